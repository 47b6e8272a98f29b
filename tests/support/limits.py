"""Windows that workers share, without a database: for tests of what is built upon them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from latchgate.domain.allotments import Allotments
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import NO_PERMITS, Permits, RateState
from latchgate.domain.ports import RateAnswer, RateAsk, RateTold
from latchgate.domain.ratelimit import WindowLimiter
from latchgate.domain.shares import WINDOW_SLOTS
from support.records import ManualClock

KEY = "key_1"
OTHERS_ASK = RateAsk(KEY, 1000, 0, 1, 0, 0, 0, 0)


class MemoryRateStore:
    """Implements latchgate.domain.ports.RateStore by the rules of the statement, in memory."""

    def __init__(self, clock: Callable[[], float], workers: int = 1) -> None:
        """Takes the store's clock in seconds since 1970, and how many workers there are."""
        self._clock = clock
        self.workers = workers
        self.windows: dict[str, dict[int, int]] = {}
        self.newest: dict[str, int] = {}
        self.is_away = False
        # How many statements were sent.
        self.statements = 0

    async def exchange(self, asks: Sequence[RateAsk]) -> RateAnswer:
        """Answers at once."""
        return self.step(asks)

    def step(self, asks: Sequence[RateAsk]) -> RateAnswer:
        """Does what is asked. Raises StorageUnavailableError if the store is away."""
        self.statements += 1
        if self.is_away:
            raise StorageUnavailableError("the database is not available (Test)")
        assert len({ask.key_id for ask in asks}) == len(asks)
        now_s = self._clock()
        return RateAnswer(self.workers, {ask.key_id: self._step(ask, now_s) for ask in asks})

    def _step(self, ask: RateAsk, now_s: float) -> RateTold:
        now = int(now_s)
        before = self.newest.get(ask.key_id, now)
        kept = min(before, now + 1)
        newest = self.newest[ask.key_id] = max(now, kept)
        window = {slot - before + kept: cost for slot, cost in self.windows.get(ask.key_id, {}).items()}
        if ask.slot in window:
            window[ask.slot] -= ask.back
        window = {slot: cost for slot, cost in window.items() if slot > newest - WINDOW_SLOTS and cost > 0}
        granted = self._granted(ask, ask.limit - sum(window.values()) - ask.charged)
        if granted + ask.charged:
            window[newest] = window.get(newest, 0) + granted + ask.charged
        self.windows[ask.key_id] = window
        used = sum(window.values())
        is_short = used >= ask.limit or granted < ask.wanted or not ask.wanted + ask.charged
        leaves = [(slot + WINDOW_SLOTS - now_s, cost) for slot, cost in sorted(window.items())]
        return RateTold(granted, newest, used, leaves if is_short else ())

    def _granted(self, ask: RateAsk, room: int) -> int:
        if room < ask.least or not ask.wanted:
            return 0
        most = min(ask.wanted, room, max(ask.needed, room // min(max(self.workers, 1), 4)))
        beyond = most - ask.needed if most >= ask.needed else most
        return most - beyond % ask.least


class LimitBench:
    """A worker and the store, under one clock."""

    def __init__(
        self,
        *,
        limit: int = 10,
        max_keys: int = 100,
        workers: int = 1,
        stirred: Callable[[], object] = lambda: None,
    ) -> None:
        self.limit = limit
        self.clock = ManualClock(1000.25)
        self.store = MemoryRateStore(self.clock, workers)
        self.allotments = Allotments(self.clock, max_keys, stirred=stirred)

    def take(self, cost: int = 1, key_id: str = KEY) -> RateState | None:
        """Has a request come."""
        return self.allotments.take(key_id, self.limit, cost)

    def exchange(self, *, delay_s: float = 0.0) -> list[RateAsk]:
        """Has the worker ask the store; the answer takes a while."""
        asks, sent_s = self.allotments.asks(), self.clock()
        answer = self.store.step(asks)
        self.clock.advance(delay_s)
        self.allotments.hear(asks, answer, sent_s)
        return asks

    def need(self, cost: int = 1, *, delay_s: float = 0.0) -> None:
        """Has a request wait for the store."""
        self.allotments.need(KEY, self.limit, cost)
        self.exchange(delay_s=delay_s)

    def others_take(self, cost: int) -> None:
        """Charges what other workers have admitted."""
        self.store.step([OTHERS_ASK._replace(charged=cost)])

    @property
    def used(self) -> int:
        """What the store holds of the key."""
        return sum(self.store.windows.get(KEY, {}).values())


class CountingAlone(WindowLimiter):
    """A limit of one process, where there is no store to ask."""

    def take(self, key_id: str, limit: int, cost: int) -> RateState:
        """Always knows."""
        return super().take(key_id, limit, cost)

    def permits(self, key_id: str) -> Permits:  # noqa: ARG002 - the same for all
        """Has every request counted by `take`."""
        return NO_PERMITS

    async def wait(self, key_id: str, limit: int, cost: int) -> None:
        """Is never called."""
        raise AssertionError(key_id, limit, cost)
