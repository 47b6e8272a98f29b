"""The rate limiter, driven by a clock that the tests move."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latchgate.domain.ratelimit import MAX_CHANCES, WindowLimiter
from support.records import ManualClock

KEY = "key_1"
MINUTE_MS = 60_000

# Around the edges of seconds and of the window, where a slip by one shows.
edges_ms = st.sampled_from([0, 1, 500, 999, 1000, 1001, 58_999, 59_000, 59_999, 60_000, 60_001, 60_999, 61_000, 61_001])
gaps_ms = edges_ms | st.integers(0, 70_000) | st.integers(0, 3_000)
limits = st.integers(1, 20)
costs = st.integers(0, 6)
schedules = st.lists(st.tuples(gaps_ms, costs), max_size=60)
starts_ms = st.integers(0, 5_000)


class Bench:
    """A limiter under a clock in milliseconds: whole numbers, so that no rounding blurs an edge."""

    def __init__(self, start_ms: int = 0, max_keys: int = 100) -> None:
        self.now_ms = start_ms
        self.clock = ManualClock(start_ms / 1000)
        self.limiter = WindowLimiter(self.clock, max_keys)

    def advance_ms(self, span_ms: int) -> None:
        """Moves the clock."""
        self.now_ms += span_ms
        self.clock.now_s = self.now_ms / 1000

    def run(self, limit: int, schedule: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Plays gaps and costs; gives the times and costs that were admitted."""
        admitted = []
        for gap_ms, cost in schedule:
            self.advance_ms(gap_ms)
            if self.limiter.take(KEY, limit, cost).allowed:
                admitted.append((self.now_ms, cost))
        return admitted


@given(start_ms=starts_ms, limit=limits, schedule=schedules)
@example(start_ms=999, limit=1, schedule=[(0, 1), (60_000, 1)])
@example(start_ms=0, limit=1, schedule=[(0, 1), (60_000, 1)])
def test_no_minute_admits_more_than_the_limit(start_ms: int, limit: int, schedule: list[tuple[int, int]]) -> None:
    """Whatever the schedule, the costs admitted within any 60 seconds, both ends included, keep to the limit."""
    admitted = Bench(start_ms).run(limit, schedule)
    minutes = [
        sum(cost for time_ms, cost in admitted if start <= time_ms <= start + MINUTE_MS) for start, _ in admitted
    ]
    assert limit >= max(minutes, default=0)


@pytest.mark.parametrize(
    ("limit", "gap_ms"),
    [(1, 40), (1, 7001), (2, 333), (7, 7001), (59, 1000), (60, 40), (60, 333), (60, 1000), (61, 333), (600, 40)],
)
def test_overload_is_admitted_close_to_the_limit(limit: int, gap_ms: int) -> None:
    """Under constant overload, at least 0.95 of the limit a minute is admitted: the limit is no trap for the busy."""
    minutes = 20
    bench = Bench(123)
    admitted = bench.run(limit, [(gap_ms, 1)] * (minutes * MINUTE_MS // gap_ms))
    assert 0.95 * limit * minutes <= len(admitted)


@given(start_ms=starts_ms, gap_ms=st.integers(1017, 20_000), limit=st.integers(1, 60))
def test_requests_within_the_limit_are_never_refused(start_ms: int, gap_ms: int, limit: int) -> None:
    """A client that keeps an even pace of at most 60/61 of the limit is never refused."""
    gap_ms = max(gap_ms, 61_000 // limit + 1)
    assert 200 == len(Bench(start_ms).run(limit, [(gap_ms, 1)] * 200))


@given(start_ms=starts_ms, limit=limits, schedule=schedules, excess=st.integers(1, 30))
def test_a_refused_cost_is_not_charged(start_ms: int, limit: int, schedule: list[tuple[int, int]], excess: int) -> None:
    """A refused request leaves all that was left, for smaller ones to use."""
    bench = Bench(start_ms)
    bench.run(limit, schedule)
    before = bench.limiter.take(KEY, limit, 0)
    after = bench.limiter.take(KEY, limit, before.remaining + excess)
    assert (False, before.remaining) == (after.allowed, after.remaining)
    rest = bench.limiter.take(KEY, limit, before.remaining)
    assert (True, 0) == (rest.allowed, rest.remaining)


@given(start_ms=starts_ms, limit=limits, schedule=schedules, looks=st.integers(1, 100))
def test_cost_0_is_never_charged(start_ms: int, limit: int, schedule: list[tuple[int, int]], looks: int) -> None:
    """Looking at a limit, however often, is allowed and uses nothing up."""
    bench = Bench(start_ms)
    bench.run(limit, schedule)
    states = [bench.limiter.take(KEY, limit, 0) for _ in range(looks)]
    assert [True] * looks == [state.allowed for state in states]
    assert 1 == len({state.remaining for state in states})


@given(limit=limits, taken=st.lists(st.integers(0, 5), max_size=20))
def test_remaining_counts_down(limit: int, taken: list[int]) -> None:
    """Within one second, what is left is the limit less all that was admitted."""
    bench = Bench()
    used = 0
    for cost in taken:
        state = bench.limiter.take(KEY, limit, cost)
        used += cost if used + cost <= limit else 0
        assert (limit, limit - used) == (state.limit, state.remaining)


@given(start_ms=starts_ms, limit=limits, schedule=schedules, share=st.integers(0, 19))
def test_reset_says_when_a_refused_cost_succeeds(
    start_ms: int, limit: int, schedule: list[tuple[int, int]], share: int
) -> None:
    """A client that waits for as long as it was told is admitted, and one second less would not have been enough."""
    cost = 1 + share % limit
    bench = Bench(start_ms)
    bench.run(limit, schedule)
    bench.limiter.take(KEY, limit, max(bench.limiter.take(KEY, limit, 0).remaining - cost + 1, 0))
    refused = bench.limiter.take(KEY, limit, cost)
    assert not refused.allowed
    assert 0 < refused.reset_after_s <= 61
    bench.advance_ms(round(refused.reset_after_s * 1000) - 1000)
    assert not bench.limiter.take(KEY, limit, cost).allowed
    bench.advance_ms(1000)
    assert bench.limiter.take(KEY, limit, cost).allowed


@given(start_ms=starts_ms, limit=limits, schedule=schedules, cost=costs)
def test_reset_says_when_all_is_to_be_had_again(
    start_ms: int, limit: int, schedule: list[tuple[int, int]], cost: int
) -> None:
    """After an admitted request, the whole limit is left again when the reset time has come, and not long before."""
    bench = Bench(start_ms)
    bench.run(limit, schedule)
    state = bench.limiter.take(KEY, limit, min(cost, bench.limiter.take(KEY, limit, 0).remaining))
    assert state.allowed
    assert 0 <= state.reset_after_s <= 61
    assert (state.remaining == limit) is (state.reset_after_s == 0)
    if state.reset_after_s:
        bench.advance_ms(round(state.reset_after_s * 1000) - 1000)
        assert limit > bench.limiter.take(KEY, limit, 0).remaining
        bench.advance_ms(1000)
    assert limit == bench.limiter.take(KEY, limit, 0).remaining


@given(first=st.integers(1, 50), second=st.integers(1, 50))
def test_a_changed_limit_holds_at_once(first: int, second: int) -> None:
    """What was used under the old limit counts under the new one, and nothing is left below zero."""
    bench = Bench()
    bench.limiter.take(KEY, first, first)
    state = bench.limiter.take(KEY, second, 1)
    assert (second > first, max(second - first - 1, 0)) == (state.allowed, state.remaining)


@pytest.mark.parametrize("used", [0, 3])
def test_a_cost_beyond_the_limit_is_not_told_to_come_back_at_once(used: int) -> None:
    """A request that costs more than the whole limit is refused without sending its client into a busy loop."""
    bench = Bench()
    bench.limiter.take(KEY, 10, used)
    state = bench.limiter.take(KEY, 10, 11)
    assert (False, 10 - used) == (state.allowed, state.remaining)
    assert 0 < state.reset_after_s


def test_keys_have_limits_of_their_own() -> None:
    """A key that has used up its limit takes nothing from others."""
    bench = Bench()
    assert bench.limiter.take("key_1", 5, 5).allowed
    assert not bench.limiter.take("key_1", 5, 1).allowed
    state = bench.limiter.take("key_2", 5, 1)
    assert (True, 4) == (state.allowed, state.remaining)


def test_the_number_of_keys_is_bounded() -> None:
    """Memory is bounded: beyond the number of keys, the one that was unused for the longest is forgotten."""
    bench = Bench(max_keys=2)
    bench.limiter.take("key_1", 1, 1)
    bench.limiter.take("key_2", 1, 1)
    bench.limiter.take("key_3", 1, 1)
    assert not bench.limiter.take("key_2", 1, 1).allowed
    assert not bench.limiter.take("key_3", 1, 1).allowed
    assert bench.limiter.take("key_1", 1, 1).allowed


def test_keys_in_use_are_not_forgotten() -> None:
    """A key that is over its limit stays so while it goes on trying, however many others come and go."""
    bench = Bench(max_keys=2)
    bench.limiter.take("busy", 1, 1)
    verdicts = []
    for other in range(50):
        bench.limiter.take(f"key_{other}", 1, 1)
        verdicts.append(bench.limiter.take("busy", 1, 1).allowed)
    assert [False] * 50 == verdicts


def test_the_longest_minute_between_two_bursts() -> None:
    """A used-up limit is whole again 61 seconds after the second in which it was used up, not later."""
    bench = Bench(500)
    admitted = bench.run(10, [(100, 1)] * 2000)
    bursts = [time_ms for (earlier_ms, _), (time_ms, _) in pairwise(admitted) if time_ms - earlier_ms > 1000]
    assert [61_000, 122_000, 183_000] == bursts


def test_search_for_a_key_to_forget_is_bounded() -> None:
    """Where all keys are in use, the one that comes first is forgotten after so many chances: counting stays short."""
    count = 3 * MAX_CHANCES
    bench = Bench(max_keys=count)
    for _ in range(2):
        for number in range(count):
            bench.limiter.take(f"key_{number}", 9, 1)
    bench.limiter.take("new", 9, 1)
    forgotten = [number for number in range(count) if bench.limiter.take(f"key_{number}", 9, 0).remaining == 9]
    assert MAX_CHANCES == forgotten[0]
