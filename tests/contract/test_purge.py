"""Deleted keys: removed when their time has come, with all that is kept of their tokens."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import pytest

from latchgate.domain.errors import KeyNotFoundError
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import DELETED_KEPT, ROOT_ORGANIZATION_ID, Key, KeyFilter
from latchgate.domain.token import digest
from latchgate.storage import purge, queries
from latchgate.storage.lookups import FindMany
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.purge import purge_keys
from latchgate.storage.stores import PostgresStore
from support.databases import ROOT_CALLER, insert_key, insert_organization, opened, started_and_waiting

MINUTE = timedelta(minutes=1)


async def _deleted(
    store: PostgresStore,
    observer: Connection,
    age: timedelta = DELETED_KEPT,
    organization_id: str = "acme",
) -> tuple[Key, str]:
    """Stores a key that was deleted so long ago."""
    key, token = await insert_key(store, organization_id)
    await observer.execute("UPDATE organization SET key_count = key_count - 1 WHERE id = $1", organization_id)
    await observer.execute(
        "UPDATE key SET revoke_time = now() - $2::interval, delete_time = now() - $2::interval WHERE id = $1",
        key.id,
        age,
    )
    return key, token


async def _ids(observer: Connection, organization_id: str = "acme") -> list[str]:
    rows = await observer.fetch("SELECT id FROM key WHERE organization_id = $1 ORDER BY id", organization_id)
    return [row["id"] for row in rows]


async def test_what_is_removed(store: PostgresStore, database: Database, observer: Connection) -> None:
    """A key goes with its secrets and their last uses when it was deleted 30 days ago, and not before; keys that were
    not deleted stay, be they revoked for longer. The number of keys that count stays as it is.
    """
    await insert_organization(store)
    gone, _ = await _deleted(store, observer)
    young, _ = await _deleted(store, observer, DELETED_KEPT - MINUTE)
    revoked, _ = await insert_key(store)
    good, _ = await insert_key(store)
    await observer.execute("UPDATE key SET revoke_time = now() - interval '1 year' WHERE id = $1", revoked.id)
    before = await store.get_organization("acme")

    await purge_keys(database)

    recorded = await observer.fetch(
        "SELECT entity, entity_id, actor_key_id, before_change, after_change FROM audit_event "
        "WHERE organization_id = 'acme' AND entity_id = $1",
        gone.id,
    )
    assert [("key", gone.id, "", None)] == [
        (row["entity"], row["entity_id"], row["actor_key_id"], row["after_change"]) for row in recorded
    ]
    assert {"name", "delete_time"} == json.loads(recorded[0]["before_change"]).keys()
    assert sorted([young.id, revoked.id, good.id]) == await _ids(observer)
    assert await store.get_key(gone.id) is None
    holders = await observer.fetch("SELECT DISTINCT key_id FROM secret")
    assert gone.id not in {row["key_id"] for row in holders}
    assert 0 == await observer.fetchval(
        "SELECT count(*) FROM last_used u WHERE NOT EXISTS (SELECT 1 FROM secret s WHERE s.id = u.secret_id)"
    )
    assert before == await store.get_organization("acme")


async def test_its_token_is_unknown(
    store: PostgresStore, database: Database, observer: Connection, find: FindMany
) -> None:
    """The token of a key that was removed is like one that never was, and the key too."""
    await insert_organization(store)
    key, token = await _deleted(store, observer)
    lookup = (await find([digest(token)]))[digest(token)]
    assert lookup.record is not None
    assert lookup.record.revoked

    await purge_keys(database)

    assert (await find([digest(token)]))[digest(token)].record is None
    assert [] == await store.list_keys(KeyFilter(organization_id="acme", show_deleted=True), "", 10)
    # A page that ended with it goes on from there.
    assert [] == await store.list_keys(KeyFilter(organization_id="acme", show_deleted=True), key.id, 10)


async def test_root_keys_stay(store: PostgresStore, database: Database, observer: Connection) -> None:
    """A root key is never removed: a start finds by its secret that the root token of the settings was ended."""
    _, token = await _deleted(store, observer, 12 * DELETED_KEPT, ROOT_ORGANIZATION_ID)
    await purge_keys(database)
    assert await observer.fetchval(queries.SECRET_EXISTS, digest(token))


async def test_many(
    store: PostgresStore, database: Database, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, all are removed, in small batches, and workers that do it at once do not wait for each
    other.
    """
    monkeypatch.setattr(purge, "PURGE_ROWS", 3)
    await insert_organization(store)
    for _ in range(20):
        await _deleted(store, observer)
    await asyncio.gather(*(purge_keys(database) for _ in range(3)))
    await purge_keys(database)
    assert [] == await _ids(observer)


async def test_keys_that_someone_is_at(store: PostgresStore, database: Database, observer: Connection) -> None:
    """A key whose lock somebody holds is left for the next time, and nobody waits."""
    await insert_organization(store)
    held, _ = await _deleted(store, observer)
    await _deleted(store, observer)
    async with store.transaction() as transaction:
        await transaction.lock_key(held.id)
        await purge_keys(database)
        assert [held.id] == await _ids(observer)
    await purge_keys(database)
    assert [] == await _ids(observer)


async def test_who_waits_for_a_key_that_is_removed(
    store: PostgresStore, keys: KeyManager, database_url: str, observer: Connection
) -> None:
    """Who asks for a key while it is being removed is told that it does not exist, as if they had asked later."""
    await insert_organization(store)
    key, _ = await _deleted(store, observer)
    async with opened(database_url) as other:
        async with other.transaction() as connection:
            removed = await connection.fetch(queries.KEY_PURGE, DELETED_KEPT, 10)
            waiting = await started_and_waiting(observer, keys.undelete(ROOT_CALLER, key.id))
        assert [(key.id, "acme")] == [(row["id"], row["organization_id"]) for row in removed]
        with pytest.raises(KeyNotFoundError):
            await waiting


async def test_looking_for_them_costs_little(store: PostgresStore, observer: Connection) -> None:
    """They are found by an index of their own, and not by a walk through all keys."""
    await insert_organization(store)
    async with observer.transaction():
        await observer.execute("SET LOCAL enable_seqscan = off")
        plan = await observer.fetchval(
            "EXPLAIN (FORMAT JSON) " + queries.KEY_PURGE.replace("$1", "'30 days'").replace("$2", "200")
        )
    assert "key_deleted" in plan
    assert '"Index Cond": "(delete_time <=' in plan
