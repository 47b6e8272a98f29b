"""What one worker holds of keys that are far from their limits: it asks for more at a time, and looks less often."""

from __future__ import annotations

import math
import random

import pytest

from latchgate.domain.allotments import Allotments
from latchgate.domain.ports import RateAsk
from latchgate.domain.shares import WINDOW_SLOTS, Share
from support.limits import KEY, LimitBench, MemoryRateStore
from support.records import ManualClock


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


def steadily_used(bench: LimitBench, ticks: int) -> int:
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

    def counting(share: Share, now_s: float, workers: int) -> RateAsk | None:
        looks.append(ask(share, now_s, workers))
        return looks[-1]

    monkeypatch.setattr(Share, "ask", counting)
    bench = LimitBench(limit=1_000_000)
    bench.allotments = Allotments(bench.clock, stands_after_s=math.inf)
    steadily_used(bench, 1000)
    asks = len(looks) - looks.count(None)
    assert 50 < asks < 100
    assert len(looks) < 1.2 * asks
    # One that is hardly asked for, and has a permit left, is looked at once more: when that has expired.
    bench = LimitBench(limit=1_000_000)
    looks.clear()
    bench.allotments.need(KEY, bench.limit, 1)
    for _ in range(120):
        bench.exchange()
        bench.clock.advance(0.05)
    assert [True, True, False] == [each is not None for each in looks]


def far_from_its_limit() -> LimitBench:
    """A key with permits that are to last for a while, and no standing ones."""
    bench = LimitBench(limit=1_000_000)
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
    bench = LimitBench(limit=6000)
    bench.clock.advance(-bench.clock() % WINDOW_SLOTS)
    assert bench.take() is not None
    bench.need(110)
    ticks = 0
    while not bench.allotments.is_idle:
        ticks += 1
        assert ticks < 200
        assert bench.take() is not None
        bench.clock.advance(0.05)
        bench.exchange()
    at_hand = bench.allotments.permits(KEY).left
    bench.clock.advance(WINDOW_SLOTS)
    assert bench.take() is not None
    assert 0 < at_hand < 70 - 1 == bench.allotments.permits(KEY).left
    # And one on debt.
    assert 80 == len(list(iter(bench.take, None)))


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
@pytest.mark.parametrize(("limit", "standing"), [(1_000_000, 0), (6000, 80), (3000, 40), (300, 0)])
def test_every_permit_is_used_or_given_back(limit: int, standing: int, seed: int) -> None:
    """However a key is used, the store holds in the end what was admitted and no more, less the standing permits that
    were used: none is lost, and none is used twice.
    """
    rng = random.Random(seed)  # noqa: S311 - not to hide anything
    bench = LimitBench(limit=limit)
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
    for _ in range(280):
        bench.clock.advance(0.05)
        bench.exchange()
    assert bench.allotments.is_idle
    assert admitted == bench.used + standing - bench.allotments.permits(KEY).left


def test_key_that_is_not_used_any_more_is_let_go_of() -> None:
    """However much a key was used: once it is not any more, its permits are given back, and nothing more is asked."""
    bench = LimitBench(limit=1_000_000)
    bench.allotments = Allotments(bench.clock, stands_after_s=math.inf)
    admitted = steadily_used(bench, 100)
    for _ in range(60):
        bench.clock.advance(0.05)
        bench.exchange()
    assert bench.allotments.is_idle
    assert admitted == bench.used
