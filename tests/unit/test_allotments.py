"""What one worker holds of limits that are shared, by a clock and a store that the test moves."""

from __future__ import annotations

import math
import random

import pytest

from latchgate.domain.allotments import Allotments
from latchgate.domain.model import NO_PERMITS, RateState
from latchgate.domain.ports import RateAsk
from latchgate.domain.shares import LIFE_S, WINDOW_SLOTS, Share
from support.limits import MemoryRateStore
from support.records import ManualClock

KEY = "key_1"
OTHERS_ASK = RateAsk(KEY, 1000, 0, 1, 0, 0, 0, 0)


class Bench:
    """A worker and the store, under one clock."""

    def __init__(self, *, limit: int = 10, max_keys: int = 100, workers: int = 1) -> None:
        self.limit = limit
        self.clock = ManualClock(1000.25)
        self.store = MemoryRateStore(self.clock, workers)
        self.allotments = Allotments(self.clock, max_keys)

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


def test_a_key_that_is_used_now_and_then_never_waits() -> None:
    """A single request is admitted at once, without a word to the store, which hears of it later."""
    bench = Bench()
    assert RateState(allowed=True, limit=10, remaining=9, reset_after_s=62) == bench.take()
    assert (0, 1) == (bench.store.statements, bench.exchange()[0].charged)
    assert 1 == bench.used
    assert [] == bench.exchange()


def test_a_second_request_is_not_admitted_on_debt() -> None:
    """Until the store has heard of one request that it was not asked about, there is no other: not while it is waited
    for, and not when it may not have heard.
    """
    bench = Bench()
    assert bench.take() is not None
    assert bench.take() is None
    asks = bench.allotments.asks()
    assert bench.take() is None
    bench.allotments.hear(asks, bench.store.step(asks), bench.clock())
    assert bench.take() is not None


def test_no_debt_for_a_window_after_one_too_many() -> None:
    """A worker whose unasked request went beyond the limit asks first for as long as that one counts."""
    bench = Bench(limit=1)
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
    bench = Bench()
    bench.need(5, delay_s=0.5)
    assert bench.take(1) is not None
    bench.clock.advance(LIFE_S - 0.5 - 0.01)
    assert bench.take(1) is not None
    bench.clock.advance(0.02)
    assert bench.take(2) is None


def test_permits_that_were_not_used_are_given_back() -> None:
    """What has expired goes back to the slot that it was charged to, and only that."""
    bench = Bench()
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
    bench = Bench()
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
    bench = Bench()
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
    bench = Bench(limit=10)
    for cost in (4, 3, 3):
        bench.others_take(cost)
        bench.clock.advance(1.0)
    bench.need(8)
    bench.clock.advance(WINDOW_SLOTS - 1.5)

    assert [RateState(allowed=False, limit=10, remaining=7, reset_after_s=1)] * 2 == [bench.take(8), bench.take(8)]


def test_requests_that_are_refused_are_asked_for_again() -> None:
    """While many are refused the window is looked at again now and then: others may have given permits back."""
    bench = Bench()
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
        bench = Bench()
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
    bench = Bench()
    bench.others_take(8)
    bench.need(5)
    refused = bench.take(5)
    assert (False, 2) == (refused and refused.allowed, refused and refused.remaining)
    assert RateState(allowed=True, limit=10, remaining=1, reset_after_s=62) == bench.take(1)


def test_what_is_refused_is_not_charged() -> None:
    """A refused request leaves all permits, for cheaper ones to use."""
    bench = Bench(limit=5)
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
    bench = Bench()
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
    bench = Bench()
    assert RateState(allowed=False, limit=10, remaining=10, reset_after_s=62) == bench.take(11)
    assert [] == bench.exchange()


def test_a_changed_limit_holds_at_once() -> None:
    """What was used under the old limit counts under the new one, be it lower or higher, with permits or without."""
    bench = Bench()
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
    bench = Bench()
    bench.need(6)
    for _ in range(6):
        assert bench.take() is not None
    bench.clock.advance(WINDOW_SLOTS + 1)
    assert RateState(allowed=True, limit=10, remaining=9, reset_after_s=62) == bench.take()


def test_alone_a_worker_keeps_its_share() -> None:
    """While the store is away, a worker admits its part of the limit, less its part of what was used before."""
    bench = Bench(limit=20, workers=4)
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
    bench = Bench(limit=10, workers=5)
    bench.exchange()
    bench.allotments.hear([], bench.store.step([]), 0.0)
    bench.allotments.lose()
    assert [True, False] == [state.allowed for _ in range(2) if (state := bench.take(7))]
    state = bench.take(11)
    assert state is not None
    assert not state.allowed


def test_what_was_admitted_alone_is_charged() -> None:
    """When the store is back it hears of what was admitted meanwhile, as far as that still counts."""
    bench = Bench()
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
    bench = Bench()
    bench.allotments.lose()
    bench.take()
    bench.clock.advance(62)
    bench.allotments.forget_old_debts()
    bench.allotments.regain(bench.store.step([]))
    assert [] == bench.exchange()


def test_the_number_of_keys_is_bounded_and_no_debt_is_lost() -> None:
    """Beyond the number of keys those go that there is nothing to report of, the unused ones first."""
    bench = Bench(max_keys=3)
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
    bench = Bench(limit=30)
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
    """Of a twentieth of the limit, by thirds for each window of the clock's, the store is never told; no more."""
    bench = Bench(limit=1000, workers=2)
    bench.exchange()
    assert [True] * 8 == [bool(bench.take()) for _ in range(8)]
    assert [] == bench.exchange()
    bench.take()
    bench.exchange()
    assert bench.used
    told = bench.used
    # The same again in the next window of the clock's, and what has expired is not given back to the store.
    bench.clock.advance(WINDOW_SLOTS)
    for _ in range(8):
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
        assert 100 - 1 == permits.left
        assert clock() < permits.until_s <= clock() + WINDOW_SLOTS
        clock.advance(WINDOW_SLOTS)


def test_permits_end_no_later_for_standing_ones_beside_them() -> None:
    """Of permits of several grants all are counted in until the first of them ends."""
    bench = Bench(limit=1000)
    bench.others_take(500)
    bench.need(5)
    assert bench.take(600) is None
    permits = bench.allotments.permits(KEY)
    assert (5 + 16, bench.clock() + LIFE_S) == (permits.left, permits.until_s)


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
    assert (100 - 1, 1) == (permits.left, permits.used)
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


def test_far_from_the_limit_more_is_asked_at_a_time() -> None:
    """A key far from its limit is asked for less often than one near it, and gives back what has expired with what it
    asks next; near the limit that goes back at once.
    """
    (far, far_back), (near, near_back) = asks_of_some_minutes(10_000), asks_of_some_minutes(600)
    assert far < 0.6 * near
    assert far_back < 10 < near_back


def asks_of_some_minutes(limit: int) -> tuple[int, int]:
    """Uses a key nine times a second, unevenly; gives how many asks that took, and how many only gave back."""
    clock, rng = ManualClock(1000.25), random.Random(1)  # noqa: S311 - not to hide anything
    store, allotments = MemoryRateStore(clock), Allotments(clock, stands_after_s=math.inf)
    asks = back = 0
    for _ in range(3 * 60 * 20):
        clock.advance(0.05)
        for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))):
            if allotments.take(KEY, limit, 1) is None:
                allotments.need(KEY, limit, 1)
        sent = allotments.asks()
        allotments.hear(sent, store.step(sent), clock())
        asks += len(sent)
        back += sum(1 for ask in sent if ask.back and not ask.wanted and not ask.charged)
    return asks, back


def steadily_used(bench: Bench, ticks: int) -> int:
    """Has a key used five times in three ticks, which are 50 ms apart; gives how often it was admitted at once."""
    admitted = 0
    for number in range(ticks):
        for _ in range(1 + (number % 3 > 0)):
            if bench.take() is None:
                bench.need()
            else:
                admitted += 1
        bench.clock.advance(0.05)
        bench.exchange()
    return admitted


def test_far_from_the_limit_a_key_is_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key far from its limit, which has permits for a while, is gone into when few are left, and hardly at any other
    tick: there may be very many such keys.
    """
    looks: list[RateAsk | None] = []
    ask = Share.ask

    def counting(share: Share, now_s: float) -> RateAsk | None:
        looks.append(ask(share, now_s))
        return looks[-1]

    monkeypatch.setattr(Share, "ask", counting)
    bench = Bench(limit=1_000_000)
    bench.allotments = Allotments(bench.clock, stands_after_s=math.inf)
    steadily_used(bench, 1000)
    asks = len(looks) - looks.count(None)
    assert 50 < asks < 100
    assert len(looks) < 1.2 * asks
    # One that is hardly asked for, and has a permit left, is looked at once more: when that has expired.
    bench = Bench(limit=1_000_000)
    looks.clear()
    bench.allotments.need(KEY, bench.limit, 1)
    for _ in range(40):
        bench.exchange()
        bench.clock.advance(0.05)
    assert [True, True, False] == [each is not None for each in looks]


def far_from_its_limit() -> Bench:
    """A key with permits that are to last for a while, and no standing ones."""
    bench = Bench(limit=1_000_000)
    bench.allotments = Allotments(bench.clock, stands_after_s=math.inf)
    steadily_used(bench, 100)
    while not bench.exchange():
        bench.take()
    return bench


def test_key_that_runs_out_is_seen_to_at_the_next_tick() -> None:
    """Before its permits are used up more are asked for, with the next tick and not sooner; no request is admitted on
    debt, and none waits.
    """
    bench = far_from_its_limit()
    for _ in range(bench.allotments.permits(KEY).left):
        assert bench.take() is not None
        assert [] == bench.exchange()
    assert bench.take() is not None
    assert bench.allotments.permits(KEY).left > 0
    (ask,) = bench.exchange()
    assert ask.wanted > 3
    assert 0 == ask.charged
    assert bench.allotments.permits(KEY).left > 3


def test_key_that_has_run_out_is_seen_to_at_the_next_tick() -> None:
    """However long its permits were to last: who has used them up at once is asked for more with the next tick, and one
    more request does not wait for it.
    """
    bench = far_from_its_limit()
    admitted = len(list(iter(bench.take, None)))
    bench.clock.advance(0.05)
    (ask,) = bench.exchange()
    assert admitted > 4
    assert 1 == ask.charged
    assert bench.allotments.permits(KEY).left > 3


@pytest.mark.parametrize("cost", [None, 0, 1])
def test_what_comes_while_the_store_is_asked_goes_out_with_the_next_tick(cost: int | None) -> None:
    """Whether it was admitted on debt (None), or waits: what the answer brings does not put it off."""
    bench = far_from_its_limit()
    for _ in range(bench.allotments.permits(KEY).left + 1):
        bench.take()
    asks, sent_s = bench.allotments.asks(), bench.clock()
    if cost is None:
        assert list(iter(bench.take, None))
    else:
        bench.allotments.need(KEY, bench.limit, cost)
    bench.allotments.hear(asks, bench.store.step(asks), sent_s)
    assert [KEY] == [ask.key_id for ask in bench.exchange()]


def test_reserve_of_standing_permits_ends_with_them() -> None:
    """Of the standing permits of a window of the clock's none is left in the next one, those in reserve neither; and
    with no others there is nothing to ask.
    """
    bench = Bench(limit=6000)
    bench.clock.advance(-bench.clock() % WINDOW_SLOTS)
    assert bench.take() is not None
    bench.need(110)
    ticks = 0
    while not bench.allotments.is_idle:
        ticks += 1
        assert ticks < 30
        assert bench.take() is not None
        bench.clock.advance(0.05)
        bench.exchange()
    at_hand = bench.allotments.permits(KEY).left
    bench.clock.advance(WINDOW_SLOTS)
    assert bench.take() is not None
    assert 0 < at_hand < 100 - 1 == bench.allotments.permits(KEY).left
    # And one on debt.
    assert 100 == len(list(iter(bench.take, None)))


@pytest.mark.parametrize("used", [0, 1])
def test_farewell_gives_back_what_was_to_last(used: int) -> None:
    """A worker that goes gives back the permits of keys, too, that were not to be looked at for a while: all of it."""
    bench, fresh = far_from_its_limit(), far_from_its_limit()
    before = fresh.used - len(list(iter(fresh.take, None))) + 1
    for _ in range(used):
        bench.take()
    for asks in bench.allotments.farewell():
        bench.allotments.hear(asks, bench.store.step(asks), bench.clock())
    assert before + used == bench.used


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("limit", "standing"), [(1_000_000, 0), (6000, 100), (3000, 50), (300, 0)])
def test_every_permit_is_used_or_given_back(limit: int, standing: int, seed: int) -> None:
    """However a key is used, the store holds in the end what was admitted and no more, less the standing permits that
    were used: none is lost, and none is used twice.
    """
    rng = random.Random(seed)  # noqa: S311 - not to hide anything
    bench = Bench(limit=limit)
    bench.allotments = Allotments(bench.clock, stands_after_s=0.0 if standing else math.inf)
    # From within one window of the clock's, so that there are standing permits once.
    bench.clock.advance(-bench.clock() % WINDOW_SLOTS)
    admitted = 0
    while bench.clock() % WINDOW_SLOTS < 45:
        calls, pause_s, is_answered = rng.choice((0, 1, 2, 20)), rng.choice((0.01, 0.05, 0.05, 0.3)), rng.random() < 0.7
        for _ in range(calls):
            cost = rng.choice((0, 1, 1, 1, 3))
            state = bench.take(cost)
            if state is None:
                bench.need(cost, delay_s=0.004)
                state = bench.take(cost)
            admitted += cost if state is not None and state.allowed else 0
        bench.clock.advance(pause_s)
        if is_answered:
            bench.exchange(delay_s=0.004)
    for _ in range(60):
        bench.clock.advance(0.05)
        bench.exchange()
    assert bench.allotments.is_idle
    assert admitted == bench.used + standing - bench.allotments.permits(KEY).left


def test_key_that_is_not_used_any_more_is_let_go_of() -> None:
    """However much a key was used: once it is not any more, its permits are given back, and nothing more is asked."""
    bench = Bench(limit=1_000_000)
    bench.allotments = Allotments(bench.clock, stands_after_s=math.inf)
    admitted = steadily_used(bench, 100)
    for _ in range(60):
        bench.clock.advance(0.05)
        bench.exchange()
    assert bench.allotments.is_idle
    assert admitted == bench.used


def test_windows_of_the_past_are_let_go_of() -> None:
    """Keys that are not used any more take no memory for long, while others come: for each new one, two are
    looked at.
    """
    bench = Bench(limit=1000, max_keys=10_000)
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
    bench = Bench(limit=1000, workers=2)
    bench.exchange()
    assert [True] * 8 == [bool(bench.take()) for _ in range(8)]
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
