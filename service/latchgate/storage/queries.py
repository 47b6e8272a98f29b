"""SQL, each statement with what it guarantees. Named entity, operation, qualifier."""

from __future__ import annotations

# Advisory locks, which are a database's own; "latc" in ASCII, and the next number.
CHANGE_LOCK = 0x6C617463
MIGRATION_LOCK = 0x6C617464

# All of a key that management shows. now() is fixed for a transaction, so that two reads of an unchanged key are equal.
_KEY = """
SELECT k.id, k.organization_id, k.name, k.key_type, k.environment, k.permissions, k.rate_limit_per_minute, k.active,
       k.user_id, k.user_email, k.metadata, k.allowed_cidrs, k.created_by, k.create_time, k.update_time, k.expire_time,
       k.revoke_time, k.revoke_reason, k.delete_time, k.version, k.revision, now() AS read_time,
       newest.hints, newest.create_times, newest.end_times, newest.used_times,
       (SELECT max(u.used_time) FROM secret s JOIN last_used u ON u.secret_id = s.id WHERE s.key_id = k.id)
           AS last_used_time
FROM key k
CROSS JOIN LATERAL (
    SELECT array_agg(n.hint ORDER BY n.id DESC) AS hints,
           array_agg(n.create_time ORDER BY n.id DESC) AS create_times,
           array_agg(n.end_time ORDER BY n.id DESC) AS end_times,
           array_agg(n.used_time ORDER BY n.id DESC) AS used_times
    FROM (
        SELECT s.id, s.hint, s.create_time, s.end_time, u.used_time
        FROM secret s JOIN last_used u ON u.secret_id = s.id
        WHERE s.key_id = k.id
        ORDER BY s.id DESC
        LIMIT 2
    ) n
) newest
"""

# One key, also when it is deleted.
KEY_GET = _KEY + "WHERE k.id = $1"

# Likewise each of several.
KEY_GET_MANY = _KEY + "WHERE k.id = ANY ($1::text[])"

# One key of an organization that is locked, kept from change until the end of the transaction. Weak enough to let
# secrets that refer to it be inserted.
KEY_LOCK = "SELECT 1 FROM key WHERE id = $1 FOR NO KEY UPDATE"

# The organization of a key, locked first: everyone who waits for locks takes organization before key.
KEY_LOCK_ORGANIZATION = """
SELECT o.id FROM organization o
WHERE o.id = (SELECT k.organization_id FROM key k WHERE k.id = $1)
FOR NO KEY UPDATE
"""

# The state is the first that holds, by the database's clock, as latchgate.domain.model.Key has it.
_KEY_MATCHES = """
  AND ($3::text IS NULL OR k.key_type = $3)
  AND ($4::text IS NULL OR k.environment = $4)
  AND ($5::text IS NULL OR CASE $5
          WHEN 'active' THEN k.revoke_time IS NULL AND k.active AND (k.expire_time IS NULL OR k.expire_time > now())
          WHEN 'inactive' THEN
              k.revoke_time IS NULL AND NOT k.active AND (k.expire_time IS NULL OR k.expire_time > now())
          WHEN 'expired' THEN k.revoke_time IS NULL AND k.expire_time <= now()
          WHEN 'revoked' THEN k.revoke_time IS NOT NULL AND k.delete_time IS NULL
          WHEN 'deleted' THEN k.delete_time IS NOT NULL
      END)
  AND ($6 OR k.delete_time IS NULL)
"""

# Up to $7 keys, newest first, beyond the id $2 ('' for the first page). Keyset paging: what is inserted or changed
# between two pages neither hides nor repeats another key. However many keys the organization has, and however large a
# part of all keys they are, a page is a walk along an index of the organization's own: the pair is compared, and not
# each column, so that no walk along the ids of all organizations gives the order that is asked for.
# To be prepared anew for each call: its plan is for the values at hand.
KEY_LIST = (
    _KEY
    + """
WHERE k.organization_id >= $1 AND (k.organization_id, k.id) < ($1, coalesce(nullif($2, ''), '~'))
"""
    + _KEY_MATCHES
    + """
ORDER BY k.organization_id DESC, k.id DESC
LIMIT $7
"""
)

# The same for the keys of the user $8 alone, along the index that is the users'. To be prepared anew for each call.
KEY_LIST_OF_USER = (
    _KEY
    + """
WHERE k.organization_id = $1 AND k.user_id = $8 AND k.user_id <> '' AND k.id < coalesce(nullif($2, ''), '~')
"""
    + _KEY_MATCHES
    + """
ORDER BY k.id DESC
LIMIT $7
"""
)

# Those of an organization's keys that count, beyond the id $2, oldest first: a walk along an index of its own, as
# KEY_LIST is one.
_UNREVOKED_AFTER = """
FROM key k
WHERE k.organization_id <= $1 AND (k.organization_id, k.id) > ($1, $2) AND k.revoke_time IS NULL
"""

# The database's clock, and how far $3 keys go beyond the id $2: the id of the last of them, or null if there are not so
# many. Reads an index alone.
KEY_REACH = (
    """
SELECT now(), (
    SELECT k.id"""
    + _UNREVOKED_AFTER
    + """
    ORDER BY k.organization_id, k.id
    OFFSET $3::bigint - 1 LIMIT 1
) AS reach
"""
)

# Up to $5 keys, oldest first, beyond the id $2 and up to the id $3, that were made before $4 and not used since. Each
# key's last use is looked up by itself, and only as many as it takes; what is shown is read for those alone that are
# given. To be prepared anew for each call.
KEY_LIST_UNUSED = (
    """
WITH unused AS MATERIALIZED (
    SELECT k.id"""
    + _UNREVOKED_AFTER
    + """
      AND k.id <= $3 AND k.create_time < $4
      AND coalesce(
          (SELECT max(u.used_time) FROM secret s JOIN last_used u ON u.secret_id = s.id WHERE s.key_id = k.id) < $4,
          true
      )
    ORDER BY k.organization_id, k.id
    LIMIT $5
)
"""
    + _KEY
    + """
WHERE k.id = ANY (ARRAY(SELECT id FROM unused))
ORDER BY k.id
"""
)

# The newest publishable key of an environment that is active now. Reads no key that is not publishable.
KEY_GET_PUBLISHABLE = """
SELECT k.id, s.readable_token
FROM key k
JOIN secret s ON s.key_id = k.id AND s.end_time IS NULL AND s.readable_token IS NOT NULL
WHERE k.organization_id = $1 AND k.key_type = 'publishable' AND k.environment = $2
  AND k.active AND k.revoke_time IS NULL AND (k.expire_time IS NULL OR k.expire_time > now())
ORDER BY k.id DESC
LIMIT 1
"""

# The root keys that are good now and are not set to end by themselves.
KEY_LIST_LASTING_ROOT = """
SELECT id FROM key
WHERE organization_id = 'org_root' AND active AND revoke_time IS NULL AND expire_time IS NULL
"""

# A key; the organization's count is raised with it, so the two can not part.
KEY_INSERT = """
WITH counted AS (UPDATE organization SET key_count = key_count + 1 WHERE id = $2 RETURNING id)
INSERT INTO key (id, organization_id, name, key_type, environment, permissions, rate_limit_per_minute, user_id,
                 user_email, metadata, allowed_cidrs, created_by, expire_time)
SELECT $1, counted.id, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13 FROM counted
"""

# All that can change of a key; one that is revoked by this is counted no more, and one that is brought back is again.
# With a key that is revoked end the tokens that it was exchanged for, for good.
KEY_UPDATE = """
WITH counted AS (
    UPDATE organization o SET key_count = o.key_count + CASE WHEN k.revoke_time IS NULL THEN -1 ELSE 1 END
    FROM key k
    WHERE k.id = $1 AND o.id = k.organization_id AND (k.revoke_time IS NULL) <> ($9::timestamptz IS NULL)
), refreshed AS (
    DELETE FROM token_family WHERE key_id = $1 AND $9 IS NOT NULL
)
UPDATE key
SET name = $2, permissions = $3, rate_limit_per_minute = $4, active = $5, metadata = $6, allowed_cidrs = $7,
    expire_time = $8, revoke_time = $9, revoke_reason = $10, delete_time = $11, revision = $12,
    version = version + 1, update_time = now()
WHERE id = $1
"""

# Removes up to $2 keys that were deleted longer ago than $1, the first deleted first, with their secrets and the times
# of their last uses. By the database's clock, as undeleting them is. Those that another worker is at, or that are being
# brought back, are left. Root keys stay: a start finds by their secrets that the root token of the settings was ended.
KEY_PURGE = """
WITH purged AS MATERIALIZED (
    SELECT id FROM key
    WHERE delete_time <= now() - $1::interval AND organization_id <> 'org_root'
    ORDER BY delete_time
    LIMIT $2
    FOR UPDATE SKIP LOCKED
), secrets AS (
    DELETE FROM secret s USING purged p WHERE s.key_id = p.id
)
DELETE FROM key k USING purged p WHERE k.id = p.id
RETURNING k.id, k.organization_id, k.name, k.delete_time
"""

# What keys of the organization $1 that are neither revoked nor deleted are permitted, each permission once: those of
# $2, and wildcards. Only with the organization locked it stays so.
KEY_LIST_PERMISSIONS = """
SELECT DISTINCT held.permission
FROM key k CROSS JOIN LATERAL unnest(k.permissions) AS held (permission)
WHERE k.organization_id = $1 AND k.revoke_time IS NULL
  AND (held.permission = ANY ($2::text[]) OR strpos(held.permission, '*') > 0)
"""

# Up to $3 of these keys that hold one of the permissions $2, the oldest first, and in each row how many they are.
KEY_LIST_HOLDING = """
SELECT k.id, count(*) OVER () AS key_count
FROM key k
WHERE k.organization_id = $1 AND k.revoke_time IS NULL AND k.permissions && $2::text[]
ORDER BY k.id
LIMIT $3
"""

# What keys of all organizations that are neither revoked nor deleted are permitted that is neither one of $1 nor a
# scope of their organization's own, and how many hold it. Wildcards may stand for some of these scopes, and are told
# with them.
KEY_COUNT_PERMISSIONS = """
SELECT held.permission, CASE WHEN strpos(held.permission, '*') > 0 THEN o.scopes ELSE '[]' END AS own_scopes,
       sum(held.key_count)::int8 AS key_count
FROM (
    SELECT k.organization_id, each.permission, count(*) AS key_count
    FROM key k CROSS JOIN LATERAL unnest(k.permissions) AS each (permission)
    WHERE k.revoke_time IS NULL AND each.permission <> ALL ($1::text[])
    GROUP BY 1, 2
) held
JOIN organization o ON o.id = held.organization_id
WHERE NOT o.scopes @> jsonb_build_array(jsonb_build_object('name', held.permission))
GROUP BY 1, 2
"""

# A secret, with its place for the last use, so that a flush only ever updates.
SECRET_INSERT = """
WITH inserted AS (
    INSERT INTO secret (digest, key_id, hint, readable_token) VALUES ($1, $2, $3, $4) RETURNING id
)
INSERT INTO last_used (secret_id) SELECT id FROM inserted
"""

# Ends the secrets of a key: the one that has no end yet after $2, those that a former rotation left a grace now.
SECRET_END = """
UPDATE secret
SET end_time = CASE WHEN end_time IS NULL THEN now() + $2::interval ELSE now() END
WHERE key_id = $1 AND (end_time IS NULL OR end_time > now())
"""

# Whether a digest was ever stored, whatever became of it.
SECRET_EXISTS = "SELECT EXISTS (SELECT 1 FROM secret WHERE digest = $1)"

# The keys of the rows $3 whose digests are new, with their secrets and the places for their last use; the organization
# $1 is counted up with them. What is not new is passed over, also if another transaction stores it at this moment,
# which is waited for: digests are taken in their order, so that no two wait for each other. Gives the ids of what is
# stored.
KEY_IMPORT = """
WITH given AS MATERIALIZED (
    SELECT given.*, decode(given.digest, 'hex') AS digest_bytes
    FROM jsonb_to_recordset($3) AS given (
        id text, digest text, hint text, name text, key_type text, environment text, permissions text[],
        rate_limit_per_minute int4, active bool, user_id text, user_email text, metadata jsonb, allowed_cidrs text[],
        expire_time timestamptz
    )
), stored AS (
    INSERT INTO secret (digest, key_id, hint)
    SELECT digest_bytes, id, hint FROM given ORDER BY digest_bytes
    ON CONFLICT (digest) DO NOTHING
    RETURNING id, key_id
), placed AS (
    INSERT INTO last_used (secret_id) SELECT id FROM stored
), counted AS (
    UPDATE organization SET key_count = key_count + (SELECT count(*) FROM stored) WHERE id = $1
)
INSERT INTO key (id, organization_id, name, key_type, environment, permissions, rate_limit_per_minute, active, user_id,
                 user_email, metadata, allowed_cidrs, created_by, expire_time)
SELECT given.id, $1, given.name, given.key_type, given.environment, given.permissions, given.rate_limit_per_minute,
       given.active, given.user_id, given.user_email, given.metadata, given.allowed_cidrs, $2, given.expire_time
FROM given JOIN stored ON stored.key_id = given.id
RETURNING id
"""

# Whose each of many digests is that was ever stored, and what of its key an import says. A digest whose secret has an
# end was replaced by a rotation.
SECRET_FIND_KEYS = """
SELECT s.digest, s.hint, k.id AS key_id, k.organization_id, k.name, k.key_type, k.environment, k.permissions,
       k.rate_limit_per_minute, k.active, k.user_id, k.user_email, k.metadata, k.allowed_cidrs, k.expire_time,
       k.revoke_time IS NOT NULL OR s.end_time IS NOT NULL AS is_ended
FROM secret s JOIN key k ON k.id = s.key_id
WHERE s.digest = ANY ($1::bytea[])
"""

# A secret that is good now, kept so until the end of the transaction. Taken after the locks of what its holder acts on:
# who ends the secret takes no lock that is taken before this one. By the clock and not by the transaction's begin, when
# the secret may still have been good.
SECRET_LOCK_IN_USE = """
SELECT true FROM secret s JOIN key k ON k.id = s.key_id
WHERE s.id = $1 AND (s.end_time IS NULL OR s.end_time > clock_timestamp())
  AND k.active AND k.revoke_time IS NULL AND (k.expire_time IS NULL OR k.expire_time > clock_timestamp())
FOR SHARE OF s, k
"""

# Whether a digest is that of a root key which is in use now.
SECRET_IS_GOOD_ROOT = """
SELECT EXISTS (
    SELECT 1 FROM secret s JOIN key k ON k.id = s.key_id
    WHERE s.digest = $1 AND (s.end_time IS NULL OR s.end_time > now())
      AND k.organization_id = 'org_root' AND k.active AND k.revoke_time IS NULL
      AND (k.expire_time IS NULL OR k.expire_time > now())
)
"""

# Whether a rotation has ended a secret for good: the one that came in its place, or one after that, was made no earlier
# than it ends. Both times are stored, so a clock that is set back does not bring the secret back.
_SECRET_HAS_ENDED = """(s.end_time IS NOT NULL AND EXISTS (
               SELECT 1 FROM secret later
               WHERE later.key_id = s.key_id AND later.id > s.id AND later.create_time >= s.end_time
           ))"""

# The hot query: all that validation needs of many digests, at one instant, with that instant and the newest change
# which it shows. Always at least one row; digest is null where none of them is known. Times are seconds since 1970.
# What many keys have in common is one value, of words without blanks: each value takes a worker some time.
SECRET_FIND = (
    """
SELECT head.now_s, head.revision, found.*
FROM (
    SELECT extract(epoch FROM statement_timestamp())::float8 AS now_s,
           coalesce((SELECT max(revision) FROM change_log), 0) AS revision
) head
LEFT JOIN LATERAL (
    SELECT s.digest, s.id AS secret_id, k.id AS key_id, k.organization_id, o.active AS organization_active, o.plan_id,
           k.name AS key_name,
           k.key_type || ' ' || k.environment || ' ' || array_to_string(k.permissions, ' ') AS kind, k.allowed_cidrs,
           CASE WHEN k.rate_limit_per_minute > 0 THEN k.rate_limit_per_minute ELSE p.rate_limit_per_minute END
               AS rate_limit_per_minute,
           k.active, k.revoke_time IS NOT NULL OR """
    + _SECRET_HAS_ENDED
    + """ AS revoked,
           coalesce(extract(epoch FROM k.expire_time)::float8, 'Infinity') AS expire_s,
           coalesce(extract(epoch FROM s.end_time)::float8, 'Infinity') AS secret_end_s,
           extract(epoch FROM k.create_time)::float8 AS create_s,
           k.user_id, k.user_email, k.metadata::text AS metadata
    FROM secret s
    JOIN key k ON k.id = s.key_id
    JOIN organization o ON o.id = k.organization_id
    JOIN plan p ON p.id = o.plan_id
    WHERE s.digest = ANY ($1::bytea[])
) found ON true
"""
)

# What tokens need to know of the key $1, which is locked with its organization, and of its secret $2: so nothing of it
# can change any more. By the clock and not by the transaction's begin, since when the secret may have been ended.
SECRET_GET_HOLDER = (
    """
SELECT k.id AS key_id, s.id AS secret_id, k.organization_id, o.active AS organization_active, k.active,
       k.revoke_time IS NOT NULL AS revoked, k.expire_time, """
    + _SECRET_HAS_ENDED
    + """ AS is_ended,
       s.end_time AS secret_end_time, k.permissions, k.allowed_cidrs, k.key_type, k.environment, k.user_id,
       clock_timestamp() AS read_time
FROM key k
JOIN organization o ON o.id = k.organization_id
JOIN secret s ON s.key_id = k.id
WHERE k.id = $1 AND s.id = $2
"""
)

# Last uses; a time never goes back. Few enough rows at once to be looked up one after the other, in the order in which
# they are given: by id, so that two flushes hardly ever wait for each other. Gives the secrets that had not been used
# when the statement began: of two flushes at once both may say so.
LAST_USED_UPDATE = """
WITH updated AS (
    UPDATE last_used u SET used_time = to_timestamp(flushed.used_s)
    FROM unnest($1::bigint[], $2::float8[]) AS flushed (secret_id, used_s)
    WHERE u.secret_id = flushed.secret_id AND (u.used_time IS NULL OR u.used_time < to_timestamp(flushed.used_s))
    RETURNING u.secret_id
)
SELECT before.secret_id FROM updated JOIN last_used before USING (secret_id) WHERE before.used_time IS NULL
"""

# How many permits are granted where {room} are left: none if not even the cheapest request fits; beyond what is needed
# now no more than a part of what is left, so that nobody holds the last ones for requests that may not come, and whole
# requests only.
_RATE_GRANTED = """
CASE WHEN {room} < {asked}.smallest OR {asked}.wanted = 0 THEN 0 ELSE (
    SELECT most - (CASE WHEN most >= {asked}.needed THEN most - {asked}.needed ELSE most END) % {asked}.smallest
    FROM (SELECT least({asked}.wanted, {room}, greatest(
        {asked}.needed, {room} / (SELECT least(greatest(count(*), 1), 4) FROM worker)
    ))) AS grantable (most)
)::int4 END
"""

# Does what a worker tells and asks of the windows of many keys (latchgate.domain.ports.RateAsk), each in one step, and
# says what came of it, and how many workers there are. Always at least one row; without keys its key_id is null.
#
# - A window is the cost of each second, the newest last: `ages` says how many seconds before `newest`. Those of 62
#   seconds and more are gone. Seconds are the server's; `newest` never goes back but where its clock was set back, when
#   the window is taken as it is for one that has just been written. A statement that had to wait for a row may be older
#   than what it finds there, and charges to the second that it finds.
# - Rows are taken in the order of their keys, so that no two statements wait for each other.
# - What was asked is kept in the row, as ON CONFLICT can be told nothing but columns, and tells whoever looks.
# - Of the table nothing is written ahead (it is unlogged), and nobody waits for the disk.
RATE_EXCHANGE = (
    """
WITH clock AS MATERIALIZED (
    SELECT extract(epoch FROM statement_timestamp())::float8 AS now_s
), asked AS MATERIALIZED (
    SELECT asked.*, floor(now_s)::int8 AS newest
    FROM unnest($1::text[], $2::int4[], $3::int4[], $4::int4[], $5::int4[], $6::int4[], $7::int8[], $8::int4[])
         AS asked (key_id, allowed, charged, smallest, needed, wanted, back_slot, back), clock
), fresh AS (
    SELECT asked.*, """
    + _RATE_GRANTED.format(asked="asked", room="(asked.allowed - asked.charged)")
    + """ AS granted
    FROM asked
), exchanged AS (
    INSERT INTO rate_window AS w (key_id, newest, ages, costs, allowed, charged, smallest, needed, wanted, back_slot,
                                  back, granted)
    SELECT key_id, newest,
           CASE WHEN charged + granted > 0 THEN ARRAY[0::int2] ELSE '{}' END,
           CASE WHEN charged + granted > 0 THEN ARRAY[charged + granted] ELSE '{}' END,
           allowed, charged, smallest, needed, wanted, back_slot, back, granted
    FROM fresh
    ORDER BY key_id COLLATE "C"
    ON CONFLICT (key_id) DO UPDATE
    SET (newest, ages, costs, allowed, charged, smallest, needed, wanted, back_slot, back, granted) = (
        SELECT written.newest,
               CASE WHEN added.cost = 0 OR live.ages[live.length] = 0 THEN live.ages ELSE live.ages || 0::int2 END,
               CASE WHEN added.cost = 0 THEN live.costs
                    WHEN live.ages[live.length] = 0
                    THEN live.costs[:live.length - 1] || live.costs[live.length] + added.cost
                    ELSE live.costs || added.cost END,
               excluded.allowed, excluded.charged, excluded.smallest, excluded.needed, excluded.wanted,
               excluded.back_slot, excluded.back, added.granted
        FROM (
            SELECT least(w.newest, excluded.newest + 1) AS before,
                   greatest(excluded.newest, least(w.newest, excluded.newest + 1)) AS newest
        ) written
        CROSS JOIN LATERAL (
            SELECT coalesce(array_agg(age), '{}') AS ages, coalesce(array_agg(cost), '{}') AS costs,
                   coalesce(sum(cost), 0)::int8 AS used, count(*)::int4 AS length
            FROM (
                SELECT (held.age + written.newest - written.before)::int2 AS age,
                       held.cost - CASE WHEN written.before - held.age = excluded.back_slot THEN excluded.back
                                        ELSE 0 END AS cost
                FROM unnest(w.ages, w.costs) AS held (age, cost)
                WHERE held.age + written.newest - written.before < 62
            ) held
            WHERE cost > 0
        ) live
        CROSS JOIN LATERAL (
            SELECT granted, excluded.charged + granted AS cost
            FROM (SELECT """
    + _RATE_GRANTED.format(asked="excluded", room="(excluded.allowed - live.used - excluded.charged)")
    + """) AS now (granted)
        ) added
    )
    RETURNING w.*
)
SELECT head.workers, exchanged.key_id, exchanged.granted, exchanged.newest AS slot,
       CASE WHEN shown.is_short THEN exchanged.ages END AS ages,
       CASE WHEN shown.is_short THEN exchanged.costs END AS costs,
       shown.used, clock.now_s
FROM clock
CROSS JOIN (SELECT count(*) AS workers FROM worker) head
LEFT JOIN exchanged ON true
LEFT JOIN LATERAL (
    SELECT used, used >= exchanged.allowed OR exchanged.granted < exchanged.wanted
                 OR exchanged.wanted + exchanged.charged = 0 AS is_short
    FROM (SELECT coalesce(sum(cost), 0)::int8 AS used FROM unnest(exchanged.costs) AS held (cost)) held
) shown ON true
"""
)

# Forgets up to $1 windows in which nothing is left. Those that a worker is at are left to it.
RATE_FORGET = """
DELETE FROM rate_window
WHERE key_id IN (
    SELECT key_id FROM rate_window
    WHERE newest < extract(epoch FROM statement_timestamp()) - 62
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)
"""

_ORGANIZATION = """
SELECT o.id, o.name, o.plan_id, o.active, o.scopes, o.key_count, p.max_keys, o.create_time, o.update_time
FROM organization o JOIN plan p ON p.id = o.plan_id
"""

ORGANIZATION_GET = _ORGANIZATION + "WHERE o.id = $1"

# The organization, kept from change until the end of the transaction; keys that refer to it can still be inserted. To
# be read by a statement after this one: this one's snapshot may be older than what the lock's last holder left.
ORGANIZATION_LOCK = "SELECT 1 FROM organization WHERE id = $1 FOR NO KEY UPDATE"

ORGANIZATION_LIST = _ORGANIZATION + "WHERE o.id > $1 ORDER BY o.id LIMIT $2"

ORGANIZATION_SCOPES = "SELECT scopes FROM organization WHERE id = $1"

# Whether an organization may call (null if there is none), and the time by which JWTs are judged.
ORGANIZATION_STANDING = "SELECT now(), (SELECT active FROM organization WHERE id = $1) AS active"

ORGANIZATION_INSERT = "INSERT INTO organization (id, name, plan_id, scopes) VALUES ($1, $2, $3, $4)"

ORGANIZATION_UPDATE = """
UPDATE organization SET name = $2, plan_id = $3, active = $4, scopes = $5, update_time = now() WHERE id = $1
"""

_PLAN = "SELECT id, rate_limit_per_minute, max_keys, create_time, update_time FROM plan "

PLAN_LOCK = _PLAN + "WHERE id = $1 FOR NO KEY UPDATE"

PLAN_LIST = _PLAN + "WHERE id > $1 ORDER BY id LIMIT $2"

PLAN_INSERT = """
INSERT INTO plan (id, rate_limit_per_minute, max_keys) VALUES ($1, $2, $3)
RETURNING id, rate_limit_per_minute, max_keys, create_time, update_time
"""

PLAN_UPDATE = """
UPDATE plan SET rate_limit_per_minute = $2, max_keys = $3, update_time = now() WHERE id = $1
RETURNING id, rate_limit_per_minute, max_keys, create_time, update_time
"""

# Taken before the number and held to the end of the transaction: commit order is revision order.
CHANGE_LOCK_TAKE = "SELECT pg_advisory_xact_lock($1)"

# The next revision, in the log, with a wake-up for listeners at commit.
CHANGE_INSERT = """
WITH logged AS (
    INSERT INTO change_log (revision, entity, entity_id) VALUES (nextval('change_revision'), $1, $2) RETURNING revision
)
SELECT revision, pg_notify('latchgate_change', revision::text) FROM logged
"""

# The newest change. Whatever the transaction has read before is no newer.
CHANGE_NEWEST = "SELECT coalesce(max(revision), 0) AS revision FROM change_log"

# What one reading of the log shows, at one instant: the newest revision, the history that the server is on (it changes
# when a standby takes over), and up to $3 changes beyond $2. Always at least one row. {member} says whether the worker
# $1 has its row still.
_LOG = """
{renewal}
SELECT head.revision AS head, head.timeline, head.now_s, {member} AS is_member, c.entity, c.entity_id
FROM (
    SELECT coalesce((SELECT max(revision) FROM change_log), 0) AS revision,
           substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) AS timeline,
           extract(epoch FROM statement_timestamp())::float8 AS now_s
) head
LEFT JOIN LATERAL (
    SELECT revision, entity, entity_id FROM change_log WHERE revision > $2 ORDER BY revision LIMIT $3
) c ON true
ORDER BY c.revision
"""

# Reads the log.
LOG_READ = _LOG.format(renewal="", member="EXISTS (SELECT 1 FROM worker WHERE incarnation = $1)")

# Has the transaction on disk before it is answered, whatever the server's own setting.
_SAFELY = """
(
    SELECT set_config('synchronous_commit', CASE WHEN current IN ('off', 'local') THEN 'on' ELSE current END, true)
    FROM current_setting('synchronous_commit') AS current
) AS safely
"""

# Reads the log and renews the worker's row in one statement; the row tells how far this very reading went. Safe on disk
# once it is answered: of a renewal that a crash took back nobody would know that it gave a lease, and its worker would
# be taken off while it has one. After a failover that lost changes a worker has not applied more than there is, and the
# random step keeps the row from being the same twice.
LOG_READ_RENEWING = _LOG.format(
    renewal=f"""
WITH renewed AS (
    UPDATE worker
    SET renewals = renewals + 1 + floor(random() * 1e6)::bigint, seen_revision = seen.head,
        applied_revision = least($2, seen.head)
    FROM {_SAFELY}, (SELECT coalesce((SELECT max(revision) FROM change_log), 0) AS head) AS seen
    WHERE incarnation = $1
    RETURNING 1
)
""",
    member="EXISTS (SELECT 1 FROM renewed)",
)

# Registers a worker. Safe on disk once it is answered: nobody waits for a worker that a crash has made unknown.
WORKER_INSERT = f"INSERT INTO worker (incarnation, lease_s) SELECT $1, $2 FROM {_SAFELY}"

# Tells what a worker has applied. May be lost in a crash: changes then wait for what it has applied already.
WORKER_ACKNOWLEDGE = """
UPDATE worker SET applied_revision = $2
FROM (SELECT set_config('synchronous_commit', 'off', true)) AS hurry
WHERE incarnation = $1
"""

# The workers, at one instant, and the history that the server is on.
WORKER_LIST = """
SELECT incarnation, applied_revision, seen_revision, renewals, lease_s,
       substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) AS timeline
FROM worker
"""

# Takes a worker off that has not renewed its row since it was seen with $2 renewals, long enough ago, nor since the
# change $3, for which it was waited long enough. One that has, be it a moment ago and unheard of, has a lease that
# begins after the change: the next change must wait for it. Nobody is taken off for a change that the database has lost
# since.
WORKER_EVICT = """
DELETE FROM worker
WHERE incarnation = $1 AND renewals = $2
  AND seen_revision < $3 AND $3 <= (SELECT coalesce(max(revision), 0) FROM change_log)
RETURNING true
"""

# Takes a worker off that has not renewed its row since it was seen with $2 renewals, long enough ago.
WORKER_EVICT_SILENT = "DELETE FROM worker WHERE incarnation = $1 AND renewals = $2 RETURNING true"

WORKER_DELETE = "DELETE FROM worker WHERE incarnation = $1"

# Forgets up to $2 changes that are older than $1 and that every worker has applied. The newest stays: it is the head.
CHANGE_FORGET = """
DELETE FROM change_log
WHERE revision IN (
    SELECT revision FROM change_log
    WHERE change_time < now() - $1::interval
      AND revision < coalesce((SELECT min(applied_revision) FROM worker), 0)
      AND revision < (SELECT max(revision) FROM change_log)
    ORDER BY revision
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
"""

# Reserves a slot. A twin that is under way is waited for; gives nothing if the slot is taken.
REQUEST_CLAIM = """
INSERT INTO request (slot, body_digest) VALUES ($1, $2) ON CONFLICT (slot) DO NOTHING RETURNING slot
"""

# What a slot holds; its token only while it is younger than $2.
REQUEST_GET = """
SELECT body_digest, key_id, revision,
       CASE WHEN create_time > now() - $2::interval THEN sealed_token END AS sealed_token
FROM request WHERE slot = $1
"""

REQUEST_ANSWER = "UPDATE request SET key_id = $2, revision = $3, sealed_token = $4 WHERE slot = $1"

# Forgets up to $2 tokens that are older than $1, the oldest first. Those that another worker is at are left to it.
REQUEST_CLEAR = """
UPDATE request SET sealed_token = NULL
WHERE slot IN (
    SELECT slot FROM request
    WHERE sealed_token IS NOT NULL AND create_time <= now() - $1::interval
    ORDER BY create_time
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
"""

# Removes up to $2 slots that are older than $1, likewise.
REQUEST_DELETE = """
DELETE FROM request
WHERE slot IN (
    SELECT slot FROM request
    WHERE create_time <= now() - $1::interval
    ORDER BY create_time
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
"""

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

ROLE_CURRENT = "SELECT current_user::text"

# The statements that give the user $1 what the service needs of the schema: of the audit trail to read and to add.
ROLE_GRANTS = """
SELECT format('GRANT %s ON TABLE %I.%I TO %I',
              CASE c.relname WHEN 'audit_event' THEN 'SELECT, INSERT'
                             WHEN 'audit_head' THEN 'SELECT, INSERT, UPDATE'
                             WHEN 'audit_start' THEN 'SELECT'
                             WHEN 'alembic_version' THEN 'SELECT'
                             ELSE 'SELECT, INSERT, UPDATE, DELETE' END,
              n.nspname, c.relname, $1::text) AS statement
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p') AND NOT c.relispartition
UNION ALL
SELECT format('GRANT USAGE ON SEQUENCE %I.%I TO %I', n.nspname, c.relname, $1::text)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = current_schema() AND c.relkind = 'S'
UNION ALL
SELECT format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), $1::text)
"""

# The schema's version, if it has one: the table is Alembic's.
SCHEMA_VERSION = "SELECT version_num FROM alembic_version"

# Held until the session ends: one process migrates, the others wait.
MIGRATION_LOCK_TAKE = "SELECT pg_advisory_lock($1)"

# Begins the housekeeping $1 unless it was begun within $2; no row if it was. Of those that ask at once one begins: the
# others wait until it is committed, and then look at the clock again. After a clock that was stepped back it is begun.
HOUSEKEEPING_TAKE = """
INSERT INTO housekeeping AS h (name, begin_time) VALUES ($1, clock_timestamp())
ON CONFLICT (name) DO UPDATE SET begin_time = clock_timestamp()
WHERE clock_timestamp() NOT BETWEEN h.begin_time AND h.begin_time + $2::interval
RETURNING true
"""

DEPLOYMENT_GET = "SELECT value FROM deployment WHERE name = $1"

DEPLOYMENT_INSERT = "INSERT INTO deployment (name, value) VALUES ($1, $2)"

# Whether the database can be written: not a standby, and it answers.
DATABASE_PROBE = "SELECT pg_is_in_recovery()"
