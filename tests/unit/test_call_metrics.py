"""Calls and how long they took: those that were answered from memory and all others are shown as one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from latchgate.domain.model import Outcome
from latchgate.observability import Metrics

METHOD = "KeyService/Validate"
OTHER = "KeyService/GetKey"


def shown(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """All that is shown of calls, by name and labels."""
    return {
        (sample.name.removeprefix("latchgate_"), *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        if family.name in {"latchgate_calls", "latchgate_call_seconds"}
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    """Three quick calls from memory and a slow one; a looked-up one, one that failed, and one of another method."""
    made = Metrics(CollectorRegistry())
    tally = made.tally(METHOD)
    tally.quick += 3
    tally.seconds += 0.0006
    tally.valid += 2
    tally.slow(0.003)
    made.finished(METHOD, "OK", 0.02)
    made.finished(METHOD, "UNAVAILABLE", 9.0)
    made.finished(OTHER, "OK", 0.02)
    made.outcome(Outcome.VALID)
    return made


def test_calls_are_shown_by_how_they_ended(metrics: Metrics) -> None:
    """Whether it was answered from memory is not seen of a call."""
    found = shown(metrics)
    assert {("OK", METHOD): 5, ("UNAVAILABLE", METHOD): 1, ("OK", OTHER): 1} == {
        (labels[1], labels[0]): value for (name, *labels), value in found.items() if name == "calls_total"
    }
    assert 3 == metrics.registry.get_sample_value("latchgate_outcomes_total", {"outcome": "VALID"})


def test_times_are_shown_in_buckets(metrics: Metrics) -> None:
    """Each call is in the bucket of its time and all above, and the sum is that of all."""
    found = shown(metrics)
    counts = [value for (name, *labels), value in found.items() if name == "call_seconds_bucket" and METHOD in labels]
    # Up to 0.5 ms, 5 ms, 25 ms and beyond 5 s.
    assert [(0, 3), (3, 1), (5, 1), (13, 1)] == [
        (at, after - before) for at, (before, after) in enumerate(pairwise([0.0, *counts])) if after != before
    ]
    assert 6 == found["call_seconds_count", METHOD]
    assert pytest.approx(9.0236) == found["call_seconds_sum", METHOD]
    assert (1, 0.02) == (found["call_seconds_count", OTHER], found["call_seconds_sum", OTHER])


def test_reading_counts_nothing(metrics: Metrics) -> None:
    """Whoever reads twice reads the same."""
    assert shown(metrics) == shown(metrics)


@pytest.mark.parametrize("name", ["latchgate_calls_total", "latchgate_call_seconds_count", "latchgate_outcomes_total"])
def test_each_can_be_asked_for_by_its_name(metrics: Metrics, name: str) -> None:
    """`/metrics?name[]=NAME` shows that and nothing else."""
    asked: Any = metrics.registry.restricted_registry([name])
    assert {name} == {sample.name for family in asked.collect() for sample in family.samples}


def test_methods_answered_from_memory_alone_are_shown() -> None:
    """A method of which all calls were quick has its times as well; one that was never called is not shown."""
    made = Metrics(CollectorRegistry())
    made.tally(OTHER)
    tally = made.tally(METHOD)
    tally.quick += 1
    tally.seconds += 0.0002
    found = shown(made)
    assert (1, 1) == (found["calls_total", METHOD, "OK"], found["call_seconds_count", METHOD])
    assert not any(OTHER in labels for labels in found)
