"""Figures of several workers as those of one service."""

from __future__ import annotations

import json

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from latchgate.workers.merging import Family, Totals, as_message, from_message, read_registry

Shown = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def worker(calls: int, pending: int, is_up: int) -> list[Family]:
    """What a worker tells that has counted some calls."""
    registry = CollectorRegistry()
    counted = Counter("latchgate_calls", "Calls.", ["method"], registry=registry)
    timed = Histogram("latchgate_call_seconds", "Time.", buckets=(1.0,), registry=registry)
    for _ in range(calls):
        counted.labels(method="Validate").inc()
        timed.observe(0.5)
    Gauge("latchgate_last_used_pending", "Pending.", registry=registry).set(pending)
    Gauge("latchgate_database_up", "Up.", registry=registry).set(is_up)
    return from_message(json.loads(json.dumps(as_message(read_registry(registry)))))


def shown(totals: Totals, *living: tuple[str, list[Family]]) -> Shown:
    """What is shown of workers."""
    return {
        (sample.name, tuple(sample.labels.items())): sample.value
        for metric in totals.merged(living)
        for sample in metric.samples
    }


def test_counters_and_histograms_are_summed() -> None:
    """What workers count is shown as the sum, and beside it how many calls each has answered."""
    found = shown(Totals(), ("1", worker(2, 0, 1)), ("2", worker(3, 0, 1)))
    assert 5 == found["latchgate_calls_total", (("method", "Validate"),)]
    assert 5 == found["latchgate_call_seconds_bucket", (("le", "1.0"),)]
    assert 2.5 == found["latchgate_call_seconds_sum", ()]
    assert [2, 3] == [found["latchgate_worker_calls_total", (("worker", number),)] for number in ("1", "2")]


def test_gauges_are_shown_by_worker() -> None:
    """A gauge is shown for each worker, but for those of which the sum says something."""
    found = shown(Totals(), ("1", worker(0, 4, 1)), ("2", worker(0, 5, 0)))
    assert [1, 0] == [found["latchgate_database_up", (("worker", number),)] for number in ("1", "2")]
    assert 9 == found["latchgate_last_used_pending", ()]


def test_what_was_counted_stays() -> None:
    """What a worker had counted that has ended is in the sums for good; its gauges are gone with it."""
    totals = Totals()
    totals.keep("1", worker(2, 4, 1))
    totals.keep("1", worker(3, 4, 1))
    for _ in range(2):
        found = shown(totals, ("1", worker(1, 0, 0)))
        assert 6 == found["latchgate_calls_total", (("method", "Validate"),)]
        assert 6 == found["latchgate_worker_calls_total", (("worker", "1"),)]
        assert 0 == found["latchgate_last_used_pending", ()]
        assert 0 == found["latchgate_database_up", (("worker", "1"),)]
    assert ("latchgate_database_up", (("worker", "1"),)) not in shown(totals)


def test_time_of_creation_is_the_first() -> None:
    """The time since when something is counted is not added up: the earliest is shown."""
    first, second = worker(1, 0, 1), worker(1, 0, 1)
    times = [
        value for family in (*first, *second) for name, _, value in family.samples if name == "latchgate_calls_created"
    ]
    assert (
        min(times) == shown(Totals(), ("2", second), ("1", first))["latchgate_calls_created", (("method", "Validate"),)]
    )
