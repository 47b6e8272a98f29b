"""Which of the workers does what one of them has to do for all."""

from __future__ import annotations

from datetime import timedelta

from latchgate.storage import queries
from latchgate.storage.postgres import Database


async def take_turn(database: Database, name: str, at_least: timedelta) -> bool:
    """Says whether it is this worker's turn: nobody's began within `at_least`, by the database's clock."""
    async with database.connection() as connection:
        return await connection.fetchval(queries.HOUSEKEEPING_TAKE, name, at_least) is not None
