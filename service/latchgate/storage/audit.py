"""The audit trail in PostgreSQL: reading it, and keeping its partitions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Final

import structlog

from latchgate.domain.audit import GENESIS, AuditFilter, ChainedEvent
from latchgate.domain.trail import Chain
from latchgate.storage import queries, queries_audit, rows
from latchgate.storage.postgres import Database

WALK_ROWS: Final = 1000

_log = structlog.get_logger("latchgate.audit")


class PostgresTrail:
    """Implements latchgate.domain.trail.TrailReader."""

    def __init__(self, database: Database) -> None:
        """Takes the open database."""
        self._database = database

    async def list_events(self, event_filter: AuditFilter, before: int, count: int) -> Sequence[ChainedEvent]:
        """Lists up to `count` events that match, newest first, before the sequence `before`."""
        values = (
            event_filter.organization_id,
            before,
            event_filter.actor_key_id,
            event_filter.actor_subject,
            event_filter.entity,
            event_filter.entity_id,
            event_filter.method,
            event_filter.code,
            event_filter.start_time,
            event_filter.end_time,
            count,
        )
        async with self._database.connection() as connection:
            statement = await connection.prepare(queries_audit.AUDIT_EVENT_LIST)
            return [rows.audit_event(row) for row in await statement.fetch(*values)]

    async def has_organization(self, organization_id: str) -> bool:
        """Says whether there is such an organization."""
        async with self._database.connection() as connection:
            return await connection.fetchrow(queries.ORGANIZATION_SCOPES, organization_id) is not None

    async def chains(self) -> Sequence[Chain]:
        """Lists where each organization's chain begins and ends."""
        async with self._database.connection() as connection:
            return [
                Chain(
                    organization_id=row["organization_id"],
                    sequence=row["sequence"],
                    hash=row["hash"],
                    last_sequence=row["last_sequence"],
                    start_sequence=row["start_sequence"],
                    start_hash=row["start_hash"] or GENESIS,
                )
                for row in await connection.fetch(queries_audit.AUDIT_CHAIN_LIST)
            ]

    async def orphans(self) -> Sequence[str]:
        """Lists the organizations whose events have lost the end of their chain."""
        async with self._database.connection() as connection:
            return [row["organization_id"] for row in await connection.fetch(queries_audit.AUDIT_ORPHAN_LIST)]

    async def walk(self, kept: Chain) -> AsyncIterator[ChainedEvent]:
        """Gives the events of a chain in their order, up to its end as it was when the chain was read."""
        after = kept.start_sequence
        while True:
            async with self._database.connection() as connection:
                found = await connection.fetch(
                    queries_audit.AUDIT_EVENT_WALK, kept.organization_id, after, kept.sequence, WALK_ROWS
                )
            for row in found:
                after = row["sequence"]
                yield rows.audit_event(row)
            if len(found) < WALK_ROWS:
                return

    async def make_partitions(self) -> None:
        """Makes the partitions that the next months' events go to."""
        async with self._database.connection() as connection:
            await connection.execute(queries_audit.AUDIT_MAKE_PARTITIONS)

    async def forget(self, retention: timedelta) -> int:
        """Drops the months whose events are all older than `retention`, of 30 days at least; gives how many."""
        async with self._database.connection() as connection:
            dropped: int = await connection.fetchval(queries_audit.AUDIT_FORGET, retention)
        return dropped


async def keep_trail(trail: PostgresTrail, retention: timedelta) -> None:
    """Makes room for what will come, and lets go of what is too old."""
    await trail.make_partitions()
    dropped = await trail.forget(retention)
    if dropped:
        _log.info("audit_months_dropped", months=dropped)
