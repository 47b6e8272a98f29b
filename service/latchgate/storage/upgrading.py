"""The migrations themselves, by Alembic. Loaded only where there is something to migrate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection as SyncConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from latchgate.storage.migrate import VERSIONS, SchemaError
from latchgate.storage.postgres import unavailable


async def upgrade(connect: Callable[[], Awaitable[Any]]) -> tuple[str | None, str]:
    """Applies what is missing on a connection of the driver's, and gives the schema's version before and after.

    Raises SchemaError for the schema of a newer release, the driver's errors, and StorageUnavailableError.
    """
    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        with _unwrapped():
            async with engine.connect() as connection:
                return await connection.run_sync(_upgrade)
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
            raise unavailable(error) from None
        raise cause from None


def _upgrade(connection: SyncConnection) -> tuple[str | None, str]:
    config = Config()
    config.set_main_option("script_location", str(VERSIONS.parent))
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
