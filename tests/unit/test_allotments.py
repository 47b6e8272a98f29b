"""What one worker holds of limits that are shared, by a clock and a store that the test moves."""

from __future__ import annotations

import pytest

from latchgate.domain.allotments import Allotments
from latchgate.domain.model import NO_PERMITS, RateState
from latchgate.domain.shares import LASTING_S, LIFE_S, WINDOW_SLOTS, Share
from support.limits import KEY, LimitBench, MemoryRateStore
from support.records import ManualClock


def test_a_key_that_is_used_now_and_then_never_waits() -> None:
    """A single request is admitted at once, without a word to the store, which hears of it later."""
    bench = LimitBench()
    assert RateState(allowed=True, limit=10, remaining=9, reset_after_s=62) == bench.take()
    assert (0, 1) == (bench.store.statements, bench.exchange()[0].charged)
    assert 1 == bench.used
    assert [] == bench.exchange()


def test_a_second_request_is_not_admitted_on_debt() -> None:
    """Until the store has heard of one request that it was not asked about, there is no other: not while it is waited
    for, and not when it may not have heard.
    """
    bench = LimitBench()
    assert bench.take() is not None
    assert bench.take() is None
    asks = bench.allotments.asks()
    assert bench.take() is None
    bench.allotments.hear(asks, bench.store.step(asks), bench.clock())
    assert bench.take() is not None


def test_no_debt_for_a_window_after_one_too_many() -> None:
    """A worker whose unasked request went beyond the limit asks first for as long as that one counts."""
    bench = LimitBench(limit=1)
    bench.others_take(1)
    bench.clock.advance(5)
    assert bench.take() is not None
    bench.exchange()
    assert 2 == bench.used
    # The other worker's request has left the window, and its own has not; then that has, but for a moment.
    for seconds in (57, 4.9):
        bench.clock.advance(seconds)
        bench.limit = 3
        assert bench.take() is None
    bench.clock.advance(0.2)
    assert bench.take() is not None


def test_permits_end_by_when_they_were_asked_for() -> None:
    """Permits are good for less than a second from when they were asked for, not from when the answer came."""
    bench = LimitBench()
    bench.need(5, delay_s=0.5)
    assert bench.take(1) is not None
    bench.clock.advance(LIFE_S - 0.5 - 0.01)
    assert bench.take(1) is not None
    bench.clock.advance(0.02)
    assert bench.take(2) is None


def test_permits_that_were_not_used_are_given_back() -> None:
    """What has expired goes back to the slot that it was charged to, and only that."""
    bench = LimitBench()
    bench.need(5)
    assert bench.take(2) is not None
    assert bench.used >= 5
    for _ in range(3):
        bench.clock.advance(1.0)
        bench.exchange()
    assert 2 == bench.used


def test_a_full_window_is_told_from_memory() -> None:
    """Once the store has said that a window is full, requests are refused without asking, with the time at which there
    is room for their cost; until then nothing changes that.
    """
    bench = LimitBench()
    bench.others_take(4)
    bench.clock.advance(10)
    bench.others_take(6)
    bench.need()
    statements = bench.store.statements
    assert RateState(allowed=False, limit=10, remaining=0, reset_after_s=52) == bench.take(1)
    assert RateState(allowed=False, limit=10, remaining=0, reset_after_s=52) == bench.take(4)
    assert RateState(allowed=False, limit=10, remaining=0, reset_after_s=62) == bench.take(5)
    assert statements == bench.store.statements
    bench.clock.advance(40)
    state = bench.take(1)
    assert (False, 12) == (state and state.allowed, state and state.reset_after_s)
    assert statements == bench.store.statements


def test_reset_is_when_there_is_room() -> None:
    """Who comes back when it was told to is admitted."""
    bench = LimitBench()
    bench.others_take(10)
    bench.need()
    refused = bench.take()
    assert refused is not None
    # The time is told in whole seconds, and the refusal is no news any more.
    bench.exchange()
    bench.clock.advance(refused.reset_after_s)
    bench.exchange()
    assert RateState(allowed=True, limit=10, remaining=9, reset_after_s=62) == bench.take()


def test_what_leaves_together_leaves_once() -> None:
    """Of several costs that have left the window since it was last looked at, each makes room once."""
    bench = LimitBench(limit=10)
    for cost in (4, 3, 3):
        bench.others_take(cost)
        bench.clock.advance(1.0)
    bench.need(8)
    bench.clock.advance(WINDOW_SLOTS - 1.5)

    assert [RateState(allowed=False, limit=10, remaining=7, reset_after_s=1)] * 2 == [bench.take(8), bench.take(8)]


def test_requests_that_are_refused_are_asked_for_again() -> None:
    """While many are refused the window is looked at again now and then: others may have given permits back."""
    bench = LimitBench()
    bench.others_take(10)
    bench.need()
    for _ in range(20):
        refused = bench.take()
        assert refused is not None
        assert not refused.allowed
    bench.clock.advance(0.1)
    assert [] == bench.exchange()
    bench.store.windows[KEY].clear()
    bench.clock.advance(0.3)
    for _ in range(20):
        bench.take()
    assert 1 == len(bench.exchange())
    state = bench.take()
    assert state is not None
    assert state.allowed


def test_what_is_not_asked_for_any_more_is_not_asked_of_the_store() -> None:
    """Refusals have the window looked at once; after that only those do that come anew, whatever they cost."""
    for cost in (1, 7):
        bench = LimitBench()
        bench.others_take(11 - cost)
        bench.need(cost)
        for _ in range(20):
            refused = bench.take(cost)
            assert refused is not None
            assert not refused.allowed
        bench.clock.advance(0.5)
        bench.exchange()
        for _ in range(200):
            bench.clock.advance(0.05)
            assert [] == bench.exchange()


def test_a_cheaper_request_is_not_refused_for_a_dear_one() -> None:
    """A request that fits is admitted, though others were refused that cost more."""
    bench = LimitBench()
    bench.others_take(8)
    bench.need(5)
    refused = bench.take(5)
    assert (False, 2) == (refused and refused.allowed, refused and refused.remaining)
    assert RateState(allowed=True, limit=10, remaining=1, reset_after_s=62) == bench.take(1)


def test_what_is_refused_is_not_charged() -> None:
    """A refused request leaves all permits, for cheaper ones to use."""
    bench = LimitBench(limit=5)
    bench.need(3)
    bench.others_take(2)
    bench.need(5)
    assert [(False, 3), (False, 3)] == [
        (state.allowed, state.remaining) for state in (bench.take(4), bench.take(5)) if state
    ]
    assert RateState(allowed=True, limit=5, remaining=0, reset_after_s=62) == bench.take(3)
    assert 5 == bench.used


def test_cost_0_is_answered_by_what_is_known_and_young() -> None:
    """Looking charges nothing, and what it shows is not older than a second; the store is asked for the rest."""
    bench = LimitBench()
    assert bench.take(0) is None
    bench.need(0)
    assert RateState(allowed=True, limit=10, remaining=10, reset_after_s=0) == bench.take(0)
    bench.others_take(4)
    bench.clock.advance(1.1)
    assert bench.take(0) is None
    bench.need(0)
    assert RateState(allowed=True, limit=10, remaining=6, reset_after_s=61) == bench.take(0)
    assert 4 == bench.used


def test_a_cost_beyond_the_limit_never_fits() -> None:
    """It is refused without asking, and not told to come back at once."""
    bench = LimitBench()
    assert RateState(allowed=False, limit=10, remaining=10, reset_after_s=62) == bench.take(11)
    assert [] == bench.exchange()


def test_a_changed_limit_holds_at_once() -> None:
    """What was used under the old limit counts under the new one, be it lower or higher, with permits or without."""
    bench = LimitBench()
    bench.need(8)
    assert bench.take(2) is not None
    bench.limit = 3
    state = bench.take(1)
    assert (True, 0) == (state and state.allowed, state and state.remaining)
    assert bench.take(1) is None
    bench.need(1)
    state = bench.take(1)
    assert (False, 0) == (state and state.allowed, state and state.remaining)
    bench.limit = 20
    assert bench.take(0) is not None
    bench.need(1)
    state = bench.take(1)
    assert (True, 16) == (state and state.allowed, state and state.remaining)


def test_old_news_are_forgotten() -> None:
    """What was used more than a window ago is not counted, whatever was last told."""
    bench = LimitBench()
    bench.need(6)
    for _ in range(6):
        assert bench.take() is not None
    bench.clock.advance(WINDOW_SLOTS + 1)
    assert RateState(allowed=True, limit=10, remaining=9, reset_after_s=62) == bench.take()


def test_alone_a_worker_keeps_its_share() -> None:
    """While the store is away, a worker admits its part of the limit, less its part of what was used before."""
    bench = LimitBench(limit=20, workers=4)
    bench.others_take(7)
    bench.need(1)
    assert bench.take() is not None
    bench.allotments.lose()
    allowed = [state.allowed for _ in range(6) if (state := bench.take())]
    assert [True] * 3 + [False] * 3 == allowed
    state = bench.take(0)
    assert (True, 20, 0) == (state and state[:3])


def test_alone_a_request_that_costs_more_than_a_share_still_fits() -> None:
    """At least one request a window fits into a worker's share."""
    bench = LimitBench(limit=10, workers=5)
    bench.exchange()
    bench.allotments.hear([], bench.store.step([]), 0.0)
    bench.allotments.lose()
    assert [True, False] == [state.allowed for _ in range(2) if (state := bench.take(7))]
    state = bench.take(11)
    assert state is not None
    assert not state.allowed


def test_what_was_admitted_alone_is_charged() -> None:
    """When the store is back it hears of what was admitted meanwhile, as far as that still counts."""
    bench = LimitBench()
    bench.allotments.lose()
    for seconds in (0, 40, 10):
        bench.clock.advance(seconds)
        assert bench.take(2) is not None
    bench.allotments.forget_old_debts()
    bench.clock.advance(15)
    bench.allotments.forget_old_debts()
    bench.allotments.regain(bench.store.step([]))
    assert bench.take() is None
    assert [4] == [ask.charged for ask in bench.exchange()]
    assert 4 == bench.used


def test_old_debts_are_forgotten_alone() -> None:
    """However long the store is away, no more is remembered than what counts."""
    bench = LimitBench()
    bench.allotments.lose()
    bench.take()
    bench.clock.advance(62)
    bench.allotments.forget_old_debts()
    bench.allotments.regain(bench.store.step([]))
    assert [] == bench.exchange()


def test_the_number_of_keys_is_bounded_and_no_debt_is_lost() -> None:
    """Beyond the number of keys those go that there is nothing to report of, the unused ones first."""
    bench = LimitBench(max_keys=3)
    for number in range(6):
        bench.take(key_id=f"debtor_{number}")
    assert 6 == len(bench.allotments)
    assert {f"debtor_{number}" for number in range(6)} == {ask.key_id for ask in bench.exchange()}
    bench.exchange()
    for number in range(10):
        bench.take(11, key_id=f"other_{number}")
    assert 6 == len(bench.allotments)


def test_farewell() -> None:
    """A worker that goes reports its debts and gives back all permits, of however many grants."""
    bench = LimitBench(limit=30)
    bench.take(key_id="key_2")
    for _ in range(3):
        bench.need(5)
        bench.clock.advance(0.3)
        bench.allotments.take(KEY, 30, 4)
    for asks in bench.allotments.farewell():
        bench.allotments.hear(asks, bench.store.step(asks), bench.clock())
    assert 12 == bench.used
    assert 1 == sum(bench.store.windows["key_2"].values())


def test_standing_permits() -> None:
    """Of four hundredths of the limit, by thirds for each window of the clock's, the store is never told; no more."""
    bench = LimitBench(limit=1000, workers=2)
    bench.exchange()
    assert [True] * 6 == [bool(bench.take()) for _ in range(6)]
    assert [] == bench.exchange()
    bench.take()
    bench.exchange()
    assert bench.used
    told = bench.used
    # The same again in the next window of the clock's, and what has expired is not given back to the store.
    bench.clock.advance(WINDOW_SLOTS)
    for _ in range(6):
        assert bench.take()
    bench.clock.advance(3 * WINDOW_SLOTS)
    bench.take()
    bench.exchange()
    assert told >= bench.used


def test_standing_permits_of_a_window_that_is_over_are_gone() -> None:
    """In each window of the clock's there are as many, whatever was left of those before; and calls count in them."""
    clock = ManualClock(1000.25)
    allotments = Allotments(clock, 2, stands_after_s=0.0)
    for _ in range(3):
        assert RateState(allowed=True, limit=6000, remaining=5999, reset_after_s=62) == allotments.take(KEY, 6000, 1)
        permits = allotments.permits(KEY)
        # And ten in reserve.
        assert 70 - 1 == permits.left
        assert clock() < permits.until_s <= clock() + WINDOW_SLOTS
        clock.advance(WINDOW_SLOTS)


def test_permits_end_no_later_for_standing_ones_beside_them() -> None:
    """Of permits of several grants all are counted in until the first of them ends."""
    bench = LimitBench(limit=1000)
    bench.others_take(500)
    bench.need(5)
    assert bench.take(600) is None
    permits = bench.allotments.permits(KEY)
    assert (10 + 13, bench.clock() + LASTING_S) == (permits.left, permits.until_s)


def test_what_has_left_the_window_is_no_demand() -> None:
    """How much is asked for ahead is told from what was used since, not from what is forgotten."""
    share = Share(KEY, 1000.25)
    share.permits.used = share.used_before = 6
    share.debt = 1
    share.told_s = 1000.25
    share.age(1000.25 + WINDOW_SLOTS + 1)
    assert (1, 1) == (share.permits.used, share.used_before)


def test_permits_of_a_key_that_is_forgotten_admit_nothing() -> None:
    """Whoever still has what a key was counted in finds nothing left in it once the key is forgotten: counted anew, it
    is given what it may use all over.
    """
    clock = ManualClock(1000.25)
    allotments = Allotments(clock, 2, stands_after_s=0.0)
    assert NO_PERMITS is allotments.permits(KEY)
    assert allotments.take(KEY, 6000, 1) is not None
    permits = allotments.permits(KEY)
    assert (70 - 1, 1) == (permits.left, permits.used)
    assert permits.until_s > clock()
    for number in range(4):
        assert allotments.take(f"another_{number}", 6000, 1) is not None
    assert NO_PERMITS is allotments.permits(KEY)
    assert 0 == permits.left
    assert permits.until_s < clock()


def test_it_is_told_when_there_is_something_again() -> None:
    """Who sends what there is may sleep while there is nothing: it is told of the first that comes, not of each."""
    told: list[str] = []
    clock = ManualClock(1000.25)
    store = MemoryRateStore(clock)
    allotments = Allotments(clock, stirred=lambda: told.append("stirred"))
    assert allotments.is_idle
    for key_id in (KEY, "key_2"):
        assert allotments.take(key_id, 10, 1) is not None
    assert (["stirred"], False) == (told, allotments.is_idle)
    for _ in range(2):
        asks = allotments.asks()
        allotments.hear(asks, store.step(asks), clock())
    assert (["stirred"], True) == (told, allotments.is_idle)
    clock.advance(1)
    assert allotments.take(KEY, 10, 1) is not None
    assert ["stirred"] * 2 == told


def test_windows_of_the_past_are_let_go_of() -> None:
    """Keys that are not used any more take no memory for long, while others come: for each new one, two are
    looked at.
    """
    bench = LimitBench(limit=1000, max_keys=10_000)
    bench.take()
    for number in range(200):
        bench.allotments.take(f"former_{number}", 10, 1)
    bench.exchange()
    for number in range(100):
        bench.take(key_id=f"meanwhile_{number}")
    assert 301 == len(bench.allotments)
    bench.exchange()
    bench.clock.advance(2 * WINDOW_SLOTS)
    bench.exchange()
    assert bench.allotments.is_idle
    # The one that came first is in use.
    bench.take()
    for number in range(152):
        bench.take(key_id=f"new_{number}")
    assert 153 == len(bench.allotments)


def test_standing_permits_are_not_given_twice_to_those_let_go_of() -> None:
    """A key that has used its standing permits has none again in the same window, however many others come."""
    bench = LimitBench(limit=1000, workers=2)
    bench.exchange()
    assert [True] * 6 == [bool(bench.take()) for _ in range(6)]
    for number in range(50):
        bench.take(0, key_id=f"another_{number}")
    assert bench.take()
    assert [KEY] == [ask.key_id for ask in bench.exchange() if ask.charged]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("told_s", 1000.0 - WINDOW_SLOTS),
        ("block", 1000 // WINDOW_SLOTS),
        ("free_after_s", 1000.5),
        ("is_active", True),
        ("debt", 1),
        ("backs", ((7, 1),)),
    ],
)
def test_what_still_counts_is_not_of_the_past(name: str, value: object) -> None:
    """What was told within a window, permits that stand, a debt, what it must not do yet, and what is to be said."""
    share = Share(KEY, 0.0)
    assert share.is_past(1000.0)
    setattr(share, name, value)
    assert not share.is_past(1000.0)
