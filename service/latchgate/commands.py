"""What the commands do."""

# ruff: noqa: T201 - they speak to the terminal

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import structlog

from latchgate import config, demo
from latchgate.app import DatabaseRefusalError, Ready, Running, database_address, serving
from latchgate.background import BackgroundError
from latchgate.config import CommandError, LogFormat, Settings
from latchgate.domain.errors import UnavailableError
from latchgate.observability import configure_logging
from latchgate.rpc.server import ListenError
from latchgate.storage.bootstrap import BootstrapError
from latchgate.storage.embedded import EmbeddedDatabaseError
from latchgate.storage.migrate import SchemaError
from latchgate.storage.migrate import migrate as migrate_database

_log = structlog.get_logger("latchgate")

# Errors whose message is all that a person needs.
_PLAIN: Final = (
    BackgroundError,
    BootstrapError,
    DatabaseRefusalError,
    EmbeddedDatabaseError,
    ListenError,
    SchemaError,
    UnavailableError,
)

Welcome = Callable[[Running, Ready], Awaitable[None]]
Result = TypeVar("Result")


async def serve(settings: Settings) -> None:
    """Serves until a signal comes. Raises CommandError."""
    await _serve(settings, _announce, lambda: _log.info("stopping"))
    _log.info("stopped")


async def run(settings: Settings) -> None:
    """Serves until a signal comes, and shows a key's life. Raises CommandError."""

    async def show(running: Running, ready: Ready) -> None:
        _warn_of_refused_root(ready)
        await demo.show(settings, running, is_new=ready.schema_before is None)

    def say_stopping() -> None:
        # The terminal may be gone.
        with suppress(OSError):
            print("\nStopping ...", flush=True)

    demo.say_beginning(settings)
    await _serve(settings, show, say_stopping)


async def migrate(settings: Settings) -> None:
    """Brings the schema up to date. Raises CommandError."""
    _configure_logging(settings)
    stopping = _on_signals(settings)
    versions = None
    with _plain_errors(stopping):
        async with AsyncExitStack() as stack:
            dsn = await database_address(stack, settings)
            versions = await _unless_stopped(stopping, migrate_database(dsn))
    if versions is None:
        raise CommandError("stopped by a signal; what was not finished is undone, and the next time begins there")
    before, after = versions
    print(f"schema {after}" + ("" if before == after else f" (was {before or 'empty'})"))


async def _serve(settings: Settings, welcome: Welcome, farewell: Callable[[], None]) -> None:
    _configure_logging(settings)
    stopping = _on_signals(settings)
    with _plain_errors(stopping):
        async with serving(settings) as running:
            ready = await _unless_stopped(stopping, running.ready)
            if ready is not None:
                # What is there now stays: the collector need not look through it again and again while calls wait.
                gc.collect()
                gc.freeze()
                await _unless_stopped(stopping, welcome(running, ready))
                await _unless_stopped(stopping, running.background.death())
            farewell()


def _configure_logging(settings: Settings) -> None:
    configure_logging(level=settings.log_level.value, as_json=settings.log_format is LogFormat.JSON)
    for name in config.unknown_variables():
        _log.warning("unknown_setting", name=name)


@contextmanager
def _plain_errors(stopping: asyncio.Event) -> Iterator[None]:
    """Leaves of known errors the one line that a person needs."""
    try:
        yield
    except _PLAIN as error:
        # Ctrl-C reaches the programs that start the embedded database as well: that they were ended is no news then.
        if not (stopping.is_set() and isinstance(error, EmbeddedDatabaseError)):
            raise CommandError(str(error)) from None


def _on_signals(settings: Settings) -> asyncio.Event:
    """Gives an event that the first SIGINT, SIGTERM or SIGHUP sets; the second ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            if settings.database_url is None:
                end_embedded(settings.data_dir / "postgres")
            os._exit(1)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Who starts it with nohup wants it to outlive the terminal.
        if signal.getsignal(number) is not signal.SIG_IGN or number is not signal.SIGHUP:
            loop.add_signal_handler(number, stop)
    return stopping


def end_embedded(folder: Path) -> None:
    """Tells the embedded PostgreSQL to end in an orderly way, which it does without this process.

    Only where the system can be asked whether the process is the server: its number may be another's by now, and while
    the database is being made the file holds a negative one, which would mean a whole group of processes.
    """
    with suppress(OSError, ValueError, IndexError):
        pid = int((folder / "postmaster.pid").read_text().split(maxsplit=1)[0])
        if os.fsencode(folder.resolve()) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGINT)


async def _unless_stopped(stopping: asyncio.Event, work: Awaitable[Result]) -> Result | None:
    """Waits for some work or for the signal to stop, whichever comes first; work that is not done then is cancelled."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


async def _announce(running: Running, ready: Ready) -> None:
    """Says where the service listens, and shows a root token that was made now: the only time that it is seen."""
    _log.info("serving", listen=running.listen, metrics=running.metrics_listen, schema=ready.schema)
    _warn_of_refused_root(ready)
    if ready.root.token is not None:
        print(
            f"The root token of this new deployment, shown this once; keep it safe:\n{ready.root.token}",
            file=sys.stderr,
            flush=True,
        )


def _warn_of_refused_root(ready: Ready) -> None:
    if ready.root.is_refused:
        _log.warning("root_token_refused", hint="LATCHGATE_ROOT_TOKEN is that of a key which is no longer in use")
