"""SQL of events, webhooks, deliveries and mail, each statement with what it guarantees."""

from __future__ import annotations

# An advisory lock, which is a database's own: the number after those of latchgate.storage.queries.
DISPATCH_LOCK = 0x6C617466

# Events, beside the changes that they tell of, numbered in the order in which they are given. With their subjects
# locked: the number of each is larger than that of any earlier event of the same subject, and it is not seen before
# those.
EVENT_INSERT = """
INSERT INTO event (id, organization_id, type, subject, body, mail_to)
SELECT id, organization_id, type, subject, body, mail_to
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
     WITH ORDINALITY AS given (id, organization_id, type, subject, body, mail_to, place)
ORDER BY place
"""

# The id of a delivery: that of its event with the webhook's in it, so that it sorts by the event's time.
_DELIVERY_ID = (
    "'dlv_' || substr({event}, 5, 10) || substr(encode(sha256(convert_to({event} || {webhook}, 'UTF8')), 'hex'), 1, 16)"
)

# Hands up to $1 events on that were not yet, the oldest first: a delivery for each webhook of their organization that
# wants to know, and a mail where somebody is told by mail ($2 says whether mail is sent at all). Under the lock $3, so
# that none overtakes an earlier one of the same subject: nothing for who does not get it. Who gets it so soon that what
# the last holder did is not seen yet does nothing twice.
EVENT_DISPATCH = (
    """
WITH held AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock($3) AS is_mine
), due AS MATERIALIZED (
    SELECT e.number, e.id, e.organization_id, e.type, e.subject, e.mail_to
    FROM held, event e
    WHERE held.is_mine AND e.dispatch_time IS NULL
    ORDER BY e.number
    LIMIT $1
), delivered AS (
    INSERT INTO delivery (id, webhook_id, organization_id, event_number, event_type, subject)
    SELECT """
    + _DELIVERY_ID.format(event="due.id", webhook="w.id")
    + """, w.id, due.organization_id, due.number, due.type, due.subject
    FROM due JOIN webhook w ON w.organization_id = due.organization_id
    WHERE w.enabled AND w.delete_time IS NULL
      AND (cardinality(w.event_types) = 0 OR due.type = ANY (w.event_types))
    ORDER BY due.number, w.id
    ON CONFLICT (webhook_id, event_number) DO NOTHING
), mailed AS (
    INSERT INTO mail (id, event_number, recipient)
    SELECT 'mail_' || substr(due.id, 5), due.number, due.mail_to FROM due WHERE $2::bool AND due.mail_to <> ''
    ON CONFLICT (event_number, recipient) DO NOTHING
), dispatched AS (
    UPDATE event SET dispatch_time = now() FROM due WHERE event.number = due.number
)
SELECT count(*) FROM due
"""
)

# Whether there are events to be handed on, and deliveries and mail that are due: all that a worker asks for again and
# again while there is nothing. Takes no lock and writes nothing, and reads the first entry of an index each, however
# much waits for later.
OUTBOX_DUE = """
SELECT EXISTS (SELECT 1 FROM event WHERE dispatch_time IS NULL) AS events,
       coalesce((SELECT min(next_time) FROM delivery WHERE state = 'pending') <= now(), false) AS deliveries,
       coalesce((SELECT min(next_time) FROM mail WHERE state = 'pending') <= now(), false) AS mails
"""

# An event for one webhook alone, handed on already; gives the delivery's id.
EVENT_INSERT_FOR_ONE = (
    """
WITH made AS (
    INSERT INTO event (id, organization_id, type, subject, body, dispatch_time) VALUES ($1, $2, $3, $4, $5, now())
    RETURNING number, id, organization_id, type, subject
)
INSERT INTO delivery (id, webhook_id, organization_id, event_number, event_type, subject)
SELECT """
    + _DELIVERY_ID.format(event="made.id", webhook="$6::text")
    + """, $6::text, organization_id, number, type, subject FROM made
RETURNING id
"""
)

# Takes up to $1 deliveries that are due, for $2: until then nobody else takes them, and should this worker be gone by
# then, somebody does. Of each webhook no more than $3 at once, less those that are under way here ($4, and $5 how
# many). In order: one is due only when all before it of the same webhook and subject are done; so of a subject no two
# are under way. Those that another worker is about to take are left to it.
DELIVERY_TAKE = """
WITH candidate AS MATERIALIZED (
    SELECT d.id, d.webhook_id, d.next_time, d.event_number
    FROM delivery d
    JOIN webhook w ON w.id = d.webhook_id AND w.enabled AND w.delete_time IS NULL
    WHERE d.state = 'pending' AND d.next_time <= now()
      AND d.webhook_id NOT IN (
          SELECT id FROM unnest($4::text[], $5::int8[]) AS busy (id, count) WHERE count >= $3
      )
      AND NOT EXISTS (
          SELECT 1 FROM delivery earlier
          WHERE earlier.webhook_id = d.webhook_id AND earlier.subject = d.subject AND earlier.state = 'pending'
            AND earlier.event_number < d.event_number
      )
    ORDER BY d.next_time
    LIMIT 500
), chosen AS MATERIALIZED (
    SELECT c.id FROM (
        SELECT id, next_time, webhook_id,
               row_number() OVER (PARTITION BY webhook_id ORDER BY next_time, event_number) AS place
        FROM candidate
    ) c
    LEFT JOIN unnest($4::text[], $5::int8[]) AS busy (id, count) ON busy.id = c.webhook_id
    WHERE c.place <= $3 - coalesce(busy.count, 0)
    ORDER BY c.next_time
    LIMIT $1
), locked AS MATERIALIZED (
    SELECT d.id FROM delivery d JOIN chosen ON chosen.id = d.id
    WHERE d.state = 'pending' AND d.next_time <= now()
    FOR UPDATE OF d SKIP LOCKED
)
UPDATE delivery d
SET next_time = now() + $2::interval, attempts = d.attempts + 1, tries = d.tries + 1, last_time = now(),
    first_time = coalesce(d.first_time, now())
FROM locked, webhook w, event e
WHERE d.id = locked.id AND w.id = d.webhook_id AND e.number = d.event_number
RETURNING d.id, d.webhook_id, d.organization_id, d.event_type, d.attempts, d.tries, d.first_time, e.id AS event_id,
          e.body, w.url, w.sealed_secret,
          CASE WHEN w.old_secret_end_time > now() THEN w.old_sealed_secret END AS old_sealed_secret,
          now() AS now
"""

# What has come of the attempt $2 of a delivery. Nothing if a later attempt is under way or was made: this one had taken
# too long, and was given to another worker.
DELIVERY_FINISH = """
UPDATE delivery
SET state = $3, next_time = $4, last_status = $5, last_error = $6, last_duration = $7,
    done_time = CASE WHEN $3 <> 'pending' THEN now() END
WHERE id = $1 AND attempts = $2 AND state = 'pending'
RETURNING webhook_id, subject
"""

# Has those that wait for a delivery be looked at when it is tried again, and not every time before.
DELIVERY_PUT_OFF = """
UPDATE delivery SET next_time = $4
WHERE webhook_id = $1 AND subject = $2 AND state = 'pending' AND next_time < $4 AND id <> $3
"""

# Gives up to $1 deliveries up whose webhook is disabled or deleted.
DELIVERY_GIVE_UP = """
UPDATE delivery d SET state = 'dead', next_time = NULL, last_error = 'webhook_disabled', done_time = now()
WHERE d.id IN (
    SELECT p.id FROM webhook w JOIN delivery p ON p.webhook_id = w.id AND p.state = 'pending'
    WHERE NOT w.enabled OR w.delete_time IS NOT NULL
    LIMIT $1
    FOR UPDATE OF p SKIP LOCKED
)
"""

# The first failure after a success is when failing began.
WEBHOOK_FAILED = "UPDATE webhook SET failing_since = now() WHERE id = $1 AND failing_since IS NULL"

WEBHOOK_DID_WELL = "UPDATE webhook SET failing_since = NULL WHERE id = $1 AND failing_since IS NOT NULL"

# Disables a webhook that is gone ($2), or has failed for $3 or longer. Once: of several that find it so, one is told.
WEBHOOK_DISABLE = """
UPDATE webhook
SET enabled = false, disable_time = now(), disable_reason = CASE WHEN $2 THEN 'gone' ELSE 'failing' END,
    update_time = now(), version = version + 1
WHERE id = $1 AND enabled AND delete_time IS NULL AND ($2 OR failing_since <= now() - $3::interval)
RETURNING id
"""

_WEBHOOK = """
SELECT id, organization_id, url, event_types, enabled, disable_time, disable_reason, failing_since,
       CASE WHEN old_secret_end_time > now() THEN old_secret_end_time END AS old_secret_end_time,
       created_by, create_time, update_time, version
FROM webhook
"""

WEBHOOK_GET = _WEBHOOK + "WHERE id = $1 AND delete_time IS NULL"

# To be read by a statement after this one, see ORGANIZATION_LOCK.
WEBHOOK_LOCK = "SELECT 1 FROM webhook WHERE id = $1 AND delete_time IS NULL FOR NO KEY UPDATE"

# Newest first, beyond the id $2 ('' for the first page). Keyset paging.
WEBHOOK_LIST = (
    _WEBHOOK
    + """
WHERE organization_id = $1 AND delete_time IS NULL AND id < coalesce(nullif($2, ''), '~')
ORDER BY id DESC
LIMIT $3
"""
)

WEBHOOK_COUNT = "SELECT count(*) FROM webhook WHERE organization_id = $1 AND delete_time IS NULL"

WEBHOOK_INSERT = """
INSERT INTO webhook (id, organization_id, url, event_types, created_by, sealed_secret) VALUES ($1, $2, $3, $4, $5, $6)
"""

WEBHOOK_UPDATE = """
UPDATE webhook
SET url = $2, event_types = $3, enabled = $4, disable_time = $5, disable_reason = $6, failing_since = $7,
    version = version + 1, update_time = now()
WHERE id = $1
"""

# Of a webhook that is deleted no secret is kept.
WEBHOOK_DELETE = """
UPDATE webhook SET delete_time = now(), sealed_secret = '', old_sealed_secret = NULL, old_secret_end_time = NULL
WHERE id = $1
"""

WEBHOOK_ROTATE = """
UPDATE webhook
SET sealed_secret = $2, old_sealed_secret = sealed_secret, old_secret_end_time = now() + $3::interval,
    version = version + 1, update_time = now()
WHERE id = $1
"""

_DELIVERY = """
SELECT d.id, d.webhook_id, d.organization_id, e.id AS event_id, d.event_type, d.subject, d.state, d.attempts,
       d.create_time, d.next_time, d.last_time, d.last_status, d.last_error, d.last_duration, d.done_time
FROM delivery d JOIN event e ON e.number = d.event_number
"""

DELIVERY_GET = _DELIVERY + "WHERE d.id = $1"

# Up to $5 deliveries, newest first, beyond the id $2 ('' for the first page). Keyset paging, along an index of the
# organization's own, and for the webhook $6 along the webhook's. To be prepared anew for each call.
DELIVERY_LIST = (
    _DELIVERY
    + """
WHERE d.organization_id = $1 AND d.id < coalesce(nullif($2, ''), '~')
  AND ($3::text IS NULL OR d.state = $3) AND ($4 = '' OR d.event_type = $4)
ORDER BY d.id DESC
LIMIT $5
"""
)
DELIVERY_LIST_OF_WEBHOOK = (
    _DELIVERY
    + """
WHERE d.organization_id = $1 AND d.webhook_id = $6 AND d.id < coalesce(nullif($2, ''), '~')
  AND ($3::text IS NULL OR d.state = $3) AND ($4 = '' OR d.event_type = $4)
ORDER BY d.id DESC
LIMIT $5
"""
)

# Makes deliveries of a webhook that are done pending again, with all tries before them: the one with the id $2, or with
# '' up to $3 that are dead. Their place in the order is that of their events.
DELIVERY_REVIVE = """
UPDATE delivery
SET state = 'pending', next_time = now(), tries = 0, first_time = NULL, done_time = NULL
WHERE id IN (
    SELECT id FROM delivery
    WHERE webhook_id = $1 AND CASE WHEN $2 = '' THEN state = 'dead' ELSE id = $2 AND state <> 'pending' END
    ORDER BY id
    LIMIT $3
    FOR UPDATE
)
"""

# Takes up to $1 mails that are due, for $2, as DELIVERY_TAKE does; in no order.
MAIL_TAKE = """
WITH locked AS MATERIALIZED (
    SELECT id FROM mail WHERE state = 'pending' AND next_time <= now()
    ORDER BY next_time
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)
UPDATE mail m
SET next_time = now() + $2::interval, attempts = m.attempts + 1, first_time = coalesce(m.first_time, now())
FROM locked, event e
WHERE m.id = locked.id AND e.number = m.event_number
RETURNING m.id, m.recipient, m.attempts, m.first_time, e.id AS event_id, e.type, e.body, now() AS now
"""

# What has come of the attempt $2 of a mail, as DELIVERY_FINISH does it.
MAIL_FINISH = """
UPDATE mail
SET state = $3, next_time = $4, last_error = $5, done_time = CASE WHEN $3 <> 'pending' THEN now() END
WHERE id = $1 AND attempts = $2 AND state = 'pending'
"""

# Whether EXPIRY_SCAN may note anything for one of the kinds $1, each with its $2, or has not moved on for $3. While
# there is nothing no row is locked or written, but once in that time; no more keys are read than those of that time.
EXPIRY_DUE = """
SELECT EXISTS (
    SELECT 1 FROM unnest($1::text[], $2::interval[]) AS lead (kind, span)
    LEFT JOIN expiry_scan scan ON scan.kind = lead.kind
    WHERE scan.kind IS NULL OR scan.until_time <= now() + lead.span - $3::interval OR EXISTS (
        SELECT 1 FROM key k
        WHERE k.revoke_time IS NULL AND k.expire_time IS NOT NULL
          AND k.expire_time > scan.until_time - interval '1 minute' AND k.expire_time <= now() + lead.span
          AND NOT EXISTS (
              SELECT 1 FROM key_notice n
              WHERE n.key_id = k.id AND n.kind = lead.kind AND n.expire_time = k.expire_time
          )
    )
)
"""

# Begins to look for keys that come to an expiry within $2, from those on that do so from now on.
EXPIRY_SCAN_BEGIN = """
INSERT INTO expiry_scan (kind, until_time) VALUES ($1, now() + $2::interval) ON CONFLICT (kind) DO NOTHING
"""

# Notes up to $3 keys that come to an expiry within $2 and were not noted yet. Looks from where it was looked last, less
# the longest time that a transaction takes to be seen. One worker at a time; gives nothing to the others.
EXPIRY_SCAN = """
WITH scan AS MATERIALIZED (
    SELECT kind, until_time FROM expiry_scan WHERE kind = $1 FOR UPDATE SKIP LOCKED
), due AS MATERIALIZED (
    SELECT k.id, k.expire_time
    FROM scan, key k
    WHERE k.revoke_time IS NULL AND k.expire_time IS NOT NULL
      AND k.expire_time > scan.until_time - interval '1 minute' AND k.expire_time <= now() + $2::interval
      AND NOT EXISTS (
          SELECT 1 FROM key_notice n WHERE n.key_id = k.id AND n.kind = $1 AND n.expire_time = k.expire_time
      )
    ORDER BY k.expire_time
    LIMIT $3
), noted AS (
    INSERT INTO key_notice (key_id, kind, expire_time) SELECT id, $1, expire_time FROM due ON CONFLICT DO NOTHING
), moved AS (
    UPDATE expiry_scan SET until_time = now() + $2::interval
    FROM scan
    WHERE expiry_scan.kind = scan.kind AND (SELECT count(*) FROM due) < $3
)
SELECT count(*) FROM due
"""

# Notes the keys of these secrets as used for the first time, unless another secret of theirs was used before, or they
# were noted already. In the order of the keys, so that no two wait for each other.
KEY_NOTE_FIRST_USED = """
INSERT INTO key_notice (key_id, kind, expire_time)
SELECT DISTINCT s.key_id, 'first_used', 'epoch'::timestamptz
FROM secret s
WHERE s.id = ANY ($1::int8[]) AND NOT EXISTS (
    SELECT 1 FROM secret other JOIN last_used u ON u.secret_id = other.id
    WHERE other.key_id = s.key_id AND other.id <> ALL ($1::int8[]) AND u.used_time IS NOT NULL
)
ORDER BY s.key_id
ON CONFLICT DO NOTHING
"""

NOTICE_EXISTS = "SELECT EXISTS (SELECT 1 FROM key_notice WHERE publish_time IS NULL)"

# Takes up to $1 notices of which no event was made yet, the oldest first, for good, and keeps their keys from change
# until the end of the transaction. Waits for nobody, so that it is part of no deadlock, in whatever order others lock:
# what they are at is left for later. The key first: of its notices no later one is taken while another worker is at one
# before. Keys are to be read by a statement after this one, see ORGANIZATION_LOCK.
NOTICE_TAKE = """
WITH taken AS MATERIALIZED (
    SELECT n.key_id, n.kind, n.expire_time, n.create_time
    FROM key_notice n JOIN key k ON k.id = n.key_id
    WHERE n.publish_time IS NULL
    ORDER BY n.create_time
    LIMIT $1
    FOR NO KEY UPDATE OF k SKIP LOCKED
    FOR UPDATE OF n SKIP LOCKED
), published AS (
    UPDATE key_notice n SET publish_time = now()
    FROM taken t
    WHERE n.key_id = t.key_id AND n.kind = t.kind AND n.expire_time = t.expire_time
)
SELECT key_id, kind, expire_time FROM taken ORDER BY create_time
"""

# Forgets up to $2 deliveries that were done longer ago than $1.
DELIVERY_FORGET = """
DELETE FROM delivery
WHERE id IN (
    SELECT id FROM delivery WHERE state <> 'pending' AND done_time < now() - $1::interval
    LIMIT $2 FOR UPDATE SKIP LOCKED
)
"""

# Forgets up to $1 deliveries whose webhook is deleted.
DELIVERY_FORGET_ENDED = """
DELETE FROM delivery
WHERE id IN (
    SELECT d.id FROM webhook w JOIN delivery d ON d.webhook_id = w.id
    WHERE w.delete_time IS NOT NULL AND d.state <> 'pending'
    LIMIT $1 FOR UPDATE OF d SKIP LOCKED
)
"""

# Forgets up to $2 notices of expiries that are longer ago than $1. That a key was used stays noted.
NOTICE_FORGET = """
DELETE FROM key_notice
WHERE (key_id, kind, expire_time) IN (
    SELECT key_id, kind, expire_time FROM key_notice
    WHERE kind <> 'first_used' AND publish_time IS NOT NULL AND expire_time < now() - $1::interval
    LIMIT $2 FOR UPDATE SKIP LOCKED
)
"""

# Likewise mail.
MAIL_FORGET = """
DELETE FROM mail
WHERE id IN (
    SELECT id FROM mail WHERE state <> 'pending' AND done_time < now() - $1::interval LIMIT $2 FOR UPDATE SKIP LOCKED
)
"""

# Forgets up to $2 events that are older than $1 and of which nothing is under way or kept.
EVENT_FORGET = """
DELETE FROM event
WHERE number IN (
    SELECT number FROM event e
    WHERE create_time < now() - $1::interval AND dispatch_time IS NOT NULL
      AND NOT EXISTS (SELECT 1 FROM delivery d WHERE d.event_number = e.number)
      AND NOT EXISTS (SELECT 1 FROM mail m WHERE m.event_number = e.number)
    ORDER BY create_time
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
"""

# Removes deleted webhooks of which no delivery is kept.
WEBHOOK_FORGET = """
DELETE FROM webhook w
WHERE w.delete_time IS NOT NULL AND NOT EXISTS (SELECT 1 FROM delivery d WHERE d.webhook_id = w.id)
"""

# What there is to be sent and how long it has been due, in seconds; and how many webhooks are disabled.
OUTBOX_FIGURES = """
SELECT (SELECT count(*) FROM delivery WHERE state = 'pending') AS deliveries,
       (SELECT count(*) FROM mail WHERE state = 'pending') AS mails,
       coalesce(extract(epoch FROM now() - (SELECT min(create_time) FROM delivery WHERE state = 'pending')), 0)::float8
           AS oldest_s,
       (SELECT count(*) FROM webhook WHERE NOT enabled AND delete_time IS NULL) AS disabled
"""
