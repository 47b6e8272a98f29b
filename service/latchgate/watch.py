"""What is said of the state that the service is in: its health, and figures for metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latchgate.background import Background
from latchgate.domain.coherence import Coherence
from latchgate.domain.floods import ForeignLookupBudget
from latchgate.limiting import SharedLimiter
from latchgate.observability import Metrics
from latchgate.rpc.server import RpcServer
from latchgate.storage.lookups import BatchingKeyReader
from latchgate.storage.postgres import Database
from latchgate.storage.probe import DatabaseProbe
from latchgate.storage.usage import UsageBuffer

_log = structlog.get_logger("latchgate.watch")


class DatabaseWatch:
    """Keeps health and metrics true to the database."""

    def __init__(
        self,
        probe: DatabaseProbe,
        server: RpcServer,
        metrics: Metrics,
        background: Background,
        coherence: Coherence,
        reader: BatchingKeyReader,
    ) -> None:
        """Takes how to ask, and who is to know."""
        self._coherence = coherence
        self._reader = reader
        self._probe = probe
        self._server = server
        self._metrics = metrics
        self._background = background
        self._is_up = True

    async def show(self, *, is_up: bool) -> None:
        """Says that the database is up, or that it is away."""
        self._is_up = is_up
        self._metrics.database_up.set(int(is_up))
        await self._say()

    async def _say(self) -> None:
        # While the lease lasts, what is in memory can be answered.
        await self._server.set_serving(is_serving=self._is_up or self._coherence.lease_left_s > 0)

    async def look(self) -> None:
        """Asks the database, and says what is new."""
        try:
            is_up = await self._probe.is_writable()
        except Exception as error:  # noqa: BLE001 - a database that can not even be asked is not there
            self._background.failed("database watch", error)
            await self._probe.close()
            is_up = False
        if is_up != self._is_up:
            (_log.info if is_up else _log.error)("database_back" if is_up else "database_away")
            await self.show(is_up=is_up)
        elif not is_up:
            await self._say()
        if not is_up:
            # Found out before a lookup has to wait for it.
            self._reader.suspect()


class Figures(Collector):
    """Figures that are read when they are scraped."""

    def __init__(
        self,
        database: Database,
        usage: UsageBuffer,
        foreign: ForeignLookupBudget,
        background: Background,
        coherence: Coherence,
        limiter: SharedLimiter,
    ) -> None:
        """Takes what to read. It may be read by any thread."""
        self._limiter = limiter
        self._loop = asyncio.get_running_loop()
        self._coherence = coherence
        self._database = database
        self._usage = usage
        self._foreign = foreign
        self._background = background

    def collect(self) -> Iterable[Metric]:
        """Reads them."""
        pool = self._database.management
        busy = pool.get_size() - pool.get_idle_size()
        connections = GaugeMetricFamily(
            "latchgate_pool_connections", "Connections for management: at work, or free to be had.", labels=["state"]
        )
        connections.add_metric(["busy"], busy)
        connections.add_metric(["idle"], pool.get_max_size() - busy)
        yield connections
        yield GaugeMetricFamily(
            "latchgate_last_used_pending", "Secrets whose usage is not written yet.", self._usage.pending
        )
        yield CounterMetricFamily(
            "latchgate_foreign_lookups_refused",
            "Unknown tokens of foreign formats that were over the budget of lookups.",
            self._foreign.refused,
        )
        yield GaugeMetricFamily("latchgate_tasks", "Tasks of the event loop.", len(asyncio.all_tasks(self._loop)))
        yield from self._memory()
        yield from self._limits()
        failures = CounterMetricFamily(
            "latchgate_background_failures",
            "Work beside the calls that ended with an error which nobody expected; the log has it as work_failed.",
            labels=["work"],
        )
        for work, count in self._background.failures.items():
            failures.add_metric([work], count)
        yield failures

    def _limits(self) -> Iterable[Metric]:
        limiter = self._limiter
        yield GaugeMetricFamily(
            "latchgate_rate_limits_local",
            "Whether each worker keeps rate limits by itself, because their store is away (1), or not (0).",
            int(limiter.allotments.is_alone),
        )
        yield GaugeMetricFamily(
            "latchgate_rate_limit_keys", "Keys whose rate limit is known here.", len(limiter.allotments)
        )
        yield CounterMetricFamily(
            "latchgate_rate_limit_waits", "Calls that waited for the store of rate limits.", limiter.waits
        )

    def _memory(self) -> Iterable[Metric]:
        coherence = self._coherence
        yield CounterMetricFamily("latchgate_memory_hits", "Tokens that were answered from memory.", coherence.hits)
        yield GaugeMetricFamily("latchgate_memory_keys", "Secrets in memory.", len(coherence.cache))
        yield CounterMetricFamily(
            "latchgate_memory_evictions", "Secrets that others have driven out of memory.", coherence.cache.evicted
        )
        yield GaugeMetricFamily(
            "latchgate_lease_left_seconds", "For how long memory may still be answered from.", coherence.lease_left_s
        )
        yield GaugeMetricFamily(
            "latchgate_applied_revision", "The newest change that is applied.", coherence.applied_revision
        )
