"""A port that is held for workers: theirs alone, and nobody's when they are gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from latchgate.listening import PortError, hold_port
from latchgate.observability import Metrics
from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import SERVERS, make_server

LISTEN = "0A"
"""How Linux writes that state."""


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


@pytest.mark.parametrize("host", ["127.0.0.1", "[::]"])
async def test_servers_of_a_worker_share_its_port(host: str) -> None:
    """All of grpc's servers that a worker has listen on its port, also where it was the first of them that found it."""
    pipeline = Pipeline(Metrics(CollectorRegistry()), is_validate_open=True)
    server = make_server(pipeline=pipeline, connection_age_s=60, shares_port=True)
    await server.listen(f"{host}:0", None)
    found = listeners(server.port)
    await server.stop(0)
    assert SERVERS == len(server.servers) == found
    assert not listeners(server.port)


async def test_server_asks_for_one_call_at_a_time() -> None:
    """A server waits for one next call, of whichever method: at each call grpc.aio waits anew for all that it has asked
    for, and of methods that are registered, as generated code does, it asks for each.
    """
    before = asyncio.all_tasks()
    server = make_server(
        pipeline=Pipeline(Metrics(CollectorRegistry()), is_validate_open=True), connection_age_s=60, shares_port=True
    )
    await server.listen("127.0.0.1:0", None)
    # Each begins to ask once it has said that it is started.
    await asyncio.sleep(0)
    asked = [
        name
        for task in asyncio.all_tasks() - before
        if "request" in (name := getattr(task.get_coro(), "__qualname__", ""))
    ]
    await server.stop(0)
    assert ["AioServer._request_call"] * len(server.servers) == asked


def listeners(port: int) -> int:
    """Says how many sockets of this machine listen on a port, as Linux tells it."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
    return sum(line[1].endswith(f":{port:04X}") and line[3] == LISTEN for line in lines)


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
