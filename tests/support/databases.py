"""Help for tests of storage: a proxy that fails on command, cancellation at a chosen wait, looks behind the scenes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg

from latchgate.domain.keys import KeyManager
from latchgate.domain.model import (
    ROOT_ORGANIZATION_ID,
    Caller,
    Effect,
    Key,
    KeyDraft,
    KeyIdentity,
    NewKey,
    Organization,
    Plan,
    Scope,
)
from latchgate.domain.permissions import Grants
from latchgate.domain.token import TokenFormat
from latchgate.storage import queries, queries_coherence
from latchgate.storage.link import Link
from latchgate.storage.lookups import FindMany, find_many, lookup_link
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.requests import RequestSealer
from latchgate.storage.stores import PostgresStore

Result = TypeVar("Result")

DEADLINE_S = 20.0
"""How long a test waits for what must come; far longer than it takes."""


TAG_KEY = b"tag-key-of-the-contract-tests-01"
TOKENS = TokenFormat(TAG_KEY)
ROOT_CALLER = Caller(
    key_id="key_00000000000000000000000000",
    secret_id=1,
    organization_id=ROOT_ORGANIZATION_ID,
    grants=Grants(("*",)),
)
"""Who makes the calls of tests, once `insert_organization` has stored its key: the first secret of a database."""

_numbers = itertools.count(1)


class ImmediateEffects:
    """Waits for nobody, where there is no worker that answers from memory."""

    async def wait(self, revision: int, until_s: float) -> Effect:
        """Needs not wait."""
        del until_s
        return Effect(revision=revision)


def show(identity: KeyIdentity) -> bytes:
    """Writes what is shown of a key in a form that a test can read."""
    return repr(identity).encode()


def next_id(prefix: str) -> str:
    """Makes ids that sort by the order in which they were made."""
    return f"{prefix}{next(_numbers):026d}"


def key_manager(store: PostgresStore) -> KeyManager:
    """The use cases, over a store."""
    return KeyManager(
        store=store, tokens=TOKENS, sealer=RequestSealer(TAG_KEY), effects=ImmediateEffects(), make_id=next_id
    )


def draft(name: str = "a key", **fields: Any) -> KeyDraft:
    """A key to ask for."""
    return KeyDraft(name=name, metadata=fields.pop("metadata", {}), **fields)


async def insert_key(
    store: PostgresStore, organization_id: str = "acme", key_id: str = "", **fields: Any
) -> tuple[Key, str]:
    """Stores a key without any rule being asked, and gives its token too."""
    wanted = draft(**fields)
    minted = TOKENS.mint(wanted.key_type, wanted.environment)
    new_key = NewKey(id=key_id or next_id("key_"), organization_id=organization_id, created_by="", draft=wanted)
    async with store.transaction() as transaction:
        return await transaction.insert_key(new_key, minted.secret), minted.token


async def insert_organization(store: PostgresStore, organization_id: str = "acme", max_keys: int = 1000) -> str:
    """Stores an organization with a plan of its own, and the key of ROOT_CALLER; gives the organization's id."""
    if await store.get_key(ROOT_CALLER.key_id) is None:
        await insert_key(store, ROOT_ORGANIZATION_ID, ROOT_CALLER.key_id)
    async with store.transaction() as transaction:
        await transaction.insert_plan(organization_id, 0, max_keys)
        await transaction.insert_organization(organization_id, organization_id.title(), organization_id, ())
    return organization_id


async def store_plan(store: PostgresStore, plan_id: str, rate_limit_per_minute: int, max_keys: int) -> Plan:
    """Stores a plan by itself."""
    async with store.transaction() as transaction:
        return await transaction.insert_plan(plan_id, rate_limit_per_minute, max_keys)


async def store_organization(
    store: PostgresStore, organization_id: str, name: str, plan_id: str, scopes: Sequence[Scope] = ()
) -> Organization:
    """Stores an organization by itself."""
    async with store.transaction() as transaction:
        return await transaction.insert_organization(organization_id, name, plan_id, scopes)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """A connection of the test's own, beside the code under test."""
    connection: Connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def opened(url: str, *, pool_size: int = 5) -> AsyncIterator[Database]:
    """The storage layer's own pools."""
    database = await Database.open(url, pool_size=pool_size)
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def linked(url: str, timeout_s: float = 2.0) -> AsyncIterator[Link]:
    """A connection of the service's own kind, cut at the end."""
    link = Link(url, timeout_s=timeout_s)
    try:
        yield link
    finally:
        link.cut()


@asynccontextmanager
async def finding(url: str) -> AsyncIterator[FindMany]:
    """Lookups as the service makes them, over a connection that is cut at the end."""
    link = lookup_link(url)
    try:
        yield find_many(link, show)
    finally:
        link.cut()


async def log_change(connection: Connection, entity: str = "key", entity_id: str = "key_other") -> int:
    """Enters a change into the log as the service does, and gives its revision."""
    async with connection.transaction():
        await connection.execute(queries.CHANGE_LOCK_TAKE, queries.CHANGE_LOCK)
        revision: int = await connection.fetchval(queries_coherence.CHANGE_INSERT, entity, entity_id)
    return revision


async def insert_worker(connection: Connection, *, lease_s: float = 10.0, applied: int = 0) -> UUID:
    """Registers a worker that does nothing by itself, and gives its incarnation."""
    incarnation = uuid4()
    await connection.execute(queries_coherence.WORKER_INSERT, incarnation, lease_s)
    await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, incarnation, applied)
    return incarnation


async def workers(connection: Connection) -> dict[UUID, int]:
    """The workers that are registered, and what each has applied."""
    rows = await connection.fetch(queries_coherence.WORKER_LIST)
    return {row["incarnation"]: row["applied_revision"] for row in rows}


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = DEADLINE_S) -> None:
    """Waits for something that can only be looked at."""
    deadline_s = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("what was waited for did not come")
        await asyncio.sleep(0.005)


async def lock_waiters(connection: Connection) -> int:
    """How many sessions of this database wait for a lock."""
    count: int = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return count


async def until_waiting(connection: Connection, count: int = 1) -> None:
    """Waits until `count` sessions of this database wait for a lock."""

    async def are_waiting() -> bool:
        return await lock_waiters(connection) >= count

    await until(are_waiting)


async def started_and_waiting(
    connection: Connection, work: Coroutine[Any, Any, Result], count: int = 1
) -> asyncio.Task[Result]:
    """Starts some work, and comes back once `count` sessions of this database wait for a lock.

    The connection must not be in a transaction: there it would see the same sessions over and over.
    """
    task = asyncio.create_task(work)

    async def is_waiting() -> bool:
        if task.done():
            await task
            raise AssertionError("the work did not wait")
        return await lock_waiters(connection) >= count

    await until(is_waiting)
    return task


async def assert_all_usable(database: Database, observer: Connection) -> None:
    """Demands that every place of the pool can be had at once, works, and that no session has left anything open."""
    pool = database.management
    async with asyncio.timeout(DEADLINE_S):
        connections = [await pool.acquire() for _ in range(pool.get_max_size())]
    answers = [await connection.fetchval("SELECT 1") for connection in connections]
    for connection in connections:
        await pool.release(connection)
    assert [1] * pool.get_max_size() == answers

    async def is_clean() -> bool:
        left_open: bool = await observer.fetchval(
            """
            SELECT EXISTS (
                SELECT 1 FROM pg_stat_activity
                WHERE datname = current_database() AND application_name = 'latchgate' AND state <> 'idle'
            ) OR EXISTS (
                SELECT 1 FROM pg_locks JOIN pg_database d ON d.oid = database
                WHERE d.datname = current_database() AND locktype = 'advisory'
            )
            """
        )
        return not left_open

    await until(is_clean)


class CancelledAt(Generic[Result]):
    """Runs a coroutine, and cancels the task when it waits for the `first`th time and each of the `more` - 1 after."""

    def __init__(self, coroutine: Coroutine[Any, Any, Result], first: int, more: int = 1) -> None:
        """Takes what to run and at which waits to cancel, counted from 1."""
        self._coroutine = coroutine
        self._cancelled = range(first, first + more)
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, Result]:
        """Drives the coroutine."""
        step: Callable[[Any], Any] = self._coroutine.send
        argument: Any = None
        while True:
            try:
                future = step(argument)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            self.waits += 1
            task = asyncio.current_task()
            if self.waits in self._cancelled and task is not None:
                task.cancel()
            try:
                argument = yield future
                step = self._coroutine.send
            except BaseException as error:  # noqa: BLE001 - all that comes in is handed on
                step, argument = self._coroutine.throw, error


async def run_cancelled(coroutine: Coroutine[Any, Any, Result], first: int, more: int = 1) -> int | None:
    """Runs a coroutine as a task of its own, cancelled as CancelledAt does it.

    Gives the number of its waits if it came through untouched, because it waits less often than `first` times.
    """
    driver = CancelledAt(coroutine, first, more)

    async def drive() -> Result:
        return await driver

    task = asyncio.create_task(drive())
    await asyncio.wait({task})
    if task.cancelled():
        return None
    task.result()
    return driver.waits if driver.waits < first else None


class Fault(Enum):
    """What becomes of a message on its way to the server."""

    LOSE_REQUEST = "the connection is cut before the server gets it"
    LOSE_ANSWER = "the server acts on it, and the connection is cut before the answer arrives"


class FaultProxy:
    """Stands between the service and PostgreSQL on a loopback port, and fails when it is told to."""

    def __init__(self, url: str) -> None:
        """Takes the address of the real server."""
        self._parts = urlsplit(url)
        self._query = parse_qs(self._parts.query)
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._is_refusing = False
        self._fault: Fault | None = None
        self._countdown = 0
        self.struck = asyncio.Event()

    @property
    def url(self) -> str:
        """The address of the same database by way of the proxy."""
        if self._server is None:
            raise RuntimeError("the proxy is not running")
        port = self._server.sockets[0].getsockname()[1]
        user = self._parts.netloc.rpartition("@")[0] or "postgres"
        return f"postgresql://{user}@127.0.0.1:{port}{self._parts.path}?sslmode=disable"

    async def start(self) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def stop(self) -> None:
        """Stops listening and cuts all connections."""
        if self._server is not None:
            self._server.close()
        self._flowing.set()
        self.refuse()
        for pipe in tuple(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        # For the transports that were given up to be closed, and those that came a moment ago to be refused.
        for _ in range(3):
            await asyncio.sleep(0)

    def cut(self) -> None:
        """Cuts all connections."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Cuts all connections, and every new one."""
        self._is_refusing = True
        self.cut()

    def accept(self) -> None:
        """Lets new connections through again."""
        self._is_refusing = False

    def freeze(self) -> None:
        """Lets nothing pass any more, in either direction; connections stay open, as with a network that is gone."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Lets pass what has gathered and what comes."""
        self._flowing.set()

    def strike(self, number: int, fault: Fault) -> None:
        """Has the `number`th message from now on meet a fault."""
        self._countdown, self._fault = number, fault
        self.struck.clear()

    def spare(self) -> None:
        """Takes `strike` back."""
        self._countdown, self._fault = 0, None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_refusing:
            writer.transport.abort()
            return
        # From the first moment: a pipe that is cancelled before it begins cuts nothing.
        self._writers.add(writer)
        pipe = asyncio.create_task(self._carry(reader, writer))
        self._pipes.add(pipe)
        pipe.add_done_callback(self._pipes.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await self._connect()
        except BaseException:
            writer.transport.abort()
            raise
        self._writers |= {writer, server_writer}
        lost_answer = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._to_server(reader, server_writer, lost_answer))
                group.create_task(self._to_client(server_reader, writer, lost_answer))
        except* (OSError, EOFError):
            pass
        finally:
            self._writers -= {writer, server_writer}
            writer.transport.abort()
            server_writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self._parts.port or int(self._query.get("port", ["5432"])[0])
        host = self._parts.hostname or self._query.get("host", ["127.0.0.1"])[0]
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _to_server(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost_answer: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 20):
            await self._flowing.wait()
            fault = self._fault_now()
            if fault is Fault.LOSE_REQUEST:
                self.struck.set()
                break
            if fault is Fault.LOSE_ANSWER:
                lost_answer.set()
            writer.write(data)
        raise EOFError

    async def _to_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost_answer: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 20):
            await self._flowing.wait()
            if lost_answer.is_set():
                self.struck.set()
                break
            writer.write(data)
        raise EOFError

    def _fault_now(self) -> Fault | None:
        if self._fault is None:
            return None
        self._countdown -= 1
        if self._countdown:
            return None
        fault, self._fault = self._fault, None
        return fault


@asynccontextmanager
async def fault_proxy(url: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of a database, until the block ends."""
    proxy = FaultProxy(url)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
        await until(_no_request_is_cancelled)
        # What was frozen when its owner gave it up is closed with it, by whoever finds it first.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


async def _no_request_is_cancelled() -> bool:
    """Says whether the driver has no connection open any more by which it asks the server to give a statement up."""
    running = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return "Connection._cancel" not in running
