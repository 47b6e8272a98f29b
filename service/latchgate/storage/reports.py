"""How keys were used, read from PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from latchgate.domain.model import Key, Outcome, Scope
from latchgate.domain.ports import StepCounts
from latchgate.storage import queries, queries_usage, rows
from latchgate.storage.postgres import Database
from latchgate.storage.stores import PostgresStore
from latchgate.storage.usage import OUTCOME_NUMBERS

# In the order of ids this comes after all.
_AFTER_ALL: Final = "~"
_OUTCOMES: Final = {number: outcome for outcome, number in OUTCOME_NUMBERS.items()}


class PostgresUsageStore:
    """Implements latchgate.domain.ports.UsageStore."""

    def __init__(self, database: Database, store: PostgresStore) -> None:
        """Takes the open database, and the store of keys on it."""
        self._database = database
        self._store = store

    async def now(self) -> datetime:
        """The database's clock."""
        async with self._database.connection() as connection:
            now: datetime = await connection.fetchval("SELECT now()")
        return now

    async def get_key(self, key_id: str) -> Key | None:
        """Reads a key."""
        return await self._store.get_key(key_id)

    async def scopes(self, organization_id: str) -> Sequence[Scope] | None:
        """Reads an organization's own scopes."""
        return await self._store.scopes(organization_id)

    async def usage_of_key(self, key_id: str, start_hour: int, end_hour: int, step_hours: int) -> StepCounts:
        """Counts for a key by steps."""
        return await self._counts(queries_usage.USAGE_OF_KEY, key_id, start_hour, end_hour, step_hours)

    async def usage_of_organization(
        self, organization_id: str, start_hour: int, end_hour: int, step_hours: int
    ) -> StepCounts:
        """Counts for all keys of an organization by steps."""
        return await self._counts(
            queries_usage.USAGE_OF_ORGANIZATION, organization_id, start_hour, end_hour, step_hours
        )

    async def _counts(self, query: str, *arguments: object) -> StepCounts:
        counts: dict[int, dict[Outcome, int]] = {}
        async with self._database.connection() as connection:
            statement = await connection.prepare(query)
            for step, outcome, count in await statement.fetch(*arguments):
                # Of a later release there may be outcomes that this one does not know.
                if outcome in _OUTCOMES:
                    counts.setdefault(step, {})[_OUTCOMES[outcome]] = count
        return counts

    async def reach(self, organization_id: str, after: str, count: int) -> tuple[datetime, str]:
        """Gives the database's clock, and how far `count` keys go that are not revoked."""
        async with self._database.connection() as connection:
            statement = await connection.prepare(queries.KEY_REACH)
            row = await statement.fetchrow(organization_id, after, count)
        if row is None:
            raise LookupError("a statement that always gives a row gave none")
        return row["now"], row["reach"] or ""

    async def unused_keys(
        self, organization_id: str, after: str, until: str, since: datetime, count: int
    ) -> Sequence[Key]:
        """Lists up to `count` keys that were not used since a time."""
        async with self._database.connection() as connection:
            statement = await connection.prepare(queries.KEY_LIST_UNUSED)
            found = await statement.fetch(organization_id, after, until or _AFTER_ALL, since, count)
        return [rows.key(row) for row in found]
