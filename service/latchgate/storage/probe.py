"""Whether the database can be used, asked on a connection outside the pools: a busy pool is no dead database."""

from __future__ import annotations

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import queries
from latchgate.storage.link import Link


class DatabaseProbe:
    """Asks the database the same question again and again."""

    def __init__(self, dsn: str, timeout_s: float) -> None:
        """Takes the database's address, and how long it may take to answer."""
        self._link = Link(dsn, timeout_s=timeout_s)

    async def is_writable(self) -> bool:
        """Says whether the database answers in time and is no standby."""
        try:
            async with self._link.connection() as connection:
                return not await connection.fetchval(queries.DATABASE_PROBE)
        except StorageUnavailableError:
            return False

    async def close(self) -> None:
        """Cuts the connection."""
        self._link.cut()
