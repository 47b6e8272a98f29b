"""SQL of the change log and of the workers, each statement with what it guarantees, named as in queries.py."""

from __future__ import annotations

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
