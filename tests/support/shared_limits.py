"""Several workers that share limits, in simulated time: the real parts but for the store and the network."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Final
from unittest import mock

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import RateState
from latchgate.domain.ports import RateAnswer, RateAsk
from latchgate.limiting import SharedLimiter
from simulation.world import WorkerLoop, World
from support.limits import MemoryRateStore

EPOCH_S: Final = 1_900_000_000
MINUTE_S: Final = 60.0
KEY: Final = "key_1"


class Path:
    """A worker's way to the store: it takes time, and things get lost on it."""

    def __init__(self, world: World, store: MemoryRateStore, most_delay_s: float) -> None:
        """Takes what lies at its end, and how long either direction takes at most."""
        self._world = world
        self._store = store
        self._most_delay_s = most_delay_s
        # How often a statement, or its answer, is lost.
        self.lost = 0.0

    async def exchange(self, asks: Sequence[RateAsk]) -> RateAnswer:
        """Asks the store."""
        await self._travel()
        answer = self._store.step(asks)
        await self._travel()
        return answer

    async def _travel(self) -> None:
        await asyncio.sleep(self._world.random.uniform(0.0005, self._most_delay_s))
        if self._world.chance(self.lost):
            raise StorageUnavailableError("lost")


class Worker:
    """One process: a loop and a clock of its own."""

    def __init__(self, world: World, store: MemoryRateStore, most_delay_s: float) -> None:
        """Starts it."""
        self._world = world
        self.loop = WorkerLoop(world, rate=1 + world.random.uniform(-0.005, 0.005))
        self.path = Path(world, store, most_delay_s)
        self.limiter = SharedLimiter(store=self.path, clock=self.loop.time, observer=self)
        # When what was admitted, in true time.
        self.admitted: list[tuple[float, int]] = []
        self.refused = 0
        self.slowest_s = 0.0
        self.asked = 0
        self.loop.deliver(self._start)

    def _start(self) -> None:
        self.running = self.loop.create_task(self.limiter.run())

    def stop(self) -> None:
        """Has it stop in order."""
        self.loop.deliver(self._stop)

    def _stop(self) -> None:
        async def stop() -> None:
            self.running.cancel()
            await asyncio.wait([self.running])
            await self.limiter.close()

        self.stopping = self.loop.create_task(stop())

    def request(self, limit: int, cost: int = 1, key_id: str = KEY) -> None:
        """Has a call come."""
        self.loop.deliver(self._request, limit, cost, key_id)

    def _request(self, limit: int, cost: int, key_id: str) -> None:
        self.asked += 1
        # Others come all the time, for whose windows those of the past have to go.
        self.limiter.take(f"another_{self.asked}", limit, 0)
        state = self.limiter.take(key_id, limit, cost)
        if state is None:
            self.loop.create_task(self._ask(limit, cost, key_id))
        else:
            self._note(state, cost)

    async def _ask(self, limit: int, cost: int, key_id: str) -> None:
        start_s = self._world.now_s
        state = None
        while state is None:
            await self.limiter.wait(key_id, limit, cost)
            state = self.limiter.take(key_id, limit, cost)
        self.slowest_s = max(self.slowest_s, self._world.now_s - start_s)
        self._note(state, cost)

    def _note(self, state: RateState, cost: int) -> None:
        if not 0 <= state.remaining <= state.limit:
            self._world.fail(f"{state.remaining} are said to be left")
        if state.allowed:
            self.admitted.append((self._world.now_s, cost))
        else:
            self.refused += 1

    def exchanged(self, keys: int, seconds: float) -> None:
        """Is told of a statement."""

    def not_exchanged(self) -> None:
        """Is told of one that failed."""


class Deployment:
    """Workers that share the limit of one key. All that is random comes from the seed."""

    def __init__(self, seed: int, *, workers: int, most_delay_s: float = 0.005, are_new: bool = False) -> None:
        """Starts them, as if they had all been there for long, unless they are to be new."""
        self.world = World(seed)
        part = self.world.random.random()
        self.store = MemoryRateStore(lambda: EPOCH_S + part + self.world.now_s, workers)
        self._most_delay_s = most_delay_s
        self.workers: list[Worker] = []
        for _ in range(workers):
            self.join(is_new=are_new)

    def join(self, *, is_new: bool = True) -> Worker:
        """Starts another worker."""
        old = mock.patch("latchgate.limiting.SETTLE_S", 0.0)
        with nullcontext() if is_new else old:
            worker = Worker(self.world, self.store, self._most_delay_s)
        self.workers.append(worker)
        return worker

    def load(self, limit: int, a_second: float, until_s: float, cost: int = 1, key_id: str = KEY) -> None:
        """Has each worker asked at its own irregular times, so often on average."""
        for worker in self.workers:
            self._come(partial(worker.request, limit, cost, key_id), a_second, until_s)

    def load_of(self, worker: Worker, limit: int, a_second: float, until_s: float, cost: int = 1) -> None:
        """Has one of them asked so."""
        self._come(partial(worker.request, limit, cost), a_second, until_s)

    def _come(self, request: Callable[[], None], a_second: float, until_s: float) -> None:
        def come() -> None:
            request()
            self._come(request, a_second, until_s)

        time_s = self.world.now_s + self.world.random.expovariate(a_second)
        if time_s < until_s:
            self.world.at(time_s, come)

    def run(self, until_s: float) -> None:
        """Lets time pass. Fails if anything went wrong."""
        with _in_place(self.world):
            self.world.run(until_s)
        assert not self.world.failure, self.world.failure

    def close(self) -> None:
        """Ends all."""
        for worker in self.workers:
            worker.loop.close()

    @property
    def admitted(self) -> list[tuple[float, int]]:
        """When what was admitted, by all."""
        return sorted(each for worker in self.workers for each in worker.admitted)

    def most_in_a_minute(self) -> int:
        """How much was admitted in the fullest sliding minute, both ends included."""
        times_s = [time_s for time_s, _ in self.admitted]
        sums = [0, *accumulate(cost for _, cost in self.admitted)]
        ends = [bisect_left(times_s, time_s + MINUTE_S + 1e-9) for time_s in times_s]
        return max((sums[end] - sums[start] for start, end in enumerate(ends)), default=0)

    def total(self, from_s: float, until_s: float) -> int:
        """How much was admitted in a span."""
        return sum(cost for time_s, cost in self.admitted if from_s <= time_s < until_s)


@contextmanager
def deployment(seed: int, **settings: float) -> Iterator[Deployment]:
    """Runs a deployment until the block ends."""
    deployed = Deployment(seed, **settings)  # type: ignore[arg-type]  # its settings are what they are
    try:
        yield deployed
    finally:
        deployed.close()


@contextmanager
def _in_place(world: World) -> Iterator[None]:
    """Puts the simulated chance and log where the code under test looks for the real ones."""
    note: Callable[..., None] = world.note
    with mock.patch("latchgate.limiting.random", world.random), mock.patch("latchgate.limiting._log") as log:
        log.info = log.warning = lambda event, **more: note(event, *more.values())
        yield
