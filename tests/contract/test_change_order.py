"""Revisions: commit order is revision order, however transactions run into each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg
import pytest

from latchgate.storage import queries
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.transaction import PostgresTransaction
from support.databases import connected, opened, until_waiting

WRITERS = 8
CHANGES = 12


async def _change(database: Database, entity_id: str) -> int:
    """Enters one change into the log; the transaction goes on for a while after that."""
    async with database.transaction() as connection:
        revision = await PostgresTransaction(connection).record_change("key", entity_id)
        await connection.execute("SELECT count(*) FROM organization")
    return revision


async def _undone_change(database: Database, entity_id: str) -> None:
    """Enters one change into the log, in a transaction that comes to nothing."""
    async with database.transaction() as connection:
        await PostgresTransaction(connection).record_change("key", entity_id)
        await connection.execute("SELECT 1 / 0")


async def _look_on(connection: Connection, done: asyncio.Event) -> list[list[int]]:
    """Gives what the log held each time that it was read."""
    seen = []
    while not done.is_set():
        seen.append([row["revision"] for row in await connection.fetch("SELECT revision FROM change_log ORDER BY 1")])
    return seen


def _prefixes(final: Sequence[int], seen: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """What would have been seen each time if nothing ever came to stand before what was there."""
    return [final[: len(each)] for each in seen]


async def test_nothing_appears_behind_what_was_seen(database_url: str) -> None:
    """Whoever has seen a revision has seen all before it: no reader of the log ever finds an entry below one that it
    has read already. Some writers come to nothing and leave gaps.
    """
    async with opened(database_url, pool_size=WRITERS) as database, connected(database_url) as onlooker:
        done = asyncio.Event()
        looking = asyncio.create_task(_look_on(onlooker, done))

        async def write(writer: int) -> None:
            for number in range(CHANGES):
                await _change(database, f"{writer}-{number}")
                if number % 4 == 0:
                    with pytest.raises(asyncpg.DivisionByZeroError):
                        await _undone_change(database, "none")

        await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
        done.set()
        seen = await looking
        final = [row["revision"] for row in await onlooker.fetch("SELECT revision FROM change_log ORDER BY 1")]

    assert WRITERS * CHANGES == len(final)
    assert final[-1] - final[0] >= len(final)
    assert len({tuple(each) for each in seen}) > 1, "the reader saw nothing of the writers' work"
    assert _prefixes(final, seen) == seen


async def test_slow_transaction_holds_up_the_numbers_behind_it(database_url: str) -> None:
    """As long as a transaction that has a revision is not at its end, nobody else gets a number. The next one gets its
    number after that, and a listener hears of both in order.
    """
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with opened(database_url) as database, connected(database_url) as onlooker:
        await onlooker.add_listener("latchgate_change", lambda *event: heard.put_nowait(event[3]))
        async with database.transaction() as slow:
            first = await PostgresTransaction(slow).record_change("key", "slow")
            others = [asyncio.create_task(_change(database, f"fast-{number}")) for number in range(3)]
            await until_waiting(onlooker, 3)
            given_out = await onlooker.fetchval("SELECT last_value FROM change_revision")
            visible = await onlooker.fetchval("SELECT count(*) FROM change_log")
        following = await asyncio.gather(*others)
        told = [int(await heard.get()) for _ in range(4)]

    assert first == given_out
    assert 0 == visible
    assert [first + 1, first + 2, first + 3] == sorted(following)
    assert sorted(told) == told


async def test_undone_change_leaves_no_entry_and_no_lock(database: Database, observer: Connection) -> None:
    """A transaction that is undone leaves a gap, no entry, and the way free for the next."""
    first = await _change(database, "kept")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await _undone_change(database, "undone")
    last = await _change(database, "kept too")

    entries = await observer.fetch("SELECT revision, entity_id FROM change_log ORDER BY revision")
    assert first + 2 == last
    assert [(first, "kept"), (last, "kept too")] == [tuple(entry) for entry in entries]


async def test_head_revision_is_that_of_the_state_that_is_read(database: Database, observer: Connection) -> None:
    """A lookup's revision is that of the newest change which its statement can see: not of one that is under way."""
    committed = await _change(database, "a")
    async with database.transaction() as connection:
        await PostgresTransaction(connection).record_change("key", "b")
        row = await observer.fetchrow(queries.SECRET_FIND, [])

    assert row is not None
    assert committed == row["revision"]
