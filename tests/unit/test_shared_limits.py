"""Limits that several workers share, by the real parts on simulated loops, clocks and networks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latchgate.domain.ports import RateAsk
from latchgate.domain.shares import LASTING_S
from latchgate.limiting import HEAR_S, PATIENCE_S, SETTLE_S, TICK_S
from support.shared_limits import KEY, deployment

bursts = st.lists(st.tuples(st.floats(0, 70), st.integers(1, 30), st.integers(0, 4)), max_size=25)


@pytest.mark.parametrize(
    ("limit", "cost", "workers"),
    [(1, 1, 5), (10, 1, 1), (60, 1, 1), (60, 1, 5), (600, 1, 1), (600, 1, 5), (60, 5, 5), (600, 20, 1)],
)
def test_constant_overload(limit: int, cost: int, workers: int) -> None:
    """Under constant overload of all workers no sliding minute admits more than 1.05 of the limit and one request for
    each worker, and at least 0.95 of the limit is admitted; what is refused is refused from memory.
    """
    most = limit // cost
    cycles = 10 if most <= 60 else 3
    with deployment(limit + workers, workers=workers) as deployed:
        until_s = 63.0 * (cycles + 3)
        deployed.load(limit, max(most / 60 * 2 / workers, 3.0), until_s, cost)
        deployed.run(until_s)
        times_s = [time_s for time_s, _ in deployed.admitted]
        # From the last one of a limit's worth to the last one of another, whatever bursts they come in. Each worker may
        # have added one before.
        first, last = 2 * most + workers, (2 + cycles) * most + workers
        assert 0.95 <= 60 * cycles / (times_s[last] - times_s[first])
        assert deployed.most_in_a_minute() <= 1.05 * limit + workers
        waits = sum(worker.limiter.waits for worker in deployed.workers)
        assert waits <= len(times_s) + 0.05 * sum(worker.refused for worker in deployed.workers)


@given(
    seed=st.integers(0, 1 << 16),
    workers=st.integers(1, 5),
    limit=st.sampled_from([1, 2, 3, 10, 50, 500]),
    most_delay_s=st.sampled_from([0.001, 0.02, 0.12]),
    pauses=st.lists(st.tuples(st.floats(0, 70), st.floats(0.1, 3)), max_size=4),
    bursts=bursts,
)
@example(seed=0, workers=5, limit=1, most_delay_s=0.12, pauses=[], bursts=[(0, 30, 0), (61.5, 30, 0), (62.4, 30, 0)])
@example(seed=0, workers=2, limit=50, most_delay_s=0.02, pauses=[(1, 2)], bursts=[(0.99, 30, 1), (60.99, 30, 1)])
@settings(max_examples=30)
def test_no_minute_admits_more(
    *,
    seed: int,
    workers: int,
    limit: int,
    most_delay_s: float,
    pauses: list[tuple[float, float]],
    bursts: list[tuple[float, int, int]],
) -> None:
    """Whatever comes when, with which costs, however long statements take and processes stand still: no sliding minute
    admits more than 1.05 of the limit and one for each worker, and no call waits for long.
    """
    with deployment(seed, workers=workers, most_delay_s=most_delay_s) as deployed:
        draw = deployed.world.random
        for time_s, count, cost in bursts:
            for _ in range(count):
                worker = draw.choice(deployed.workers)
                deployed.world.at(time_s + draw.uniform(0, 0.5), worker.request, limit, cost)
        for time_s, length_s in pauses:
            worker = draw.choice(deployed.workers)
            deployed.world.at(time_s, worker.loop.pause, time_s + length_s)
        deployed.run(75.0)
        answered = sum(worker.refused + len(worker.admitted) for worker in deployed.workers)
        assert sum(count for _, count, _ in bursts) == answered
        assert deployed.most_in_a_minute() <= 1.05 * limit + workers


@pytest.mark.parametrize(
    ("limit", "a_second"), [(60, 0.1), (100_000, 1.0), (100_000, 5.0), (100_000, 50.0), (600, 4.0)]
)
def test_calls_hardly_ever_wait_for_the_store(limit: int, a_second: float) -> None:
    """Below its limit a key is admitted from memory, be it used now and then or all the time, and never refused."""
    with deployment(7, workers=2) as deployed:
        deployed.load(limit, a_second, 120.0)
        deployed.run(121.0)
        asked = sum(worker.asked for worker in deployed.workers)
        assert asked == len(deployed.admitted)
        assert sum(worker.limiter.waits for worker in deployed.workers) <= 2 + 0.03 * asked


@pytest.mark.parametrize("lost", [0.01, 0.2])
@pytest.mark.parametrize("workers", [1, 3])
def test_lost_statements(workers: int, lost: float) -> None:
    """When statements and answers get lost, calls are answered nonetheless and soon, what was admitted is charged, and
    no minute admits more than twice what it should: what all share, and what each may while it is on its own.
    """
    with deployment(11 + workers, workers=workers) as deployed:
        for worker in deployed.workers:
            worker.path.lost = lost
        deployed.load(30, 3.0, 130.0)
        deployed.run(131.0)
        answered = sum(worker.refused + len(worker.admitted) for worker in deployed.workers)
        assert sum(worker.asked for worker in deployed.workers) == answered
        assert max(worker.slowest_s for worker in deployed.workers) < PATIENCE_S + 0.1
        assert deployed.most_in_a_minute() <= 2 * (30 + workers)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_store_away(workers: int) -> None:
    """While the store is away each worker admits its fair share of the limit, less its part of what was used before;
    when it is back, what was admitted meanwhile counts.
    """
    limit = 60
    with deployment(3, workers=workers) as deployed:
        deployed.load(limit, 6.0, 140.0)
        deployed.run(15.0)
        assert limit == pytest.approx(deployed.total(0, 15.0), abs=workers)
        deployed.store.is_away = True
        deployed.run(70.0)
        assert all(worker.limiter.allotments.is_alone for worker in deployed.workers)
        # All was used at the beginning, and each has heard of all of it: it counts for as long as any other request.
        assert deployed.total(16.0, 70.0) <= workers
        deployed.run(130.0)
        assert 0.85 * limit <= deployed.total(71.0, 130.0) <= limit + workers
        deployed.store.is_away = False
        deployed.run(132.0)
        assert not any(worker.limiter.allotments.is_alone for worker in deployed.workers)
        held = sum(sum(window.values()) for window in deployed.store.windows.values())
        # But for what each may let through without a word.
        assert held + workers >= deployed.total(72.0, 132.0)
        deployed.run(140.0)
        # Who is back first does not know what the others have admitted.
        assert deployed.most_in_a_minute() <= 2 * limit


@pytest.mark.parametrize("seed", [*range(8), 47, 145])
def test_a_worker_that_goes_leaves_nothing_behind(seed: int) -> None:
    """A worker that stops reports what it has admitted and gives back what it has not used, and what it is being
    granted while it stops.
    """
    with deployment(seed, workers=1, most_delay_s=0.1) as deployed:
        (worker,) = deployed.workers
        deployed.load(6000, 50.0, 5.0)
        deployed.run(5.0)
        worker.stop()
        deployed.world.at(9.0, lambda: None)
        deployed.run(8.0)
        # But for what it may let through without a word.
        assert len(deployed.admitted) == sum(deployed.store.windows["key_1"].values()) + 80


def test_workers_that_start_together() -> None:
    """Workers that have not heard of each other yet let nothing through without a word, so that the bound holds from
    the beginning; a little later they do.
    """
    limit, workers = 6000, 5
    with deployment(13, workers=workers, are_new=True) as deployed:
        # As each sees it before the others have joined.
        deployed.store.workers = 1
        deployed.world.at(4.0, setattr, deployed.store, "workers", workers)
        deployed.load(limit, 60.0, 64.0)
        deployed.run(130.0)
        assert deployed.most_in_a_minute() <= 1.05 * limit + workers
        before = deployed.store.newest[KEY]
        deployed.load(limit, 0.1, 170.0)
        deployed.run(172.0)
        assert deployed.total(130.0, 172.0) > 10
        assert deployed.store.newest[KEY] == before


def test_workers_that_follow_upon_others() -> None:
    """When all workers are replaced within a minute, the bound holds for what those before and those after them let
    through together.
    """
    limit, workers = 6000, 3
    with deployment(17, workers=workers) as deployed:
        deployed.world.at(200.0, lambda: None)
        deployed.run(40.0)
        # In two windows of the clock's more than they may let through without a word.
        deployed.load(limit, 3.0, 75.0)
        deployed.run(76.0)
        for worker in tuple(deployed.workers):
            worker.stop()
        deployed.run(78.0)
        successors = [deployed.join() for _ in range(workers)]
        deployed.run(89.0)
        for worker in successors:
            deployed.load_of(worker, limit, 400.0, 99.0)
        deployed.run(101.0)
        assert limit < deployed.total(40.0, 100.0)
        assert deployed.most_in_a_minute() <= 1.05 * limit + 2 * workers


def test_a_worker_with_nothing_to_send_sleeps() -> None:
    """Without requests nothing is looked through but when the store is asked how many workers there are; a request is
    reported within a tick after all.
    """
    with deployment(1, workers=1) as deployed:
        (worker,) = deployed.workers
        looks: list[float] = []
        allotments = worker.limiter.allotments
        asks = allotments.asks

        def noted(key_ids: Sequence[str] | None = None) -> list[RateAsk]:
            looks.append(deployed.world.now_s)
            return asks(key_ids)

        allotments.asks = noted  # type: ignore[method-assign]
        deployed.run(60)
        assert 60 / HEAR_S - 3 <= len(looks) <= 60 / HEAR_S + 1
        worker.request(10)
        deployed.run(60 + TICK_S[1] + 0.01)
        assert deployed.world.now_s - looks[-1] < TICK_S[1]
        assert 1 == sum(deployed.store.windows[KEY].values())
        before = len(looks)
        deployed.run(200)
        assert len(looks) - before <= 140 / HEAR_S + 2


@pytest.mark.parametrize("seed", range(4))
def test_what_others_hold_too_much_of_has_ended_when_a_new_worker_begins(seed: int) -> None:
    """A worker without requests hears of a new one so soon that by the time it holds permits that last, those of the
    others have ended that are more than their part.
    """
    with deployment(seed, workers=1) as deployed:
        (worker,) = deployed.workers
        deployed.load(10_000, 400.0, 8.0)
        deployed.run(9.0)
        deployed.store.workers = 2
        deployed.run(9.0 + HEAR_S + 0.2)
        assert 2 == worker.limiter.allotments.workers
        assert HEAR_S + 0.2 + LASTING_S <= SETTLE_S
