"""The ports that the service has: held for its workers, and the one for Prometheus."""

from __future__ import annotations

import errno
import socket
from contextlib import AsyncExitStack, suppress
from enum import Enum
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server

AGE_JITTER: Final = 0.1
"""By what share connections of gRPC get older than they are told to, at most: grpc draws it for each."""
KEEPALIVE_S: Final = 75.0
"""For how long a connection of HTTP is kept that nobody uses.

Longer than nginx keeps one by itself (60 s): the one who may use it again closes it.
"""


class Role(Enum):
    """What a service is among others on its port."""

    ALONE = "alone"
    """The port is its own, and it serves its metrics."""
    WORKER = "worker"
    """It shares the port, and its supervisor serves the metrics of all. It listens from the beginning."""
    SUCCESSOR = "successor"
    """Such a one that listens only when it is ready: until then others answer the calls that would come to it."""


class PortError(Exception):
    """An address can not be listened on. The message is one line that names the setting."""


def hold_port(stack: AsyncExitStack, listen: str, setting: str) -> str:
    """Holds a port for workers until `stack` ends, and gives the address, with a port that was found if it was 0.

    Nobody listens on it yet: connections are refused until a worker does. Raises PortError if anybody else has it, also
    where that is a service that shares it among its own workers.
    """
    host, _, port = listen.rpartition(":")
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise _refused(listen, setting) from None
    found = 0
    for family, *_, address in addresses:
        try:
            held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            _hold(held, (address[0], found or address[1], *address[2:]))
        except OSError as error:
            # An address that this machine lacks is no matter if the name has another.
            if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                raise _refused(listen, setting) from None
        else:
            found = held.getsockname()[1]
    if not found:
        raise _refused(listen, setting)
    return f"{host}:{found}"


def _hold(held: socket.socket, address: tuple[object, ...]) -> None:
    """Binds a socket that shares its port with those that are bound after it alone.

    Who binds without SO_REUSEPORT is refused if anybody has the port. SO_REUSEADDR lets pass connections that have
    ended a moment ago; it would let pass a second one that holds the port like this one, too, so it is taken back.
    """
    if held.family == socket.AF_INET6:
        # As grpc does it: the address of all is that of IPv4 as well.
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(address)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _refused(listen: str, setting: str) -> PortError:
    return PortError(f"{setting}: {listen} can not be listened on: it is in use, or is no address of this machine")


def serve_metrics(stack: AsyncExitStack, listen: str, registry: CollectorRegistry) -> str:
    """Serves metrics, on a thread, until `stack` ends it; gives their address. Raises PortError."""
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise PortError(f"LATCHGATE_METRICS_LISTEN: {listen} can not be listened on: {error.strerror}") from None
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    stack.callback(_wake, server.socket)
    return f"{host}:{server.server_port}"


def _wake(listener: socket.socket) -> None:
    """Has a thread that waits for connections look up: by itself it does so each half second, and the stop with it."""
    # Not everywhere can a socket that listens be shut down.
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
