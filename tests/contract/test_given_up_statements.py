"""Statements that are given up, at whatever moment: their sessions are at rest as soon as they are back in the pool."""

from __future__ import annotations

import asyncio

from latchgate.storage.postgres import Connection, Database

TRIES = 300
# After as many the statement is sent, and the answer not there.
TURNS = 8
BUSY = (
    "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1::int[]) AND (state <> 'idle' OR xact_start IS NOT NULL)"
)


async def test_no_session_stays_within_a_statement(database: Database, observer: Connection) -> None:
    """A statement that is new to its session, and is given up while it is prepared, leaves no session that is busy or
    has a transaction open.
    """
    sessions: set[int] = set()

    async def ask(number: int, begun: asyncio.Event) -> None:
        async with database.connection() as connection:
            sessions.add(connection.get_server_pid())
            begun.set()
            await connection.fetch(f"SELECT {number}, count(*) FROM key")  # noqa: S608 - a number

    for number in range(TRIES):
        begun = asyncio.Event()
        asking = asyncio.create_task(ask(number, begun))
        await begun.wait()
        for _ in range(number % TURNS):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert 0 == await observer.fetchval(BUSY, list(sessions)), f"after {number % TURNS} turns"
