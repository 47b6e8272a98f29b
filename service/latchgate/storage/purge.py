"""Deleted keys are removed when nobody can bring them back any more."""

from __future__ import annotations

import structlog

from latchgate.domain.audit import AuditEntry
from latchgate.domain.model import DELETED_KEPT
from latchgate.storage import queries
from latchgate.storage.postgres import Database
from latchgate.storage.rows import Row
from latchgate.storage.transaction import PostgresTransaction

# Few, so that neither the database nor whoever waits for a lock of theirs is long at one batch.
PURGE_ROWS = 100

_log = structlog.get_logger("latchgate.purge")


async def purge_keys(database: Database) -> None:
    """Removes the keys whose purge_time has come, with their secrets, batch by batch, each recorded in the audit trail.

    Workers that have one of them in memory go on saying that it is revoked; to all others its tokens are unknown then.
    """
    count, more = 0, True
    while more:
        async with database.transaction() as connection:
            purged = await connection.fetch(queries.KEY_PURGE, DELETED_KEPT, PURGE_ROWS)
            transaction = PostgresTransaction(connection)
            # The ends of several chains are taken: by all in one order.
            for row in sorted(purged, key=lambda row: (row["organization_id"], row["id"])):
                await transaction.record_audit(None, _entry(row))
        count += len(purged)
        more = len(purged) == PURGE_ROWS
    if count:
        _log.info("keys_purged", keys=count)


def _entry(row: Row) -> AuditEntry:
    """Says of a key what it was, and that it is no more."""
    return AuditEntry(
        organization_id=row["organization_id"],
        entity="key",
        entity_id=row["id"],
        before={"name": row["name"], "delete_time": row["delete_time"].isoformat(timespec="microseconds")},
    )
