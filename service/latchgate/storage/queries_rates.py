"""SQL of the windows of rate limits, each statement with what it guarantees, named as in queries.py."""

from __future__ import annotations

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
