"""A model of the coherence protocol: how a change becomes effective while every worker answers from memory.

`Protocol.steps` gives every step that can come next, `Protocol.violation` what is wrong with a state; `explore.py`
visits every state. Only the numbers of workers, keys, changes and lookups under way are bounded. Joins, renewals,
evictions, crashes, pauses and lost messages are not. `state.py` says what is left out.

The promise: no Validate that comes after a change of its key was called EFFECTIVE is answered from before that change.
And the table never says that a worker has applied more than it has.

A first renewal reads the head alone: there is nothing in the cache to which the log could be applied.

What the model has shown, beside that the protocol holds:
- Rows must be compared with what was read when the wait began. A renewal leaves `applied_revision` behind for a
  moment. If it runs late in the wait, and is in the last reading, the row of a worker with a fresh lease is deleted,
  and the next change does not wait for it (EVICTION_BY_LAST_READING). So the wait is counted from when that first
  reading was there: from the commit is too early (WAIT_BEGINS_BEFORE_READING). Noting in the row up to where a renewal
  read the log, and deleting rows that are not up to the change, is as good (EVICTION_BY_COMMIT).
- A lookup sent before an eviction may be cached after the rejoin. Joined, and a revision not below applied_revision,
  is enough. Joined must mean that the first renewal's answer is there (CACHED_BEFORE_JOINED).
- Whoever leaves must stop taking answers to renewals before it drops its lease (LEAVES_WHILE_RENEWING).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from model.deviations import Mutant, Variant
from model.state import (
    KEYS,
    NONE,
    WATCHED,
    WORKERS,
    Bounds,
    Change,
    Phase,
    Stage,
    State,
    Step,
    Worker,
    required,
    version,
)


class Protocol:
    """The steps of the protocol, with one deviation or none."""

    def __init__(self, bounds: Bounds, deviation: Mutant | Variant | None = None) -> None:
        self.bounds = bounds
        self.deviation = deviation
        # The same worker is met in many states: keep it once.
        self._known: dict[Worker, Worker] = {}

    def start(self) -> State:
        """No change, and no worker."""
        return State((), (Worker(),) * self.bounds.workers)

    def violation(self, state: State) -> str | None:
        """The broken promise, in words, if there is one."""
        return self.stale_answer(state) or _overstated_row(state)

    def stale_answer(self, state: State) -> str | None:
        """The call that would be answered from before a change that is EFFECTIVE, if there is one."""
        shown, least = self._answer(state.changes, state.workers[WATCHED])
        if NONE != shown < least:
            return f"a Validate of x at A is answered as of revision {shown}, though change {least} of x is EFFECTIVE"
        return None

    def steps(self, state: State) -> Iterator[Step]:
        """Every step that can come next."""
        yield from self._commits(state)
        for revision in range(1, len(state.changes) + 1):
            yield from self._waits(state, revision)
        for place, worker in enumerate(state.workers):
            worker_steps = self._worker_steps(state.changes, worker)
            if place == WATCHED:
                worker_steps = chain(worker_steps, self._calls(state.changes, worker))
            for action, after in worker_steps:
                kept = self._known.setdefault(after, after)
                workers = (*state.workers[:place], kept, *state.workers[place + 1 :])
                yield Step(f"{WORKERS[place]} {action}", state._replace(workers=workers))

    # Calls

    def _answer(self, changes: tuple[Change, ...], worker: Worker) -> tuple[int, int]:
        """The version that a Validate is shown at once (NONE: it is looked up), and the least that it may be shown."""
        least = required(changes)
        if NONE not in {worker.lease, worker.cached}:
            return worker.cached, least
        if worker.checked != NONE and self.deviation is Variant.CHECK_THEN_READ:
            return worker.cached, worker.checked
        if worker.checked != NONE and self.deviation is Mutant.LEASE_CHECK_REUSED:
            return worker.cached, least
        if self.deviation is Mutant.JOINS_SENT_LOOKUP:
            return min((version(changes, head) for head in worker.lookups), default=NONE), least
        if self.deviation is Mutant.READS_STANDBY:
            return version(changes, max(0, len(changes) - 1)), least
        return NONE, least

    def _calls(self, changes: tuple[Change, ...], worker: Worker) -> Iterator[tuple[str, Worker]]:
        head = len(changes)
        if len(worker.lookups) < self.bounds.lookups and head not in worker.lookups:
            yield f"looks up x at revision {head}", worker._replace(lookups=(*worker.lookups, head))
        for revision in worker.lookups:
            arrived = worker._replace(lookups=tuple(each for each in worker.lookups if each != revision))
            if self._may_cache(worker, revision):
                caching = arrived._replace(cached=version(changes, revision))
                yield f"caches x from its lookup at revision {revision}", caching
            yield f"loses its lookup of x at revision {revision}", arrived
        if worker.lease != NONE and self.deviation in {Mutant.LEASE_CHECK_REUSED, Variant.CHECK_THEN_READ}:
            yield "checks its lease for a Validate of x", worker._replace(checked=required(changes))

    def _may_cache(self, worker: Worker, revision: int) -> bool:
        stages = {Stage.JOINED}
        if self.deviation is Mutant.LEAVES_WHILE_RENEWING:
            stages.add(Stage.LEAVING)
        if self.deviation is Mutant.CACHED_BEFORE_JOINED:
            stages.add(Stage.REGISTERED)
        guarded = self.deviation is not Mutant.NO_REVISION_GUARD
        return worker.stage in stages and (revision >= worker.applied or not guarded)

    # Changes

    def _commits(self, state: State) -> Iterator[Step]:
        revision = len(state.changes) + 1
        if revision > self.bounds.changes:
            return
        if self.deviation is Mutant.REGISTRY_BEFORE_COMMIT and all(w.row == NONE for w in state.workers):
            yield Step("the next change reads a registry without rows", state._replace(seen_empty=True))
        for key in range(self.bounds.keys):
            change = Change(key, Phase.EFFECTIVE if state.seen_empty else Phase.COMMITTED)
            after = State((*state.changes, change), state.workers)  # seen_empty is forgotten
            yield Step(f"change {revision} of key {KEYS[key]} commits", self._committed(after, revision))

    def _committed(self, state: State, revision: int) -> State:
        if self.deviation is Mutant.WAIT_BEGINS_BEFORE_READING:
            return self._with(state, [_outlived(worker, revision) for worker in state.workers])
        if self.deviation is Variant.EVICTION_BY_COMMIT:
            noted = [_outlived(_read(worker, revision), revision) for worker in state.workers]
            return self._with(_in_phase(state, revision, Phase.WAITING), noted)
        return state

    def _waits(self, state: State, revision: int) -> Iterator[Step]:
        workers, bit = state.workers, 1 << revision
        phase = state.changes[revision - 1].phase
        if phase <= Phase.WAITING and all(worker.row == NONE or worker.row >= revision for worker in workers):
            yield Step(
                f"change {revision} is EFFECTIVE: each row has acknowledged it", self._acknowledged(state, revision)
            )
        if phase is Phase.COMMITTED:
            noted = [_read(worker, revision) for worker in workers]
            if self.deviation is not Mutant.WAIT_BEGINS_BEFORE_READING:
                noted = [_outlived(worker, revision) for worker in noted]
            yield Step(
                f"the waiter of change {revision} reads the registry; its wait begins",
                self._with(_in_phase(state, revision, Phase.WAITING), noted),
            )
        if phase is Phase.WAITING:
            over = [self._wait_over(worker, bit) for worker in workers]
            yield Step(
                f"change {revision} is EFFECTIVE: its wait is over",
                self._with(_in_phase(state, revision, Phase.EFFECTIVE), over),
            )
            if self.deviation is Mutant.EVICTION_BY_LAST_READING:
                noted = [_read(worker, revision) for worker in workers]
                yield Step(f"the waiter of change {revision} reads the registry again", self._with(state, noted))
        for place, worker in enumerate(workers):
            if phase is Phase.EFFECTIVE and worker.unrenewed & bit:
                evicted = worker._replace(row=NONE, unrenewed=0)
                yield Step(
                    f"the waiter of change {revision} evicts {WORKERS[place]}",
                    self._with(state, [*workers[:place], evicted, *workers[place + 1 :]]),
                )

    def _wait_over(self, worker: Worker, bit: int) -> Worker:
        if self.deviation is Mutant.DRIFT_IGNORED:
            return worker
        return worker._replace(
            lease=NONE if worker.lease & bit else worker.lease,
            answer_lease=NONE if worker.answer_lease & bit else worker.answer_lease,
        )

    def _acknowledged(self, state: State, revision: int) -> State:
        """The waiter goes, and will evict nobody."""
        bit = 1 << revision
        forgotten = [
            worker._replace(
                unrenewed=worker.unrenewed & ~bit,
                lease=worker.lease if worker.lease == NONE else worker.lease & ~bit,
                answer_lease=worker.answer_lease if worker.answer_lease == NONE else worker.answer_lease & ~bit,
            )
            for worker in state.workers
        ]
        return self._with(_in_phase(state, revision, Phase.EFFECTIVE), forgotten)

    def _with(self, state: State, workers: list[Worker]) -> State:
        return state._replace(workers=tuple(self._known.setdefault(each, each) for each in workers))

    # Workers

    def _worker_steps(self, changes: tuple[Change, ...], worker: Worker) -> Iterator[tuple[str, Worker]]:
        yield from self._membership(changes, worker)
        yield from self._renewal(changes, worker)
        if worker.stage is Stage.JOINED:
            yield from self._wake_up(changes, worker)

    def _membership(self, changes: tuple[Change, ...], worker: Worker) -> Iterator[tuple[str, Worker]]:
        out = Worker()
        if worker.stage is Stage.OUT:
            registered = worker._replace(stage=Stage.REGISTERED, row=0)
            if self.deviation is Mutant.JOIN_IN_ONE_TRANSACTION:
                registered = registered._replace(row=NONE, answer=len(changes), answer_lease=0)
                yield "registers and reads the log, not yet committed", registered
            else:
                if self.deviation is Variant.EVICTION_BY_COMMIT:
                    registered = registered._replace(unrenewed=sum(1 << n for n in range(1, len(changes) + 1)))
                yield "registers", registered
            return
        yield "crashes", out
        if worker.stage is Stage.LEAVING:
            if self.deviation is Mutant.LEAVES_WHILE_RENEWING:
                yield "deletes its row", worker._replace(row=NONE, unrenewed=0)
            else:
                yield "deletes its row", out
        elif worker.row == NONE:
            yield from self._evicted(worker)
        elif worker.stage is Stage.JOINED and self.deviation is Mutant.LEAVES_ROW_FIRST:
            yield "deletes its row to leave", worker._replace(row=NONE, unrenewed=0)
        elif worker.stage is Stage.JOINED:
            leaving = worker._replace(stage=Stage.LEAVING, lease=NONE, cached=NONE)
            if self.deviation is not Mutant.LEAVES_WHILE_RENEWING:
                leaving = leaving._replace(answer=NONE, answer_lease=NONE)
            yield "drops lease and cache to leave", leaving

    def _evicted(self, worker: Worker) -> Iterator[tuple[str, Worker]]:
        """What a worker does when a renewal has told it that its row is gone."""
        if self.deviation in {Mutant.EVICTION_IGNORED, Mutant.JOIN_IN_ONE_TRANSACTION}:
            return
        if self.deviation is Variant.REJOIN_FROM_APPLIED:
            yield "learns that its row is gone, and registers again", worker._replace(row=0)
            return
        empty = worker._replace(stage=Stage.OUT, applied=0, lease=NONE, answer=NONE, answer_lease=NONE, cached=NONE)
        if self.deviation is Mutant.CACHE_KEPT_AT_REJOIN:
            empty = empty._replace(cached=worker.cached)
        yield "learns that its row is gone", empty

    def _renewal(self, changes: tuple[Change, ...], worker: Worker) -> Iterator[tuple[str, Worker]]:
        if worker.stage in {Stage.REGISTERED, Stage.JOINED}:
            sent = worker._replace(answer=len(changes), answer_lease=0, unrenewed=0)
            if self.deviation is Mutant.EVICTION_WITHOUT_COMPARISON:
                sent = sent._replace(unrenewed=worker.unrenewed)
            if worker.row != NONE:
                yield "renews", sent._replace(row=worker.applied)
            elif self.deviation is Mutant.EVICTION_IGNORED:
                yield "renews a row that is gone", sent
        if worker.answer != NONE:
            lease = 0 if self.deviation is Mutant.LEASE_FROM_REPLY else worker.answer_lease
            answered = worker._replace(answer=NONE, answer_lease=NONE, lease=lease)
            if worker.stage is Stage.REGISTERED:
                row = worker.answer if self.deviation is Mutant.JOIN_IN_ONE_TRANSACTION else worker.row
                answered = answered._replace(stage=Stage.JOINED, applied=worker.answer, row=row)
            elif self.deviation is not Mutant.RENEWAL_WITHOUT_LOG:
                answered = _apply(changes, answered, worker.answer)
            yield f"takes the answer of its renewal, up to revision {worker.answer}", answered

    def _wake_up(self, changes: tuple[Change, ...], worker: Worker) -> Iterator[tuple[str, Worker]]:
        head = len(changes)
        for upto in range(worker.applied + 1, head + 1):
            applied = _apply(changes, worker, upto)
            if self.deviation is Mutant.ACKNOWLEDGED_LATER_HEAD and worker.row != NONE:
                yield f"applies the log up to revision {upto} and acknowledges {head}", applied._replace(row=head)
            else:
                yield f"applies the log up to revision {upto}", applied
            if self.deviation is Mutant.ACKNOWLEDGED_BEFORE_APPLYING and worker.row != NONE:
                yield f"acknowledges revision {upto}", worker._replace(row=upto)
        if NONE != worker.row < worker.applied:
            yield f"acknowledges revision {worker.applied}", worker._replace(row=worker.applied)


def _overstated_row(state: State) -> str | None:
    for name, worker in zip(WORKERS, state.workers, strict=False):
        if worker.row > worker.applied:
            return f"the row of {name} says {worker.row}, but it has applied {worker.applied}"
    return None


def _in_phase(state: State, revision: int, phase: Phase) -> State:
    changes = list(state.changes)
    changes[revision - 1] = changes[revision - 1]._replace(phase=phase)
    return state._replace(changes=tuple(changes))


def _read(worker: Worker, revision: int) -> Worker:
    """The waiter of a change notes `renewals` of a worker's row, if it has one."""
    return worker if worker.row == NONE else worker._replace(unrenewed=worker.unrenewed | 1 << revision)


def _outlived(worker: Worker, revision: int) -> Worker:
    """A wait begins: it ends after every lease that has begun."""
    bit = 1 << revision
    return worker._replace(lease=worker.lease | bit, answer_lease=worker.answer_lease | bit)


def _apply(changes: tuple[Change, ...], worker: Worker, upto: int) -> Worker:
    """The worker drops what the log says has changed beyond what it had applied."""
    if upto <= worker.applied:
        return worker
    dropped = any(change.key == WATCHED for change in changes[worker.applied : upto])
    return worker._replace(applied=upto, cached=NONE if dropped else worker.cached)
