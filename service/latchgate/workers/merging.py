"""The metrics of several workers as those of one service.

Counters and histograms are summed, and what workers that have ended had counted stays in the sums, so that none ever
goes back. Gauges have a label `worker`, but for those of which only the sum means something; so have the figures of
processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

SUMMED_GAUGES: Final = frozenset({"latchgate_last_used_pending"})
LASTING: Final = frozenset({"counter", "histogram", "summary"})
WORKER_CALLS: Final = "latchgate_worker_calls"
_CALLS: Final = "latchgate_calls"

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The samples of one metric: name, labels, value."""

    name: str
    documentation: str
    kind: str
    samples: Sequence[tuple[str, dict[str, str], float]]

    @property
    def is_by_worker(self) -> bool:
        """Whether each worker's is shown by itself."""
        return (
            self.name.startswith("process_")
            or self.name == WORKER_CALLS
            or (self.kind == "gauge" and self.name not in SUMMED_GAUGES)
        )


def read_registry(registry: CollectorRegistry) -> list[Family]:
    """Reads all metrics of a registry."""
    return [
        Family(
            name=metric.name,
            documentation=metric.documentation,
            kind=metric.type,
            samples=[(each.name, each.labels, each.value) for each in metric.samples],
        )
        for metric in registry.collect()
    ]


def as_message(families: Iterable[Family]) -> list[dict[str, Any]]:
    """Writes metrics down, so that another process can read them."""
    # By hand: `asdict` copies every sample, on the loop that answers calls.
    return [
        {"name": each.name, "documentation": each.documentation, "kind": each.kind, "samples": each.samples}
        for each in families
    ]


def from_message(families: Iterable[dict[str, Any]]) -> list[Family]:
    """Reads what a worker has written down, and adds how many calls it has answered: whether load is spread evenly."""
    found = [Family(**family) for family in families]
    answered = sum(
        value
        for family in found
        if family.name == _CALLS
        for name, _, value in family.samples
        if name.endswith("_total")
    )
    calls = Family(
        name=WORKER_CALLS,
        documentation="Calls that a worker has answered.",
        kind="counter",
        samples=[(f"{WORKER_CALLS}_total", {}, answered)],
    )
    return [*found, calls]


@dataclass(slots=True, kw_only=True)
class _Sums:
    """A metric as it is shown."""

    documentation: str
    kind: str
    values: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def add(self, worker: str, family: Family) -> None:
        """Adds one worker's samples."""
        for name, labels, value in family.samples:
            shown = {**labels, "worker": worker} if family.is_by_worker else labels
            key = name, tuple(shown.items())
            if name.endswith("_created"):
                self.values[key] = min(value, self.values.get(key, math.inf))
            elif family.is_by_worker and family.kind not in LASTING:
                self.values[key] = value
            else:
                self.values[key] = value + self.values.get(key, 0.0)


class Totals:
    """What all workers have counted since the service began."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._kept: dict[str, _Sums] = {}

    def keep(self, worker: str, families: Iterable[Family]) -> None:
        """Keeps for good what a worker that has ended had counted."""
        _add(self._kept, worker, (family for family in families if family.kind in LASTING))

    def merged(self, living: Iterable[tuple[str, Iterable[Family]]]) -> list[Metric]:
        """Gives all metrics. Of a worker that comes twice, the gauges of the latter are shown."""
        shown = {name: replace(sums, values=dict(sums.values)) for name, sums in self._kept.items()}
        for worker, families in living:
            _add(shown, worker, families)
        return [_metric(name, sums) for name, sums in shown.items()]


def _add(shown: dict[str, _Sums], worker: str, families: Iterable[Family]) -> None:
    for family in families:
        sums = shown.setdefault(family.name, _Sums(documentation=family.documentation, kind=family.kind))
        sums.add(worker, family)


def _metric(name: str, sums: _Sums) -> Metric:
    metric = Metric(name, sums.documentation, sums.kind)
    metric.samples = [Sample(each, dict(labels), value) for (each, labels), value in sums.values.items()]
    return metric
