"""When a limiter asks the store: soon where something is urgent, and else for many keys at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from latchgate.limiting import LATE_TICK_S, TICK_S
from support.limits import KEY, LimitBench
from support.shared_limits import Deployment, deployment

LIMIT = 6000


@pytest.fixture
def lasting() -> LimitBench:
    """A worker with a key that is used 20 times a second, and has permits that last."""
    lasting = LimitBench(limit=LIMIT)
    use_steadily(lasting)
    return lasting


def use_steadily(bench: LimitBench) -> None:
    """Has a key used 20 times a second until it rests, when the standing permits are used up."""
    standing = len(list(iter(bench.take, None)))
    assert standing > 0
    bench.exchange()
    for _ in range(60):
        assert bench.take() is not None
        bench.clock.advance(0.05)
        bench.exchange()
    assert not bench.allotments.is_urgent


def is_urgent(bench: LimitBench) -> bool:
    """Says so anew each time."""
    return bench.allotments.is_urgent


def use_up(bench: LimitBench) -> None:
    """Uses what is at hand."""
    permits = bench.allotments.permits(KEY)
    for _ in range(permits.left):
        assert bench.take() is not None
    assert 0 == permits.left


def test_released_reserve_that_lasts_for_some_ticks_is_not_urgent(lasting: LimitBench) -> None:
    """Who has half a second's worth left can wait until others have something to ask as well; who has nothing, not."""
    use_up(lasting)
    assert not is_urgent(lasting)
    assert lasting.take() is not None
    assert 8 <= lasting.allotments.permits(KEY).left <= 10
    assert not is_urgent(lasting)
    use_up(lasting)
    assert not is_urgent(lasting)
    # On debt.
    assert lasting.take() is not None
    assert is_urgent(lasting)
    lasting.exchange()
    assert not is_urgent(lasting)


def test_released_reserve_of_short_lived_permits_is_urgent() -> None:
    """Where permits are for less than a second, what is in reserve is little."""
    bench = LimitBench(limit=LIMIT, workers=LIMIT)
    use_steadily(bench)
    use_up(bench)
    assert not bench.allotments.is_urgent
    assert bench.take() is not None
    assert bench.allotments.permits(KEY).left > 0
    assert bench.allotments.is_urgent


def test_standing_permits_are_asked_for_more_before_they_are_used_up() -> None:
    """Of those that stand an eighth is in reserve, unless a request costs more than the others."""
    bench = LimitBench(limit=LIMIT)
    assert bench.take() is not None
    permits = bench.allotments.permits(KEY)
    assert 70 - 1 == permits.left
    use_up(bench)
    assert bench.allotments.is_idle
    assert bench.take() is not None
    assert 10 - 1 == permits.left
    assert (False, False) == (bench.allotments.is_idle, bench.allotments.is_urgent)
    bench = LimitBench(limit=LIMIT)
    assert bench.take(75) is not None
    assert 0 == bench.allotments.permits(KEY).left
    assert bench.allotments.is_idle
    assert bench.take(5) is not None
    assert 0 == bench.allotments.permits(KEY).left


@pytest.mark.parametrize("cost", [0, 1])
def test_call_that_waits_is_urgent(cost: int) -> None:
    """Whatever else is not."""
    bench = LimitBench()
    bench.allotments.need(KEY, bench.limit, cost)
    assert bench.allotments.is_urgent


def test_refusal_is_urgent() -> None:
    """Others may give permits back at any time."""
    bench = LimitBench(limit=10)
    bench.others_take(10)
    bench.need()
    for _ in range(3):
        bench.exchange()
    assert not bench.allotments.is_urgent
    refused = bench.take()
    assert refused is not None
    assert not refused.allowed
    assert bench.allotments.is_urgent


def test_key_that_comes_near_its_limit_is_urgent_all_the_time() -> None:
    """It is looked at with every tick, as what it does not need is needed by others."""
    bench = LimitBench(limit=600)
    bench.others_take(500)
    bench.need(20)
    for _ in range(20):
        bench.clock.advance(0.05)
        assert bench.take() is not None
        bench.exchange()
        assert bench.allotments.is_urgent


def test_it_is_told_when_something_becomes_urgent() -> None:
    """Who waits for a later tick is told of the first that should not; not of each."""
    told: list[str] = []
    lasting = LimitBench(limit=LIMIT, stirred=lambda: told.append("stirred"))
    use_steadily(lasting)
    told.clear()
    use_up(lasting)
    assert lasting.take() is not None
    use_up(lasting)
    assert [] == told
    assert lasting.take() is not None
    assert ["stirred"] == told
    lasting.allotments.need(KEY, LIMIT, 1)
    lasting.allotments.need("another", LIMIT, 1)
    assert ["stirred"] == told


@pytest.fixture
def deployed() -> Iterator[Deployment]:
    """A single worker."""
    with deployment(3, workers=1) as deployed:
        yield deployed


def test_many_keys_share_few_statements(deployed: Deployment) -> None:
    """What is not urgent goes out a few times a second, however many keys there are, and no call waits for that."""
    # When the standing permits of all are used up, within one window of the clock's.
    begin_s, end_s = 15.0, 45.0
    for number in range(40):
        deployed.load(LIMIT, 7.0, end_s, key_id=f"key_{number}")
    deployed.run(begin_s)
    (worker,) = deployed.workers
    before, waits = deployed.store.statements, worker.limiter.waits
    deployed.run(end_s)
    statements = deployed.store.statements - before
    assert (end_s - begin_s) / LATE_TICK_S[1] * 0.9 < statements < (end_s - begin_s) / LATE_TICK_S[0] * 1.3
    assert worker.limiter.waits == waits


def test_debt_does_not_wait_for_a_later_tick(deployed: Deployment) -> None:
    """Whatever is under way: one on debt is reported within a tick."""
    (worker,) = deployed.workers
    deployed.load(20_000, 50.0, 9.0)
    for time_s in (3.0, 4.1, 5.2, 6.3, 7.4, 8.5):
        deployed.run(time_s)
        key_id = f"now_and_then_{time_s}"
        worker.request(10, key_id=key_id)
        deployed.run(time_s + TICK_S[1] + 0.02)
        assert 1 == sum(deployed.store.windows[key_id].values())
