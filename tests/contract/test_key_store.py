"""Keys, organizations and plans at rest: what is stored is what is read, whoever writes at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from latchgate.domain.errors import (
    KeyLimitReachedError,
    OrganizationExistsError,
    PlanExistsError,
    PlanNotFoundError,
)
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import Environment, Key, KeyFilter, KeyState, KeyType, Organization, Plan, Scope
from latchgate.domain.token import digest
from latchgate.storage.lookups import FindMany
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from latchgate.storage.usage import UsageBuffer
from support.databases import (
    ROOT_CALLER,
    TOKENS,
    draft,
    insert_key,
    insert_organization,
    key_manager,
    opened,
    started_and_waiting,
    store_organization,
    store_plan,
)

LATER = datetime(2090, 1, 1, tzinfo=UTC)


async def _save(store: PostgresStore, key: Key) -> Key:
    async with store.transaction() as transaction:
        assert await transaction.lock_key(key.id) is not None
        return await transaction.save_key(key, await transaction.record_change("key", key.id))


async def _counts(observer: Connection) -> dict[str, tuple[int, int]]:
    """For each organization, the count that is kept and the keys that there are."""
    rows = await observer.fetch(
        """
        SELECT o.id, o.key_count, count(k.id) FILTER (WHERE k.revoke_time IS NULL) AS real
        FROM organization o LEFT JOIN key k ON k.organization_id = o.id GROUP BY o.id
        """
    )
    return {row["id"]: (row["key_count"], row["real"]) for row in rows}


async def test_key_is_read_as_it_was_stored(store: PostgresStore) -> None:
    """Every field of a key comes back as it went in, at creation and after a change of all that can change."""
    await insert_organization(store)
    key, _ = await insert_key(
        store,
        name="Ünïcode ☃ 'quotes' \\ %s $1",
        key_type=KeyType.PUBLISHABLE,
        environment=Environment.TEST,
        permissions=("orders:*", "read"),
        rate_limit_per_minute=7,
        expire_time=LATER,
        user_id="u1",
        user_email="u1@example.com",
        metadata={"a": '{"b": [1]}', "ü": ""},
        allowed_cidrs=("10.0.0.0/8", "2001:db8::/32"),
    )
    assert key == replace(await _get(store, key.id), read_time=key.read_time)
    assert ("Ünïcode ☃ 'quotes' \\ %s $1", KeyType.PUBLISHABLE, Environment.TEST) == (
        key.name,
        key.key_type,
        key.environment,
    )
    assert (("orders:*", "read"), 7, LATER, "u1", "u1@example.com") == (
        key.permissions,
        key.rate_limit_per_minute,
        key.expire_time,
        key.user_id,
        key.user_email,
    )
    assert {"a": '{"b": [1]}', "ü": ""} == key.metadata
    assert ("10.0.0.0/8", "2001:db8::/32") == key.allowed_cidrs
    assert (True, 1, 0, None) == (key.active, key.version, key.revision, key.last_used_time)

    changed = replace(
        key,
        name="other",
        permissions=(),
        rate_limit_per_minute=0,
        active=False,
        metadata={},
        allowed_cidrs=(),
        expire_time=None,
        revoke_time=LATER,
        revoke_reason="lost",
        delete_time=LATER,
    )
    saved = await _save(store, changed)
    assert (
        replace(
            changed,
            version=2,
            revision=saved.revision,
            update_time=saved.update_time,
            read_time=saved.read_time,
        )
        == saved
    )
    assert saved.revision > 0
    assert saved.update_time > key.update_time


async def _get(store: PostgresStore, key_id: str) -> Key:
    key = await store.get_key(key_id)
    assert key is not None
    return key


async def test_unknown_ids_are_none(store: PostgresStore) -> None:
    """What does not exist is None, read or locked."""
    assert await store.get_key("key_none") is None
    assert await store.get_organization("none") is None
    assert await store.scopes("none") is None
    assert await store.publishable_key("none", Environment.LIVE) is None
    async with store.transaction() as transaction:
        assert await transaction.lock_key("key_none") is None
        assert await transaction.lock_organization("none") is None
        assert await transaction.lock_plan("none") is None


async def test_organizations_and_plans_are_read_as_they_were_stored(store: PostgresStore) -> None:
    """Every field of an organization and of a plan comes back as it went in; lists go by id, from the given one on."""
    scopes = (Scope(name="a:b", description="ä"), Scope(name="c"))
    plan = await store_plan(store, "small", 5, 2)
    organization = await store_organization(store, "acme", "Acmé", "small", scopes)

    assert ("small", 5, 2) == (plan.id, plan.rate_limit_per_minute, plan.max_keys)
    assert ("acme", "Acmé", "small", True, scopes, 0, 2) == (
        organization.id,
        organization.name,
        organization.plan_id,
        organization.active,
        organization.scopes,
        organization.key_count,
        organization.max_keys,
    )
    assert organization == await store.get_organization("acme")
    assert scopes == await store.scopes("acme")
    async with store.transaction() as transaction:
        saved = await transaction.save_organization(
            replace(organization, name="B", plan_id="default", active=False, scopes=())
        )
        saved_plan = await transaction.save_plan(replace(plan, rate_limit_per_minute=0, max_keys=9))
    assert ("B", "default", False, (), 1000) == (
        saved.name,
        saved.plan_id,
        saved.active,
        saved.scopes,
        saved.max_keys,
    )
    assert (0, 9) == (saved_plan.rate_limit_per_minute, saved_plan.max_keys)
    assert saved_plan.update_time >= plan.update_time
    assert ["acme", "org_root"] == [each.id for each in await store.list_organizations("", 5)]
    assert ["acme"] == [each.id for each in await store.list_organizations("", 1)]
    assert ["org_root"] == [each.id for each in await store.list_organizations("acme", 5)]
    assert ["default", "root", "small"] == [each.id for each in await store.list_plans("", 5)]
    assert [saved_plan] == await store.list_plans("root", 5)


async def test_taken_ids_and_missing_plans_are_told(store: PostgresStore) -> None:
    """An id that is taken and a plan that is missing are domain errors, and leave nothing behind."""
    await store_plan(store, "small", 0, 1)
    await store_organization(store, "acme", "Acme", "small")

    with pytest.raises(PlanExistsError):
        await store_plan(store, "small", 0, 1)
    with pytest.raises(OrganizationExistsError):
        await store_organization(store, "acme", "Acme", "small")
    with pytest.raises(PlanNotFoundError):
        await store_organization(store, "other", "Other", "none")
    acme = await store.get_organization("acme")
    assert acme is not None
    with pytest.raises(PlanNotFoundError):
        await _save_organization(store, replace(acme, name="B", plan_id="none"))

    assert await store.get_organization("other") is None
    assert acme == await store.get_organization("acme")


async def _save_organization(store: PostgresStore, organization: Organization) -> None:
    async with store.transaction() as transaction:
        await transaction.save_organization(organization)


async def test_key_count_is_the_number_of_unrevoked_keys(database_url: str, observer: Connection) -> None:
    """Whatever is created, revoked, deleted, brought back and revoked again at the same time, an organization's count
    is that of its keys which are not revoked.
    """
    async with opened(database_url, pool_size=10) as database:
        store = PostgresStore(database)
        keys = key_manager(store)
        for organization_id in ("acme", "other"):
            await insert_organization(store, organization_id)
        shared = [(await keys.create(ROOT_CALLER, "acme", draft())).key.id for _ in range(4)]

        async def live(organization_id: str) -> None:
            created = await keys.create(ROOT_CALLER, organization_id, draft())
            other = await keys.create(ROOT_CALLER, organization_id, draft())
            await keys.rotate(ROOT_CALLER, created.key.id, timedelta())
            await keys.delete(ROOT_CALLER, other.key.id)
            await asyncio.gather(*(keys.undelete(ROOT_CALLER, other.key.id) for _ in range(2)))
            await keys.revoke(ROOT_CALLER, created.key.id, "")
            await keys.delete(ROOT_CALLER, created.key.id)

        async def end(key_id: str) -> None:
            await keys.delete(ROOT_CALLER, key_id)

        await asyncio.gather(
            *(live(organization_id) for organization_id in ("acme", "other") * 5),
            *(keys.revoke(ROOT_CALLER, key_id, "") for key_id in shared for _ in range(3)),
            *(end(key_id) for key_id in shared for _ in range(3)),
        )

    counts = await _counts(observer)
    assert {"acme": (5, 5), "other": (5, 5), "org_root": (1, 1)} == counts


async def test_maximum_holds_however_many_ask_at_once(database_url: str, observer: Connection) -> None:
    """Of many who ask for an organization's last places at once, just as many get a key as there are places."""
    async with opened(database_url, pool_size=10) as database:
        store = PostgresStore(database)
        keys = key_manager(store)
        await insert_organization(store, "acme", max_keys=3)
        answers = await asyncio.gather(
            *(keys.create(ROOT_CALLER, "acme", draft()) for _ in range(12)), return_exceptions=True
        )

    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert [KeyLimitReachedError] * 9 == [type(answer) for answer in refused]
    assert (3, 3) == (await _counts(observer))["acme"]


async def test_place_of_a_revoked_key_is_free(store: PostgresStore, keys: KeyManager) -> None:
    """Revoking a key at the maximum makes room for another, and a second revocation of it makes room for no more."""
    await insert_organization(store, "acme", max_keys=1)
    first = await keys.create(ROOT_CALLER, "acme", draft())
    with pytest.raises(KeyLimitReachedError):
        await keys.create(ROOT_CALLER, "acme", draft())
    await keys.revoke(ROOT_CALLER, first.key.id, "")
    await keys.revoke(ROOT_CALLER, first.key.id, "")
    await keys.create(ROOT_CALLER, "acme", draft())
    with pytest.raises(KeyLimitReachedError):
        await keys.create(ROOT_CALLER, "acme", draft())


async def test_lock_shows_what_its_last_holder_left(store: PostgresStore, observer: Connection) -> None:
    """Whoever waited for an organization, a key or a plan reads it as the one before has left it, also where that one
    has given the organization another plan.
    """
    await insert_organization(store)
    large = await store_plan(store, "large", 0, 5000)
    key, _ = await insert_key(store)

    async def organization() -> Organization | None:
        async with store.transaction() as transaction:
            return await transaction.lock_organization("acme")

    async def locked_key() -> Key | None:
        async with store.transaction() as transaction:
            return await transaction.lock_key(key.id)

    async def plan() -> Plan | None:
        async with store.transaction() as transaction:
            return await transaction.lock_plan("large")

    async with store.transaction() as transaction:
        held = await transaction.lock_organization("acme")
        assert held is not None
        waiting_for_organization = await started_and_waiting(observer, organization())
        organization_left = await transaction.save_organization(replace(held, plan_id="large", active=False))
    # Before anything else is changed: it is read once the lock is had.
    assert organization_left == await waiting_for_organization
    async with store.transaction() as transaction:
        held_key = await transaction.lock_key(key.id)
        assert held_key is not None
        waiting_for_key = await started_and_waiting(observer, locked_key())
        key_left = await transaction.save_key(replace(held_key, name="renamed"), 1)
    key_found = await waiting_for_key
    assert key_found is not None
    assert key_left == replace(key_found, read_time=key_left.read_time)
    async with store.transaction() as transaction:
        await transaction.lock_plan("large")
        waiting_for_plan = await started_and_waiting(observer, plan())
        plan_left = await transaction.save_plan(replace(large, max_keys=6000))

    assert plan_left == await waiting_for_plan


async def test_locked_key_is_locked_with_its_organization(store: PostgresStore, observer: Connection) -> None:
    """Whoever has locked a key has locked its organization and the key, against changes but not against references to
    them; whoever has locked an organization or a plan has locked that.
    """
    await insert_organization(store)
    key, _ = await insert_key(store)

    async def is_free(table: str, row_id: str, strength: str) -> bool:
        try:
            await observer.fetchval(f"SELECT 1 FROM {table} WHERE id = $1 FOR {strength} NOWAIT", row_id)  # noqa: S608 - as below
        except asyncpg.LockNotAvailableError:
            return False
        return True

    rows = [("organization", "acme"), ("key", key.id), ("plan", "acme")]
    seen = []
    for lock in ("lock_key", "lock_organization", "lock_plan"):
        async with store.transaction() as transaction:
            await getattr(transaction, lock)(key.id if lock == "lock_key" else "acme")
            assert all([await is_free(*row, "KEY SHARE") for row in rows])
            seen.append([await is_free(*row, "NO KEY UPDATE") for row in rows])

    assert [[False, False, True], [False, True, True], [True, True, False]] == seen


async def test_organization_is_locked_before_the_key(store: PostgresStore, observer: Connection) -> None:
    """Who waits for an organization in order to lock a key does not hold the key meanwhile: the organization's holder
    may need it, for it may be the caller's own.
    """
    await insert_organization(store)
    key, token = await insert_key(store)
    secret_id = await observer.fetchval("SELECT id FROM secret WHERE digest = $1", digest(token))

    async def lock() -> Key | None:
        async with store.transaction() as transaction:
            return await transaction.lock_key(key.id)

    async with store.transaction() as transaction:
        await transaction.lock_organization("acme")
        waiting = await started_and_waiting(observer, lock())
        assert await transaction.is_in_use(secret_id)
    assert await waiting is not None


async def test_no_two_wait_for_each_other(database_url: str, observer: Connection) -> None:
    """Changes of the same keys, their organization and its plan at the same time all come through: everyone takes
    organization before key, and the lock of the log last.
    """
    async with opened(database_url, pool_size=10) as database:
        store = PostgresStore(database)
        keys = key_manager(store)
        await insert_organization(store)
        ids = [(await keys.create(ROOT_CALLER, "acme", draft())).key.id for _ in range(3)]

        async def change_organization(number: int) -> None:
            async with store.transaction() as transaction:
                organization = await transaction.lock_organization("acme")
                assert organization is not None
                await transaction.record_change("organization", "acme")
                await transaction.save_organization(replace(organization, name=f"Acme {number}"))

        async def change_plan(number: int) -> None:
            async with store.transaction() as transaction:
                plan = await transaction.lock_plan("acme")
                assert plan is not None
                await transaction.record_change("plan", "acme")
                await transaction.save_plan(replace(plan, rate_limit_per_minute=number))

        work: list[Awaitable[object]] = []
        for number in range(6):
            work += [change_organization(number), change_plan(number), keys.create(ROOT_CALLER, "acme", draft())]
            for key_id in ids:
                work += [
                    keys.rotate(ROOT_CALLER, key_id, timedelta(hours=1)),
                    keys.update(ROOT_CALLER, key_id, "", {"name": f"key {number}"}),
                    keys.toggle(ROOT_CALLER, key_id, active=number % 2 == 0),
                ]
        await asyncio.gather(*work)

    assert (9, 9) == (await _counts(observer))["acme"]
    versions = await observer.fetch("SELECT version FROM key WHERE id = ANY ($1::text[])", ids)
    assert all(version > 6 for (version,) in versions)


async def test_lists_are_stable_under_writes(store: PostgresStore) -> None:
    """Pages go from the newest key to the oldest and on from the id they are given: what is created, changed or deleted
    between two pages neither hides nor repeats another key.
    """
    await insert_organization(store)
    await insert_organization(store, "other")
    made, others = [], []
    for _ in range(6):
        made.append((await insert_key(store))[0])
        others.append((await insert_key(store, "other"))[0])
    wanted = KeyFilter(organization_id="acme")

    first = await store.list_keys(wanted, "", 3)
    await insert_key(store)
    await _save(store, replace(made[1], name="renamed"))
    await _save(store, replace(made[4], revoke_time=LATER, delete_time=LATER))
    second = await store.list_keys(wanted, first[-1].id, 3)
    third = await store.list_keys(wanted, second[-1].id, 3)

    assert [key.id for key in reversed(made)] == [key.id for key in (*first, *second)]
    assert [] == third
    listed = await store.list_keys(KeyFilter(organization_id="other"), "", 100)
    assert [key.id for key in reversed(others)] == [key.id for key in listed]


async def test_filters_give_what_keys_say_of_themselves(store: PostgresStore, observer: Connection) -> None:
    """A list by state, type, environment, user, or with the deleted ones, holds just the keys of which it is true."""
    await insert_organization(store)
    for key_type in KeyType:
        for environment in Environment:
            for user_id in ("", "u1"):
                for change in (
                    {},
                    {"active": False},
                    {"expire_time": LATER},
                    {"revoke_time": LATER},
                    {"revoke_time": LATER, "active": False, "delete_time": LATER},
                ):
                    key, _ = await insert_key(store, key_type=key_type, environment=environment, user_id=user_id)
                    await _save(store, replace(key, **change))
    # Set behind the rules' back: an expiry that has come, on keys that are active and on some that are not.
    await observer.execute("UPDATE key SET expire_time = now() WHERE expire_time IS NOT NULL")
    await observer.execute(
        "UPDATE key SET expire_time = now() WHERE id IN (SELECT id FROM key WHERE NOT active AND user_id = 'u1')"
    )
    everything = await store.list_keys(KeyFilter(organization_id="acme", show_deleted=True), "", 1000)
    assert 40 == len(everything)
    assert set(KeyState) == {key.state for key in everything}

    for show_deleted in (False, True):
        for key_type in (None, *KeyType):
            for environment in (None, *Environment):
                for user_id in ("", "u1", "nobody"):
                    for state in (None, *KeyState):
                        wanted = KeyFilter(
                            organization_id="acme",
                            key_type=key_type,
                            environment=environment,
                            state=state,
                            user_id=user_id,
                            show_deleted=show_deleted,
                        )
                        expected = [key.id for key in everything if _matches(wanted, key)]
                        assert expected == [key.id for key in await store.list_keys(wanted, "", 1000)], wanted


def _matches(wanted: KeyFilter, key: Key) -> bool:
    return (
        wanted.key_type in {None, key.key_type}
        and wanted.environment in {None, key.environment}
        and wanted.state in {None, key.state}
        and wanted.user_id in {"", key.user_id}
        and (wanted.show_deleted or key.state is not KeyState.DELETED)
    )


async def test_publishable_key_is_the_newest_that_is_good(store: PostgresStore, observer: Connection) -> None:
    """GetPublishableKey gives the newest publishable key of the environment that is active, neither revoked nor
    expired, and its newest token.
    """
    await insert_organization(store)
    good, token = await insert_key(store, key_type=KeyType.PUBLISHABLE)
    ended: tuple[dict[str, object], ...] = ({"active": False}, {"revoke_time": LATER}, {"expire_time": LATER})
    for change in ended:
        key, _ = await insert_key(store, key_type=KeyType.PUBLISHABLE)
        await _save(store, replace(key, **change))  # type: ignore[arg-type]  # names and values as in Key
    await observer.execute("UPDATE key SET expire_time = now() WHERE expire_time IS NOT NULL")
    await insert_key(store, key_type=KeyType.PUBLISHABLE, environment=Environment.TEST)
    await insert_key(store, key_type=KeyType.SECRET)

    found = await store.publishable_key("acme", Environment.LIVE)
    assert found is not None
    assert (good.id, token) == (found[0].id, found[1])

    renewed = TOKENS.mint(KeyType.PUBLISHABLE, Environment.LIVE)
    async with store.transaction() as transaction:
        await transaction.lock_key(good.id)
        await transaction.rotate_secret(good.id, renewed.secret, timedelta(hours=1))
    found = await store.publishable_key("acme", Environment.LIVE)
    assert found is not None
    assert (good.id, renewed.token) == (found[0].id, found[1])


async def test_rotation_ends_the_newest_secret_later_and_all_before_it_now(
    store: PostgresStore, observer: Connection
) -> None:
    """After a rotation the new secret has no end, the one before it ends after the grace, and older ones have ended;
    one that had ended keeps its end. A key shows its two newest secrets.
    """
    await insert_organization(store)
    key, _ = await insert_key(store)
    for grace in (timedelta(), timedelta(hours=5), timedelta(hours=1)):
        async with store.transaction() as transaction:
            await transaction.lock_key(key.id)
            await transaction.rotate_secret(key.id, TOKENS.mint(KeyType.SECRET, Environment.LIVE).secret, grace)

    rows = await observer.fetch("SELECT create_time, end_time FROM secret WHERE key_id = $1 ORDER BY id", key.id)
    (created, ended), (_, second_end), (_, third_end), (last_created, open_end) = (tuple(row) for row in rows)
    assert created < ended < second_end
    assert second_end == last_created
    assert last_created + timedelta(hours=1) == third_end
    assert open_end is None
    shown = await _get(store, key.id)
    assert [(None, last_created), (third_end, rows[2]["create_time"])] == [
        (secret.end_time, secret.create_time) for secret in shown.secrets
    ]


async def test_last_use_of_a_key_is_the_latest_of_any_token(
    database: Database, store: PostgresStore, find: FindMany
) -> None:
    """A key's last use outlives its token: it is the latest of all its tokens, also of those no longer shown."""
    await insert_organization(store)
    key, token = await insert_key(store)
    found = await find([digest(token)])
    record = found[digest(token)].record
    assert record is not None
    usage = UsageBuffer(database)
    usage.used(record, LATER.timestamp())
    await usage.flush()
    for _ in range(2):
        async with store.transaction() as transaction:
            await transaction.lock_key(key.id)
            await transaction.rotate_secret(key.id, TOKENS.mint(KeyType.SECRET, Environment.LIVE).secret, timedelta())

    shown = await _get(store, key.id)
    assert LATER == shown.last_used_time
    assert [None, None] == [secret.last_used_time for secret in shown.secrets]


@pytest.mark.parametrize("end", ["rotate", "revoke", "toggle", "expire"])
async def test_caller_that_was_ended_is_not_in_use_for_who_began_before(
    store: PostgresStore, keys: KeyManager, observer: Connection, end: str
) -> None:
    """A secret that was ended is not in use any more, also for a transaction that had begun before it was: it may have
    waited for the very one that has ended it.
    """
    await insert_organization(store)
    key, token = await insert_key(store)
    secret_id = await observer.fetchval("SELECT id FROM secret WHERE digest = $1", digest(token))
    async with store.transaction() as transaction:
        await transaction.now()
        if end == "rotate":
            await keys.rotate(ROOT_CALLER, key.id, timedelta())
        elif end == "revoke":
            await keys.revoke(ROOT_CALLER, key.id, "")
        elif end == "toggle":
            await keys.toggle(ROOT_CALLER, key.id, active=False)
        else:
            await observer.execute("UPDATE key SET expire_time = clock_timestamp() WHERE id = $1", key.id)

        assert not await transaction.is_in_use(secret_id)
        assert await transaction.is_in_use(1)


async def test_caller_can_not_be_ended_before_its_change_is(
    store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """Who ends the key of a caller whose change is under way waits for that change: it does not come to light after."""
    await insert_organization(store)
    await insert_organization(store, "other")
    key, token = await insert_key(store)
    secret_id = await observer.fetchval("SELECT id FROM secret WHERE digest = $1", digest(token))
    async with store.transaction() as transaction:
        await transaction.lock_organization("other")
        assert await transaction.is_in_use(secret_id)
        revoking = await started_and_waiting(observer, keys.revoke(ROOT_CALLER, key.id, ""))

    changed = await revoking
    assert KeyState.REVOKED is changed.key.state


async def test_update_that_stands_on_a_stale_read_is_not_possible(
    store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """Two changes of different fields at the same time both hold: each starts from what the other left."""
    await insert_organization(store)
    created = await keys.create(ROOT_CALLER, "acme", draft())
    key_id = created.key.id
    await asyncio.gather(
        *(
            change
            for number in range(5)
            for change in (
                keys.update(ROOT_CALLER, key_id, "", {"metadata": {"n": str(number)}}),
                keys.update(ROOT_CALLER, key_id, "", {"rate_limit_per_minute": number + 1}),
            )
        )
    )

    row = await observer.fetchrow(
        "SELECT version, rate_limit_per_minute, metadata::text FROM key WHERE id = $1", key_id
    )
    assert row is not None
    assert (11, True, True) == (row["version"], row["rate_limit_per_minute"] > 0, '{"n":' in row["metadata"])
