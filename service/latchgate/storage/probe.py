"""Whether the database can be used, asked on a connection outside the pools: a busy pool is no dead database."""

from __future__ import annotations

import asyncpg

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import queries
from latchgate.storage.postgres import SESSION_KIND, Connection, translated


class DatabaseProbe:
    """Asks the database the same question again and again."""

    def __init__(self, dsn: str, timeout_s: float) -> None:
        """Takes the database's address, and how long it may take to answer."""
        self._dsn = dsn
        self._timeout_s = timeout_s
        self._connection: Connection | None = None

    async def is_writable(self) -> bool:
        """Says whether the database answers in time and is no standby."""
        try:
            with translated():
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(
                        self._dsn, timeout=self._timeout_s, target_session_attrs=SESSION_KIND
                    )
                return not await self._connection.fetchval(queries.DATABASE_PROBE, timeout=self._timeout_s)
        except (StorageUnavailableError, asyncpg.PostgresError):
            await self.close()
            return False

    async def close(self) -> None:
        """Cuts the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
