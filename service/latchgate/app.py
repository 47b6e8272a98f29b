"""The composition root: opens everything in order, closes it in reverse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from ulid import ULID

from latchgate.config import Settings, SettingsError, ValidateAccess, load_scopes
from latchgate.domain.effects import ImmediateEffects
from latchgate.domain.errors import UnavailableError
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import Scope
from latchgate.domain.organizations import OrganizationManager
from latchgate.domain.ratelimit import WindowLimiter
from latchgate.domain.token import TokenFormat
from latchgate.domain.validation import ForeignLookupBudget, Validator
from latchgate.observability import Metrics
from latchgate.rpc.key_service import KeyService
from latchgate.rpc.organization_service import OrganizationService
from latchgate.rpc.pages import PageTokens
from latchgate.rpc.pipeline import Backend, Pipeline
from latchgate.rpc.server import KEY_SERVICE, ORGANIZATION_SERVICE, RpcServer, make_server
from latchgate.rpc.tls import CertificateError, ReloadingCredentials, TlsFiles
from latchgate.storage.bootstrap import RootKey, ensure_root_key, load_tag_key
from latchgate.storage.embedded import EmbeddedPostgres
from latchgate.storage.lookups import BatchingKeyReader, find_many
from latchgate.storage.migrate import migrate
from latchgate.storage.postgres import LOOKUP_CONNECTIONS, Database
from latchgate.storage.probe import DatabaseProbe
from latchgate.storage.requests import RequestSealer, forget_requests
from latchgate.storage.stores import PostgresStore
from latchgate.storage.usage import UsageBuffer

PROBE_INTERVAL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 1.0
FORGET_INTERVAL_S: Final = 30.0
START_RETRY_S: Final = 1.0

_log = structlog.get_logger("latchgate.app")


def make_id(prefix: str) -> str:
    """Makes an id that sorts by the time it was made: a prefix and a ULID in lower case."""
    return prefix + str(ULID()).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a start has found and made. `schema_before` is None for a new database."""

    root: RootKey
    schema_before: str | None
    schema: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A service that listens. `ready` is done once it has its database; it fails if it never can."""

    server: RpcServer
    metrics: Metrics
    ready: asyncio.Task[Ready]


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Running]:
    """Listens, connects to the database as soon as it is there, and at the end stops in order.

    Raises SettingsError, ListenError and EmbeddedDatabaseError, each with one line that says what to do.
    """
    scopes = load_scopes(settings.scopes_file)
    credentials = _credentials(settings)
    async with AsyncExitStack() as stack:
        metrics = Metrics(CollectorRegistry())
        _serve_metrics(stack, settings.metrics_listen, metrics)
        pipeline = Pipeline(metrics, is_validate_open=settings.validate_access is ValidateAccess.OPEN)
        server = make_server(
            pipeline=pipeline,
            listen=settings.listen,
            credentials=credentials.credentials() if credentials else None,
        )
        await server.set_serving(is_serving=False)
        dsn = await _database_address(stack, settings)
        database = await Database.open(dsn, pool_size=settings.pool_size)
        stack.push_async_callback(database.close)
        usage = UsageBuffer(database)
        await server.server.start()
        parts = _Parts(settings=settings, scopes=scopes, metrics=metrics, database=database, usage=usage)
        # From the last to the first: calls end, then the work beside them, then what they left is written.
        stack.push_async_callback(_flush_last, usage)
        beside = await stack.enter_async_context(AsyncExitStack())
        ready = asyncio.create_task(_get_ready(beside, parts, dsn, pipeline, server))
        stack.push_async_callback(_cancelled, [ready])
        stack.push_async_callback(server.stop, settings.drain_seconds)
        yield Running(server=server, metrics=metrics, ready=ready)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    settings: Settings
    scopes: tuple[Scope, ...]
    metrics: Metrics
    database: Database
    usage: UsageBuffer


def _credentials(settings: Settings) -> ReloadingCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    files = TlsFiles(certificate=settings.tls_cert, key=settings.tls_key, client_ca=settings.tls_client_ca)
    try:
        return ReloadingCredentials(files)
    except CertificateError as error:
        raise SettingsError(f"LATCHGATE_TLS_CERT, LATCHGATE_TLS_KEY, LATCHGATE_TLS_CLIENT_CA: {error}") from None


def _serve_metrics(stack: AsyncExitStack, listen: str, metrics: Metrics) -> None:
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=metrics.registry)
    except OSError as error:
        raise SettingsError(f"LATCHGATE_METRICS_LISTEN: {listen} can not be listened on: {error.strerror}") from None
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)


async def _database_address(stack: AsyncExitStack, settings: Settings) -> str:
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    # On a thread: starting and stopping take seconds, and signals must be heard meanwhile.
    embedded = await asyncio.to_thread(EmbeddedPostgres.start, Path(settings.data_dir))
    stack.push_async_callback(asyncio.to_thread, embedded.stop)
    return await embedded.create_database()


async def _get_ready(stack: AsyncExitStack, parts: _Parts, dsn: str, pipeline: Pipeline, server: RpcServer) -> Ready:
    """Prepares the database, waiting for it if it is away, and lets calls through."""
    settings, database = parts.settings, parts.database
    before, schema = await _patiently(lambda: migrate(dsn))
    from_settings = settings.tag_key.get_secret_value().encode() if settings.tag_key else None
    tag_key = await _patiently(lambda: load_tag_key(database, from_settings))
    tokens = TokenFormat(tag_key, settings.token_prefixes)
    root_token = settings.root_token.get_secret_value() if settings.root_token else None
    root = await _patiently(lambda: ensure_root_key(database, tokens, make_id, root_token))
    reader = BatchingKeyReader(
        find_many(database), connections=LOOKUP_CONNECTIONS, observer=parts.metrics, monotonic=time.monotonic
    )
    stack.push_async_callback(reader.close)
    foreign = ForeignLookupBudget(time.monotonic)
    parts.metrics.watch(_Figures(database, parts.usage, foreign))
    probe = DatabaseProbe(dsn, PROBE_TIMEOUT_S)
    stack.push_async_callback(probe.close)
    pipeline.connect(_backend(parts, tokens, tag_key, reader, foreign))
    await server.set_serving(is_serving=True)
    tasks = [
        asyncio.create_task(_watch_database(probe, server, parts.metrics)),
        asyncio.create_task(_repeat(settings.usage_flush_seconds, parts.usage.flush)),
        asyncio.create_task(_repeat(FORGET_INTERVAL_S, lambda: forget_requests(database))),
    ]
    stack.push_async_callback(_cancelled, tasks)
    return Ready(root=root, schema_before=before, schema=schema)


def _backend(
    parts: _Parts, tokens: TokenFormat, tag_key: bytes, reader: BatchingKeyReader, foreign: ForeignLookupBudget
) -> Backend:
    """Puts the use cases together."""
    store, effects, pages = PostgresStore(parts.database), ImmediateEffects(), PageTokens(tag_key)
    validator = Validator(
        tokens=tokens, keys=reader, limiter=WindowLimiter(time.monotonic), usage=parts.usage, foreign=foreign
    )
    keys = KeyManager(
        store=store,
        tokens=tokens,
        sealer=RequestSealer(tag_key),
        effects=effects,
        make_id=make_id,
        deployment_scopes=parts.scopes,
    )
    organizations = OrganizationManager(store=store, effects=effects, make_id=make_id)
    services = {
        KEY_SERVICE.full_name: KeyService(keys=keys, validator=validator, pages=pages, outcomes=parts.metrics),
        ORGANIZATION_SERVICE.full_name: OrganizationService(organizations=organizations, pages=pages),
    }
    return Backend(validator=validator, services=services)


Result = TypeVar("Result")


async def _patiently(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Repeats an attempt until the database is there."""
    while True:
        try:
            return await attempt()
        except UnavailableError as error:
            _log.warning("waiting_for_database", problem=error.message)
        await asyncio.sleep(START_RETRY_S)


async def _repeat(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Does some work again and again; a time at which the database is away is let pass."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await work()
        except UnavailableError as error:
            _log.warning("work_put_off", problem=error.message)


async def _watch_database(probe: DatabaseProbe, server: RpcServer, metrics: Metrics) -> None:
    """Keeps health and metrics true to the database."""
    was_up = True
    metrics.database_up.set(1)
    while True:
        is_up = await probe.is_writable()
        if is_up != was_up:
            (_log.info if is_up else _log.error)("database_back" if is_up else "database_away")
            await server.set_serving(is_serving=is_up)
            metrics.database_up.set(int(is_up))
        was_up = is_up
        await asyncio.sleep(PROBE_INTERVAL_S)


async def _flush_last(usage: UsageBuffer) -> None:
    try:
        await usage.flush()
    except UnavailableError:
        _log.warning("last_used_times_lost", count=usage.pending)


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Ends tasks and waits until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Figures(Collector):
    """Figures that are read when they are scraped."""

    def __init__(self, database: Database, usage: UsageBuffer, foreign: ForeignLookupBudget) -> None:
        self._database = database
        self._usage = usage
        self._foreign = foreign

    def collect(self) -> Iterable[Metric]:
        pool = self._database.management
        busy = pool.get_size() - pool.get_idle_size()
        connections = GaugeMetricFamily(
            "latchgate_pool_connections", "Connections for management: at work, or free to be had.", labels=["state"]
        )
        connections.add_metric(["busy"], busy)
        connections.add_metric(["idle"], pool.get_max_size() - busy)
        yield connections
        yield GaugeMetricFamily(
            "latchgate_last_used_pending", "Secrets whose last use is not written yet.", self._usage.pending
        )
        yield CounterMetricFamily(
            "latchgate_foreign_lookups_refused",
            "Unknown tokens of foreign formats that were over the budget of lookups.",
            self._foreign.refused,
        )
