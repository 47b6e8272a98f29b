"""Two users of the database: one that owns the schema, and the service's own, who may do what it needs, not more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from latchgate.storage import queries
from latchgate.storage.postgres import CONNECT_TIMEOUT_S, SESSION_KIND, Connection, translated, unavailable


async def grant_to_service(owner_dsn: str, service_dsn: str) -> None:
    """Gives the service's user, as whom `service_dsn` connects, its rights; nothing if that is the owner itself.

    Of the audit trail it may read and add, and neither change nor remove. Raises StorageUnavailableError.
    """
    with translated():
        async with _connected(service_dsn) as connection:
            user = await connection.fetchval(queries.ROLE_CURRENT)
        async with _connected(owner_dsn) as connection, connection.transaction():
            if user == await connection.fetchval(queries.ROLE_CURRENT):
                return
            # Two who grant at once would get into each other's way.
            await connection.execute(queries.CHANGE_LOCK_TAKE, queries.MIGRATION_LOCK)
            for row in await connection.fetch(queries.ROLE_GRANTS, user):
                await connection.execute(row["statement"])


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Connection]:
    try:
        connection = await asyncpg.connect(dsn, timeout=CONNECT_TIMEOUT_S, target_session_attrs=SESSION_KIND)
    except asyncpg.PostgresError as error:
        raise unavailable(error) from None
    try:
        yield connection
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)
