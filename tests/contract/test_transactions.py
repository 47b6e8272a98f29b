"""Transactions: what an error says of them is true, and nothing that happens leaves a connection unusable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from latchgate.domain.errors import StorageUnavailableError, WriteUnknownError
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import KeyFilter
from latchgate.storage.lookups import lookup_link
from latchgate.storage.postgres import MANAGEMENT_TIMEOUT_S, Connection, Database, is_undone
from latchgate.storage.stores import PostgresStore
from support.databases import (
    DEADLINE_S,
    ROOT_CALLER,
    Fault,
    assert_all_usable,
    connected,
    draft,
    fault_proxy,
    finding,
    insert_organization,
    key_manager,
    opened,
    run_cancelled,
    started_and_waiting,
    until,
)

INSERT = "INSERT INTO deployment (name, value) VALUES ($1, '')"


class GivenUpError(Exception):
    """Raised by a test to have a transaction undone."""


@pytest.fixture
async def complaints() -> list[str]:
    """What the driver reports to the event loop: transactions that it finds open, and errors that nobody saw."""
    heard: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context["message"]))
    return heard


async def _stored(observer: Connection) -> list[str]:
    return [row["name"] for row in await observer.fetch("SELECT name FROM deployment ORDER BY name")]


async def _store(database: Database, name: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(INSERT, name)


async def _store_and_give_up(database: Database, name: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(INSERT, name)
        raise GivenUpError


async def test_block_that_ends_is_committed_and_one_that_raises_is_undone(
    database: Database, observer: Connection, complaints: list[str]
) -> None:
    """A transaction holds when its block has ended, and is as if it never was when the block raised."""
    await _store(database, "a")
    assert ["a"] == await _stored(observer)
    with pytest.raises(GivenUpError):
        await _store_and_give_up(database, "b")
    with pytest.raises(asyncpg.UniqueViolationError):
        await _store(database, "a")

    assert ["a"] == await _stored(observer)
    await assert_all_usable(database, observer)
    assert [] == complaints


async def test_transactions_see_what_others_commit(database: Database, observer: Connection) -> None:
    """Each statement of a transaction sees what was committed before it, whatever the server's default is: what follows
    a lock must see what its last holder did.
    """
    name = await observer.fetchval("SELECT quote_ident(current_database())")
    await observer.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    await database.management.expire_connections()
    async with database.transaction() as connection:
        before = await connection.fetchval("SELECT count(*) FROM deployment")
        await observer.execute(INSERT, "a")
        after = await connection.fetchval("SELECT count(*) FROM deployment")

    assert (0, 1) == (before, after)


@asynccontextmanager
async def slow_commit(observer: Connection, then: str = "") -> AsyncIterator[None]:
    """Has commits of the deployment table wait for an advisory lock that is held until the block ends."""
    await observer.execute(
        f"""
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock(1); {then} RETURN NEW; END $$
        """
    )
    await observer.execute(
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON deployment DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    await observer.execute("SELECT pg_advisory_lock(1)")
    try:
        yield
    finally:
        await observer.execute("SELECT pg_advisory_unlock_all()")


async def test_session_that_is_ended_during_the_commit_is_unknown(database: Database, observer: Connection) -> None:
    """If the server ends the session while the commit is under way, the change may or may not hold, and the error says
    so.
    """
    async with slow_commit(observer):
        task = await started_and_waiting(observer, _store(database, "a"))
        await observer.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with pytest.raises(WriteUnknownError):
            await task

    await assert_all_usable(database, observer)


async def test_error_that_the_server_answers_the_commit_with_is_no_riddle(
    database: Database, observer: Connection
) -> None:
    """If the server refuses the commit and goes on, nothing was changed, and the error does not say that it is unknown:
    it was cancelled, or the disk is full.
    """
    async with slow_commit(observer):
        task = await started_and_waiting(observer, _store(database, "a"))
        await observer.fetch(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with pytest.raises(StorageUnavailableError, match="QueryCanceledError"):
            await task
    await observer.execute("DROP TRIGGER slow ON deployment")
    await observer.execute("DROP FUNCTION slow")
    async with slow_commit(observer, then="RAISE 'no space' USING ERRCODE = '53100';"):
        task = await started_and_waiting(observer, _store(database, "a"))
        await observer.execute("SELECT pg_advisory_unlock_all()")
        with pytest.raises(StorageUnavailableError, match="DiskFullError"):
            await task

    assert [] == await _stored(observer)
    await assert_all_usable(database, observer)


@pytest.mark.parametrize(
    ("severity", "sqlstate", "expected"),
    [
        ("ERROR", "40001", True),
        ("ERROR", "53100", True),
        ("FATAL", "57P01", False),
        ("PANIC", "53100", False),
        ("ERROR", "08006", False),
    ],
)
def test_only_a_server_that_goes_on_has_undone_a_commit(severity: str, sqlstate: str, expected: bool) -> None:
    """Only what the server reports as an ERROR, and goes on after, is taken as its word that nothing was changed; a
    server that ends the session, or itself, may have written the commit before.
    """
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": "no"}
    assert expected is is_undone(asyncpg.PostgresError.new(fields))
    assert not is_undone(TimeoutError())


@pytest.mark.parametrize("fault", Fault)
async def test_error_says_the_truth_wherever_the_connection_is_lost(
    database_url: str, observer: Connection, fault: Fault
) -> None:
    """Whichever message of creating a key is lost, or the answer to it: with success the key is there, with
    StorageUnavailableError it is not, and only a lost commit is WriteUnknownError. Afterwards everything works.
    """
    async with fault_proxy(database_url) as proxy, opened(proxy.url, pool_size=2) as database:
        store = PostgresStore(database)
        keys = key_manager(store)
        await insert_organization(store)
        outcomes: list[tuple[str, bool]] = []
        struck, number = True, 0
        while struck:
            number += 1
            name = f"key {number}"
            await keys.create(ROOT_CALLER, "acme", draft("another"), UUID(int=1000 + number))
            proxy.strike(number, fault)
            try:
                await keys.create(ROOT_CALLER, "acme", draft(name), UUID(int=number))
                outcome = "success"
            except (StorageUnavailableError, WriteUnknownError) as error:
                outcome = type(error).__name__
            struck = proxy.struck.is_set()
            proxy.spare()
            is_there = await observer.fetchval("SELECT EXISTS (SELECT 1 FROM key WHERE name = $1)", name)
            outcomes.append((outcome, is_there))
            # A retry with the same id finds out what became of it, or does it.
            await keys.create(ROOT_CALLER, "acme", draft(name), UUID(int=number))
            assert 1 == await observer.fetchval("SELECT count(*) FROM key WHERE name = $1", name)
        await assert_all_usable(database, observer)
        kept, real = await _counts(observer)

    committed = fault is Fault.LOSE_ANSWER
    # Everything before the commit; the commit; nothing was struck any more.
    assert [("StorageUnavailableError", False)] * (number - 2) == outcomes[:-2]
    assert [("WriteUnknownError", committed), ("success", True)] == outcomes[-2:]
    assert number > 7
    assert real == kept


async def _counts(observer: Connection) -> tuple[int, int]:
    row = await observer.fetchrow(
        """
        SELECT key_count, (SELECT count(*) FROM key WHERE organization_id = 'acme' AND revoke_time IS NULL) AS real
        FROM organization WHERE id = 'acme'
        """
    )
    assert row is not None
    return row["key_count"], row["real"]


@asynccontextmanager
async def impatient(url: str) -> AsyncIterator[Database]:
    """A pool that gives up waiting for an answer much sooner than the service's own."""
    database = Database(await asyncpg.create_pool(url, min_size=0, max_size=2, command_timeout=0.2))
    try:
        yield database
    finally:
        await database.close()


async def test_silence_is_told_from_refusal(database_url: str) -> None:
    """When the network is gone without a word, a statement that is not answered has changed nothing, a commit that is
    not answered may have; the waiting ends with the statement's own time, and the pool is as good as new.
    """
    async with (
        connected(database_url) as onlooker,
        fault_proxy(database_url) as proxy,
        impatient(proxy.url) as database,
    ):

        async def freeze_before_statement() -> None:
            async with database.transaction() as connection:
                await connection.execute(INSERT, "a")
                proxy.freeze()
                await connection.execute(INSERT, "b")

        async def freeze_before_commit() -> None:
            async with database.transaction() as connection:
                await connection.execute(INSERT, "c")
                proxy.freeze()

        async def freeze_before_query() -> None:
            async with database.connection() as connection:
                await connection.execute("SELECT 1")
                proxy.freeze()
                await connection.execute("SELECT 1")

        async def freeze_before_lookup() -> None:
            async with finding(proxy.url) as find:
                await find([b"a" * 32])
                proxy.freeze()
                await find([b"a" * 32])

        answers: list[type[BaseException]] = []
        for work in (freeze_before_statement, freeze_before_commit, freeze_before_query, freeze_before_lookup):
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises((StorageUnavailableError, WriteUnknownError)) as caught:
                    await work()
            answers.append(caught.type)
            proxy.thaw()
            await assert_all_usable(database, onlooker)
        stored = await _stored(onlooker)

    away, unknown = StorageUnavailableError, WriteUnknownError
    assert [away, unknown, away, away] == answers
    assert not {"a", "b"} & set(stored)


async def test_cancellation_in_silence_ends_soon(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is cancelled while the network is gone does not wait for the server to agree."""
    monkeypatch.setattr("latchgate.storage.postgres.ROLLBACK_TIMEOUT_S", 0.05)
    async with (
        connected(database_url) as onlooker,
        fault_proxy(database_url) as proxy,
        opened(proxy.url, pool_size=2) as database,
    ):
        frozen = asyncio.Event()

        async def work() -> None:
            async with database.transaction() as connection:
                await connection.execute(INSERT, "a")
                proxy.freeze()
                frozen.set()
                await connection.execute(INSERT, "b")

        task = asyncio.create_task(work())
        await frozen.wait()
        await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(MANAGEMENT_TIMEOUT_S - 1):
            await asyncio.wait({task})
        assert task.cancelled()
        proxy.thaw()
        await assert_all_usable(database, onlooker)
        assert [] == await _stored(onlooker)


Work = Callable[[KeyManager, str, int], Coroutine[Any, Any, object]]

WORK: dict[str, Work] = {
    "create": lambda keys, _, number: keys.create(ROOT_CALLER, "acme", draft(), UUID(int=number)),
    "rotate": lambda keys, key_id, _: keys.rotate(ROOT_CALLER, key_id, timedelta(hours=1)),
    "update": lambda keys, key_id, number: keys.update(ROOT_CALLER, key_id, "", {"name": f"key {number}"}),
    "list": lambda keys, _, __: keys.list(ROOT_CALLER, KeyFilter(organization_id="acme"), "", 5),
}


@pytest.mark.parametrize("more", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("name", WORK)
async def test_cancellation_anywhere_leaves_nothing_behind(
    database_url: str, observer: Connection, complaints: list[str], name: str, more: int
) -> None:
    """A call that is cancelled at any of its waits, and then once more while it cleans up, leaves no transaction and no
    lock behind, no connection that could not be used, and no half of a change.
    """
    async with opened(database_url, pool_size=1) as database:
        store = PostgresStore(database)
        keys = key_manager(store)
        await insert_organization(store)
        key_id = (await keys.create(ROOT_CALLER, "acme", draft())).key.id
        number, waits = 0, None
        while waits is None:
            number += 1
            waits = await run_cancelled(WORK[name](keys, key_id, number), number, more)
            await assert_all_usable(database, observer)
            kept, real = await _counts(observer)
            assert real == kept
        halves = await observer.fetchval(
            """
            SELECT count(*) FROM key k WHERE NOT EXISTS (
                SELECT 1 FROM secret s JOIN last_used u ON u.secret_id = s.id WHERE s.key_id = k.id
            )
            """
        )

    assert 0 == halves
    assert number > 2
    assert [] == complaints


async def test_transaction_that_stands_still_is_ended_by_the_server(
    database: Database, database_url: str, observer: Connection
) -> None:
    """A transaction that nobody goes on with does not hold its locks for ever: the server ends it."""
    async with database.management.acquire() as connection:
        settings = {
            name: await connection.fetchval(f"SHOW {name}")
            for name in ("idle_in_transaction_session_timeout", "statement_timeout", "lock_timeout", "TimeZone", "jit")
        }
    lookups = lookup_link(database_url)
    async with lookups.connection() as connection:
        lookup_timeout = await connection.fetchval("SHOW statement_timeout")
    lookups.cut()

    assert {
        "idle_in_transaction_session_timeout": "5s",
        "statement_timeout": "5s",
        "lock_timeout": "4s",
        "TimeZone": "UTC",
        "jit": "off",
    } == settings
    assert "800ms" == lookup_timeout
    with pytest.raises(StorageUnavailableError):
        await _stand_still(database, observer)
    await assert_all_usable(database, observer)


async def _stand_still(database: Database, observer: Connection) -> None:
    async with database.transaction() as connection:
        await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
        await connection.execute(INSERT, "a")

        async def is_ended() -> bool:
            ended: bool = await observer.fetchval(
                "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%')"
            )
            return ended

        await until(is_ended)
        await connection.execute(INSERT, "b")


async def test_close_does_not_wait_for_a_connection_that_is_never_given_back(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing ends, also if a connection is still lent: it is cut."""
    monkeypatch.setattr("latchgate.storage.postgres.CLOSE_TIMEOUT_S", 0.05)
    database = await Database.open(database_url, pool_size=1)
    kept = await database.management.acquire()
    await database.close()

    with pytest.raises(asyncpg.InterfaceError):
        await kept.fetchval("SELECT 1")
    with pytest.raises(StorageUnavailableError):
        await _store(database, "a")
