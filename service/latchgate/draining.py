"""Leaving so that no call is lost which has come, and, where others take the next ones, none that comes meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import RpcServer
from latchgate.web.server import HttpServer

# Long enough for a client on a busy machine to send its next call, and for grpc's own threads to read it; short for
# whoever waits: gateways wait 200 ms for a verdict if nothing else is set (Envoy's ext_authz).
QUIET_S: Final = 0.05
MAX_HOLD_S: Final = 0.15
# Connections that were made are accepted within a moment, by grpc's own threads.
ACCEPT_S: Final = 0.001
MAX_ACCEPT_S: Final = 0.1
# How often is looked whether connections are left.
POLL_S: Final = 0.5

_OPEN_FILES: Final = Path("/proc/self/fd")
# Linux's struct tcp_info up to tcpi_unacked, which is of a listener how many connections wait to be accepted.
_TCP_INFO: Final = struct.Struct("@8x4x4x4x4xI")

_log = structlog.get_logger("latchgate.draining")


async def retire(server: RpcServer, http: HttpServer) -> None:
    """Takes no new connections, and goes on until those that are there have ended.

    For where others listen on the same ports. Clients are told to connect anew when their connections are of age, over
    HTTP with their next answer, and are answered until they have: no call is lost, however many they have under way. A
    server that is told to stop kills what its clients send before they hear of it. Of a system that tells no process
    about its sockets (any but Linux) the gRPC port is left as it is, and its connections are not waited for.
    """
    with _listeners(http.port) as listeners:
        await _taken_up(listeners)
        await http.retire()
    await _stop_listening(server.port)
    _log.info("retiring", connections=http.connections + sum(map(_is_connected, _sockets(server.port))))
    while http.connections or any(map(_is_connected, _sockets(server.port))):  # noqa: ASYNC110 - nobody tells of them
        await asyncio.sleep(POLL_S)


async def drain(server: RpcServer, pipeline: Pipeline, grace_s: float) -> None:
    """Says NOT_SERVING, takes no new calls, and gives those that have come `grace_s` to finish.

    When grpc is told to stop, it lets the calls finish that have reached their handlers, and kills those that have come
    and were not fetched yet: their clients see CANCELLED, which none repeats by itself. So all calls are fetched and
    held first, which takes a moment, because who waits for an answer asks for nothing more. Only when nobody can
    connect any more is the server told to stop, and only then are they answered: who is answered connects anew, as it
    was told to, and is not to meet this server again. What can still be lost is what a client sends on an open
    connection before it hears that the server stops.
    """
    await server.set_serving(is_serving=False)
    pipeline.hold()
    await _quiet(pipeline)
    await _stop_listening(server.port)
    stopped = asyncio.create_task(server.stop(grace_s))
    # Two turns of the loop, in which the stop reaches all of grpc's servers.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    pipeline.release()
    await stopped


async def _quiet(pipeline: Pipeline) -> None:
    """Waits until no more calls come; not for long, because others may send without waiting for answers."""
    for _ in range(round(MAX_HOLD_S / QUIET_S)):
        before = pipeline.held
        await asyncio.sleep(QUIET_S)
        if pipeline.held == before:
            return


async def _stop_listening(port: int) -> None:
    """Closes a port of grpc's, which it does itself only when it kills calls as well."""
    with _listeners(port) as listeners:
        await _taken_up(listeners)
        for each in listeners:
            # Of the socket itself, unlike closing: grpc's file number leads to the same.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextmanager
def _listeners(port: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(each.dup())
            for each in _sockets(port)
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ]


async def _taken_up(listeners: Sequence[socket.socket]) -> None:
    """Waits until all connections are accepted that were made, but not for long: those that are not would be reset."""
    for _ in range(round(MAX_ACCEPT_S / ACCEPT_S)):
        if not any(map(_waiting, listeners)):
            return
        await asyncio.sleep(ACCEPT_S)


def _waiting(listener: socket.socket) -> int:
    """Says how many connections wait to be accepted; 0 where the system can not be asked."""
    with suppress(AttributeError, OSError, struct.error):
        (waiting,) = _TCP_INFO.unpack(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        return int(waiting)
    return 0


def _sockets(port: int) -> Iterator[socket.socket]:
    """Gives this process's sockets on a port, each until the next; none where the system can not be asked."""
    numbers: list[int] = []
    with suppress(OSError):
        numbers = [int(path.name) for path in _OPEN_FILES.iterdir()]
    for number in numbers:
        # What is closed meanwhile is no matter.
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as each:
                    if each.family != socket.AF_UNIX and each.getsockname()[1] == port:
                        yield each


def _is_connected(each: socket.socket) -> bool:
    try:
        each.getpeername()
    except OSError:
        return False
    return True
