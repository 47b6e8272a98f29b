"""The schema: made and brought up to date by one process, waited for by the others, refused where it does not fit."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import queries
from latchgate.storage.migrate import SchemaError, check_server, migrate
from latchgate.storage.postgres import Connection
from support.databases import connected, fault_proxy, started_and_waiting

HEAD = "0010"
TABLES = {
    "alembic_version",
    "audit_event",
    "audit_head",
    "audit_start",
    "change_log",
    "delivery",
    "deployment",
    "event",
    "expiry_scan",
    "housekeeping",
    "key",
    "key_notice",
    "last_used",
    "mail",
    "organization",
    "plan",
    "rate_window",
    "request",
    "secret",
    "signing_key",
    "suspicious_use",
    "token_family",
    "usage_by_organization",
    "usage_by_secret",
    "usage_flush",
    "webhook",
    "worker",
}


async def _tables(connection: Connection) -> set[str]:
    """Every table but partitions, which are named after months."""
    rows = await connection.fetch(
        "SELECT relname FROM pg_class "
        "WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition"
    )
    return {row["relname"] for row in rows}


async def test_new_database_gets_the_schema(empty_database_url: str) -> None:
    """On a new database the whole schema is made, with what the service brings along; a second time nothing happens."""
    assert (None, HEAD) == await migrate(empty_database_url)
    async with connected(empty_database_url) as connection:
        assert TABLES == await _tables(connection)
        assert ["default", "root"] == [row["id"] for row in await connection.fetch("SELECT id FROM plan ORDER BY id")]
        assert ["org_root"] == [row["id"] for row in await connection.fetch("SELECT id FROM organization")]
        await connection.execute("UPDATE organization SET name = 'kept'")

        assert (HEAD, HEAD) == await migrate(empty_database_url)
        assert "kept" == await connection.fetchval("SELECT name FROM organization")
        assert 0 == await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")


async def test_of_many_that_start_together_one_makes_the_schema(empty_database_url: str) -> None:
    """Many who migrate a new database at once all end well, and one of them has done it."""
    answers = await asyncio.gather(*(migrate(empty_database_url) for _ in range(6)))

    assert [(None, HEAD), *[(HEAD, HEAD)] * 5] == sorted(answers, key=lambda answer: answer[0] or "")


async def test_processes_that_start_together_wait_for_one(empty_database_url: str) -> None:
    """The same for processes of their own, as when a deployment starts."""
    script = (
        "import asyncio, sys; from latchgate.storage.migrate import migrate; print(asyncio.run(migrate(sys.argv[1])))"
    )
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, empty_database_url, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [(await process.communicate())[0].decode().strip() for process in processes]

    assert [str((HEAD, HEAD)), str((None, HEAD))] == sorted(outputs)
    assert [0] * 2 == [process.returncode for process in processes]


async def test_nothing_is_done_while_another_migrates(empty_database_url: str) -> None:
    """While another process holds the lock, nothing is read or made; once it is free, the work is done."""
    async with connected(empty_database_url) as other:
        await other.execute("SELECT pg_advisory_lock($1)", queries.MIGRATION_LOCK)
        waiting = await started_and_waiting(other, migrate(empty_database_url))
        assert set() == await _tables(other)
        await other.execute("SELECT pg_advisory_unlock($1)", queries.MIGRATION_LOCK)

        assert (None, HEAD) == await waiting
        assert TABLES == await _tables(other)


async def test_waiting_for_another_process_ends_with_what_it_waits_for(empty_database_url: str) -> None:
    """Who has waited for too long for another process says so, and may try again."""
    async with connected(empty_database_url) as other:
        await other.execute("SELECT pg_advisory_lock($1)", queries.MIGRATION_LOCK)
        with pytest.raises(StorageUnavailableError, match="another process has been bringing the database's schema"):
            await migrate(empty_database_url, lock_wait_s=0.05)


async def test_process_that_dies_while_it_migrates_leaves_the_way_free(empty_database_url: str) -> None:
    """If the one that migrates dies in the middle, its lock goes and its work is undone; the next one does it all."""
    async with (
        fault_proxy(empty_database_url) as proxy,
        connected(empty_database_url) as other,
        connected(empty_database_url) as onlooker,
    ):
        await other.execute("BEGIN")
        await other.execute("CREATE TABLE last_used ()")
        dying = await started_and_waiting(onlooker, migrate(proxy.url))
        proxy.cut()
        with pytest.raises(StorageUnavailableError):
            await dying
        await other.execute("ROLLBACK")
        assert TABLES != await _tables(other)

        assert (None, HEAD) == await migrate(empty_database_url)
        assert TABLES == await _tables(other)


async def test_migration_does_not_hold_up_those_who_validate(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration waits only briefly for a table that others are at: whoever comes after it waits behind it."""
    monkeypatch.setattr("latchgate.storage.migrate.TABLE_LOCK_WAIT_S", 0.1)
    async with connected(empty_database_url) as other:
        await other.execute("BEGIN")
        await other.execute("CREATE TABLE plan ()")
        with pytest.raises(StorageUnavailableError, match="LockNotAvailableError"):
            await migrate(empty_database_url, lock_wait_s=3600)
        await other.execute("ROLLBACK")
        assert set() == await _tables(other)

        assert (None, HEAD) == await migrate(empty_database_url)


async def test_schema_of_a_newer_release_is_refused(database_url: str) -> None:
    """A schema that this release does not know is refused, and left as it is."""
    async with connected(database_url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(SchemaError, match=r"schema \(9999\) is of a newer release"):
            await migrate(database_url)
        assert "9999" == await connection.fetchval("SELECT version_num FROM alembic_version")


async def test_tables_of_another_program_are_refused(empty_database_url: str) -> None:
    """A database that holds other tables by the same names is refused, and left as it is."""
    async with connected(empty_database_url) as connection:
        await connection.execute("CREATE TABLE request (id int)")
        with pytest.raises(SchemaError, match=r'another program.*relation "request" already exists'):
            await migrate(empty_database_url)
        assert {"request"} == await _tables(connection)


@asynccontextmanager
async def role_without_rights(url: str) -> AsyncIterator[str]:
    """The address of a database as a user who may make nothing in it."""
    async with connected(url) as connection:
        database = await connection.fetchval("SELECT current_database()")
        role = f"{database}_reader"
        await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'a password'")
        await connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        parts = urlsplit(url)
        netloc = f"{role}:{quote('a password')}@{parts.netloc.rpartition('@')[2]}"
        try:
            yield urlunsplit(parts._replace(netloc=netloc))
        finally:
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute(f"DROP ROLE {role}")


async def test_user_without_rights_is_told_which(empty_database_url: str) -> None:
    """A user who may not make tables is told what to grant."""
    async with role_without_rights(empty_database_url) as url:
        with pytest.raises(SchemaError, match=r"permission denied for schema public.*GRANT CREATE ON SCHEMA"):
            await migrate(url)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://user@host:port/name",
        "postgresql://user:hush#hush@host/name",
        "postgresql://user:hush/hush@host/name",
        "postgresql://user:hush?hush@host/name",
        "postgresql://user:hush@[::1/name",
        "postgresql://user:hush@127.0.0.1:99999/name",
        "postgresql://user:hush@127.0.0.1:1/name?sslmode=hush",
    ],
)
async def test_address_that_can_not_be_read_is_told_in_one_line(address: str) -> None:
    """An address with a mistake in it is one line that names the setting, and repeats no piece of it: it may be the
    password.
    """
    with pytest.raises(SchemaError) as caught:
        await migrate(address)

    message = str(caught.value)
    assert message.startswith("LATCHGATE_DATABASE_URL: ")
    assert "hush" not in message
    assert "\n" not in message


async def test_certificate_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that needs a root certificate where there is none is told so: waiting would not bring it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SchemaError, match=r"LATCHGATE_DATABASE_URL: root certificate file .* does not exist"):
        await migrate("postgresql://user@127.0.0.1:1/name?sslmode=verify-full")


async def test_server_that_is_not_there_is_waited_for() -> None:
    """A server that is not up is StorageUnavailableError, which is tried again."""
    with pytest.raises(StorageUnavailableError):
        await migrate("postgresql://user@127.0.0.1:1/name")


@pytest.mark.parametrize("major", [9, 13])
def test_server_that_is_too_old_is_refused(major: int) -> None:
    """PostgreSQL before 14 is refused, by its number."""
    with pytest.raises(SchemaError, match=f"PostgreSQL {major} is too old; latchgate needs 14 or newer"):
        check_server(major)


@pytest.mark.parametrize("major", [14, 15, 18, 30])
def test_server_that_is_new_enough_is_taken(major: int) -> None:
    """PostgreSQL 14 and all that come after it are taken."""
    check_server(major)


async def test_schema_that_is_up_to_date_needs_no_migrations(database_url: str) -> None:
    """A start with the schema of its release neither waits for one that migrates nor loads what migrates."""
    script = """if True:
        import asyncio, sys
        import latchgate.app
        from latchgate.storage.migrate import migrate
        version = asyncio.run(migrate(sys.argv[1], lock_wait_s=0.05))
        print(version, {"alembic", "sqlalchemy"} & {*sys.modules})
    """
    async with connected(database_url) as other:
        await other.execute("SELECT pg_advisory_lock($1)", queries.MIGRATION_LOCK)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, database_url, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
    assert f"{(HEAD, HEAD)} {set()}\n" == out.decode()
