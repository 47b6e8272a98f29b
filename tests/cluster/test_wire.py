"""The proxy itself: it tells links apart, and does to each what it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

import asyncpg
import pytest

from cluster.postgres import Postgres
from cluster.wire import Link, Loss, Way, Wire
from latchgate.storage import queries, queries_coherence
from latchgate.storage.lookups import lookup_link
from latchgate.storage.migrate import migrate
from support.databases import DEADLINE_S, until

SHORT_S = 0.2


@pytest.fixture(scope="module")
def database_url(postgres: Postgres) -> str:
    """A migrated database."""
    url = asyncio.run(postgres.make_database())
    asyncio.run(migrate(url))
    return url


@pytest.fixture
def table() -> str:
    """The name of a table that is not there."""
    return f"made_{uuid4().hex}"


@pytest.fixture
async def wire(postgres: Postgres) -> AsyncIterator[Wire]:
    """A wire that lets everything pass."""
    made = Wire(postgres.url)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def connection(wire: Wire, database_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection by way of the wire."""
    made = await asyncpg.connect(wire.url(database_url), timeout=DEADLINE_S)
    try:
        yield made
    finally:
        made.terminate()


@pytest.mark.parametrize(
    ("link", "statement", "arguments"),
    [
        (Link.LISTEN, "LISTEN latchgate_change", ()),
        (Link.LOG, queries_coherence.WORKER_INSERT, (uuid4(), 1.0)),
        (Link.LOG, queries_coherence.LOG_READ_RENEWING, (uuid4(), 0, 1)),
        (Link.EFFECTS, queries_coherence.WORKER_LIST, ()),
        (Link.POOL, "BEGIN;", ()),
        (Link.OTHER, queries.DATABASE_PROBE, ()),
        (Link.OTHER, "UNLISTEN *", ()),
    ],
)
async def test_links_are_told_apart(
    wire: Wire,
    connection: asyncpg.Connection[asyncpg.Record],
    link: Link,
    statement: str,
    arguments: Sequence[object],
) -> None:
    """What is held on one kind of link is held there, from the statement on that tells the link apart."""
    with wire.holding(Link.ALL ^ link):
        await connection.execute(statement, *arguments, timeout=DEADLINE_S)
    with wire.holding(link) as rule:
        asking = asyncio.create_task(connection.fetchval("SELECT 7", timeout=DEADLINE_S))
        await asyncio.wait_for(rule.caught.wait(), DEADLINE_S)
        assert not asking.done()
    assert 7 == await asking


async def test_the_link_for_lookups_is_known_from_its_start(wire: Wire, database_url: str) -> None:
    """The link for lookups is told by its settings, before anything is asked on it."""
    link = lookup_link(wire.url(database_url))
    with wire.holding(Link.ALL ^ Link.LOOKUP):
        async with link.connection() as connection:
            assert 7 == await connection.fetchval("SELECT 7")
    link.cut()


@pytest.mark.parametrize(("loss", "is_made"), [(Loss.BEFORE, False), (Loss.AFTER, True), (Loss.SILENCE, True)])
async def test_a_commit_is_lost_on_the_side_that_was_asked_for(
    wire: Wire,
    connection: asyncpg.Connection[asyncpg.Record],
    database_url: str,
    table: str,
    loss: Loss,
    is_made: bool,
) -> None:
    """The client hears of nothing; the server has made the change, or has not, as the loss says."""
    wire.lose_commit(loss)
    with pytest.raises((OSError, TimeoutError, asyncpg.PostgresError)):
        async with asyncio.timeout(2), connection.transaction():
            await connection.execute(f"CREATE TABLE {table} ()")
    connection.terminate()
    direct = await asyncpg.connect(database_url)
    try:
        statement = "SELECT to_regclass($1) IS NOT NULL"
        if is_made:

            async def is_there() -> bool:
                return bool(await direct.fetchval(statement, table))

            await until(is_there)
        else:
            assert not await direct.fetchval(statement, table)
    finally:
        await direct.close()


async def test_one_way_is_held_alone(
    wire: Wire, connection: asyncpg.Connection[asyncpg.Record], database_url: str, table: str
) -> None:
    """With the way to the client held, the server acts all the same."""
    with wire.holding(Link.ALL, Way.TO_CLIENT) as rule:
        making = asyncio.create_task(connection.execute(f"CREATE TABLE {table} ()", timeout=DEADLINE_S))
        await asyncio.wait_for(rule.caught.wait(), DEADLINE_S)
        assert not making.done()
        direct = await asyncpg.connect(database_url)
        assert await direct.fetchval("SELECT to_regclass($1) IS NOT NULL", table)
        await direct.close()
    await making


async def test_traffic_is_delayed_each_way(wire: Wire, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """A statement takes the delay there and the delay back."""
    began_s = time.monotonic()
    with wire.delaying(SHORT_S):
        await connection.execute("SELECT 7")
    assert time.monotonic() - began_s >= 2 * SHORT_S


@pytest.mark.parametrize("towards_server", [True, False])
async def test_a_half_open_connection_is_known_to_one_side(
    wire: Wire,
    connection: asyncpg.Connection[asyncpg.Record],
    database_url: str,
    towards_server: bool,
) -> None:
    """The side that is closed knows; the other waits for answers, or for questions."""
    pid = connection.get_server_pid()
    wire.half_open(towards_server=towards_server)
    if towards_server:
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT 7", timeout=SHORT_S)
    else:
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await connection.execute("SELECT 7", timeout=DEADLINE_S)
    direct = await asyncpg.connect(database_url)
    try:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"

        async def is_as_told() -> bool:
            return bool((0 if towards_server else 1) == await direct.fetchval(statement, pid))

        await until(is_as_told)
    finally:
        await direct.close()


async def test_connections_are_refused_until_the_end(
    wire: Wire, connection: asyncpg.Connection[asyncpg.Record], database_url: str
) -> None:
    """While the wire refuses, old connections are cut and new ones come to nothing; afterwards they pass."""
    with wire.refusing():
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await connection.execute("SELECT 7", timeout=DEADLINE_S)
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await asyncpg.connect(wire.url(database_url), timeout=DEADLINE_S)
    again = await asyncpg.connect(wire.url(database_url), timeout=DEADLINE_S)
    assert 7 == await again.fetchval("SELECT 7")
    again.terminate()
