"""Log lines and metrics: how they are written, and their names."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import accumulate
from operator import add
from typing import Any, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latchgate.domain.coherence import Reading
from latchgate.domain.model import Outcome
from latchgate.domain.outbox import OutboxFigures
from latchgate.gateway.credentials import Problem

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# The last line of defence, not the first: nothing hands a token or a connection string to a logger.
_SECRET = re.compile(
    r"_[0-9A-Za-z]{40,}|eyJ[\w-]{10,}\.[\w-]*(?:\.[\w-]*)?|postgres(?:ql)?://\S+|bearer\s+\S+", re.IGNORECASE
)
_REDACTED = "[redacted]"


def _redact(value: Any) -> Any:
    if isinstance(value, str):
        return _SECRET.sub(_REDACTED, value)
    if isinstance(value, dict):
        return {name: _redact(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(each) for each in value]
    return value


def _redact_event(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: _redact(value) for name, value in event.items()}


class _Output:
    """Standard error, whose failures reach nobody: a full disk or a closed pipe must not fail calls."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def configure_logging(*, level: str, as_json: bool) -> None:
    """Sends all log lines, the libraries' too, to standard error: one JSON object each, or coloured for people."""
    output = cast("TextIO", _Output())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact_event,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_library_event, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            use_get_message=False,
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def _library_event(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keeps of a library's line what it is about, and nothing that it was filled with.

    Arguments, further lines and what an exception says may hold what was sent: grpc logs headers that are not UTF-8.
    """
    record: logging.LogRecord = event["_record"]
    event["event"] = (str(record.msg).splitlines() or [""])[0]
    event["logger"] = record.name
    for traceback in ("exc_info", "stack_info"):
        event.pop(traceback, None)
    if record.exc_info and record.exc_info[0]:
        event["error"] = record.exc_info[0].__name__
    return event


class _Recalled:
    """Implements latchgate.observers.Tally."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self.quick_s = _SECONDS[0]
        self.quick = 0
        self.seconds = 0.0
        self.valid = 0
        # Counts by bucket of those that took longer.
        self.buckets = _no_buckets()

    def slow(self, seconds: float) -> None:
        """Counts one that took longer."""
        self.buckets[bisect_left(_SECONDS, seconds)] += 1
        self.seconds += seconds


class _Calls(Collector):
    """Calls by method and status, and how long they took. Numbers are plain ones: a lock for each call costs too much.

    Written by one thread, read by any.
    """

    def __init__(self, tallies: Mapping[str, _Recalled]) -> None:
        """Takes where those are counted that were answered without a detour, by method."""
        self._tallies = tallies
        self._counts: dict[tuple[str, str], int] = {}
        # For each method the counts by bucket, those of longer than the longest last; and the sum.
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def add(self, method: str, code: str, seconds: float) -> None:
        """Counts a call."""
        known = method, code
        self._counts[known] = self._counts.get(known, 0) + 1
        buckets = self._buckets.get(method)
        if buckets is None:
            self._sums[method] = 0.0
            buckets = self._buckets[method] = _no_buckets()
        buckets[bisect_left(_SECONDS, seconds)] += 1
        self._sums[method] += seconds

    def describe(self) -> Iterable[Metric]:
        """Says what there is, without any figures."""
        return _calls_family(), _durations_family()

    def collect(self) -> Iterable[Metric]:
        """Shows them."""
        counts = self._counts.copy()
        buckets = {method: list(each) for method, each in tuple(self._buckets.items())}
        sums = self._sums.copy()
        for method, tally in tuple(self._tallies.items()):
            tallied = [tally.quick + tally.buckets[0], *tally.buckets[1:]]
            if any(tallied):
                counts[method, "OK"] = counts.get((method, "OK"), 0) + sum(tallied)
                buckets[method] = list(map(add, tallied, buckets.get(method, _no_buckets())))
                sums[method] = sums.get(method, 0.0) + tally.seconds
        calls = _calls_family()
        for labels, count in counts.items():
            calls.add_metric(labels, count)
        yield calls
        durations = _durations_family()
        bounds = [*map(str, _SECONDS), "+Inf"]
        for method, each in buckets.items():
            durations.add_metric([method], list(zip(bounds, accumulate(each), strict=True)), sums[method])
        yield durations


def _no_buckets() -> list[int]:
    return [0] * (len(_SECONDS) + 1)


def _calls_family() -> CounterMetricFamily:
    return CounterMetricFamily("latchgate_calls", "Calls by method and gRPC status.", labels=["method", "code"])


def _durations_family() -> HistogramMetricFamily:
    return HistogramMetricFamily("latchgate_call_seconds", "Time to answer a call.", labels=["method"])


def _outcomes_family() -> CounterMetricFamily:
    return CounterMetricFamily("latchgate_outcomes", "Tokens judged, by outcome.", labels=["outcome"])


class _Outcomes(Collector):
    """Outcomes, counted as calls are."""

    def __init__(self, tallies: Mapping[str, _Recalled]) -> None:
        """Takes where else VALID is counted, by method."""
        self._tallies = tallies
        self.counts = dict.fromkeys(Outcome, 0)

    def describe(self) -> Iterable[Metric]:
        """Says what there is, without any figures."""
        return (_outcomes_family(),)

    def collect(self) -> Iterable[Metric]:
        """Shows them."""
        family = _outcomes_family()
        tallied = sum(tally.valid for tally in tuple(self._tallies.values()))
        for outcome, count in self.counts.items():
            family.add_metric([outcome.name], count + tallied if outcome is Outcome.VALID else count)
        yield family


class Metrics:
    """All metrics, on a registry of their own. Implements the observers that rpc and storage tell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers the metrics."""
        self.registry = registry
        # Memory, processor time and open files, which a registry of one's own is without.
        ProcessCollector(registry=registry)
        self._tallies: dict[str, _Recalled] = {}
        calls, outcomes = _Calls(self._tallies), _Outcomes(self._tallies)
        self.finished = calls.add
        self._outcomes = outcomes.counts
        registry.register(calls)
        registry.register(outcomes)
        unjudged = Counter(
            "latchgate_unjudged",
            "Requests of gateways' clients with no token (missing), or with several (conflict).",
            ["problem"],
            registry=registry,
        )
        self._unjudged = {problem.value: unjudged.labels(problem=problem.value) for problem in Problem}
        self._refresh_reuses = Counter(
            "latchgate_refresh_tokens_reused",
            "Refresh tokens that were used a second time: what came of their exchange has ended.",
            registry=registry,
        )
        self._lookups = Counter(
            "latchgate_lookups", "Digests asked of the database: answered or error.", ["result"], registry=registry
        )
        self._batch_size = Histogram(
            "latchgate_lookup_batch_size",
            "Digests in a statement.",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
            registry=registry,
        )
        self._lookup_seconds = Histogram(
            "latchgate_lookup_seconds", "Time of a lookup statement.", buckets=_SECONDS, registry=registry
        )
        self._rate_statements = Counter(
            "latchgate_rate_limit_statements",
            "Statements to the store of rate limits: answered or error.",
            ["result"],
            registry=registry,
        )
        self._rate_asks = Counter(
            "latchgate_rate_limit_asks", "Keys that these statements were about, each time.", registry=registry
        )
        self._rate_seconds = Histogram(
            "latchgate_rate_limit_seconds", "Time of such a statement.", buckets=_SECONDS, registry=registry
        )
        self._exchanged = self._rate_statements.labels(result="answered")
        self._not_exchanged = self._rate_statements.labels(result="error")
        self._unrecorded = Counter(
            "latchgate_audit_unrecorded",
            "Refused calls of management that could not be recorded in the audit trail.",
            registry=registry,
        )
        self._readings = Counter(
            "latchgate_log_readings", "Readings of the change log, by what they led to.", ["result"], registry=registry
        )
        self._changes = Counter("latchgate_changes_applied", "Changes that were applied.", registry=registry)
        self._links_lost = Counter(
            "latchgate_links_lost",
            "Connections of their own that failed: to read the log, or to hear of news.",
            ["link"],
            registry=registry,
        )
        self._deliveries = Counter(
            "latchgate_webhook_attempts",
            "Attempts to send an event to a webhook: delivered, pending (to be tried again) or dead.",
            ["result"],
            registry=registry,
        )
        self._mails = Counter(
            "latchgate_mail_attempts", "Attempts to send a mail, likewise.", ["result"], registry=registry
        )
        self._waiting = Gauge(
            "latchgate_outbox_pending", "What waits to be sent, in all workers together.", ["kind"], registry=registry
        )
        self._waiting_s = Gauge(
            "latchgate_webhook_oldest_pending_seconds",
            "For how long the oldest delivery has waited, in all workers together.",
            registry=registry,
        )
        self._disabled = Gauge("latchgate_webhooks_disabled", "Webhooks that are disabled.", registry=registry)
        self._answered = self._lookups.labels(result="answered")
        self._failed = self._lookups.labels(result="error")
        self.database_up = Gauge(
            "latchgate_database_up",
            "Whether the database answers and can be written (1) or not (0).",
            registry=registry,
        )

    def tally(self, method: str) -> _Recalled:
        """Where calls of `method` are counted that are answered from memory, or looked up with nothing else to do."""
        return self._tallies.setdefault(method, _Recalled())

    def outcome(self, outcome: Outcome) -> None:
        """A token was judged."""
        self._outcomes[outcome] += 1

    def unjudged(self, problem: str) -> None:
        """A gateway's client has sent no token, or several."""
        self._unjudged[problem].inc()

    def batch(self, size: int, seconds: float) -> None:
        """A statement for `size` digests was answered after `seconds`."""
        self._answered.inc(size)
        self._batch_size.observe(size)
        self._lookup_seconds.observe(seconds)

    def failed(self, size: int) -> None:
        """A statement for `size` digests was not answered."""
        self._failed.inc(size)

    def exchanged(self, keys: int, seconds: float) -> None:
        """The store of rate limits has answered for `keys` keys after `seconds`."""
        self._exchanged.inc()
        self._rate_asks.inc(keys)
        self._rate_seconds.observe(seconds)

    def not_exchanged(self) -> None:
        """The store of rate limits has not answered."""
        self._not_exchanged.inc()

    def refresh_token_reused(self) -> None:
        """A refresh token was used that was used up before."""
        self._refresh_reuses.inc()

    def unrecorded(self) -> None:
        """A refused call of management could not be recorded."""
        self._unrecorded.inc()

    def reading(self, result: Reading, changes: int) -> None:
        """The log of changes was read."""
        self._readings.labels(result=result.value).inc()
        self._changes.inc(changes)

    def delivery_attempted(self, result: str) -> None:
        """A delivery was tried: it is `delivered`, `pending` again or `dead`."""
        self._deliveries.labels(result=result).inc()

    def mail_attempted(self, result: str) -> None:
        """A mail was tried, likewise."""
        self._mails.labels(result=result).inc()

    def outbox(self, figures: OutboxFigures) -> None:
        """What waits to be sent was counted."""
        self._waiting.labels(kind="delivery").set(figures.deliveries)
        self._waiting.labels(kind="mail").set(figures.mails)
        self._waiting_s.set(figures.oldest_s)
        self._disabled.set(figures.disabled)

    def link_lost(self, link: str) -> None:
        """A connection of the protocol between workers failed."""
        self._links_lost.labels(link=link).inc()

    def watch(self, collector: Collector) -> None:
        """Adds figures that are read when they are scraped."""
        self.registry.register(collector)
