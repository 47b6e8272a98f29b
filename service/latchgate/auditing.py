"""Whether the audit trail is whole."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg

from latchgate.config import CommandError
from latchgate.domain.trail import Chain, find_break
from latchgate.storage.audit import PostgresTrail
from latchgate.storage.postgres import Database


async def verify(dsn: str, organization_id: str, say: Callable[[str], None]) -> bool:
    """Walks along the trail of an organization, or of all if none is named, and says of each whether it is whole.

    Raises CommandError and StorageUnavailableError.
    """
    database = await Database.open(dsn, pool_size=1)
    try:
        trail = PostgresTrail(database)
        chains = [each for each in await trail.chains() if organization_id in ("", each.organization_id)]
        orphans = [each for each in await trail.orphans() if organization_id in ("", each)]
        if not chains and not orphans:
            raise CommandError(
                f"organization {organization_id} has no audit trail" if organization_id else "there is no audit trail"
            )
        broken = len(orphans)
        for orphan in orphans:
            say(f"{orphan}: BROKEN: there are events, but not where the trail ends")
        for kept in chains:
            broken += await _verify_one(trail, kept, say)
    except asyncpg.UndefinedTableError:
        raise CommandError("the database has no audit trail yet; run `latchgate migrate`") from None
    finally:
        await database.close()
    return not broken


async def _verify_one(trail: PostgresTrail, kept: Chain, say: Callable[[str], None]) -> bool:
    """Says whether a trail is whole; gives whether it is broken."""
    found = await find_break(kept, trail.walk(kept))
    if found:
        say(f"{kept.organization_id}: BROKEN: {found}")
        return True
    since = f", kept from event {kept.start_sequence + 1} on" if kept.start_sequence else ""
    say(f"{kept.organization_id}: whole{since}, up to event {kept.sequence} with hash {kept.hash.hex()}")
    return False
