"""The composition root: opens everything in order, closes it in reverse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import asyncpg
import structlog
from prometheus_client import CollectorRegistry

from latchgate.background import Background
from latchgate.config import Settings, SettingsError, ValidateAccess, load_scopes
from latchgate.database import database_address
from latchgate.domain.access import CORE_SCOPES
from latchgate.domain.cache import KeyCache
from latchgate.domain.catalogue import missing
from latchgate.domain.coherence import Coherence, LeaseTerms
from latchgate.domain.errors import UnavailableError
from latchgate.domain.floods import ForeignLookupBudget, Patience
from latchgate.domain.keyring import Keyring
from latchgate.domain.model import Scope
from latchgate.domain.permissions import WILDCARD
from latchgate.domain.suspicion import SuspicionCounter
from latchgate.domain.token import TokenFormat, digest
from latchgate.domain.validation import Validator
from latchgate.draining import drain, retire
from latchgate.housekeeping import keep_house
from latchgate.ids import make_id
from latchgate.limiting import SharedLimiter
from latchgate.listening import PortError, Role, serve_metrics
from latchgate.login import open_login
from latchgate.observability import Metrics
from latchgate.outgoing import send_out
from latchgate.rpc import convert
from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import (
    ListenError,
    RpcServer,
    make_server,
)
from latchgate.rpc.tls import CertificateError, ReloadingCredentials, TlsFiles
from latchgate.services import Core, Parts, make_backend, tell_of_lost_keys
from latchgate.storage.audit import PostgresTrail
from latchgate.storage.bootstrap import RootKey, ensure_root_key, load_tag_key
from latchgate.storage.coherence import Membership
from latchgate.storage.effects import EffectPoller
from latchgate.storage.link import Link
from latchgate.storage.lookups import BatchingKeyReader, find_many, lookup_link
from latchgate.storage.migrate import migrate_for
from latchgate.storage.postgres import Database
from latchgate.storage.probe import DatabaseProbe
from latchgate.storage.ratelimit import PostgresRateStore, rate_link
from latchgate.storage.signing import JoseSigner
from latchgate.storage.stores import PostgresStore
from latchgate.storage.suspicion import SuspicionStore
from latchgate.storage.tokens import PostgresTokenStore
from latchgate.storage.usage import UsageBuffer
from latchgate.watch import DatabaseWatch, Figures
from latchgate.web.auth import AuthEndpoint
from latchgate.web.jwks import JWKS_PATH, JwksPage
from latchgate.web.server import HttpListenError, HttpServer

# Elsewhere than on Linux the monotonic clock does not stop.
_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
LOOKUP_SPACING_S: Final = 0.004
LOOKUP_PLENTY: Final = 16
# For what tells workers of each other: a connection that is dead is to be known within a second.
LINK_TIMEOUT_S: Final = 0.5
PROBE_INTERVAL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 1.0
START_RETRY_S: Final = 1.0
START_REMIND_S: Final = 30.0

_log = structlog.get_logger("latchgate.app")


class DatabaseRefusalError(Exception):
    """The database is there and refuses what a start needs. The message says what to look at."""


# Gives seconds that go on while the machine is suspended, unlike those of time.monotonic on Linux.
boottime: Final[Callable[[], float]] = partial(time.clock_gettime, _BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a start has found and made. `schema_before` is None for a new database.

    `missing_scopes` are permissions that match no scope any more, and how many keys hold each.
    """

    root: RootKey
    schema_before: str | None
    schema: str
    missing_scopes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A service that listens, on the addresses that it has in truth.

    `ready` is done once it has its database; it fails if it never can. `background` tells when it can not go on.
    `retire` leaves new connections to others on the same ports, and waits until there are none here any more.
    `metrics_listen` is empty for a worker, and `http_listen` where no gateway may ask over HTTP.
    """

    server: RpcServer
    listen: str
    http_listen: str
    metrics_listen: str
    metrics: Metrics
    ready: asyncio.Task[Ready]
    background: Background
    retire: Callable[[], Awaitable[None]]


@asynccontextmanager
async def serving(settings: Settings, role: Role = Role.ALONE) -> AsyncIterator[Running]:
    """Listens, connects to the database as soon as it is there, and at the end stops in order.

    Raises SettingsError, ListenError and EmbeddedDatabaseError, each with one line that says what to do.
    """
    scopes = load_scopes(settings.scopes_file)
    credentials = _credentials(settings)
    async with AsyncExitStack() as stack:
        # Before the ports: of two that are started on the same data, the second is to hear of the data.
        dsn, owner_dsn = await database_address(stack, settings)
        metrics = Metrics(CollectorRegistry())
        metrics_listen = _serve_metrics(stack, settings, metrics) if role is Role.ALONE else ""
        pipeline = Pipeline(metrics, is_validate_open=settings.validate_access is ValidateAccess.OPEN)
        database = await Database.open(dsn, pool_size=settings.pool_size)
        stack.push_async_callback(database.close)
        usage = UsageBuffer(database)
        background = Background()
        server = make_server(
            pipeline=pipeline,
            connection_age_s=settings.connection_age_seconds,
            shares_port=role is not Role.ALONE,
        )
        jwks = JwksPage(metrics)
        endpoint = AuthEndpoint(
            metrics, metrics, settings.trusted_hops, lambda: server.health.is_serving, {JWKS_PATH: jwks.answer}
        )
        http = HttpServer(endpoint, settings.drain_seconds)
        await server.set_serving(is_serving=False)
        parts = Parts(
            settings=settings,
            scopes=scopes,
            metrics=metrics,
            database=database,
            usage=usage,
            background=background,
            pipeline=pipeline,
            server=server,
            endpoint=endpoint,
            jwks=jwks,
            http=http,
            shares_ports=role is not Role.ALONE,
            news=asyncio.Event(),
        )
        # From the last to the first: calls end, then the work beside them, then what they left is written.
        stack.push_async_callback(_flush_last, usage)
        beside = await stack.enter_async_context(AsyncExitStack())
        stack.push_async_callback(background.close)
        if role is not Role.SUCCESSOR:
            await _listen(parts, credentials)
        ready = asyncio.create_task(_get_ready_and_listen(beside, parts, (dsn, owner_dsn), credentials))
        stack.push_async_callback(_cancelled, ready)
        stack.push_async_callback(drain, server, pipeline, settings.drain_seconds)
        stack.push_async_callback(http.close)
        stack.callback(background.stop)
        # Shielded: it waits for a future that stopping the server needs as well.
        for each in server.servers:
            background.keep("gRPC server", asyncio.shield(each.wait_for_termination()))
        yield Running(
            server=server,
            listen=_with_port(settings.listen, server.port),
            http_listen=_with_port(settings.http_listen, http.port) if settings.http_listen else "",
            metrics_listen=metrics_listen,
            metrics=metrics,
            ready=ready,
            background=background,
            retire=partial(retire, server, http),
        )


def _credentials(settings: Settings) -> ReloadingCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    files = TlsFiles(certificate=settings.tls_cert, key=settings.tls_key, client_ca=settings.tls_client_ca)
    try:
        return ReloadingCredentials(files)
    except CertificateError as error:
        raise SettingsError(f"LATCHGATE_TLS_CERT, LATCHGATE_TLS_KEY, LATCHGATE_TLS_CLIENT_CA: {error}") from None


def _serve_metrics(stack: AsyncExitStack, settings: Settings, metrics: Metrics) -> str:
    try:
        return serve_metrics(stack, settings.metrics_listen, metrics.registry)
    except PortError as error:
        raise ListenError(str(error)) from None


def _with_port(listen: str, port: int) -> str:
    """Gives an address with the port that it has in truth, if that is known already."""
    return f"{listen.rpartition(':')[0]}:{port}" if port else listen


async def _listen(parts: Parts, credentials: ReloadingCredentials | None) -> None:
    settings = parts.settings
    try:
        await parts.server.listen(settings.listen, credentials.credentials if credentials else None)
    except ListenError as error:
        raise ListenError(f"LATCHGATE_LISTEN: {error}") from None
    try:
        if settings.http_listen:
            await parts.http.listen(settings.http_listen, shares_port=parts.shares_ports)
    except HttpListenError as error:
        raise ListenError(f"LATCHGATE_HTTP_LISTEN: {error}") from None


async def _get_ready_and_listen(
    stack: AsyncExitStack, parts: Parts, addresses: tuple[str, str], credentials: ReloadingCredentials | None
) -> Ready:
    """Gets ready, and listens if that was put off until now."""
    ready = await _get_ready(stack, parts, *addresses)
    if not parts.server.port:
        await _listen(parts, credentials)
    return ready


async def _get_ready(stack: AsyncExitStack, parts: Parts, dsn: str, owner_dsn: str) -> Ready:
    """Prepares the database, waiting for it if it is away, and lets calls through."""
    settings, database, background = parts.settings, parts.database, parts.background
    server, pipeline = parts.server, parts.pipeline
    before, schema = await _patiently(lambda: migrate_for(dsn, owner_dsn))
    await _patiently(PostgresTrail(database).make_partitions)
    from_settings = settings.tag_key.get_secret_value().encode() if settings.tag_key else None
    tag_key = await _patiently(lambda: load_tag_key(database, from_settings))
    tokens = TokenFormat(tag_key, settings.token_prefixes, [settings.prefix_refresh])
    root_token = settings.root_token.get_secret_value() if settings.root_token else None
    root = await _patiently(lambda: ensure_root_key(database, tokens, make_id, root_token))
    lookups = lookup_link(dsn)
    stack.callback(lookups.cut)
    reader = BatchingKeyReader(
        find_many(lookups, convert.identity),
        observer=parts.metrics,
        monotonic=time.monotonic,
        spacing_s=LOOKUP_SPACING_S,
        plenty=LOOKUP_PLENTY,
    )
    stack.push_async_callback(reader.close)
    coherence = Coherence(
        terms=LeaseTerms(length_s=settings.lease_seconds), cache=KeyCache(settings.cache_keys), boottime=boottime
    )
    membership = Membership(
        link=Link(dsn, timeout_s=LINK_TIMEOUT_S),
        listening=Link(dsn, timeout_s=LINK_TIMEOUT_S),
        coherence=coherence,
        boottime=boottime,
        observer=parts.metrics,
    )
    stack.push_async_callback(membership.leave)
    effects = EffectPoller(
        link=Link(dsn, timeout_s=LINK_TIMEOUT_S), boottime=boottime, poke=membership.poke, news=membership.news
    )
    stack.push_async_callback(effects.close)
    foreign = ForeignLookupBudget(time.monotonic)
    if root_token is not None:
        # Known from the start, so that a flood of invented foreign tokens can not keep root out.
        foreign.remember(digest(root_token), found=True)
    windows = PostgresRateStore(rate_link(dsn))
    stack.callback(windows.close)
    limiter = SharedLimiter(store=windows, clock=boottime, observer=parts.metrics)
    stack.push_async_callback(limiter.close)
    parts.metrics.watch(Figures(database, parts.usage, foreign, background, coherence, limiter))
    suspects = SuspicionCounter(time.monotonic)
    probe = DatabaseProbe(dsn, PROBE_TIMEOUT_S)
    stack.push_async_callback(probe.close)
    validator = Validator(
        tokens=tokens,
        keys=reader,
        memory=coherence,
        limiter=limiter,
        usage=parts.usage,
        foreign=foreign,
        patience=Patience(time.monotonic),
        suspicion=suspects,
    )
    suspicion = SuspicionStore(database, suspects)
    login = open_login(
        stack,
        settings=settings,
        background=background,
        metrics=parts.metrics,
        organizations=PostgresStore(database),
        suspicion=suspects,
        clock=boottime,
    )
    keyring = Keyring(PostgresTokenStore(database), JoseSigner(tag_key), time.monotonic, tell_of_lost_keys)
    core = Core(
        tokens=tokens,
        tag_key=tag_key,
        validator=validator,
        effects=effects,
        suspects=suspects,
        suspicion=suspicion,
        login=login,
        keyring=keyring,
        boottime=boottime,
    )
    pipeline.connect(make_backend(parts, core))
    parts.endpoint.connect(validator)
    parts.jwks.connect(keyring.published)
    watch = DatabaseWatch(probe, server, parts.metrics, background, coherence, reader)
    await watch.show(is_up=True)
    background.keep("reading of the change log", membership.run())
    background.keep("asking for rate limits", limiter.run())
    background.repeat("database watch", PROBE_INTERVAL_S, watch.look)
    background.repeat("writing of usage", settings.usage_flush_seconds, parts.usage.flush)
    background.repeat("writing of suspicious use", settings.usage_flush_seconds, suspicion.flush)
    keep_house(background, settings, database, effects, suspicion, keyring)
    await send_out(
        stack,
        settings=settings,
        background=background,
        observer=parts.metrics,
        news=parts.news,
        dsn=dsn,
        tag_key=tag_key,
    )
    # Calls are answered by now: of many keys this may take a second.
    missing_scopes = await _missing_scopes(PostgresStore(database), parts.scopes)
    return Ready(root=root, schema_before=before, schema=schema, missing_scopes=missing_scopes)


async def _missing_scopes(store: PostgresStore, deployment: Sequence[Scope]) -> Mapping[str, int]:
    """Gives the permissions that match no scope any more, as when one was taken out of the deployment's file."""
    names = [WILDCARD, *(scope.name for scope in (*CORE_SCOPES, *deployment))]
    try:
        return missing(await store.permissions_beyond(names), deployment)
    except UnavailableError as error:
        _log.warning("scopes_not_checked", problem=error.message)
        return {}


Result = TypeVar("Result")


async def _patiently(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Repeats an attempt until the database is there; says so at first, when the problem changes, and now and then."""
    problem, said_s = "", 0.0
    while True:
        try:
            return await attempt()
        except UnavailableError as error:
            if error.message != problem or time.monotonic() - said_s >= START_REMIND_S:
                problem, said_s = error.message, time.monotonic()
                _log.warning("waiting_for_database", problem=problem)
        except asyncpg.PostgresError as error:
            # Not its text: it may hold what a row holds.
            raise DatabaseRefusalError(
                f"the database refuses what latchgate needs ({type(error).__name__}); its log says more. The user of "
                "LATCHGATE_DATABASE_URL must own the database, or be allowed to create tables in its schema"
            ) from None
        await asyncio.sleep(START_RETRY_S)


async def _flush_last(usage: UsageBuffer) -> None:
    try:
        await usage.finish()
    except Exception as error:  # noqa: BLE001 - what comes after it in stopping must come
        _log.warning("usage_lost", error=type(error).__name__)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Ends a task and waits until it has ended."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
