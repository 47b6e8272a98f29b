"""The command line: arguments only."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from importlib.metadata import version

import structlog
import uvloop

from latchgate import config, demo
from latchgate.app import Ready, Running, serving
from latchgate.config import LogFormat, Settings, SettingsError
from latchgate.domain.errors import UnavailableError
from latchgate.health import HealthError, check_health
from latchgate.observability import configure_logging
from latchgate.rpc.server import ListenError
from latchgate.storage.bootstrap import BootstrapError
from latchgate.storage.embedded import EmbeddedDatabaseError, EmbeddedPostgres
from latchgate.storage.migrate import SchemaError, migrate

_log = structlog.get_logger("latchgate")

# Errors whose message is all that a person needs.
_PLAIN = (BootstrapError, EmbeddedDatabaseError, HealthError, ListenError, SchemaError, SettingsError, UnavailableError)


def main() -> None:
    """Runs the command that the arguments name. Exits with 2 for bad settings or arguments, 1 for other failures."""
    parser = argparse.ArgumentParser(prog="latchgate", description="API keys for gateways over gRPC.")
    parser.add_argument("--version", action="version", version=version("latchgate"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="serve on this machine for a try, and show a key's life first")
    commands.add_parser("serve", help="serve")
    commands.add_parser("migrate", help="bring the database's schema up to date, and stop")
    commands.add_parser("health", help="exit with 0 if the service on LATCHGATE_LISTEN is healthy, else with 1")
    command = parser.parse_args().command
    try:
        settings = demo.settings() if command == "run" else config.load()
        configure_logging(level=settings.log_level.value, as_json=settings.log_format is LogFormat.JSON)
        for name in config.unknown_variables():
            _log.warning("unknown_setting", name=name)
        work = {"run": _serve_with_demo, "serve": _serve, "migrate": _migrate, "health": check_health}[command]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work(settings))
    except SettingsError as error:
        sys.exit(_complaint(error, 2))
    except _PLAIN as error:
        sys.exit(_complaint(error, 1))


def _complaint(error: Exception, status: int) -> int:
    print(f"latchgate: {error}", file=sys.stderr)
    return status


async def _serve(settings: Settings) -> None:
    """Serves until a signal comes."""
    stopping = _on_signals()
    async with serving(settings) as running:
        ready = await _ready_or_stopped(running, stopping)
        if ready is None:
            return
        _announce(settings, ready)
        await stopping.wait()
        _log.info("stopping")


async def _serve_with_demo(settings: Settings) -> None:
    """Serves until a signal comes, and shows a key's life."""
    stopping = _on_signals()
    async with serving(settings) as running:
        ready = await _ready_or_stopped(running, stopping)
        if ready is None:
            return
        await demo.show(settings, is_new=ready.schema_before is None, port=running.server.port)
        await stopping.wait()
        print("\nStopping ...", flush=True)


def _on_signals() -> asyncio.Event:
    """Gives an event that the first SIGINT or SIGTERM sets; the second ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return stopping


async def _ready_or_stopped(running: Running, stopping: asyncio.Event) -> Ready | None:
    """Waits until the service is ready, or until it is told to stop before that."""
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({stop, running.ready}, return_when=asyncio.FIRST_COMPLETED)
        return running.ready.result() if running.ready.done() else None
    finally:
        stop.cancel()


def _announce(settings: Settings, ready: Ready) -> None:
    """Says where the service listens, and shows a root token that was made now: the only time that it is seen."""
    _log.info("serving", listen=settings.listen, metrics=settings.metrics_listen, schema=ready.schema)
    if ready.root.is_refused:
        _log.warning("root_token_refused", hint="LATCHGATE_ROOT_TOKEN is that of a key which is no longer in use")
    if ready.root.token is not None:
        print(
            f"The root token of this new deployment, shown this once; keep it safe:\n{ready.root.token}",
            file=sys.stderr,
            flush=True,
        )


async def _migrate(settings: Settings) -> None:
    """Brings the schema up to date."""
    if settings.database_url is not None:
        before, after = await migrate(settings.database_url.get_secret_value())
    else:
        embedded = EmbeddedPostgres.start(settings.data_dir)
        try:
            before, after = await migrate(await embedded.create_database())
        finally:
            embedded.stop()
    print(f"schema {after}" + ("" if before == after else f" (was {before or 'empty'})"))
