"""What keys were used for before a benchmark begins: made by it, in a database that it has filled."""

from __future__ import annotations

from typing import Final

import asyncpg

from bench.indexes import without_indexes

BUSY: Final = "bench-0007"
LARGE, USED = "bench-large", "bench-used"
LARGE_KEYS, USED_KEYS = 100_000, 50_000
DAYS_OF_ALL, DAYS_OF_BUSY = 7, 90
UNUSED_PART: Final = 100
COUNTS = ("usage_by_secret", "usage_by_organization")

# $1 is the hour that goes on now, $2 the organization whose keys are busy, the last one how many days. Every key was
# used in one hour of each of some days, busy ones in every hour of a longer time, and of each organization something is
# counted in each of those hours.
_OF_ALL: Final = """
INSERT INTO usage_by_secret (secret_id, hour, outcome, count)
SELECT s.id, h.hour, 1, 10
FROM generate_series($1::int - 24 * $3::int, $1 - 1) AS h (hour)
JOIN secret s ON s.id % 24 = h.hour % 24
JOIN key k ON k.id = s.key_id AND k.organization_id <> $2
ORDER BY h.hour, s.id
"""
_OF_BUSY: Final = """
INSERT INTO usage_by_secret (secret_id, hour, outcome, count)
SELECT s.id, h.hour, 1, 10
FROM generate_series($1::int - 24 * $3::int, $1 - 1) AS h (hour)
CROSS JOIN (SELECT s.id FROM secret s JOIN key k ON k.id = s.key_id WHERE k.organization_id = $2) s
"""
_OF_ORGANIZATIONS: Final = """
INSERT INTO usage_by_organization (organization_id, hour, outcome, count)
SELECT o.id, h.hour, 1, 10
FROM generate_series($1::int - 24 * $2::int, $1 - 1) AS h (hour), organization o
ORDER BY h.hour, o.id
"""
_HISTORY: Final = (
    (_OF_ALL, (BUSY, DAYS_OF_ALL)),
    (_OF_BUSY, (BUSY, DAYS_OF_BUSY)),
    (_OF_ORGANIZATIONS, (DAYS_OF_BUSY,)),
)
# Two organizations have many keys. All keys are taken to be used from now on but for a part; in one, none is unused.
_OWNERS: Final = (
    (
        "INSERT INTO organization (id, name, plan_id) SELECT id, id, 'bench' FROM unnest($1::text[]) id",
        ([LARGE, USED],),
    ),
    (
        """
        UPDATE key SET organization_id = CASE WHEN n <= $2::int THEN $1 ELSE $3 END
        FROM (SELECT id, row_number() OVER (ORDER BY id DESC) AS n FROM key) numbered
        WHERE numbered.id = key.id AND n <= $2 + $4::int AND key.organization_id <> $5
        """,
        (LARGE, LARGE_KEYS, USED, USED_KEYS, BUSY),
    ),
    (
        """
        UPDATE last_used SET used_time = now() + interval '2 days' FROM secret s JOIN key k ON k.id = s.key_id
        WHERE s.id = secret_id AND (secret_id % $1 <> 0 OR k.organization_id = $2)
        """,
        (UNUSED_PART, USED),
    ),
)


async def remember(connection: asyncpg.Connection[asyncpg.Record], hour: int) -> str:
    """Makes a history, and says how large it is."""
    for statement, arguments in _OWNERS:
        await connection.execute(statement, *arguments)
    async with without_indexes(connection, COUNTS):
        for history, of in _HISTORY:
            await connection.execute(history, hour, *of)
    await connection.execute("VACUUM (ANALYZE) key, last_used, organization, usage_by_secret, usage_by_organization")
    await connection.execute("CHECKPOINT")
    sizes = []
    for table in COUNTS:
        count = await connection.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608 - one of ours
        size = await connection.fetchval("SELECT pg_total_relation_size($1::regclass)", table)
        sizes.append(f"`{table}` had {count:,} rows, {size / count:.0f} bytes each with its index")
    return f"Before, {' and '.join(sizes)}."
