"""What the statements of the protocol between workers guarantee by themselves: how they commit, and what is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest

from latchgate.storage import queries_coherence
from latchgate.storage.coherence import FORGET_ROWS, forget_changes
from latchgate.storage.postgres import Connection, Database
from support.databases import connected, insert_worker, log_change, workers

# Writes down how a transaction that touches a worker's row will be committed, at its end.
NOTE = """
CREATE TABLE noted (operation text, setting text, incarnation uuid);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO noted VALUES (TG_OP, current_setting('synchronous_commit'), NEW.incarnation);
    RETURN NEW;
END $$;
CREATE CONSTRAINT TRIGGER note AFTER INSERT OR UPDATE ON worker DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note();
"""


@pytest.fixture
async def noting(database_url: str) -> AsyncIterator[Connection]:
    """A connection to a database that notes, as each transaction commits, whether it waits for the disk."""
    async with connected(database_url) as connection:
        await connection.execute(NOTE)
        yield connection


async def noted(connection: Connection) -> list[tuple[str, str]]:
    """What was noted since the last time."""
    rows = await connection.fetch("DELETE FROM noted RETURNING operation, setting")
    return [(row["operation"], row["setting"]) for row in rows]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("off", "on"),
        ("local", "on"),
        ("on", "on"),
        ("remote_write", "remote_write"),
        ("remote_apply", "remote_apply"),
    ],
)
async def test_registrations_and_renewals_are_safe_on_disk(noting: Connection, setting: str, expected: str) -> None:
    """A registration and a renewal are committed to disk whatever the server's own setting, and to standbys where that
    is set: else a crash could make a worker unknown, or have it taken off, that answers from memory. The session's
    setting stays as it was.
    """
    worker = uuid4()
    await noting.execute(f"SET synchronous_commit = {setting}")
    await noting.execute(queries_coherence.WORKER_INSERT, worker, 10.0)
    assert [("INSERT", expected)] == await noted(noting)
    await noting.fetch(queries_coherence.LOG_READ_RENEWING, worker, 0, 10)
    assert [("UPDATE", expected)] == await noted(noting)
    assert setting == await noting.fetchval("SHOW synchronous_commit")


@pytest.mark.parametrize("setting", ["on", "remote_apply", "off"])
async def test_acknowledgements_do_not_wait_for_the_disk(noting: Connection, setting: str) -> None:
    """What is written several times a second, and may be lost, does not have the server wait for its disk; what else
    the session does, does.
    """
    worker = await insert_worker(noting)
    await noting.execute(f"SET synchronous_commit = {setting}")
    await noted(noting)
    await noting.execute(queries_coherence.WORKER_ACKNOWLEDGE, worker, 7)
    assert [("UPDATE", "off")] == await noted(noting)
    assert setting == await noting.fetchval("SHOW synchronous_commit")


async def test_registration_starts_from_nothing(observer: Connection) -> None:
    """A new row has applied and seen nothing, so that it is waited for from the moment that it stands."""
    revision = await log_change(observer)
    incarnation = uuid4()
    await observer.execute(queries_coherence.WORKER_INSERT, incarnation, 2.5)
    (row,) = await observer.fetch(queries_coherence.WORKER_LIST)
    assert (incarnation, 0, 0, 0, 2.5) == tuple(
        row[name] for name in ("incarnation", "applied_revision", "seen_revision", "renewals", "lease_s")
    )
    assert revision > 0


async def test_reading_of_the_log(observer: Connection) -> None:
    """A reading gives what came after what was applied, in order and up to a number, with the newest revision of all;
    and it gives that newest revision also if nothing has come. It says whether the worker's row still stands.
    """
    worker = await insert_worker(observer)
    (empty,) = await observer.fetch(queries_coherence.LOG_READ, worker, 0, 10)
    assert (0, True, None, None) == (empty["head"], empty["is_member"], empty["entity"], empty["entity_id"])
    revisions = [await log_change(observer, "key", f"key_{number}") for number in range(5)]
    for statement in (queries_coherence.LOG_READ, queries_coherence.LOG_READ_RENEWING):
        rows = await observer.fetch(statement, worker, revisions[1], 2)
        assert [("key_2", revisions[4], True), ("key_3", revisions[4], True)] == [
            (row["entity_id"], row["head"], row["is_member"]) for row in rows
        ]
        (stranger,) = await observer.fetch(statement, uuid4(), revisions[4], 10)
        assert (revisions[4], False, None) == (stranger["head"], stranger["is_member"], stranger["entity"])
        now_s = await observer.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        assert abs(now_s - stranger["now_s"]) < 5
        assert 8 == len(stranger["timeline"])


async def test_renewal_notes_what_it_has_read(observer: Connection) -> None:
    """A renewal counts, takes over what was applied, and notes the newest revision of its own reading."""
    worker, other = await insert_worker(observer), await insert_worker(observer)
    revision = await log_change(observer)
    await observer.fetch(queries_coherence.LOG_READ_RENEWING, worker, revision - 1, 10)
    rows = {row["incarnation"]: row for row in await observer.fetch(queries_coherence.WORKER_LIST)}
    assert (1, revision - 1, revision) == _state(rows[worker])
    assert (0, 0, 0) == _state(rows[other])
    await observer.fetch(queries_coherence.LOG_READ, worker, revision, 10)
    await observer.execute(queries_coherence.WORKER_ACKNOWLEDGE, worker, revision)
    rows = {row["incarnation"]: row for row in await observer.fetch(queries_coherence.WORKER_LIST)}
    assert (1, revision, revision) == _state(rows[worker])
    await observer.execute(queries_coherence.WORKER_DELETE, worker)
    assert {other} == set(await workers(observer))


def _state(row: object) -> tuple[int, int, int]:
    """What a row says: whether it was renewed, what is applied, how far its last renewal has read."""
    values: dict[str, int] = dict(row)  # type: ignore[call-overload]  # asyncpg's records are pairs to the type checker
    return int(values["renewals"] > 0), values["applied_revision"], values["seen_revision"]


async def make_old(connection: Connection, *revisions: int, age: str = "61 minutes") -> None:
    """Makes changes older than they are."""
    statement = "UPDATE change_log SET change_time = now() - $2::text::interval WHERE revision = ANY ($1::bigint[])"
    await connection.execute(statement, list(revisions), age)


async def kept(connection: Connection) -> list[int]:
    """The revisions that are in the log."""
    return [row["revision"] for row in await connection.fetch("SELECT revision FROM change_log ORDER BY revision")]


async def acknowledge(connection: Connection, incarnation: UUID, revision: int) -> None:
    """Has a worker's row say what it has applied."""
    await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, incarnation, revision)


async def test_old_changes_that_all_have_applied_are_forgotten(database: Database, observer: Connection) -> None:
    """Of the log's changes those go that are an hour old and that every worker has applied; the newest of all stays: it
    is how far the log has come.
    """
    fast, slow = await insert_worker(observer), await insert_worker(observer)
    revisions = [await log_change(observer) for _ in range(6)]
    await acknowledge(observer, fast, revisions[5])
    await acknowledge(observer, slow, revisions[3])
    await make_old(observer, *revisions[:2], *revisions[3:])
    await make_old(observer, revisions[2], age="59 minutes")
    await forget_changes(database)
    assert revisions[2:] == await kept(observer)

    await acknowledge(observer, slow, revisions[5])
    await make_old(observer, *revisions)
    await forget_changes(database)
    assert revisions[5:] == await kept(observer)


async def test_what_a_worker_that_just_joined_may_read_is_kept(database: Database, observer: Connection) -> None:
    """A row that has applied nothing yet keeps the whole log."""
    worker = await insert_worker(observer)
    revisions = [await log_change(observer) for _ in range(3)]
    await make_old(observer, *revisions)
    await acknowledge(observer, worker, revisions[2])
    await insert_worker(observer)
    await forget_changes(database)
    assert revisions == await kept(observer)


async def test_many_changes_are_forgotten_in_pieces(database: Database, observer: Connection) -> None:
    """However many changes there are, all that may go go at once, by statements that are short each."""
    statement = (
        "INSERT INTO change_log (revision, entity, entity_id, change_time) "
        "SELECT nextval('change_revision'), 'key', 'k', now() - interval '2 hours' FROM generate_series(1, $1::int)"
    )
    await observer.execute(statement, FORGET_ROWS * 2 + 10)
    head = await observer.fetchval("SELECT max(revision) FROM change_log")
    await insert_worker(observer, applied=head)
    await forget_changes(database)
    assert [head] == await kept(observer)


async def test_changes_that_another_forgets_are_left_to_it(database: Database, observer: Connection) -> None:
    """Two workers that clear the log at once do not wait for each other."""
    revisions = [await log_change(observer) for _ in range(4)]
    await make_old(observer, *revisions)
    await insert_worker(observer, applied=revisions[3])
    async with database.transaction() as holder:
        await holder.execute("SELECT 1 FROM change_log WHERE revision = $1 FOR UPDATE", revisions[0])
        await forget_changes(database)
        assert [revisions[0], revisions[3]] == await kept(observer)
