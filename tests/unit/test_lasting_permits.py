"""Permits that last for some seconds, of which each worker may hold some of a key that is far from its limit."""

from __future__ import annotations

from bisect import bisect_left

import pytest

from latchgate.domain.allotments import Allotments
from latchgate.domain.model import Permits
from latchgate.domain.ports import RateAnswer, RateTold
from latchgate.domain.shares import LASTING_S, LIFE_S
from support.limits import KEY, LimitBench, MemoryRateStore
from support.records import ManualClock

MINUTE_S = 60.0


class Holder:
    """A worker that is granted what the test says, of a limit of 1000."""

    def __init__(self, *, workers: int = 1, stands_after_s: float = 0.0) -> None:
        # At the begin of a window of the clock's.
        self.clock = ManualClock(62_000.0)
        self.workers = workers
        self.granted = 0
        self.allotments = Allotments(self.clock, stands_after_s=stands_after_s)

    def grant(self, count: int) -> Permits:
        """Has so many permits come, of the second that it is."""
        self.allotments.need(KEY, 1000, 1)
        asks, now_s = self.allotments.asks(), self.clock()
        self.granted += count
        told = RateTold(granted=count, slot=int(now_s), used=self.granted, leaves=())
        self.allotments.hear(asks, RateAnswer(self.workers, {KEY: told}), now_s)
        return self.allotments.permits(KEY)

    def use(self, count: int) -> bool:
        """Says whether there were so many."""
        state = self.allotments.take(KEY, 1000, count)
        return state is not None and state.allowed


@pytest.mark.parametrize(
    ("count", "workers", "stands_after_s", "life_s"),
    [
        # Of a hundredth of the limit, shared by all.
        (10, 1, 0.0, LASTING_S),
        (11, 1, 0.0, LIFE_S),
        (5, 2, 0.0, LASTING_S),
        (6, 2, 0.0, LIFE_S),
        (1, 10, 0.0, LASTING_S),
        (1, 11, 0.0, LIFE_S),
        # Not before all have heard how many they are.
        (10, 1, 62_000.1, LIFE_S),
    ],
)
def test_permits_that_last_are_few(count: int, workers: int, stands_after_s: float, life_s: float) -> None:
    """What a worker holds of a hundredth of the limit, divided by the number of workers, lasts; more does not."""
    holder = Holder(workers=workers, stands_after_s=stands_after_s)
    assert holder.clock() + life_s == holder.grant(count).until_s
    holder.clock.advance(life_s - 0.01)
    assert holder.use(count)


def test_what_is_held_already_counts() -> None:
    """Permits that come to others last only if all of them together may."""
    holder = Holder()
    holder.grant(6)
    holder.clock.advance(1.0)
    # They last until later than those before.
    assert 62_000.0 + LASTING_S == holder.grant(4).until_s
    assert holder.clock() + LIFE_S == holder.grant(1).until_s


def test_those_that_end_first_are_used_first() -> None:
    """So those that are left can be used for as long as they last, and no longer."""
    for later_s, is_good in ((-0.01, True), (0.01, False)):
        holder = Holder()
        holder.grant(10)
        holder.clock.advance(1.0)
        holder.grant(20)
        assert holder.use(20)
        holder.clock.advance(LASTING_S - 1.0 + later_s)
        # There would be standing ones for more.
        assert is_good == (holder.use(10) and holder.allotments.permits(KEY).left == 0)


def test_standing_permits_may_end_first() -> None:
    """Nobody counts in standing permits once their window of the clock's has ended, whatever lasts longer beside."""
    holder = Holder()
    holder.clock.advance(61.0)
    permits = holder.grant(10)
    assert holder.clock() + LASTING_S == permits.until_s
    assert holder.use(11)
    assert holder.clock() + 1.0 == permits.until_s
    holder.grant(0)
    # By the store, which is not told of those that stand.
    assert 0 == permits.used
    holder.clock.advance(1.1)
    # Those that last, without the two that still stood.
    assert holder.use(10)
    assert 0 == permits.left


def test_permits_that_last_go_back_when_they_have_ended() -> None:
    """What is left of them when nobody uses the key any more goes back to its slot, and nothing is asked before."""
    bench = LimitBench(limit=1_000_000)
    bench.need(100)
    assert bench.take(3) is not None
    bench.exchange()
    held, begin_s = bench.used, bench.clock()
    while bench.clock() < begin_s + LASTING_S - 0.1:
        assert [] == bench.exchange()
        bench.clock.advance(0.05)
    assert held == bench.used > 3
    for _ in range(round(2 * LASTING_S / 0.05)):
        bench.exchange()
        bench.clock.advance(0.05)
    assert 3 == bench.used
    assert bench.allotments.is_idle


def test_permits_that_last_do_not_wait_for_standing_ones() -> None:
    """They go back when they have ended, though others beside them, of which the store is not told, last longer."""
    bench = LimitBench(limit=6000)
    bench.allotments.need(KEY, 6000, 10)
    asks, sent_s = bench.allotments.asks(), bench.clock()
    # Meanwhile the standing ones are enough.
    assert bench.take() is not None
    bench.allotments.hear(asks, bench.store.step(asks), sent_s)
    assert 10 <= bench.used
    for _ in range(round(2 * LASTING_S / 0.05)):
        bench.exchange()
        bench.clock.advance(0.05)
    assert 0 == bench.used


def test_near_the_limit_no_permits_are_taken_to_last() -> None:
    """What lies idle with a worker would be missed by others."""
    assert most_wanted(others=0) > 35
    assert most_wanted(others=4600) < 8


def most_wanted(others: int) -> int:
    """Uses a key of 6000 a minute ten times a second; gives how many permits it is asked for at most at a time."""
    bench = LimitBench(limit=6000)
    bench.others_take(others)
    bench.need()
    most = 0
    for _ in range(300):
        if bench.take() is None:
            bench.allotments.need(KEY, bench.limit, 1)
        most = max(most, *(ask.wanted for ask in bench.exchange()), 0)
        bench.clock.advance(0.1)
    return most


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("begin_s", [0.0, 30.0])
def test_no_minute_admits_more_with_permits_that_last(workers: int, times: int, begin_s: float) -> None:
    """Where all workers hold as much as they may for as long as it lasts, while another one fills the window, and takes
    what leaves it as soon as it does: no sliding minute admits more than 1.05 of the limit and one for each worker.
    """
    limit = 6000
    # At the begin of a second, and of a window of the clock's or amid one.
    clock = ManualClock(62_000.0 + begin_s)
    store = MemoryRateStore(clock, workers + 1)
    filling, *holding = everyone = [Allotments(clock, stands_after_s=0.0) for _ in range(workers + 1)]
    part = limit // 100 // (workers + 1)
    admitted: list[float] = []
    for each in everyone:
        each.hear([], store.step([]), clock())
    for each in holding:
        each.need(KEY, limit, times * part)
        exchange(each, store, clock)

    until_s = clock() + 130.0
    filled_from_s, used_from_s = clock() + 2.9, clock() + LASTING_S - 0.1
    while clock() < until_s:
        clock.advance(0.05)
        for _ in range(8 * (clock() > filled_from_s)):
            # Over and over, as fast as it is given permits.
            use_all(filling, limit, clock, admitted)
            exchange(filling, store, clock)
        for each in holding:
            if clock() > used_from_s:
                use_all(each, limit, clock, admitted)
            exchange(each, store, clock)

    most = max(bisect_left(admitted, time_s + MINUTE_S) - number for number, time_s in enumerate(admitted))
    assert most <= 1.05 * limit + workers + 1
    if times == 1:
        # What lasted is among it.
        assert most >= limit + part * workers


def exchange(worker: Allotments, store: MemoryRateStore, clock: ManualClock) -> None:
    """Has a worker ask the store."""
    asks = worker.asks()
    worker.hear(asks, store.step(asks), clock())


def use_all(worker: Allotments, limit: int, clock: ManualClock, admitted: list[float]) -> None:
    """Has requests come to a worker until one is not admitted from memory, which waits."""
    while state := worker.take(KEY, limit, 1):
        if not state.allowed:
            return
        admitted.append(clock())
    worker.need(KEY, limit, 1)
