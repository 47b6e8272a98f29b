"""The audit trail in a real database: append-only, whole, kept by months, and out of the service's own reach."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import token_service_pb2 as tokens_pb
from latchgate.auditing import verify
from latchgate.config import CommandError
from latchgate.domain.audit import AuditEntry
from latchgate.domain.errors import KeyNotFoundError
from latchgate.domain.keys import KeyManager
from latchgate.storage.audit import PostgresTrail, keep_trail
from latchgate.storage.migrate import migrate_for
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.purge import purge_keys
from latchgate.storage.stores import PostgresStore
from latchgate.storage.tokens import forget_families
from support.databases import ROOT_CALLER, connected, draft, insert_organization, opened
from support.service import RunningService, run_service
from support.tokens import exchange, refresh, verified

MONTH = timedelta(days=31)


@pytest.fixture
def trail(database: Database) -> PostgresTrail:
    """The trail over the pools."""
    return PostgresTrail(database)


async def record(store: PostgresStore, count: int = 5, organization_id: str = "acme") -> None:
    """Records so many events."""
    for number in range(count):
        await store.record_audit(ROOT_CALLER, AuditEntry(organization_id=organization_id, entity_id=f"key_{number}"))


async def said(url: str, organization_id: str = "") -> tuple[bool, list[str]]:
    """What a verification says."""
    lines: list[str] = []
    return await verify(url, organization_id, lines.append), lines


async def unlocked(observer: Connection, statement: str) -> None:
    """Does behind the service's back what only the owner of the tables can do: with the triggers off."""
    async with observer.transaction():
        await observer.execute("SET LOCAL session_replication_role = replica")
        await observer.execute(statement)


async def test_changes_and_their_events_are_stored_together(
    keys: KeyManager, store: PostgresStore, observer: Connection
) -> None:
    """A change that is undone leaves no event, and an event that can not be stored undoes the change."""
    await insert_organization(store)
    created = await keys.create(ROOT_CALLER, "acme", draft())
    count = "SELECT count(*) FROM audit_event"
    assert 1 == await observer.fetchval(count)
    with pytest.raises(KeyNotFoundError):
        await keys.revoke(ROOT_CALLER, "key_none", "")
    assert 1 == await observer.fetchval(count)
    await observer.execute("ALTER TABLE audit_event ADD CONSTRAINT full_disk CHECK (revision = 0) NOT VALID")
    with pytest.raises(asyncpg.CheckViolationError):
        await keys.revoke(ROOT_CALLER, created.key.id, "")
    assert (await keys.get(ROOT_CALLER, created.key.id)).revoke_time is None
    assert 1 == await observer.fetchval(count)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_event SET code = 'OK'",
        "DELETE FROM audit_event",
        "TRUNCATE audit_event",
        "DO $$ BEGIN EXECUTE format('TRUNCATE %I', to_char(now(), '\"audit_event_\"YYYY_MM')); END $$",
        "DO $$ BEGIN EXECUTE format('DELETE FROM %I', to_char(now(), '\"audit_event_\"YYYY_MM')); END $$",
    ],
)
async def test_append_only(store: PostgresStore, observer: Connection, statement: str) -> None:
    """Not even the owner of the tables changes or removes events by a statement on them, whole or by their month."""
    await record(store)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await observer.execute(statement)
    assert 5 == await observer.fetchval("SELECT count(*) FROM audit_event")


async def test_a_whole_trail(store: PostgresStore, database_url: str) -> None:
    """A trail that nobody has touched is whole, each organization's by itself, and where it ends is said."""
    await record(store)
    await record(store, 1, "other")
    whole, lines = await said(database_url)
    assert whole
    assert ["acme: whole, up to event 5 with hash ", "other: whole, up to event 1 with hash "] == [
        line[:-64] for line in lines
    ]
    assert (True, lines[:1]) == await said(database_url, "acme")
    with pytest.raises(CommandError, match="none has no audit trail"):
        await said(database_url, "none")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM audit_event WHERE sequence = 1", "event 1 is missing"),
        ("DELETE FROM audit_event WHERE sequence = 3", "event 3 is missing"),
        ("DELETE FROM audit_event WHERE sequence = 5", "event 5 is missing"),
        ("DELETE FROM audit_event", "event 1 is missing"),
        (
            "UPDATE audit_event SET peer = '192.0.2.1' WHERE sequence = 2",
            "event 2 is not what was recorded, or follows another than it did",
        ),
        ("DELETE FROM audit_head", "there are events, but not where the trail ends"),
        (
            "UPDATE audit_head SET sequence = 4, hash = (SELECT hash FROM audit_event WHERE sequence = 4)",
            "event 5 lies beyond the end of the trail",
        ),
    ],
)
async def test_what_is_done_behind_the_services_back_shows(
    store: PostgresStore, observer: Connection, database_url: str, statement: str, expected: str
) -> None:
    """Whatever is removed or changed with the triggers off is found, and said."""
    await record(store)
    await unlocked(observer, statement)
    whole, lines = await said(database_url)
    assert not whole
    assert [f"acme: BROKEN: {expected}"] == lines


async def test_events_at_once_follow_each_other(store: PostgresStore, database_url: str) -> None:
    """Events that are recorded at the same time are put in a row, and the trail is whole."""
    await asyncio.gather(*(record(store, 5) for _ in range(5)))
    whole, lines = await said(database_url)
    assert whole
    assert lines[0].startswith("acme: whole, up to event 25 ")


async def test_months_that_are_too_old_are_dropped(
    trail: PostgresTrail, store: PostgresStore, observer: Connection, database_url: str
) -> None:
    """Months are dropped once all their events are too old, and what is left is still found whole; what is younger than
    30 days stays, whatever is asked for. There is room for the months to come.
    """
    await record(store)
    await grow_old(observer, 4, up_to=3)
    assert 0 == await trail.forget(5 * MONTH)
    assert (True, "acme: whole, up to event 5") == _short(await said(database_url))
    assert 1 == await trail.forget(timedelta(0))
    assert (True, "acme: whole, kept from event 4 on, up to event 5") == _short(await said(database_url))
    await record(store)
    await keep_trail(trail, timedelta(days=30))
    assert (True, "acme: whole, kept from event 4 on, up to event 10") == _short(await said(database_url))
    months = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'audit_event'::regclass"
    assert 4 == await observer.fetchval(months)


def _short(told: tuple[bool, list[str]]) -> tuple[bool, str]:
    whole, (line,) = told
    return whole, line.partition(" with hash")[0]


async def grow_old(observer: Connection, months: int, up_to: int) -> None:
    """Has the events up to a sequence lie in a partition of so many months ago, as if it were then that they came.

    Their chain is made for the times that they have, so the partition holds them by another bound than its name's.
    """
    name = await observer.fetchval(
        "SELECT 'audit_event_' || to_char(date_trunc('month', now()) - make_interval(months => $1), 'YYYY_MM')", months
    )
    last = await observer.fetchval("SELECT event_time FROM audit_event WHERE sequence = $1", up_to + 1)
    current = await observer.fetchval("SELECT to_char(now(), '\"audit_event_\"YYYY_MM')")
    await unlocked(
        observer,
        f"""
        CREATE TEMPORARY TABLE kept AS TABLE audit_event;
        DROP TABLE {current};
        CREATE TABLE {name} PARTITION OF audit_event FOR VALUES FROM ('2000-01-01') TO ('{last.isoformat()}');
        CREATE TABLE {current} PARTITION OF audit_event FOR VALUES FROM ('{last.isoformat()}')
            TO ('{(last + MONTH).replace(day=1, hour=0, minute=0, second=0, microsecond=0).isoformat()}');
        INSERT INTO audit_event SELECT * FROM kept;
        """,  # noqa: S608 - names and times of the test's own
    )


@pytest.fixture
async def service_url(empty_database_url: str) -> AsyncIterator[str]:
    """The address of a migrated database for a user who does not own it."""
    user = f"service_{uuid.uuid4().hex}"
    async with connected(empty_database_url) as owner:
        await owner.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'x'")
    parts = urlsplit(empty_database_url)
    host = parts.netloc.rpartition("@")[2]
    url = urlunsplit(parts._replace(netloc=f"{user}:x@{host}"))
    await migrate_for(url, empty_database_url)
    yield url
    async with connected(empty_database_url) as owner:
        await owner.execute(f"DROP OWNED BY {user}")
        await owner.execute(f"DROP ROLE {user}")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_event SET code = 'OK'",
        "DELETE FROM audit_event",
        "TRUNCATE audit_event",
        "ALTER TABLE audit_event DISABLE TRIGGER ALL",
        "DROP TRIGGER audit_event_append_only ON audit_event",
        "DROP TABLE audit_event",
        "SET session_replication_role = replica",
        "DELETE FROM audit_head",
        "UPDATE audit_start SET sequence = 10",
        "INSERT INTO audit_start VALUES ('acme', 10, '')",
        "DO $$ BEGIN EXECUTE format('DELETE FROM %I', to_char(now(), '\"audit_event_\"YYYY_MM')); END $$",
        "CREATE OR REPLACE FUNCTION audit_refuse() RETURNS trigger LANGUAGE sql AS 'SELECT 1'",
    ],
)
async def test_the_services_user_can_not_touch_the_trail(service_url: str, statement: str) -> None:
    """A user that does not own the schema can neither change nor remove what is recorded, nor what guards it."""
    async with connected(service_url) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


async def _use_tokens(service: RunningService, key_id: str, token: str) -> None:
    """Exchanges a key and refreshes, has another key sign, and ends and purges the key with what came of it."""
    grant = await exchange(service, token)
    following = await refresh(service, grant.refresh_token, str(uuid.uuid4()))
    await service.tokens.RotateSigningKeys(tokens_pb.RotateSigningKeysRequest(), metadata=service.root)
    await verified(service, (await refresh(service, following.refresh_token)).access_token)
    await exchange(service, token)
    await service.keys.DeleteKey(keys_pb.DeleteKeyRequest(key_id=key_id), metadata=service.root)
    async with opened(service.database_url) as database:
        await forget_families(database)
        await purge_keys(database)


async def test_the_service_works_as_that_user(service_url: str) -> None:
    """The whole service runs as a user that does not own the schema, its work beside the calls included."""
    async with run_service(service_url) as service:
        await service.create_organization()
        created = await service.create_key()
        assert "VALID" == await service.outcome(created.token)
        async with connected(service_url) as connection:
            await keep_trail(PostgresTrail(await Database.open(service_url, pool_size=1)), timedelta(days=30))
            assert 3 == await connection.fetchval("SELECT count(*) FROM audit_event")
        await _use_tokens(service, created.key.id, created.token)
        assert {} == dict(service.running.background.failures)
