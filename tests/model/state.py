"""The world that the model of the coherence protocol moves in: what a state is, and what can be read from it.

What is left out, and why nothing is lost by it: each time the model allows at least what the real thing can do.

Clocks. The rules ask them one thing alone: is a lease over when a wait is over? A lease lives L(1-rho)-margin on its
    holder's clock, a wait lasts L(1+rho)+margin on the waiter's, and clocks run at rates within [1-rho, 1+rho]. A
    faster holder only loses hits, a slower waiter only does later what may be done later anyway. So let each holder be
    the slowest, each waiter the fastest, and the margin nothing. Then leases and waits last the same true time L and
    end in the order in which they began: when a wait is over, the leases that began before it are over; the others
    need not be. Every such order can happen in real time (Roberts 1969: proper interval graphs are unit interval
    graphs). So there are no ticks: a lease knows which waits began after it. A pause is a worker that takes no step
    while waits end.
Renewals. t0 is noted when the statement runs: noted earlier, the lease only ends earlier. A lost answer is one that
    never comes; the next renewal forgets it. "Your row is gone" is learnt at any time after it is so. A statement of a
    worker that gave it up could only raise `renewals`, and so keep a row.
Wake-ups. What was read of the log some time ago is a part of what is there now. So a wake-up applies up to any
    revision.
Acknowledgements. They take effect at once, or never. One that takes effect late only lets changes wait longer.
Lookups. The calls that share a statement came before it was sent: what it reads is as new as they may ask. What
    matters is the row that arrives later, to be cached or not.
Hits. They change nothing, so they are no steps. A state is wrong if a Validate that came now would be answered
    wrongly.
Crashes. A row that stays behind could only make changes wait longer, so it goes with its worker.
Waits. They begin with the first reading of the registry. EFFECTIVE is returned as soon as it may be. A row that was
    read may be deleted whatever it has acknowledged: that only adds evictions.
Who asks. A stale answer is one worker's about one key. Call them A and x; all are alike. What other workers cache is
    nothing to it; their rows are, and so are the revisions of other keys. So A alone looks up, and x alone, and y
    stands for every other key.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import NamedTuple

NONE = -1  # all bits set: a lease that is over is outlived by every wait
WORKERS = "ABC"
KEYS = "xy"
WATCHED = 0  # A among the workers, x among the keys


class Stage(IntEnum):
    """Where a worker is between start and end."""

    OUT = 0
    REGISTERED = 1
    JOINED = 2
    LEAVING = 3


class Phase(IntEnum):
    """Where a change is after its commit. While it is WAITING its waiter has read the registry and a clock."""

    COMMITTED = 0
    WAITING = 1
    EFFECTIVE = 2


class Worker(NamedTuple):
    """A worker and its row. NONE stands for what is not there.

    Leases are sets of changes, as bits: those whose wait began after the lease did.
    """

    stage: Stage = Stage.OUT
    row: int = NONE  # applied_revision in the table
    unrenewed: int = 0  # bits: the changes whose waiter read this row and would find `renewals` as it was
    applied: int = 0
    lease: int = NONE
    answer: int = NONE  # head in the answer of a renewal, under way to the worker
    answer_lease: int = NONE  # the lease that this answer will give
    cached: int = NONE  # the version of x in memory: the revision of its last change when it was read
    lookups: tuple[int, ...] = ()  # head revisions with which rows of x are under way to the worker
    checked: int = NONE  # a call has checked the lease, and must be shown this version or a later one


class Change(NamedTuple):
    """A committed change. Its revision is its place in the log, counted from 1."""

    key: int
    phase: Phase


class State(NamedTuple):
    """Everything: the log with its waiters, the workers with their rows."""

    changes: tuple[Change, ...]
    workers: tuple[Worker, ...]
    seen_empty: bool = False  # REGISTRY_BEFORE_COMMIT alone: the next change has read a registry without rows


class Step(NamedTuple):
    """What happens, in words, and the state after it."""

    action: str
    state: State


class Bounds(NamedTuple):
    """How large a world is explored. `lookups` are those under way to one worker at a time."""

    workers: int = 1
    keys: int = 1
    changes: int = 2
    lookups: int = 1


@cache
def version(changes: tuple[Change, ...], head: int) -> int:
    """The version of x that a reading at `head` shows: the revision of its last change, 0 if there is none."""
    return max((number for number, change in enumerate(changes[:head], 1) if change.key == WATCHED), default=0)


@cache
def required(changes: tuple[Change, ...]) -> int:
    """The version that a Validate of x which comes now must show, or a later one: that of the last EFFECTIVE change."""
    return max(
        (n for n, change in enumerate(changes, 1) if change.key == WATCHED and change.phase is Phase.EFFECTIVE),
        default=0,
    )


def canonical(state: State) -> State:
    """The one state that stands for all that differ in nothing but what does not matter of the workers beside A."""
    watched, *others = state.workers
    if not others:
        return state
    return state._replace(workers=(watched, *sorted(map(_unwatched, others))))


@cache
def _unwatched(worker: Worker) -> Worker:
    """What matters of a worker that nobody asks: its row. It may apply as much from a wake-up as from an answer."""
    if worker.row == NONE:
        return Worker()
    if worker.stage is Stage.REGISTERED:
        return worker._replace(answer_lease=NONE)
    return worker._replace(lease=NONE, answer=NONE, answer_lease=NONE)
