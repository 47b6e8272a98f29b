"""What is seen of a service's workers over hours: samples, the file that they are kept in, and what became of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from bench.metrics import Scrape

LEAST_POINTS = 3
"""From how many points on a slope is given."""

# What is sampled of each worker, by the metric that tells it.
MEASURES = {
    "rss_bytes": "process_resident_memory_bytes",
    "descriptors": "process_open_fds",
    "tasks": "latchgate_tasks",
    "keys": "latchgate_memory_keys",
    "calls": "latchgate_worker_calls_total",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One worker at one moment, in seconds since the load began. A measure that the service does not tell is absent."""

    at_s: float
    worker: str
    values: dict[str, float]


def taken(scrape: Scrape, at_s: float) -> list[Sample]:
    """Gives a sample of each worker."""
    found = {measure: scrape.by("worker", metric) for measure, metric in MEASURES.items()}
    # The supervisor, which holds no keys, is not asked for anything.
    return [
        Sample(
            at_s=at_s,
            worker=worker,
            values={measure: values[worker] for measure, values in found.items() if worker in values},
        )
        for worker in sorted(found["keys"])
    ]


class SampleFile:
    """A file of samples that is complete after each one: comma-separated, a line for each worker, the head first."""

    def __init__(self, file: TextIO, beside: Sequence[str]) -> None:
        """Takes the names of what else is written down with each sample."""
        self._file = file
        self._file.write(",".join(("at_s", "worker", *MEASURES, *beside)) + "\n")
        self._file.flush()

    def write(self, samples: Sequence[Sample], beside: Sequence[int]) -> None:
        """Adds lines."""
        for each in samples:
            values = (f"{each.values[name]:.0f}" if name in each.values else "" for name in MEASURES)
            self._file.write(",".join((f"{each.at_s:.1f}", each.worker, *values, *map(str, beside))) + "\n")
        self._file.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """What became of a measure. `settled` and `per_hour` are None for want of samples after it has settled."""

    start: float
    settled: float | None
    end: float
    least: float
    most: float
    per_hour: float | None


def points(samples: Sequence[Sample], worker: str, measure: str) -> list[tuple[float, float]]:
    """Gives times and values of a worker's measure."""
    return [(each.at_s, each.values[measure]) for each in samples if each.worker == worker and measure in each.values]


def trend(values: Sequence[tuple[float, float]], settling_s: float) -> Trend | None:
    """Says what became of values; None if there are none.

    The slope is that of the line of least squares through what was seen from `settling_s` on.
    """
    if not values:
        return None
    settled = [(at_s, value) for at_s, value in values if at_s >= settling_s]
    per_hour = None
    if len(settled) >= LEAST_POINTS:
        per_hour = statistics.linear_regression(*zip(*settled, strict=True)).slope * 3600
    seen = [value for _, value in values]
    return Trend(
        start=seen[0],
        settled=settled[0][1] if settled else None,
        end=seen[-1],
        least=min(seen),
        most=max(seen),
        per_hour=per_hour,
    )
