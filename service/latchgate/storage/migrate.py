"""Brings the schema up to date: one process at a time, the others wait and then find nothing to do."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import asyncpg

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import queries
from latchgate.storage.postgres import CONNECT_TIMEOUT_S, SESSION_KIND, Connection, translated, unavailable
from latchgate.storage.roles import grant_to_service

OLDEST_SERVER = 14
VERSIONS: Final = Path(__file__).parent / "migrations" / "versions"
LOCK_WAIT_S = 30.0

# A migration may take long, but its process may not be gone for long without its lock being free again. It waits for
# locks on tables only briefly: whoever comes after it, such as every validation, waits behind it.
_SERVER_SETTINGS = {
    "application_name": "latchgate",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "30s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
TABLE_LOCK_WAIT_S = 2.0


class SchemaError(Exception):
    """The database can not be used by this release."""


async def migrate(dsn: str, *, lock_wait_s: float = LOCK_WAIT_S) -> tuple[str | None, str]:
    """Applies what is missing and gives the schema's version before and after.

    Raises SchemaError if the address can not be read, the server is too old, the schema is of a newer release or the
    user may not change it; and StorageUnavailableError, also if another process is still at it after `lock_wait_s`.
    """
    try:
        with translated():
            newest = newest_version()
            if await _version(dsn) == newest:
                return newest, newest
            # Imported late: it takes a third of the time and a quarter of the memory in which a worker starts, and
            # nearly all of them start with a schema that is up to date.
            from latchgate.storage.upgrading import upgrade  # noqa: PLC0415

            return await upgrade(lambda: _connect_alone(dsn, lock_wait_s))
    except asyncpg.InsufficientPrivilegeError as error:
        raise SchemaError(
            f"the database's user may not make the schema ({error.message}); GRANT CREATE ON SCHEMA to it, or run "
            "`latchgate migrate` as a user who may"
        ) from None
    except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError) as error:
        raise SchemaError(
            f"the database holds another program's tables ({error.message}); give latchgate a database of its own"
        ) from None


def newest_version() -> str:
    """Gives the version that this release's schema has: the number that the last file of migrations begins with."""
    return max(path.name.partition("_")[0] for path in VERSIONS.glob("[0-9]*.py"))


async def migrate_for(service_dsn: str, owner_dsn: str) -> tuple[str | None, str]:
    """Does the same as the schema's owner, and gives the service's user its rights.

    Raises what `migrate` does.
    """
    versions = await migrate(owner_dsn)
    if owner_dsn != service_dsn:
        await grant_to_service(owner_dsn, service_dsn)
    return versions


async def _version(dsn: str) -> str | None:
    """Gives the schema's version as the last migration that was committed has left it; None if there is none."""
    connection = await _connect(dsn)
    try:
        version: str | None = await connection.fetchval(queries.SCHEMA_VERSION)
    except asyncpg.PostgresError:
        # It has no such table, or one that may not be read: whoever migrates finds out.
        return None
    finally:
        await connection.close()
    return version


async def _connect(dsn: str) -> asyncpg.Connection[asyncpg.Record]:
    """Connects to a server that is new enough."""
    try:
        connection = await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, target_session_attrs=SESSION_KIND, server_settings=_SERVER_SETTINGS
        )
    except asyncpg.PostgresError as error:
        raise unavailable(error) from None
    except asyncpg.ClientConfigurationError as error:
        raise SchemaError(f"LATCHGATE_DATABASE_URL: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError):
        # What they say may be a piece of the password.
        raise SchemaError(
            "LATCHGATE_DATABASE_URL: can not be read; write postgresql://user:password@host:5432/name, with %23 for #, "
            "%2F for / and so on in the password"
        ) from None
    try:
        check_server(connection.get_server_version().major)
    except SchemaError:
        connection.terminate()
        raise
    return connection


async def _connect_alone(dsn: str, lock_wait_s: float) -> Connection:
    """Connects, and takes the lock: the session's, so that it outlives each migration's transaction.

    Closing the connection gives it back.
    """
    connection = await _connect(dsn)
    try:
        await _set_lock_timeout(connection, lock_wait_s)
        await connection.execute(queries.MIGRATION_LOCK_TAKE, queries.MIGRATION_LOCK)
        await _set_lock_timeout(connection, TABLE_LOCK_WAIT_S)
    except asyncpg.LockNotAvailableError:
        connection.terminate()
        raise StorageUnavailableError(
            f"another process has been bringing the database's schema up to date for more than {lock_wait_s:g} s"
        ) from None
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _set_lock_timeout(connection: Connection, timeout_s: float) -> None:
    await connection.execute("SELECT set_config('lock_timeout', $1, false)", f"{timeout_s * 1000:.0f}ms")


def check_server(major: int) -> None:
    """Demands a server that is new enough. Raises SchemaError."""
    if major < OLDEST_SERVER:
        raise SchemaError(f"PostgreSQL {major} is too old; latchgate needs {OLDEST_SERVER} or newer")
