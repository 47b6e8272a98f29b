"""SQL of the audit trail and of suspicious use, each statement with what it guarantees, named as in queries.py."""

from __future__ import annotations

# The end of an organization's chain, taken until the end of the transaction, and the time of what comes next: by the
# clock, once the lock is held, and never before the last event's.
AUDIT_HEAD_LOCK = """
INSERT INTO audit_head AS h (organization_id, sequence, hash, event_time)
VALUES ($1, 0, decode(repeat('00', 32), 'hex'), '-infinity')
ON CONFLICT (organization_id) DO UPDATE SET sequence = h.sequence
RETURNING sequence, hash, greatest(event_time, clock_timestamp()) AS event_time
"""

# An event, and with it the new end of its chain, which must be locked. Values are in the order of the columns.
AUDIT_EVENT_INSERT = """
WITH moved AS (UPDATE audit_head SET sequence = $2, hash = $18, event_time = $3 WHERE organization_id = $1)
INSERT INTO audit_event (organization_id, sequence, event_time, actor_key_id, actor_organization_id, certificate, peer,
                         method, request_id, entity, entity_id, before_change, after_change, revision, code, reason,
                         actor_subject, hash)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
"""

_AUDIT_EVENT = """
SELECT organization_id, sequence, event_time, actor_key_id, actor_organization_id, certificate, peer, method,
       request_id, entity, entity_id, before_change, after_change, revision, code, reason, actor_subject, hash
FROM audit_event
"""

# Up to $11 events of an organization that match, newest first, before the sequence $2 (0 for the first page). Keyset
# paging: what is recorded between two pages hides and repeats nothing. To be prepared anew for each call: its plan is
# for the values at hand.
AUDIT_EVENT_LIST = (
    _AUDIT_EVENT
    + """
WHERE organization_id = $1 AND ($2::bigint = 0 OR sequence < $2)
  AND ($3::text = '' OR actor_key_id = $3) AND ($4::text = '' OR actor_subject = $4)
  AND ($5::text = '' OR entity = $5) AND ($6::text = '' OR entity_id = $6)
  AND ($7::text = '' OR method = $7) AND ($8::text = '' OR code = $8)
  AND ($9::timestamptz IS NULL OR event_time >= $9) AND ($10::timestamptz IS NULL OR event_time < $10)
ORDER BY sequence DESC
LIMIT $11
"""
)

# Up to $4 events of an organization beyond the sequence $2 and up to $3, in their order.
AUDIT_EVENT_WALK = (
    _AUDIT_EVENT
    + """
WHERE organization_id = $1 AND sequence > $2 AND sequence <= $3
ORDER BY sequence
LIMIT $4
"""
)

# Every chain by its organization: from which event on it is kept (0 and null for all), its end, and the last event that
# there is; all as of one moment.
AUDIT_CHAIN_LIST = """
SELECT h.organization_id, h.sequence, h.hash, coalesce(s.sequence, 0) AS start_sequence, s.hash AS start_hash,
       coalesce((SELECT max(e.sequence) FROM audit_event e WHERE e.organization_id = h.organization_id), 0)
           AS last_sequence
FROM audit_head h LEFT JOIN audit_start s USING (organization_id)
ORDER BY h.organization_id
"""

# Organizations with events, but without the end of a chain.
AUDIT_ORPHAN_LIST = """
SELECT DISTINCT e.organization_id FROM audit_event e
WHERE NOT EXISTS (SELECT 1 FROM audit_head h WHERE h.organization_id = e.organization_id)
"""

# Adds to what was counted this hour; in the order in which it is given, so that two who write hardly ever wait for each
# other.
SUSPICIOUS_USE_ADD = """
INSERT INTO suspicious_use AS s (hour, source, outcome, organization_id, key_id, count)
SELECT date_trunc('hour', now(), 'UTC'), added.*
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
     AS added (source, outcome, organization_id, key_id, count)
ON CONFLICT (hour, source, outcome, key_id) DO UPDATE
SET count = s.count + excluded.count, last_time = excluded.last_time
"""

# Up to $3 rows of the organization $1, or of all where it is null, newest first, before the id $2 (0: the first page).
SUSPICIOUS_USE_LIST = """
SELECT id, hour, source, outcome, organization_id, key_id, count, first_time, last_time
FROM suspicious_use
WHERE ($1::text IS NULL OR organization_id = $1) AND ($2::bigint = 0 OR id < $2)
ORDER BY id DESC
LIMIT $3
"""

# Forgets up to $2 rows that are older than $1. Those that another worker is at are left to it.
SUSPICIOUS_USE_FORGET = """
DELETE FROM suspicious_use
WHERE id IN (
    SELECT id FROM suspicious_use WHERE hour < now() - $1::interval ORDER BY hour LIMIT $2 FOR UPDATE SKIP LOCKED
)
"""

# The partitions for what will come, and away with those that are too old; see the migration that makes the functions.
AUDIT_MAKE_PARTITIONS = "SELECT audit_make_partitions()"
AUDIT_FORGET = "SELECT audit_forget($1::interval)"
