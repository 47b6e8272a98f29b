"""A TCP proxy between one worker and PostgreSQL that knows the worker's links apart, and fails each on command."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

_CHUNK: Final = 65536
# How asyncpg spells it in its simple query.
COMMIT: Final = b"COMMIT;\x00"


class Link(Flag):
    """What a connection is for, told by what has passed on it."""

    OTHER = auto()
    """Not known yet, the probe, and connections of the pool that have only read."""
    LISTEN = auto()
    LOG = auto()
    """Reads the log of changes, renews and acknowledges."""
    LOOKUP = auto()
    EFFECTS = auto()
    """Reads the workers' rows for those who wait."""
    POOL = auto()
    """Has had a transaction of management."""

    ALL = OTHER | LISTEN | LOG | LOOKUP | EFFECTS | POOL
    NEWS = LISTEN | LOG
    """All by which a worker hears of changes."""


class Way(Flag):
    """Which way bytes go."""

    TO_SERVER = auto()
    TO_CLIENT = auto()
    BOTH = TO_SERVER | TO_CLIENT


class Loss(Enum):
    """What befalls a COMMIT."""

    BEFORE = "the connection is cut before the server gets the COMMIT"
    AFTER = "the server commits, and the connection is cut before the answer"
    SILENCE = "the server commits, and neither the answer nor anything else comes through"


# The first pattern that is found decides. Later ones tell nothing new, but that a worker's row is written.
_SIGNS: Final = (
    (re.compile(rb"plan_cache_mode"), Link.LOOKUP),
    (re.compile(rb'(?<!UN)LISTEN "?latchgate_change'), Link.LISTEN),
    (re.compile(rb"INSERT INTO worker|UPDATE worker"), Link.LOG),
    (re.compile(rb"SELECT incarnation, applied_revision"), Link.EFFECTS),
    (re.compile(rb"BEGIN;"), Link.POOL),
)


@dataclass(eq=False, kw_only=True)
class Rule:
    """Holds back or delays what passes on some links. `caught` is set when something first meets it."""

    links: Link
    ways: Way
    delay_s: float | None = None
    """None holds back until `release`."""
    only: bytes = b""
    """Only chunks that hold this; those behind them wait, too."""
    caught: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Lets everything pass."""
        self.released.set()

    def meets(self, link: Link, way: Way, chunk: bytes) -> bool:
        """Says whether a chunk is held or delayed."""
        return not self.released.is_set() and bool(self.links & link) and bool(self.ways & way) and self.only in chunk


@dataclass(eq=False, kw_only=True)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    link: Link = Link.OTHER
    loss: Loss | None = None
    is_deaf: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def learn(self, chunk: bytes) -> None:
        if self.link in Link.OTHER | Link.POOL:
            for pattern, link in _SIGNS:
                if pattern.search(chunk) and (self.link is Link.OTHER or link is Link.LOG):
                    self.link = link
                    return

    def cut(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class Wire:
    """Forwards one worker's connections to PostgreSQL, and fails as it is told."""

    def __init__(self, server_url: str) -> None:
        """Takes the address of the server, whose socket is in a folder."""
        parts = urlsplit(server_url)
        self._user = parts.username or "postgres"
        self._folder = Path(parse_qs(parts.query)["host"][0])
        self._listener: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._rules: list[Rule] = []
        self._losses: list[tuple[Loss, asyncio.Event]] = []
        self._is_refusing = False
        # When connections came, by time.monotonic.
        self.accepted_s: list[float] = []

    @property
    def open_count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    async def start(self) -> None:
        """Takes connections from now on."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def close(self) -> None:
        """Ends everything."""
        if self._listener is not None:
            self._listener.close()
        self.cut()
        tasks = [task for connection in self._connections for task in connection.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def url(self, server_url: str) -> str:
        """Gives the address of a database of the server as it is reached through the wire."""
        if self._listener is None:
            raise RuntimeError("the wire is not started")
        port = self._listener.sockets[0].getsockname()[1]
        return f"postgresql://{self._user}@127.0.0.1:{port}{urlsplit(server_url).path}?sslmode=disable"

    def cut(self, links: Link = Link.ALL) -> None:
        """Cuts what is open of these links."""
        for connection in tuple(self._connections):
            if connection.link & links:
                connection.cut()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Cuts all connections, and every new one until the block ends."""
        self._is_refusing = True
        self.cut()
        try:
            yield
        finally:
            self._is_refusing = False

    @contextmanager
    def holding(self, links: Link = Link.ALL, ways: Way = Way.BOTH, *, only: bytes = b"") -> Iterator[Rule]:
        """Holds back what goes over these links, until it is released or the block ends."""
        with self._ruled(Rule(links=links, ways=ways, only=only)) as rule:
            yield rule

    @contextmanager
    def delaying(self, delay_s: float, links: Link = Link.ALL, ways: Way = Way.BOTH) -> Iterator[Rule]:
        """Delays what goes over these links by so much each way, until the block ends."""
        with self._ruled(Rule(links=links, ways=ways, delay_s=delay_s)) as rule:
            yield rule

    def half_open(self, *, towards_server: bool, links: Link = Link.ALL) -> None:
        """Closes one side of what is open without telling the other, whose bytes are lost from then on."""
        for connection in tuple(self._connections):
            if connection.link & links:
                connection.is_deaf = True
                closed = connection.server if towards_server else connection.client
                if closed is not None:
                    closed.transport.abort()

    def lose_commit(self, loss: Loss) -> asyncio.Event:
        """Has the next COMMIT of management meet a loss; the event is set once it has."""
        done = asyncio.Event()
        self._losses.append((loss, done))
        return done

    def spare_commits(self) -> None:
        """Takes back what has met no COMMIT yet."""
        self._losses.clear()

    @contextmanager
    def _ruled(self, rule: Rule) -> Iterator[Rule]:
        self._rules.append(rule)
        try:
            yield rule
        finally:
            rule.release()
            self._rules.remove(rule)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted_s.append(time.monotonic())
        connection = _Connection(client=writer)
        self._connections.add(connection)
        connection.tasks.append(asyncio.create_task(self._carry(connection, reader)))

    async def _carry(self, connection: _Connection, from_client: asyncio.StreamReader) -> None:
        try:
            if self._is_refusing:
                return
            path = str(self._folder / ".s.PGSQL.5432")
            from_server, connection.server = await asyncio.open_unix_connection(path)
            connection.tasks.append(asyncio.create_task(self._backward(connection, from_server)))
            await self._forward(connection, from_client, connection.server)
            while connection.is_deaf and not connection.client.transport.is_closing():
                # Whoever still holds an end of it finds out by itself, or never.
                if not await from_client.read(_CHUNK):
                    break
        except OSError:
            pass
        finally:
            if not connection.is_deaf:
                connection.cut()
            await asyncio.gather(*connection.tasks[1:], return_exceptions=True)
            connection.cut()
            self._connections.discard(connection)

    async def _forward(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while chunk := await reader.read(_CHUNK):
            connection.learn(chunk)
            if self._losses and connection.link is Link.POOL and COMMIT in chunk:
                connection.loss, done = self._losses.pop(0)
                done.set()
                if connection.loss is Loss.BEFORE:
                    return
            await self._pass(connection, Way.TO_SERVER, chunk, writer)

    async def _backward(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if connection.loss is Loss.SILENCE:
                    continue
                if connection.loss is Loss.AFTER:
                    break
                await self._pass(connection, Way.TO_CLIENT, chunk, connection.client)
        if not connection.is_deaf:
            connection.cut()

    async def _pass(self, connection: _Connection, way: Way, chunk: bytes, writer: asyncio.StreamWriter) -> None:
        delays_s = [rule.delay_s for rule in self._met(connection, way, chunk) if rule.delay_s is not None]
        if delays_s:
            await asyncio.sleep(sum(delays_s))
        while holding := [rule for rule in self._met(connection, way, chunk) if rule.delay_s is None]:
            holding[0].caught.set()
            await holding[0].released.wait()
        if not connection.is_deaf and not writer.transport.is_closing():
            writer.write(chunk)
            await writer.drain()

    def _met(self, connection: _Connection, way: Way, chunk: bytes) -> list[Rule]:
        return [rule for rule in self._rules if rule.meets(connection.link, way, chunk)]
