"""Events that time brings about: of each key once, whoever looks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from latchgate.domain.keys import KeyManager
from latchgate.storage import notices as publishing
from latchgate.storage import queries
from latchgate.storage.notices import PUBLISH_ROWS, Notices
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.purge import purge_keys
from latchgate.storage.stores import PostgresStore
from latchgate.storage.usage import UsageBuffer
from support.databases import ROOT_CALLER, connected, draft, insert_organization, next_id, started_and_waiting
from support.records import KEY_RECORD

MANY = 2 * PUBLISH_ROWS + 7
# Notes all keys of an organization as used for the first time, the newest key first.
NOTE_ALL = """
INSERT INTO key_notice (key_id, kind, expire_time, create_time)
SELECT id, 'first_used', 'epoch', now() - interval '1 second' * row_number() OVER (ORDER BY id)
FROM key WHERE organization_id = 'acme'
"""
UNPUBLISHED = "SELECT count(*) FROM key_notice WHERE publish_time IS NULL"
# Has whoever has taken notices wait for a lock, before it reads their keys.
HOLD = (
    """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'
    """,
    "CREATE TRIGGER hold AFTER UPDATE ON key_notice FOR EACH ROW EXECUTE FUNCTION hold()",
    "SELECT pg_advisory_lock(1)",
)
RELEASE = "SELECT pg_advisory_unlock(1)"
TYPES = "SELECT type FROM event WHERE subject = $1 AND type NOT LIKE '%created' ORDER BY number"
# As if so many days had passed for the keys and for what was noted of them.
PASS = (
    "UPDATE key SET expire_time = expire_time - $1::interval",
    "UPDATE key_notice SET expire_time = expire_time - $1::interval WHERE kind <> 'first_used'",
    "UPDATE expiry_scan SET until_time = until_time - $1::interval",
)


@pytest.fixture
def notices(database: Database) -> Notices:
    """What looks for expiries."""
    return Notices(database, next_id, (7, 1))


async def make(keys: KeyManager, lasts: timedelta | None = None) -> str:
    """Makes a key, and gives its id."""
    expire_time = datetime.now(UTC) + lasts if lasts else None
    return (await keys.create(ROOT_CALLER, "acme", draft(expire_time=expire_time))).key.id


async def pass_time(observer: Connection, span: timedelta) -> None:
    """Lets time pass, for keys."""
    for statement in PASS:
        await observer.execute(statement, span)


async def types_of(observer: Connection, key_id: str) -> list[str]:
    """Gives the types of the events of a key, but for its making."""
    return [row["type"].removeprefix("api_key.") for row in await observer.fetch(TYPES, key_id)]


async def test_expiry_is_told_before_and_when_it_comes(
    notices: Notices, keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """A key that expires is told of 7 days and 1 day before and when it has expired, each once; a key that was made for
    less time is not told of for what it never had.
    """
    await insert_organization(store)
    await notices.work()
    long, short, endless = await make(keys, timedelta(days=8)), await make(keys, timedelta(days=3)), await make(keys)
    told = []
    for days in (0, 1.5, 0, 5, 1, 1, 1):
        await pass_time(observer, timedelta(days=days))
        await notices.work()
        told.append((await types_of(observer, long), await types_of(observer, short)))
    expiring, expired = ["expiring"], ["expired"]
    assert [
        ([], []),
        (expiring, []),
        (expiring, []),
        (expiring, expired),
        (expiring * 2, expired),
        (expiring * 2 + expired, expired),
        (expiring * 2 + expired, expired),
    ] == told
    assert [] == await types_of(observer, endless)


async def test_keys_that_ended_or_live_longer_are_not_told_of(
    notices: Notices, keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """What was noted and holds no more is not told; a new expiry is told of anew."""
    await insert_organization(store)
    await notices.work()
    revoked, moved, kept = [await make(keys, timedelta(days=8)) for _ in range(3)]
    await pass_time(observer, timedelta(days=1.5))
    await notices.note()
    await keys.revoke(ROOT_CALLER, revoked, "")
    await keys.update(ROOT_CALLER, moved, "", {"expire_time": datetime.now(UTC) + timedelta(days=20)})
    assert 1 == await notices.publish()
    assert (["revoked"], ["updated"], ["expiring"]) == (
        await types_of(observer, revoked),
        await types_of(observer, moved),
        await types_of(observer, kept),
    )
    await pass_time(observer, timedelta(days=14))
    await notices.work()
    assert ["updated", "expiring"] == await types_of(observer, moved)
    assert ["revoked"] == await types_of(observer, revoked)


async def test_of_many_that_look_one_tells(
    database: Database, keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """Workers that look at the same time tell of each key once between them."""
    await insert_organization(store)
    workers = [Notices(database, next_id, (7, 1)) for _ in range(4)]
    await workers[0].work()
    made = [await make(keys, timedelta(days=8)) for _ in range(10)]
    await pass_time(observer, timedelta(days=1.5))
    published = await asyncio.gather(*(worker.work() for worker in workers))
    assert 10 == sum(published)
    assert [["expiring"]] * 10 == [await types_of(observer, key_id) for key_id in made]


async def make_many(keys: KeyManager, store: PostgresStore, observer: Connection) -> list[str]:
    """Makes more keys than are published at a time, all noted as used; gives their ids in the order of the notices."""
    await insert_organization(store)
    made = [await make(keys) for _ in range(MANY)]
    await observer.execute(NOTE_ALL)
    return made[::-1]


async def test_many_are_told_once_by_several_workers(
    database: Database, keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """Workers that publish several batches at the same time tell of each key once between them, and leave nothing."""
    made = await make_many(keys, store, observer)
    published = await asyncio.gather(*(Notices(database, next_id, ()).publish() for _ in range(4)))
    assert MANY == sum(published)
    told = await observer.fetch("SELECT subject FROM event WHERE type = 'api_key.first_used' ORDER BY subject")
    assert sorted(made) == [row["subject"] for row in told]
    assert 0 == await observer.fetchval(UNPUBLISHED)


async def test_turn_tells_of_so_many_in_their_order(
    notices: Notices, keys: KeyManager, store: PostgresStore, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn tells of no more than a fixed number, what was noted first before the rest, and the next turn goes on."""
    monkeypatch.setattr(publishing, "PUBLISH_AT_ONCE", 2 * PUBLISH_ROWS)
    made = await make_many(keys, store, observer)
    assert [2 * PUBLISH_ROWS, MANY - 2 * PUBLISH_ROWS, 0] == [await notices.publish() for _ in range(3)]
    told = await observer.fetch("SELECT subject FROM event WHERE type = 'api_key.first_used' ORDER BY number")
    assert made == [row["subject"] for row in told]


async def test_batch_that_fails_is_told_by_the_next(
    notices: Notices, keys: KeyManager, store: PostgresStore, database: Database, observer: Connection
) -> None:
    """A worker that ends within a batch has told nothing of it, and the next one tells all of it."""
    made = await make_many(keys, store, observer)
    ids = (f"evt_{number}" for number in range(2))
    with pytest.raises(RuntimeError):
        await Notices(database, lambda _: next(ids), ()).publish()
    assert [[]] * 3 == [await types_of(observer, key_id) for key_id in made[:3]]
    assert MANY == await notices.publish()
    assert [["first_used"]] * MANY == [await types_of(observer, key_id) for key_id in made]


@pytest.mark.parametrize("at_once", [1, PUBLISH_ROWS])
async def test_batch_tells_only_of_keys_that_are_as_they_were(
    at_once: int,
    notices: Notices,
    keys: KeyManager,
    store: PostgresStore,
    database: Database,
    observer: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one turn, what holds is told, in one batch or several; of keys that were revoked, deleted, given another
    expiry, removed for good or have expired since, nothing is told of what was noted before, then or later.
    """
    monkeypatch.setattr(publishing, "PUBLISH_ROWS", at_once)
    await insert_organization(store)
    await notices.work()
    first, revoked, deleted, moved, removed, expired, last = made = [
        await make(keys, timedelta(days=8)) for _ in range(7)
    ]
    await pass_time(observer, timedelta(days=1.5))
    await notices.note()
    await keys.revoke(ROOT_CALLER, revoked, "")
    await keys.delete(ROOT_CALLER, deleted)
    await keys.update(ROOT_CALLER, moved, "", {"expire_time": datetime.now(UTC) + timedelta(days=20)})
    await keys.delete(ROOT_CALLER, removed)
    await observer.execute("UPDATE key SET delete_time = delete_time - interval '31 days' WHERE id = $1", removed)
    await purge_keys(database)
    for statement in ("UPDATE key SET expire_time = now() WHERE id = $1", "UPDATE key_notice SET expire_time = now()"):
        await observer.execute(statement + (" WHERE key_id = $1" if "notice" in statement else ""), expired)
    assert [2, 0] == [await notices.publish() for _ in range(2)]
    told = {key_id: await types_of(observer, key_id) for key_id in made}
    assert {
        first: ["expiring"],
        revoked: ["revoked"],
        deleted: ["deleted"],
        moved: ["updated"],
        removed: ["deleted"],
        expired: [],
        last: ["expiring"],
    } == told
    assert 0 == await observer.fetchval(UNPUBLISHED)


@pytest.mark.parametrize("at_once", [1, PUBLISH_ROWS])
@pytest.mark.parametrize("kinds", [("first_used", "expiring_7"), ("expiring_7", "first_used")])
async def test_notices_of_one_key_are_told_in_their_order(
    kinds: tuple[str, str],
    at_once: int,
    notices: Notices,
    keys: KeyManager,
    store: PostgresStore,
    observer: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two things that were noted of a key are both told, in the order in which they were noted, be it in one batch."""
    monkeypatch.setattr(publishing, "PUBLISH_ROWS", at_once)
    await insert_organization(store)
    key_id = await make(keys, timedelta(days=5))
    for age_s, kind in zip((2, 1), kinds, strict=True):
        await observer.execute(
            """
            INSERT INTO key_notice (key_id, kind, expire_time, create_time)
            SELECT id, $2, CASE WHEN $2 = 'first_used' THEN 'epoch' ELSE expire_time END, now() - $3::interval
            FROM key WHERE id = $1
            """,
            key_id,
            kind,
            timedelta(seconds=age_s),
        )
    assert 2 == await notices.publish()
    assert [kind.removesuffix("_7") for kind in kinds] == await types_of(observer, key_id)


async def test_whoever_is_at_a_key_is_not_waited_for(
    notices: Notices, keys: KeyManager, store: PostgresStore, database_url: str, observer: Connection
) -> None:
    """Keys that somebody else is at are passed over, and told of once that one is done, if there is anything then."""
    await insert_organization(store)
    await notices.work()
    free, held, ended = [await make(keys, timedelta(days=8)) for _ in range(3)]
    await pass_time(observer, timedelta(days=1.5))
    await notices.note()
    async with connected(database_url) as other, other.transaction():
        await other.execute(queries.ORGANIZATION_LOCK, "acme")
        await other.execute(queries.KEY_LOCK, held)
        await other.execute("UPDATE key SET revoke_time = now() WHERE id = $1", ended)
        assert [1, 0] == [await notices.publish() for _ in range(2)]
    assert [1, 0] == [await notices.publish() for _ in range(2)]
    assert [["expiring"], ["expiring"], []] == [await types_of(observer, key_id) for key_id in (free, held, ended)]


async def test_keys_of_a_batch_stay_as_they_are_until_it_is_told(
    notices: Notices,
    keys: KeyManager,
    store: PostgresStore,
    database: Database,
    database_url: str,
    observer: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever changes a key that a worker is about to tell of comes after it, and so does what else was noted of it."""
    monkeypatch.setattr(publishing, "PUBLISH_ROWS", 1)
    monkeypatch.setattr(publishing, "PUBLISH_AT_ONCE", 1)
    await insert_organization(store)
    await notices.work()
    key_id = await make(keys, timedelta(days=8))
    await pass_time(observer, timedelta(days=1.5))
    await notices.note()
    async with connected(database_url) as other:
        for statement in HOLD:
            await other.execute(statement)
        telling = await started_and_waiting(observer, notices.publish())
        await observer.execute(NOTE_ALL)
        assert 0 == await Notices(database, next_id, ()).publish()
        revoking = await started_and_waiting(observer, keys.revoke(ROOT_CALLER, key_id, ""), 2)
        await other.execute(RELEASE)
        assert 1 == await telling
        await revoking
        assert 1 == await notices.publish()
    assert ["expiring", "revoked", "first_used"] == await types_of(observer, key_id)


async def test_what_expired_while_nobody_looked_is_told(
    notices: Notices, keys: KeyManager, store: PostgresStore, database: Database, observer: Connection
) -> None:
    """What came about while no worker ran is told by the next one; what came about before all this is not."""
    await insert_organization(store)
    before = await make(keys, timedelta(days=2))
    await observer.execute("UPDATE key SET expire_time = now() - interval '5 days' WHERE id = $1", before)
    await notices.work()
    missed = await make(keys, timedelta(days=2))
    await pass_time(observer, timedelta(days=10))
    await Notices(database, next_id, (7, 1)).work()
    assert ([], ["expired"]) == (await types_of(observer, before), await types_of(observer, missed))


async def test_looking_for_nothing_writes_nothing(
    notices: Notices, keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """While nothing comes about no row is written, except that what was looked through moves on twice a minute."""
    await insert_organization(store)
    await make(keys, timedelta(days=8))
    scans = "SELECT array_agg(until_time ORDER BY kind) FROM expiry_scan"
    await notices.work()
    first = await observer.fetchval(scans)
    assert 3 == len(first)

    await notices.work()

    assert first == await observer.fetchval(scans)
    await observer.execute("UPDATE expiry_scan SET until_time = until_time - interval '31 seconds'")
    await notices.work()
    moved = await observer.fetchval(scans)
    assert all(late >= early for early, late in zip(first, moved, strict=True))


@pytest.mark.parametrize("days", [7, 1, 0])
async def test_key_that_comes_due_is_found_before_the_pause_is_over(
    days: int, notices: Notices, keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """A key is told of as soon as it is due, whichever notice it is, although keys were looked through just now."""
    await insert_organization(store)
    key_id = await make(keys, timedelta(days=8))
    await notices.work()
    # Just beyond what was looked through, and due by now.
    await observer.execute(
        "UPDATE key SET expire_time = now() + $2::interval - interval '1 microsecond' WHERE id = $1",
        key_id,
        timedelta(days=days),
    )
    # That it was told of for another reason does not matter.
    await observer.execute(
        """
        INSERT INTO key_notice (key_id, kind, expire_time, publish_time)
        SELECT id, 'expiring_30', expire_time, now() FROM key WHERE id = $1
        """,
        key_id,
    )
    await notices.work()
    assert ["expiring" if days else "expired"] == await types_of(observer, key_id)


async def use(buffer: UsageBuffer, observer: Connection, key_id: str, at_s: float = 2e9) -> None:
    """Takes note of a use of a key's newest token."""
    secret_id = await observer.fetchval("SELECT max(id) FROM secret WHERE key_id = $1", key_id)
    buffer.used(replace(KEY_RECORD, secret_id=secret_id), at_s)


async def test_first_use_is_told_once(
    notices: Notices, keys: KeyManager, store: PostgresStore, database: Database, observer: Connection
) -> None:
    """The first use of a key is told once, whatever token it is used with later; of a key that is not used, nothing."""
    await insert_organization(store)
    used, unused = await make(keys), await make(keys)
    usage = UsageBuffer(database)
    for at_s in (2e9, 2.1e9):
        await use(usage, observer, used, at_s)
        await usage.flush()
        await notices.work()
        assert ["first_used"] == await types_of(observer, used)
    await keys.rotate(ROOT_CALLER, used, timedelta(0))
    await use(usage, observer, used)
    await usage.flush()
    await notices.work()
    assert ["first_used", "rotated"] == await types_of(observer, used)
    assert [] == await types_of(observer, unused)


async def test_first_use_that_two_workers_have_seen(
    notices: Notices, keys: KeyManager, store: PostgresStore, database: Database, observer: Connection
) -> None:
    """Workers that write the first use of the same keys at the same time have it told once."""
    await insert_organization(store)
    made = [await make(keys) for _ in range(5)]
    workers = [UsageBuffer(database) for _ in range(4)]
    for number, worker in enumerate(workers):
        for key_id in made:
            await use(worker, observer, key_id, 2e9 + number)
    await asyncio.gather(*(worker.flush() for worker in workers))
    await notices.work()
    assert [["first_used"]] * 5 == [await types_of(observer, key_id) for key_id in made]


async def test_keys_that_were_used_before_are_not_told_of(
    notices: Notices, keys: KeyManager, store: PostgresStore, database: Database, observer: Connection
) -> None:
    """A key that had been used before anyone kept note, and has a new token now, is not told of as used first."""
    await insert_organization(store)
    key_id = await make(keys)
    await observer.execute("UPDATE last_used SET used_time = now() - interval '1 day'")
    await keys.rotate(ROOT_CALLER, key_id, timedelta(0))
    usage = UsageBuffer(database)
    await use(usage, observer, key_id)
    await usage.flush()
    await notices.work()
    assert ["rotated"] == await types_of(observer, key_id)


async def test_removed_keys_leave_nothing(
    keys: KeyManager, store: PostgresStore, database: Database, observer: Connection
) -> None:
    """A key that is removed for good takes with it what was noted of it."""
    await insert_organization(store)
    key_id = await make(keys)
    usage = UsageBuffer(database)
    await use(usage, observer, key_id)
    await usage.flush()
    await keys.delete(ROOT_CALLER, key_id)
    assert 1 == await observer.fetchval("SELECT count(*) FROM key_notice")
    await observer.execute("UPDATE key SET delete_time = delete_time - interval '31 days' WHERE id = $1", key_id)
    await purge_keys(database)
    assert await store.get_key(key_id) is None
    assert 0 == await observer.fetchval("SELECT count(*) FROM key_notice")
