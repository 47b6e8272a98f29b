"""What the commands do."""

# ruff: noqa: T201 - they speak to the terminal

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from latchgate import config
from latchgate.config import CommandError, LogFormat, Settings
from latchgate.database import database_address, end_embedded
from latchgate.domain.errors import UnavailableError
from latchgate.listening import AGE_JITTER, KEEPALIVE_S, PortError, hold_port, serve_metrics
from latchgate.observability import configure_logging
from latchgate.signals import Signals
from latchgate.storage.embedded import EmbeddedDatabaseError
from latchgate.workers.metrics import FleetMetrics
from latchgate.workers.supervisor import Supervisor

_log = structlog.get_logger("latchgate")

# Errors whose message is all that a person needs.
_PLAIN: Final = (EmbeddedDatabaseError, PortError, UnavailableError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A service all of whose workers serve. `root_token` is there only if it was made now, and is shown once."""

    listen: str
    http_listen: str | None
    metrics_listen: str
    workers: int
    schema: str
    is_new: bool
    root_token: str | None
    is_root_refused: bool


Welcome = Callable[[Started], Awaitable[None]]


async def serve(settings: Settings) -> None:
    """Serves until a signal comes. Raises CommandError."""
    await _serve(settings, _announce, lambda: _log.info("stopping"))
    _log.info("stopped")


async def run(settings: Settings) -> None:
    """Serves until a signal comes, and shows a key's life. Raises CommandError."""
    # It needs grpc, which who only supervises workers is without.
    from latchgate import demo  # noqa: PLC0415

    async def show(started: Started) -> None:
        _warn_of_refused_root(started)
        await demo.show(settings, started, is_new=started.is_new)

    def say_stopping() -> None:
        # The terminal may be gone.
        with suppress(OSError):
            print("\nStopping ...", flush=True)

    demo.say_beginning(settings)
    await _serve(settings, show, say_stopping)


async def migrate(settings: Settings) -> None:
    """Brings the schema up to date. Raises CommandError."""
    # It needs what takes long to import.
    from latchgate.storage import migrate as schema  # noqa: PLC0415

    _configure_logging(settings)
    signals = _listen_for_signals(settings, is_renewable=False)
    versions = None
    with _plain_errors(signals):
        try:
            async with AsyncExitStack() as stack:
                address = await database_address(stack, settings)
                versions = await signals.unless_stopped(schema.migrate_for(*address))
        except schema.SchemaError as error:
            raise CommandError(str(error)) from None
    if versions is None:
        raise CommandError("stopped by a signal; what was not finished is undone, and the next time begins there")
    before, after = versions
    print(f"schema {after}" + ("" if before == after else f" (was {before or 'empty'})"))


async def verify_audit(settings: Settings, organization_id: str) -> int:
    """Walks along the audit trail of one organization or of all, and says whether each is whole; gives the exit status.

    Raises CommandError.
    """
    # It needs the database alone.
    from latchgate import auditing  # noqa: PLC0415

    _configure_logging(settings)
    signals = _listen_for_signals(settings, is_renewable=False)
    whole = None
    with _plain_errors(signals):
        async with AsyncExitStack() as stack:
            address = await database_address(stack, settings)
            whole = await signals.unless_stopped(auditing.verify(address.owner, organization_id, print))
    if whole is None:
        raise CommandError("stopped by a signal; what was not said above was not looked at")
    return 0 if whole else 1


async def _serve(settings: Settings, welcome: Welcome, farewell: Callable[[], None]) -> None:
    _configure_logging(settings)
    signals = _listen_for_signals(settings, is_renewable=True)
    # Before anything is started. The workers read it again.
    config.load_scopes(settings.scopes_file)
    with _plain_errors(signals):
        async with AsyncExitStack() as stack:
            # Before the ports: of two that are started on the same data, the second is to hear of the data.
            address = await database_address(stack, settings)
            metrics = FleetMetrics()
            registry = CollectorRegistry()
            registry.register(metrics)
            metrics_listen = serve_metrics(stack, settings.metrics_listen, registry)
            listen = hold_port(stack, settings.listen, "LATCHGATE_LISTEN")
            addresses = {
                "LATCHGATE_DATABASE_URL": address.service,
                "LATCHGATE_OWNER_DATABASE_URL": address.owner,
                "LATCHGATE_LISTEN": listen,
            }
            if settings.http_listen:
                held = hold_port(stack, settings.http_listen, "LATCHGATE_HTTP_LISTEN")
                addresses["LATCHGATE_HTTP_LISTEN"] = held
            supervisor = Supervisor(
                count=settings.workers,
                connection_s=_longest_connection_s(settings),
                drain_s=settings.drain_seconds,
                variables=config.as_variables(settings) | addresses,
                metrics=metrics,
            )
            stack.push_async_callback(supervisor.stop)
            signals.at_once.insert(0, supervisor.kill)
            found = await signals.unless_stopped(supervisor.start())
            if found is not None:
                started = Started(
                    listen=listen,
                    http_listen=addresses.get("LATCHGATE_HTTP_LISTEN"),
                    metrics_listen=metrics_listen,
                    workers=settings.workers,
                    schema=found[0].schema,
                    is_new=any(each.schema_before is None for each in found),
                    root_token=next((each.root_token for each in found if each.root_token is not None), None),
                    is_root_refused=any(each.is_root_refused for each in found),
                )
                await signals.unless_stopped(welcome(started))
                await signals.unless_stopped(_go_on(supervisor, signals))
            farewell()


def _longest_connection_s(settings: Settings) -> float:
    """Says how long a connection lasts at most from when its client is to make a new one."""
    grpc_s = (1 + AGE_JITTER) * settings.connection_age_seconds
    return max(grpc_s, KEEPALIVE_S) if settings.http_listen else grpc_s


async def _go_on(supervisor: Supervisor, signals: Signals) -> None:
    """Renews the workers each time that it is asked for. Raises WorkerError if the service can not go on."""
    renewing = asyncio.create_task(_renew(supervisor, signals.renewing))
    try:
        await supervisor.failure()
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


async def _renew(supervisor: Supervisor, asked: asyncio.Event) -> None:
    while await asked.wait():
        asked.clear()
        await supervisor.renew()


def _configure_logging(settings: Settings) -> None:
    configure_logging(level=settings.log_level.value, as_json=settings.log_format is LogFormat.JSON)
    for name in config.unknown_variables():
        _log.warning("unknown_setting", name=name)


def _listen_for_signals(settings: Settings, *, is_renewable: bool) -> Signals:
    signals = Signals(is_renewable=is_renewable)
    if settings.database_url is None:
        signals.at_once.append(lambda: end_embedded(settings.data_dir / "postgres"))
    return signals


@contextmanager
def _plain_errors(signals: Signals) -> Iterator[None]:
    """Leaves of known errors the one line that a person needs."""
    try:
        yield
    except _PLAIN as error:
        # Ctrl-C reaches the programs that start the embedded database as well: that they were ended is no news then.
        if not (signals.stopping.is_set() and isinstance(error, EmbeddedDatabaseError)):
            raise CommandError(str(error)) from None


async def _announce(started: Started) -> None:
    """Says where the service listens, and shows a root token that was made now: the only time that it is seen."""
    _log.info(
        "serving",
        listen=started.listen,
        **({"http": started.http_listen} if started.http_listen else {}),
        metrics=started.metrics_listen,
        schema=started.schema,
        workers=started.workers,
    )
    _warn_of_refused_root(started)
    if started.root_token is not None:
        print(
            f"The root token of this new deployment, shown this once; keep it safe:\n{started.root_token}",
            file=sys.stderr,
            flush=True,
        )


def _warn_of_refused_root(started: Started) -> None:
    if started.is_root_refused:
        _log.warning("root_token_refused", hint="LATCHGATE_ROOT_TOKEN is that of a key which is no longer in use")
