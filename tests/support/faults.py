"""A wire that breaks on demand: a TCP proxy between the service and PostgreSQL. And what health says of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING

_CHUNK: Final = 65536
# How asyncpg spells it in its simple query.
_COMMIT: Final = b"COMMIT;\x00"


class CommitFault(Enum):
    """What befalls the next COMMIT on the wire, and the connection that carries it."""

    CUT_BEFORE = auto()
    """The connection is cut; the server never sees the COMMIT."""
    CUT_AFTER = auto()
    """The server has committed and answered; the connection is cut before the client hears of it."""
    SILENCE = auto()
    """The server has committed and answered; the client hears neither that nor anything else on this connection."""
    CUT_ANSWERED = auto()
    """The client hears that it is committed, and then the connection is cut."""


@dataclass(eq=False, slots=True)
class _Link:
    """One connection: two sockets, and what is to befall it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    fault: CommitFault | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def cut(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class FaultyWire:
    """Forwards connections to one PostgreSQL until it is told otherwise. The port stays its own all the time."""

    def __init__(self, server_url: str) -> None:
        """Takes the address of the server: a host, or the folder of a socket."""
        parts = urlsplit(server_url)
        folder = parse_qs(parts.query).get("host", [""])[0]
        self._socket = str(Path(folder) / f".s.PGSQL.{parts.port or 5432}") if folder else None
        self._target = parts.hostname or "127.0.0.1", parts.port or 5432
        # Bound and never listened on: while the wire refuses, nobody else can come to own the port.
        self._reserved = _socket(0)
        self.port: Final[int] = self._reserved.getsockname()[1]
        self.delay_s = 0.0
        self._listener: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._links: set[_Link] = set()
        self._armed: tuple[CommitFault, asyncio.Event] | None = None
        self._let_pass = 0
        self.accepted = 0
        self._has_accepted = asyncio.Event()

    def url(self, server_url: str) -> str:
        """Gives the address of a database of the server as it is reached through the wire."""
        parts = urlsplit(server_url)
        user = f"{parts.username}{':' + parts.password if parts.password else ''}@" if parts.username else ""
        return f"postgresql://{user}127.0.0.1:{self.port}{parts.path}"

    async def listen(self) -> None:
        """Takes connections (again)."""
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, sock=_socket(self.port))

    def refuse(self) -> None:
        """Refuses new connections, and cuts those that are open: the server is not running."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """Cuts all connections that are open now."""
        for link in tuple(self._links):
            link.cut()

    def swallow(self) -> None:
        """Takes connections and bytes, and passes nothing on: a black hole."""
        self._flowing.clear()

    def flow(self) -> None:
        """Passes on what was held back, and all that comes."""
        self._flowing.set()

    def at_next_commit(self, fault: CommitFault, *, let_pass: int = 0) -> asyncio.Event:
        """Arms a fault, for a commit after those that it lets pass; the event is set once it has come about."""
        done = asyncio.Event()
        self._armed = fault, done
        self._let_pass = let_pass
        return done

    async def until_accepted(self) -> None:
        """Waits for the first connection."""
        await asyncio.wait_for(self._has_accepted.wait(), 30)

    async def close(self) -> None:
        """Ends everything."""
        self.refuse()
        self._reserved.close()
        tasks = [task for link in self._links for task in link.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._listener is None:
            # It was on its way in when the wire began to refuse.
            writer.transport.abort()
            return
        self.accepted += 1
        self._has_accepted.set()
        link = _Link(client=writer)
        self._links.add(link)
        link.tasks.append(asyncio.create_task(self._carry(link, reader)))

    async def _carry(self, link: _Link, from_client: asyncio.StreamReader) -> None:
        try:
            await self._flowing.wait()
            if self._socket:
                from_server, link.server = await asyncio.open_unix_connection(self._socket)
            else:
                from_server, link.server = await asyncio.open_connection(*self._target)
            link.tasks.append(asyncio.create_task(self._backward(link, from_server)))
            await self._forward(link, from_client, link.server)
        except OSError:
            pass
        finally:
            link.cut()
            await asyncio.gather(*link.tasks[1:], return_exceptions=True)
            self._links.discard(link)

    async def _forward(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK):
            if self._armed and link.fault is None and _COMMIT in chunk:
                if self._let_pass:
                    self._let_pass -= 1
                else:
                    link.fault = self._armed[0]
            if link.fault is CommitFault.CUT_BEFORE:
                self._done()
                return
            await self._pass(chunk, writer)

    async def _backward(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if link.fault is CommitFault.SILENCE:
                    self._done()
                    continue
                if link.fault is CommitFault.CUT_AFTER:
                    self._done()
                    break
                await self._pass(chunk, link.client)
                if link.fault is CommitFault.CUT_ANSWERED:
                    self._done()
                    break
        link.cut()

    async def _pass(self, chunk: bytes, writer: asyncio.StreamWriter) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._flowing.wait()
        writer.write(chunk)
        await writer.drain()

    def _done(self) -> None:
        if self._armed is not None:
            self._armed[1].set()
            self._armed = None


@asynccontextmanager
async def faulty_wire(server_url: str) -> AsyncIterator[FaultyWire]:
    """Runs a wire to a server until the block ends; it refuses connections until it is told to listen."""
    wire = FaultyWire(server_url)
    try:
        yield wire
    finally:
        await wire.close()


def _socket(port: int) -> socket.socket:
    """Makes a socket that shares its port with those of this process that ask for the same."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    return made


@asynccontextmanager
async def health_changes(address: str) -> AsyncIterator[asyncio.Queue[int]]:
    """Watches the health of a server; each answer comes into the queue."""
    answers: asyncio.Queue[int] = asyncio.Queue()

    async def watch() -> None:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
            answers.put_nowait(answer.status)

    async with grpc.aio.insecure_channel(address) as channel:
        watching = asyncio.create_task(watch())
        yield answers
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
