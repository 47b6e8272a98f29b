"""Brings the schema up to date: one process at a time, the others wait and then find nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import queries
from latchgate.storage.postgres import CONNECT_TIMEOUT_S, translated

OLDEST_SERVER = 14


class SchemaError(Exception):
    """The database can not be used by this release."""


async def migrate(dsn: str) -> tuple[str | None, str]:
    """Applies what is missing and gives the schema's version before and after.

    Raises SchemaError if the server is too old or the schema is of a newer release, and StorageUnavailableError.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(dsn, timeout=CONNECT_TIMEOUT_S),
        poolclass=NullPool,
    )
    try:
        with translated(), _unwrapped():
            async with engine.connect() as connection:
                return await connection.run_sync(_upgrade)
    except asyncpg.ClientConfigurationError:
        raise SchemaError("LATCHGATE_DATABASE_URL: can not be read; write postgresql://user@host:5432/name") from None
    finally:
        await engine.dispose()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Gives the driver's own error where SQLAlchemy has wrapped it: its text may hold a statement's parameters."""
    try:
        yield
    except DBAPIError as error:
        cause = error.orig.__cause__ if error.orig else None
        if cause is None:
            raise StorageUnavailableError(f"the database is not available ({type(error).__name__})") from None
        raise cause from None


def _upgrade(connection: Connection) -> tuple[str | None, str]:
    version = connection.dialect.server_version_info
    major = int(version[0]) if version else 0
    if major < OLDEST_SERVER:
        raise SchemaError(f"PostgreSQL {major} is too old; latchgate needs {OLDEST_SERVER} or newer")
    # The lock is the session's, so that it outlives each migration's transaction; closing the connection gives it back.
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": queries.MIGRATION_LOCK})
    connection.commit()
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    before = MigrationContext.configure(connection).get_current_revision()
    if before is not None and before not in {script.revision for script in scripts.walk_revisions()}:
        raise SchemaError(
            f"the database's schema ({before}) is of a newer release; run that release, or restore a backup"
        )
    connection.commit()
    command.upgrade(config, "head")
    connection.commit()
    head = scripts.get_current_head()
    if head is None:
        raise SchemaError("this installation holds no schema; install it anew")
    return before, head
