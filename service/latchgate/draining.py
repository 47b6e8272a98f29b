"""Stopping so that no call which has arrived is lost."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import RpcServer

# Long enough for a client on a busy machine to send its next call, and for grpc's own threads to read it; short for
# whoever waits: gateways wait 200 ms for a verdict if nothing else is set (Envoy's ext_authz).
QUIET_S: Final = 0.05
MAX_HOLD_S: Final = 0.15
# grpc closes its port on a thread of its own, a moment after it was told to.
CLOSE_S: Final = 0.002
MAX_CLOSE_S: Final = 0.5


async def drain(server: RpcServer, pipeline: Pipeline, grace_s: float) -> None:
    """Says NOT_SERVING, takes no new calls, and gives those that have come `grace_s` to finish.

    When grpc is told to stop, it lets the calls finish that have reached their handlers, and kills those that have come
    and were not fetched yet: their clients see CANCELLED, which none repeats by itself. So all calls are fetched and
    held first, which takes a moment, because who waits for an answer asks for nothing more. Only then is the server
    told to stop, and once its port is closed they are answered: who is answered connects anew, as it was told to, and
    is not to meet the port in the moment in which it is closed, when connections are reset. What can still be lost is
    what a client sends on an open connection before it hears that the server stops.
    """
    await server.set_serving(is_serving=False)
    pipeline.hold()
    await _quiet(pipeline)
    listeners = _listeners(server.port)
    stopped = asyncio.create_task(server.stop(grace_s))
    # One turn of the loop, in which the stop reaches grpc.
    await asyncio.sleep(0)
    await _closed(listeners)
    pipeline.release()
    await stopped


async def _quiet(pipeline: Pipeline) -> None:
    """Waits until no more calls come; not for long, because others may send without waiting for answers."""
    for _ in range(round(MAX_HOLD_S / QUIET_S)):
        before = pipeline.held
        await asyncio.sleep(QUIET_S)
        if pipeline.held == before:
            return


def _listeners(port: int) -> dict[Path, str]:
    """Finds the sockets by which this process listens on a port; none where the system can not be asked."""
    found = {}
    for path in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            if stat.S_ISSOCK(path.stat().st_mode):
                with socket.socket(fileno=os.dup(int(path.name))) as each:
                    is_listener = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    if is_listener and each.family != socket.AF_UNIX and each.getsockname()[1] == port:
                        found[path] = str(path.readlink())
    return found


async def _closed(listeners: dict[Path, str]) -> None:
    """Waits until sockets are closed; not for long, because calls wait for it."""
    for _ in range(round(MAX_CLOSE_S / CLOSE_S)):
        if not any(_is_open(path, leads_to) for path, leads_to in listeners.items()):
            return
        await asyncio.sleep(CLOSE_S)


def _is_open(path: Path, leads_to: str) -> bool:
    try:
        return str(path.readlink()) == leads_to
    except OSError:
        return False
