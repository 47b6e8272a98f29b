"""What a worker process does: it serves until its supervisor lets it go, or is gone.

It heeds no signals: those that a terminal or a process manager sends to all processes at once are the supervisor's, who
lets the workers go one after the other.
"""

# ruff: noqa: PLC0415 - what can not be imported is told to the supervisor, like all that goes wrong

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Final

import structlog

from latchgate import config
from latchgate.background import fault, where
from latchgate.config import CommandError, LogFormat, Settings
from latchgate.listening import Role
from latchgate.observability import configure_logging
from latchgate.signals import unless_stopped
from latchgate.workers.channel import Channel, Found
from latchgate.workers.merging import as_message, read_registry

if TYPE_CHECKING:
    from latchgate.app import Ready, Running

_log = structlog.get_logger("latchgate.workers.worker")

YOUNG_OBJECTS: Final = 2_000
"""How many new objects the garbage collector waits for before it looks at them; with Python alone it is 700."""
YOUNG_COLLECTIONS: Final = 50
"""How often it looks at the new ones before it does at those that were left then; with Python alone 10 times."""
LAST_S: Final = 10.0
"""How long a worker may take to stop beyond the time that calls have to finish."""


def supervisors_end() -> socket.socket:
    """Gives the socket that leads to the supervisor: the process's standard input. Raises CommandError."""
    try:
        end = socket.socket(fileno=os.dup(0))
        is_supervised = end.family == socket.AF_UNIX
    except OSError:
        is_supervised = False
    if not is_supervised:
        raise CommandError("a worker is started by `latchgate serve`, not by hand")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return end


async def work(end: socket.socket, number: int, role: str) -> int:
    """Serves as the worker of this number and role, and gives its exit status.

    What it ends with is told to the supervisor.
    """
    channel = await Channel.open(end)
    status = 0
    try:
        await _serve(config.load(), channel, number, Role(role))
    except CommandError as error:
        status = error.status
        channel.send({"is": "failed", "problem": str(error), "status": status})
    except ImportError as error:
        status = 1
        problem = f"this installation is not complete: {error}; install it anew"
        channel.send({"is": "failed", "problem": problem, "status": status})
    except Exception as error:  # noqa: BLE001 - the last to hear of it
        status = 1
        channel.send({"is": "failed", "problem": fault(error), "status": status})
    await channel.close()
    return status


async def _serve(settings: Settings, channel: Channel, number: int, role: Role) -> None:
    configure_logging(level=settings.log_level.value, as_json=settings.log_format is LogFormat.JSON)
    structlog.configure(processors=[_naming(number), *structlog.get_config()["processors"]])
    from latchgate.scheduling import schedule_for_throughput

    # Before grpc is loaded: its threads take after the one that starts them.
    schedule_for_throughput()
    from latchgate.app import DatabaseRefusalError, serving
    from latchgate.background import BackgroundError
    from latchgate.domain.errors import UnavailableError
    from latchgate.rpc.server import ListenError
    from latchgate.storage.bootstrap import BootstrapError
    from latchgate.storage.migrate import SchemaError

    try:
        async with serving(settings, role) as running:
            stopping = asyncio.Event()
            heeding = asyncio.create_task(_heed(channel, running, stopping, settings.drain_seconds + LAST_S))
            ready = await unless_stopped(stopping, running.ready)
            if ready is not None:
                # What is there now stays: the collector need not look through it again and again while calls wait.
                gc.collect()
                gc.freeze()
                # Each call leaves some objects in a cycle (grpc's, from when it looks for the handler). They are found
                # most cheaply when they are many, and yet so few that they lie in the processor's cache; and all calls
                # wait meanwhile. What was left, and the keys in memory, are looked at no more often for it.
                gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, gc.get_threshold()[2])
                channel.send(_found(ready).as_message())
                await unless_stopped(stopping, running.background.death())
        # What it has counted to the last, before the supervisor hears that it has ended.
        _tell_metrics(channel, running)
        heeding.cancel()
    except (BackgroundError, BootstrapError, DatabaseRefusalError, ListenError, SchemaError, UnavailableError) as error:
        # Errors whose message is all that a person needs.
        raise CommandError(str(error)) from None


def _naming(number: int) -> structlog.typing.Processor:
    """Gives what writes in each log line which worker it is from."""

    def name(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["worker"] = number
        return event

    return name


def _found(ready: Ready) -> Found:
    return Found(
        schema=ready.schema,
        schema_before=ready.schema_before,
        root_token=ready.root.token,
        is_root_refused=ready.root.is_refused,
        missing_scopes=dict(ready.missing_scopes),
    )


async def _heed(channel: Channel, running: Running, stopping: asyncio.Event, stop_within_s: float) -> None:
    """Answers the supervisor, and retires or stops when it says so; stops when it is gone."""
    _tell_metrics(channel, running)
    retiring = None
    while (message := await channel.receive()) is not None and message["is"] != "stop":
        if message["is"] == "retire":
            retiring = asyncio.create_task(_retire(channel, running))
        _tell_metrics(channel, running)
    if retiring is not None:
        retiring.cancel()
        await asyncio.gather(retiring, return_exceptions=True)
    # Should stopping hang: there may be nobody any more who would end this process.
    watchdog = threading.Timer(stop_within_s, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    try:
        stopping.set()
        while await channel.receive() is not None:
            _tell_metrics(channel, running)
        await asyncio.Event().wait()
    finally:
        watchdog.cancel()


async def _retire(channel: Channel, running: Running) -> None:
    try:
        await running.retire()
    except Exception as error:  # noqa: BLE001 - then it is stopped like any other
        _log.error("not_retired", error=type(error).__name__, where=where(error))
    channel.send({"is": "retired"})


def _tell_metrics(channel: Channel, running: Running) -> None:
    try:
        families = read_registry(running.metrics.registry)
    except Exception as error:  # noqa: BLE001 - figures that can not be read must not keep a worker from stopping
        _log.error("metrics_not_read", error=type(error).__name__, where=where(error))
        return
    channel.send({"is": "metrics", "families": as_message(families)})
