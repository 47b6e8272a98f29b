"""Last-used times: gathered in memory, written in batches, never one write a call."""

from __future__ import annotations

from latchgate.storage import queries
from latchgate.storage.postgres import Database

# Few, so that neither this process nor the database is long at one of them.
FLUSH_ROWS = 500


class UsageBuffer:
    """Implements latchgate.domain.ports.UsageRecorder. A crash loses what came since the last flush."""

    def __init__(self, database: Database) -> None:
        """Takes where to write."""
        self._database = database
        self._used: dict[int, float] = {}

    @property
    def pending(self) -> int:
        """How many secrets have a time that is not written yet."""
        return len(self._used)

    def record(self, secret_id: int, used_s: float) -> None:
        """Takes note of a use. Answers overtake each other, times do not go back."""
        if self._used.get(secret_id, 0.0) < used_s:
            self._used[secret_id] = used_s

    async def flush(self) -> None:
        """Writes what has gathered. What may not have been written is kept for the next time: twice does no harm."""
        used, self._used = self._used, {}
        batch = sorted(used.items())
        while batch:
            part, batch = batch[:FLUSH_ROWS], batch[FLUSH_ROWS:]
            try:
                await self._write(part)
            except BaseException:
                for secret_id, used_s in (*part, *batch):
                    self.record(secret_id, used_s)
                raise

    async def _write(self, part: list[tuple[int, float]]) -> None:
        async with self._database.transaction() as connection:
            # A crash of the server may lose the last moments' times; waiting for the disk would be the higher price.
            await connection.execute("SET LOCAL synchronous_commit = off")
            await connection.execute(
                queries.LAST_USED_UPDATE, [secret_id for secret_id, _ in part], [used_s for _, used_s in part]
            )
