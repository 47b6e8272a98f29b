"""A port that is held for workers: theirs alone, and nobody's when they are gone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack

import grpc
import pytest

from latchgate.listening import PortError, hold_port


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    """Closes sockets at the end."""
    with ExitStack() as stack:
        yield stack


def port_of(address: str) -> int:
    """The port of an address."""
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::]"])  # noqa: S104 - it is this machine that is tested
async def test_held_port_is_for_servers_that_share_it(host: str) -> None:
    """A port that is held refuses who wants to hold it too, or wants it for itself; servers that share it get it."""
    async with AsyncExitStack() as stack:
        listen = hold_port(stack, f"{host}:0", "LATCHGATE_LISTEN")
        assert port_of(listen) > 0
        with pytest.raises(PortError, match=f"LATCHGATE_LISTEN: .*:{port_of(listen)} can not be listened on"):
            hold_port(stack, listen, "LATCHGATE_LISTEN")
        alone = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(RuntimeError):
            alone.add_insecure_port(listen)
        servers = [grpc.aio.server(options=[("grpc.so_reuseport", 1)]) for _ in range(2)]
        for server in servers:
            assert port_of(listen) == server.add_insecure_port(listen)
            await server.start()
        with pytest.raises(PortError):
            hold_port(stack, listen, "LATCHGATE_LISTEN")
        for server in servers:
            await server.stop(None)


async def test_port_is_free_again(sockets: ExitStack) -> None:
    """A port that is let go can be held again at once, though connections to it have ended a moment ago."""
    async with AsyncExitStack() as stack:
        listen = hold_port(stack, "127.0.0.1:0", "LATCHGATE_LISTEN")
        address = ("127.0.0.1", port_of(listen))
        listener = sockets.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen()
        client = sockets.enter_context(socket.create_connection(address))
        # Who closes first is left with the address for a minute.
        listener.accept()[0].close()
        assert b"" == client.recv(1)
        listener.close()
    async with AsyncExitStack() as stack:
        assert listen == hold_port(stack, listen, "LATCHGATE_LISTEN")


async def test_nobody_listens_on_a_held_port() -> None:
    """Until a worker listens, connections are refused: none waits in a queue that nobody looks at."""
    async with AsyncExitStack() as stack:
        address = ("127.0.0.1", port_of(hold_port(stack, "127.0.0.1:0", "LATCHGATE_LISTEN")))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


async def test_host_that_is_not_known() -> None:
    """A name that leads nowhere is told like an address that is not this machine's."""
    async with AsyncExitStack() as stack:
        with pytest.raises(PortError, match=r"LATCHGATE_LISTEN: host\.invalid:1 "):
            hold_port(stack, "host.invalid:1", "LATCHGATE_LISTEN")
