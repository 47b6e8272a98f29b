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
