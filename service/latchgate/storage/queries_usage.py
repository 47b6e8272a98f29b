"""SQL about how keys are used, each statement with what it guarantees. Named entity, operation, qualifier."""

from __future__ import annotations

# Takes note that the worker $1 writes its part number $2, in the transaction that writes it; no row if it has written
# it before. Who sends a part again while the first one is still under way waits here until it is known what came of it.
USAGE_FLUSH_MARK = """
INSERT INTO usage_flush AS f (incarnation, sequence) VALUES ($1, $2)
ON CONFLICT (incarnation) DO UPDATE SET sequence = excluded.sequence, flush_time = now()
WHERE f.sequence < excluded.sequence
RETURNING true
"""

# Counts of secrets in the hour $1, added to what there is. Rows are taken in the order of their keys, after those of
# last_used and before those of organizations, so that no two flushes wait for each other.
USAGE_SECRET_ADD = """
INSERT INTO usage_by_secret AS u (hour, secret_id, outcome, count)
SELECT $1, added.* FROM unnest($2::bigint[], $3::smallint[], $4::bigint[]) AS added (secret_id, outcome, count)
ORDER BY secret_id, outcome
ON CONFLICT (hour, secret_id, outcome) DO UPDATE SET count = u.count + excluded.count
"""

# The same for organizations: in the same transaction, so that the two never differ. Last, as all who write a busy
# organization's row wait for each other.
USAGE_ORGANIZATION_ADD = """
INSERT INTO usage_by_organization AS u (hour, organization_id, outcome, count)
SELECT $1, added.* FROM unnest($2::text[], $3::smallint[], $4::bigint[]) AS added (organization_id, outcome, count)
ORDER BY organization_id COLLATE "C", outcome
ON CONFLICT (hour, organization_id, outcome) DO UPDATE SET count = u.count + excluded.count
"""

# What was counted for the key $1 in the hours from $2 up to $3, without it, by steps of $4 hours that are numbered from
# 0; only steps and outcomes with a count. Every hour is looked up by itself (that is what OFFSET is for), so that what
# others have counted in it is not read.
USAGE_OF_KEY = """
SELECT (hours.hour - $2::int) / $4::int AS step, u.outcome, sum(u.count)::bigint AS count
FROM generate_series($2, $3::int - 1) AS hours (hour)
CROSS JOIN LATERAL (
    SELECT outcome, count FROM usage_by_secret
    WHERE hour = hours.hour AND secret_id = ANY (ARRAY(SELECT id FROM secret WHERE key_id = $1))
    OFFSET 0
) u
GROUP BY step, u.outcome
"""

# The same for all keys of the organization $1, however many they are.
USAGE_OF_ORGANIZATION = """
SELECT (hours.hour - $2::int) / $4::int AS step, u.outcome, sum(u.count)::bigint AS count
FROM generate_series($2, $3::int - 1) AS hours (hour)
CROSS JOIN LATERAL (
    SELECT outcome, count FROM usage_by_organization
    WHERE hour = hours.hour AND organization_id = $1
    OFFSET 0
) u
GROUP BY step, u.outcome
"""

# Forgets up to $2 counts of secrets that are older than $1. Those that another is at are left to it. Found where they
# lie, at the begin of the primary key.
USAGE_SECRET_FORGET = """
DELETE FROM usage_by_secret WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM usage_by_secret
    WHERE hour < floor(extract(epoch FROM statement_timestamp() - $1::interval) / 3600)::int
    ORDER BY hour
    LIMIT $2
    FOR UPDATE SKIP LOCKED
))
"""

# The same for organizations.
USAGE_ORGANIZATION_FORGET = """
DELETE FROM usage_by_organization WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM usage_by_organization
    WHERE hour < floor(extract(epoch FROM statement_timestamp() - $1::interval) / 3600)::int
    ORDER BY hour
    LIMIT $2
    FOR UPDATE SKIP LOCKED
))
"""

# Forgets workers that have not written anything for $1. One that comes back after that with a part of which it does not
# know whether it was written, would count it again.
USAGE_FLUSH_FORGET = "DELETE FROM usage_flush WHERE flush_time < now() - $1::interval"
