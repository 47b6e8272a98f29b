"""Suspicious use in PostgreSQL: written in batches, read by the hour."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from latchgate.domain.suspicion import SuspicionCounter
from latchgate.domain.trail import SuspiciousUse
from latchgate.storage import queries_audit, rows
from latchgate.storage.postgres import Database

KEPT: Final = timedelta(days=30)
FORGET_ROWS: Final = 5000


class SuspicionStore:
    """Implements latchgate.domain.trail.SuspicionReader, and writes what a counter has gathered."""

    def __init__(self, database: Database, counter: SuspicionCounter) -> None:
        """Takes the open database, and who counts."""
        self._database = database
        self._counter = counter

    async def flush(self) -> None:
        """Writes what has gathered. What may not have been written is counted again the next time."""
        counts = self._counter.take()
        if not counts:
            return
        columns = [
            [suspect.source for suspect, _ in counts],
            [suspect.outcome.value for suspect, _ in counts],
            [suspect.organization_id for suspect, _ in counts],
            [suspect.key_id for suspect, _ in counts],
            [count for _, count in counts],
        ]
        try:
            async with self._database.transaction() as connection:
                # As for last-used times: a crash of the server may lose the last moments.
                await connection.execute("SET LOCAL synchronous_commit = off")
                await connection.execute(queries_audit.SUSPICIOUS_USE_ADD, *columns)
        except BaseException:
            self._counter.put_back(counts)
            raise

    async def list_suspicious(self, organization_id: str | None, before: int, count: int) -> Sequence[SuspiciousUse]:
        """Lists up to `count` rows of an organization's, or of all for None, newest first, before the id `before`."""
        async with self._database.connection() as connection:
            found = await connection.fetch(queries_audit.SUSPICIOUS_USE_LIST, organization_id, before, count)
        return [rows.suspicious_use(row) for row in found]

    async def forget(self) -> None:
        """Removes what is older than 30 days, in small statements."""
        async with self._database.connection() as connection:
            more = True
            while more:
                status: str = await connection.execute(queries_audit.SUSPICIOUS_USE_FORGET, KEPT, FORGET_ROWS)
                more = int(status.rsplit(maxsplit=1)[-1]) == FORGET_ROWS
