"""What can go wrong with a database: which of it is StorageUnavailableError, and which is a fault to be seen."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage.postgres import Connection, Database
from support.databases import assert_all_usable, connected, finding, opened, started_and_waiting, until

# By what the server says (PostgreSQL documentation, appendix A): what passes by itself or with an operator's help.
AWAY = {
    "08006": "connection_failure",
    "25006": "read_only_sql_transaction",
    "28P01": "invalid_password",
    "3D000": "invalid_catalog_name",
    "40001": "serialization_failure",
    "40P01": "deadlock_detected",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "55P03": "lock_not_available",
    "57014": "query_canceled",
    "57P01": "admin_shutdown",
    "57P03": "cannot_connect_now",
    "58030": "io_error",
}
FAULTS = {
    "22001": "string_data_right_truncation",
    "22P05": "untranslatable_character",
    "23505": "unique_violation",
    "23514": "check_violation",
    "42501": "insufficient_privilege",
    "42P01": "undefined_table",
    "P0001": "raise_exception",
    "XX000": "internal_error",
}


async def _raise_on_server(database: Database, sqlstate: str) -> None:
    async with database.connection() as connection:
        await connection.execute(f"DO $$ BEGIN RAISE 'the secret value' USING ERRCODE = '{sqlstate}'; END $$")


async def test_what_passes_is_unavailable_and_what_does_not_is_raised(database: Database, observer: Connection) -> None:
    """What waiting or an operator mends is StorageUnavailableError, and says what it is without the server's own words,
    which may hold a value of a row. Anything else is raised as it is.
    """
    for sqlstate in AWAY:
        with pytest.raises(StorageUnavailableError) as away:
            await _raise_on_server(database, sqlstate)
        assert "secret" not in away.value.message
        assert (None, True) == (away.value.__cause__, away.value.__suppress_context__)
    for sqlstate in FAULTS:
        with pytest.raises(asyncpg.PostgresError) as fault:
            await _raise_on_server(database, sqlstate)
        assert sqlstate == fault.value.sqlstate

    await assert_all_usable(database, observer)


async def test_values_that_do_not_fit_are_not_unavailable(database: Database, observer: Connection) -> None:
    """A value that a column can not hold is a fault of the service, whether the driver or the server finds it."""

    async def run(statement: str, value: object) -> None:
        async with database.connection() as connection:
            await connection.fetch(statement, value)

    for statement, value in (
        ("SELECT $1::int", "x"),
        ("SELECT $1::int", 1 << 40),
        ("SELECT $1::text", "\0"),
        ("SELECT $1::text::int", "x"),
    ):
        with pytest.raises(asyncpg.DataError):
            await run(statement, value)
    await assert_all_usable(database, observer)


async def test_exhausted_pool_is_unavailable(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds no free connection in time is told so, and the next one after it was given back is served."""
    monkeypatch.setattr("latchgate.storage.postgres.ACQUIRE_TIMEOUT_S", 0.05)
    async with opened(database_url, pool_size=1) as database, connected(database_url) as onlooker:
        async with database.connection():
            with pytest.raises(StorageUnavailableError):
                await _ask(database)
            with pytest.raises(StorageUnavailableError):
                await _ask_in_transaction(database)
        assert 1 == await _ask(database)
        await assert_all_usable(database, onlooker)


async def _ask(database: Database) -> int:
    async with database.connection() as connection:
        answer: int = await connection.fetchval("SELECT 1")
    return answer


async def _ask_in_transaction(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.execute("SELECT 1")


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("postgresql://postgres@127.0.0.1:1/none", id="refused"),
        pytest.param("postgresql://postgres@/none?host=/nowhere", id="no socket"),
        pytest.param("postgresql://postgres@host.invalid/none", id="no such host"),
    ],
)
async def test_server_that_is_not_there_is_unavailable(address: str) -> None:
    """Where nothing listens, everything is StorageUnavailableError, and the message names no host."""
    async with opened(address) as database, finding(address) as find:
        for ask in (_ask(database), _ask_in_transaction(database), find([b"a" * 32])):
            with pytest.raises(StorageUnavailableError) as caught:
                await ask
            assert "host" not in caught.value.message
            assert "127.0.0.1" not in caught.value.message


async def test_database_that_is_missing_is_unavailable(database_url: str) -> None:
    """A database that is not made yet is waited for like one that is not up."""
    async with opened(database_url.replace("/test_", "/missing_")) as database:
        with pytest.raises(StorageUnavailableError, match="InvalidCatalogNameError"):
            await _ask(database)


async def test_server_that_takes_no_session_is_unavailable(postgres_url: str) -> None:
    """Whatever a server has against a new session is StorageUnavailableError."""
    address = urlunsplit(urlsplit(postgres_url)._replace(path="/template0"))
    async with opened(address) as database, finding(address) as find:
        for ask in (_ask(database), _ask_in_transaction(database), find([b"a" * 32])):
            with pytest.raises(StorageUnavailableError):
                await ask


async def test_timeouts_of_the_server_are_unavailable(database: Database, observer: Connection) -> None:
    """A statement that takes too long, and a lock that is not had in time, are StorageUnavailableError; the transaction
    is undone and the connection as good as new.
    """

    async def run(*statements: str) -> None:
        async with database.transaction() as connection:
            for statement in statements:
                await connection.execute(statement)

    with pytest.raises(StorageUnavailableError, match="QueryCanceledError"):
        await run("SET LOCAL statement_timeout = '10ms'", "SELECT pg_sleep(10)")
    async with observer.transaction():
        await observer.execute("LOCK TABLE deployment")
        with pytest.raises(StorageUnavailableError, match="LockNotAvailableError"):
            await run("SET LOCAL lock_timeout = '10ms'", "SELECT * FROM deployment")
    await assert_all_usable(database, observer)


async def test_sessions_that_are_ended_by_an_operator_are_replaced(database: Database, observer: Connection) -> None:
    """After all sessions were ended, one under way is StorageUnavailableError, and the next ones are served anew."""
    await assert_all_usable(database, observer)
    await observer.execute("SELECT pg_advisory_lock(1)")

    async def wait_for_lock() -> None:
        async with database.connection() as connection:
            await connection.execute("SELECT pg_advisory_lock(1)")

    task = await started_and_waiting(observer, wait_for_lock())
    ended = await observer.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'latchgate'"
    )
    with pytest.raises(StorageUnavailableError):
        await task
    assert len(ended) > 1
    await observer.execute("SELECT pg_advisory_unlock(1)")

    async def have_noticed() -> bool:
        return database.management.get_size() == 0

    await until(have_noticed)
    await assert_all_usable(database, observer)
