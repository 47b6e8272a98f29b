"""What Prometheus is shown of all workers and their supervisor."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latchgate.workers.merging import Totals, read_registry
from latchgate.workers.process import WorkerProcess

SUPERVISOR: Final = "supervisor"
"""What stands for the supervisor in the label `worker`."""
SCRAPE_TIMEOUT_S: Final = 4.0

_log = structlog.get_logger("latchgate.workers")


class FleetMetrics(Collector):
    """Gathers the metrics of the workers that are there, and keeps what those counted that are not.

    Is made in the loop that the workers are followed in, and may be read by any thread.
    """

    def __init__(self) -> None:
        """Begins with no workers."""
        self.living: list[WorkerProcess] = []
        self.deaths = 0
        self._totals = Totals()
        self._loop = asyncio.get_running_loop()
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)

    def ended(self, worker: WorkerProcess) -> None:
        """A worker is gone; what it had counted stays."""
        self.living.remove(worker)
        self._totals.keep(str(worker.number), worker.families)

    async def refresh(self) -> None:
        """Has all workers tell their metrics anew."""
        await asyncio.gather(*(worker.tell_metrics() for worker in self.living))

    def collect(self) -> Iterable[Metric]:
        """Gives all metrics. Not to be called in the loop."""
        try:
            return asyncio.run_coroutine_threadsafe(self._gather(), self._loop).result(SCRAPE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - what serves the metrics would write a traceback
            _log.error("metrics_not_gathered", error=type(error).__name__)
            return []

    async def _gather(self) -> list[Metric]:
        await self.refresh()
        # Of two in one place, the gauges of the one that takes new connections.
        living = sorted(self.living, key=lambda worker: worker.is_open)
        parts = [(SUPERVISOR, read_registry(self._own)), *((str(each.number), each.families) for each in living)]
        return [*self._totals.merged(parts), *self.of_workers()]

    def of_workers(self) -> Iterable[Metric]:
        """Gives what there is to say of the workers themselves."""
        states = Counter(_state(worker) for worker in self.living)
        workers = GaugeMetricFamily("latchgate_workers", "Worker processes, by what they do.", labels=["state"])
        for state in ("starting", "ready", "leaving"):
            workers.add_metric([state], states[state])
        yield workers
        yield CounterMetricFamily(
            "latchgate_worker_deaths", "Workers that ended unasked and were replaced.", self.deaths
        )


def _state(worker: WorkerProcess) -> str:
    if worker.is_retiring or worker.is_leaving:
        return "leaving"
    return "ready" if worker.is_ready else "starting"
