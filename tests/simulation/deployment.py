"""One simulated deployment: workers that run the real code, what befalls them, and what must hold all the while."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final
from unittest import mock
from uuid import UUID

from latchgate.domain.coherence import Entity
from latchgate.domain.errors import RevisionUnknownError, UnavailableError
from latchgate.domain.model import Verdict
from latchgate.domain.validation import Need
from latchgate.storage.link import Link
from simulation.database import CHANGE, EXPIRING_KEY, TOKEN_KEYS, UNKNOWN_TOKENS, Change, Database
from simulation.judge import Judge, Question
from simulation.network import DOWN, MOST_DELAY_S, UP, Connection
from simulation.worker import LINK_TIMEOUT_S, Worker
from simulation.world import World

# Faults come until this time; then all is well, and all must come to its end.
CALM_S: Final = 4.0
# Beyond the longest wait: what was on its way when the faults ended, a statement given up, another try.
RECOVERY_S: Final = MOST_DELAY_S + 2.0
FINAL_S: Final = 0.5
PROBE_S: Final = 0.05
TOKENS: Final = (*TOKEN_KEYS, *UNKNOWN_TOKENS)


class Simulation:
    """A deployment from its start to its end. All that is random comes from the seed."""

    def __init__(self, seed: int) -> None:
        """Draws what the deployment is like."""
        self.world = World(seed)
        random = self.world.random
        self.database = Database(lambda: self.world.now_s, lambda: random.randint(1, 1_000_000))
        self._expire_s = random.uniform(1, CALM_S)
        self.database.expire_s = self.database.wall_s() + self._expire_s
        # Whether the standby, should it take over, has all that was committed and answered.
        self.is_standby_safe = random.random() < 0.75
        self._late = random.choice((0.0, 0.02, 0.1))
        self._lost = random.choice((0.0, 0.002, 0.01))
        self._stops = random.choice((0.0, 0.0, 0.002))
        self.workers: dict[str, Worker] = {}
        for _ in range(random.choice((2, 2, 3))):
            self._join()
        self._judge = Judge(self.world, self.database)
        self._changes = 0
        self._open: set[tuple[str, Worker, int]] = set()
        self.answers = 0

    def run(self) -> str:
        """Lets it all happen; gives what went wrong, or nothing."""
        world, random = self.world, self.world.random
        with _in_place(self):
            for _ in range(random.randint(4, 10)):
                world.at(random.uniform(0.3, CALM_S), self._manage, self._draw_change())
            for _ in range(random.randint(0, 8)):
                world.at(random.uniform(0.5, CALM_S), self._befall)
            for _ in range(random.choice((0, 8))):
                world.at(random.uniform(0.5, CALM_S), self._have_swept)
            world.at(0.1, self._probe)
            for _ in range(4):
                world.at(self._expire_s + random.uniform(0, 0.1), self._ask_all, EXPIRING_KEY)
            world.run(CALM_S)
            self._calm()
            calm_s = world.now_s
            longest_s = max(worker.coherence.terms.wait_s for worker in self.workers.values())
            world.run(calm_s + RECOVERY_S - FINAL_S)
            while self._unfinished() and world.now_s < calm_s + longest_s + RECOVERY_S and not world.failure:
                world.run(world.now_s + 0.1)
            for worker in self._living():
                for token in TOKENS:
                    self.validate(worker, token, is_final=True)
            world.run(world.now_s + FINAL_S)
            if unfinished := self._unfinished():
                world.fail(f"without an end: {unfinished}")
            for loop in world.loops:
                loop.close()
        return world.failure

    @property
    def from_memory(self) -> int:
        """How many answers came from memory."""
        return self._judge.from_memory

    def story(self) -> str:
        """Tells what happened."""
        return "\n".join(" ".join(map(str, (f"{at_s:10.6f}", *what))) for at_s, what in self.world.trace)

    def _unfinished(self) -> list[str]:
        return sorted(
            f"{what} {number} at {worker.name}" for what, worker, number in self._open if not worker.is_leaving
        )

    def _living(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if not worker.is_leaving]

    def _join(self) -> None:
        name = f"w{len(self.workers)}"
        worker = Worker(self.world, self.database, name=name, lease_s=self.world.random.choice((1.0, 1.0, 2.0)))
        worker.path.late, worker.path.lost, worker.stops = self._late, self._lost, self._stops
        self.workers[name] = worker

    # What is asked.

    def _probe(self) -> None:
        """Asks every worker for some token, again and again."""
        for worker in self._living():
            self.validate(worker, self.world.random.choice(TOKENS))
        if self.world.now_s < CALM_S:
            self.world.at(self.world.now_s + self.world.random.uniform(0, 2 * PROBE_S), self._probe)

    def _ask_all(self, key: int | None) -> None:
        """Asks every worker for a key, or for all, at the same time."""
        for worker in self._living():
            for token, each in TOKEN_KEYS.items():
                if key in {None, each}:
                    self.validate(worker, token)

    def validate(self, worker: Worker, token: str, *, min_revision: int = 0, is_final: bool = False) -> None:
        """Has a client ask a worker now; the worker hears of it when it can."""
        question = Question(
            worker=worker,
            token=token,
            asked_s=self.world.now_s,
            asked_wall_s=self.database.wall_s(),
            required=max(self._judge.effective, min_revision),
            is_final=is_final,
        )
        worker.loop.deliver(lambda: worker.loop.create_task(self._validate(question, min_revision)))

    async def _validate(self, question: Question, min_revision: int) -> None:
        worker = question.worker
        call = ("Validate", worker, self.answers)
        self.answers += 1
        self._open.add(call)
        problem: Exception | None = None
        try:
            # As latchgate.rpc does: from memory in one go if that will do.
            recalled = worker.validator.recall(
                question.token.encode(), Need.of((), "", 1, min_revision), worker.validator.clock()
            )
            verdict = Verdict._make(
                recalled or await worker.validator.validate(question.token, min_revision=min_revision)
            )
        except (UnavailableError, RevisionUnknownError) as error:
            problem = error
        finally:
            self._open.discard(call)
            task = asyncio.current_task()
            is_from_memory = task not in worker.reader.asked
            worker.reader.asked.discard(task)
        if problem is None:
            self._judge.judge(question, verdict, is_from_memory=is_from_memory)
        elif question.is_final and not worker.is_leaving:
            self.world.fail(f"{worker.name} does not answer though all is well: {problem!r}")
        elif isinstance(problem, RevisionUnknownError) and self._judge.lost_s < 0:
            self.world.fail(f"{worker.name} does not know a revision that was given out")

    # What is changed.

    def _draw_change(self) -> Change:
        random = self.world.random
        self._changes += 1
        entity = random.choice((Entity.KEY, Entity.KEY, Entity.KEY, Entity.ORGANIZATION, Entity.PLAN))
        index = random.randrange({Entity.KEY: 4, Entity.ORGANIZATION: 2, Entity.PLAN: 3}[entity])
        action = random.choice(("touch", "toggle", "revoke" if entity is Entity.KEY else "move"))
        if action == "revoke" and random.random() < 0.5:
            action = "touch"
        return Change(number=self._changes, entity=entity, index=index, action=action)

    def _manage(self, change: Change) -> None:
        """Has a client ask some worker for a change, or again for one whose answer was lost."""
        worker = self.world.random.choice(self._living())
        worker.loop.deliver(lambda: worker.loop.create_task(self._change(worker, change)))

    async def _change(self, worker: Worker, change: Change) -> None:
        world, link = self.world, Link(worker.name, timeout_s=LINK_TIMEOUT_S)
        call = ("change", worker, change.number)
        self._open.add(call)
        try:
            async with link.connection() as connection:
                # What else the transaction does, and the locks that it waits for.
                await asyncio.sleep(world.random.choice((0.0, 0.0, world.random.uniform(0, 0.3))))
                revision = await connection.fetchval(CHANGE, change)
        except UnavailableError:
            world.note(worker.name, "change not answered", change.number)
            world.at(world.now_s + world.random.uniform(0.01, 0.5), self._manage, change)
            return
        finally:
            link.cut()
            self._open.discard(call)
        world.note(worker.name, "changed", change.number, change.entity.value, change.index, change.action, revision)
        if world.chance(0.3):
            self.validate(world.random.choice(self._living()), world.random.choice(TOKENS), min_revision=revision)
        patience_s = math.inf if world.chance(0.7) else world.random.uniform(0, 1.5)
        self._open.add(call)
        try:
            effect = await worker.effects.wait(revision, worker.loop.time() + patience_s)
        finally:
            self._open.discard(call)
        if effect.max_remaining is None:
            self._hold(change, revision)
        elif patience_s == math.inf:
            world.fail(f"{worker.name} has ended a wait that has no end")
        else:
            world.note(worker.name, "pending", revision, effect.max_remaining)
            world.at(world.now_s + effect.max_remaining.total_seconds(), self._hold, change, revision)

    def _hold(self, change: Change, revision: int) -> None:
        """A change was called effective: everyone is asked at once for what it may have changed."""
        if self._judge.hold(change, revision):
            self._ask_all(change.index if change.entity is Entity.KEY else None)

    def _have_swept(self) -> None:
        worker = self.world.random.choice(self._living())
        worker.loop.deliver(lambda: worker.loop.create_task(self._sweep(worker)))

    async def _sweep(self, worker: Worker) -> None:
        """Has a worker take off others that are silent, as latchgate.app does every now and then."""
        with suppress(UnavailableError):
            await worker.effects.sweep()

    # What befalls them.

    def _befall(self) -> None:
        world, random = self.world, self.world.random
        worker = random.choice(self._living())
        span_s = random.uniform(0.05, 1.5 * worker.coherence.terms.length_s)
        until_s = min(world.now_s + span_s, CALM_S)
        what = random.choice(
            (self._cut, self._freeze, self._freeze, self._pause, self._crash, self._take_over, self._go)
        )
        world.note(worker.name, what.__name__, round(until_s, 3))
        what(worker, until_s)

    def _cut(self, worker: Worker, until_s: float) -> None:
        del until_s
        for connection in tuple(worker.path.connections):
            if self.world.chance(0.5):
                worker.loop.deliver(connection.terminate)

    def _freeze(self, worker: Worker, until_s: float) -> None:
        for direction in self.world.random.choice(((UP,), (DOWN,), (UP, DOWN))):
            worker.path.frozen_until_s[direction] = until_s

    def _pause(self, worker: Worker, until_s: float) -> None:
        worker.loop.pause(until_s)

    def _crash(self, worker: Worker, until_s: float) -> None:
        del worker
        if self.database.is_up:
            self.database.is_up = False
            self.world.at(min(until_s, self.world.now_s + 1), self.database.restart, self.world.random.random())

    def _take_over(self, worker: Worker, until_s: float) -> None:
        del worker
        if self.database.is_up:
            self.database.is_up = False
            self.world.at(min(until_s, self.world.now_s + 1), self._taken_over)

    def _taken_over(self) -> None:
        random, head = self.world.random, self.database.head
        unsafe = self.database.unsafe()
        self.database.fail_over(random.randint(0, unsafe if self.is_standby_safe else unsafe + 12))
        self.database.wall_offset_s += random.choice((0, 0, -0.5, 0.5))
        self._judge.clock_set_s = self.world.now_s
        self.world.note("taken over", self.database.timeline, "head", head, self.database.head)
        if not self.is_standby_safe:
            self._judge.lose()

    def _go(self, worker: Worker, until_s: float) -> None:
        """Ends a worker, with or without a word, and starts another one."""
        del until_s
        worker.is_leaving = True
        if self.world.chance(0.5):
            worker.loop.deliver(lambda: worker.loop.create_task(worker.leave()))
        else:
            worker.loop.end()
        self._join()
        # Changes that it may be told of, or not, while it joins.
        for _ in range(2):
            self.world.at(self.world.now_s + self.world.random.uniform(0, 0.02), self._manage, self._draw_change())
            self.world.at(self.world.now_s + self.world.random.uniform(0, 0.02), self._ask_all, None)

    def _calm(self) -> None:
        self._late = self._lost = self._stops = 0.0
        for worker in self.workers.values():
            worker.path.late = worker.path.lost = worker.stops = 0.0


class _Log:
    """Takes what the code under test logs into the trace."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, level: str) -> Any:
        return lambda event, **more: self._world.note(event, *more.values())


@contextmanager
def _in_place(simulation: Simulation) -> Iterator[None]:
    """Puts the simulated network, chance and log where the code under test looks for the real ones."""
    world = simulation.world

    async def connect(dsn: str, *, timeout: float, **_: object) -> Connection:  # noqa: ASYNC109 - asyncpg's name
        worker = simulation.workers[dsn]
        return await Connection(worker.path, worker.loop, timeout).open()

    async def prepare(_: Connection) -> None:
        pass

    places: dict[str, object] = {
        "latchgate.storage.link.asyncpg.connect": connect,
        "latchgate.storage.link.prepare_connection": prepare,
        "latchgate.storage.coherence.uuid4": lambda: UUID(int=world.random.getrandbits(128)),
        "latchgate.storage.lookups.random": world.random,
        "latchgate.storage.coherence._log": _Log(world),
        "latchgate.storage.effects._log": _Log(world),
        # Sets of waits are gone through in the order of hashes, which would else be those of addresses.
        "latchgate.storage.effects._Wait.__hash__": lambda wait: wait.revision,
    }
    with ExitStack() as stack:
        for place, substitute in places.items():
            stack.enter_context(mock.patch(place, substitute))
        yield
