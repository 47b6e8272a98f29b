"""Counts of what was answered: each answer once, whatever becomes of connections and of the processes that count."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from latchgate.domain.errors import StorageUnavailableError, UnavailableError, WriteUnknownError
from latchgate.domain.model import KeyRecord, Outcome
from latchgate.storage import queries_usage
from latchgate.storage import usage as usage_module
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.usage import UsageBuffer, forget_usage
from support.databases import Fault, connected, fault_proxy, opened, started_and_waiting
from support.records import KEY_RECORD

NOON_S = datetime(2030, 1, 1, 12, tzinfo=UTC).timestamp()
NOON_HOUR = int(NOON_S) // 3600
HOUR_S = 3600.0

Counts = Mapping[tuple[object, int, int], int]


def of(secret_id: int, organization_id: str = "acme") -> KeyRecord:
    """A secret of which no more is known than whose it is."""
    return replace(KEY_RECORD, secret_id=secret_id, organization_id=organization_id)


async def by_secret(observer: Connection) -> Counts:
    """What is stored by secret, hour from noon on, and outcome's number."""
    rows = await observer.fetch("SELECT secret_id, hour, outcome, count FROM usage_by_secret")
    return {(row["secret_id"], row["hour"] - NOON_HOUR, row["outcome"]): row["count"] for row in rows}


async def by_organization(observer: Connection) -> Counts:
    """The same by organization."""
    rows = await observer.fetch("SELECT organization_id, hour, outcome, count FROM usage_by_organization")
    return {(row["organization_id"], row["hour"] - NOON_HOUR, row["outcome"]): row["count"] for row in rows}


async def test_counts_are_by_secret_outcome_and_hour(database: Database, observer: Connection) -> None:
    """Every answer is counted in the hour in which it was given, with its outcome, for its secret and for the
    organization; what further flushes bring is added.
    """
    usage = UsageBuffer(database)
    usage.used(of(1), NOON_S - 0.001)
    for _ in range(2):
        usage.used(of(1), NOON_S)
        usage.refused(of(1), Outcome.RATE_LIMITED, NOON_S + HOUR_S - 0.001)
        usage.refused(of(2), Outcome.REVOKED, NOON_S + 1)
        usage.used(of(3, "rival"), NOON_S + HOUR_S)
        await usage.flush()
    # An answer that was overtaken by those of the next hour.
    usage.used(of(1), NOON_S + 1)
    await usage.flush()

    assert {
        (1, -1, 1): 1,
        (1, 0, 1): 3,
        (1, 0, 9): 2,
        (2, 0, 3): 2,
        (3, 1, 1): 2,
    } == await by_secret(observer)
    assert {
        ("acme", -1, 1): 1,
        ("acme", 0, 1): 3,
        ("acme", 0, 9): 2,
        ("acme", 0, 3): 2,
        ("rival", 1, 1): 2,
    } == await by_organization(observer)
    assert 0 == usage.pending


async def test_every_outcome_of_a_known_key_is_counted(database: Database, observer: Connection) -> None:
    """Each outcome that is answered about a known key has a number of its own, which is the contract's."""
    usage = UsageBuffer(database)
    refusals = [outcome for outcome in Outcome if outcome not in (Outcome.VALID, Outcome.NOT_FOUND)]
    for times, outcome in enumerate(refusals, 1):
        for _ in range(times):
            usage.refused(of(1), outcome, NOON_S)
    await usage.flush()

    assert {(1, 0, number): number - 2 for number in range(3, 10)} == await by_secret(observer)


@pytest.mark.parametrize("fault", Fault)
async def test_flush_of_which_nothing_is_known_is_counted_once(
    database_url: str, observer: Connection, fault: Fault
) -> None:
    """Wherever the connection is lost during a flush, before or after the server has acted on it, each answer is
    counted just once by the flushes that follow, together with what has come meanwhile.
    """
    async with fault_proxy(database_url) as proxy, opened(proxy.url) as database:
        usage = UsageBuffer(database)
        errors = set()
        answers, struck, number = 0, True, 0
        while struck:
            number += 1
            usage.used(of(1), NOON_S)
            usage.refused(of(1), Outcome.EXPIRED, NOON_S)
            proxy.strike(number, fault)
            try:
                await usage.flush()
            except UnavailableError as error:
                errors.add(type(error))
            struck = proxy.struck.is_set()
            proxy.spare()
            usage.used(of(1), NOON_S)
            await usage.flush()
            answers += 1
            expected = {(1, 0, 1): 2 * answers, (1, 0, 5): answers}
            assert expected == await by_secret(observer), f"message {number}"
            assert {("acme", 0, 1): 2 * answers, ("acme", 0, 5): answers} == await by_organization(observer)

    assert {StorageUnavailableError, WriteUnknownError} == errors


@pytest.mark.parametrize("is_committed", [True, False])
async def test_part_that_is_still_being_written_is_waited_for(
    database_url: str, database: Database, observer: Connection, is_committed: bool
) -> None:
    """A part that is sent again while the server is still at its first try is counted by one of the two."""
    usage = UsageBuffer(database)
    usage.used(of(1), NOON_S)
    async with connected(database_url) as first_try:
        transaction = first_try.transaction()
        await transaction.start()
        await first_try.fetchval(queries_usage.USAGE_FLUSH_MARK, usage.incarnation, 1)
        await first_try.execute(queries_usage.USAGE_SECRET_ADD, NOON_HOUR, [1], [1], [1])
        again = await started_and_waiting(observer, usage.flush())
        await (transaction.commit() if is_committed else transaction.rollback())
        await again

    assert {(1, 0, 1): 1} == await by_secret(observer)
    assert 0 == usage.pending


async def test_answers_during_a_flush_are_counted_by_it_or_the_next(database: Database, observer: Connection) -> None:
    """Answers that come while a flush is under way, for what is being written as for what is not, are all counted."""
    usage = UsageBuffer(database)
    usage.used(of(1), NOON_S)
    async with database.transaction() as holder:
        await holder.execute(queries_usage.USAGE_SECRET_ADD, NOON_HOUR, [1], [1], [10])
        flush = await started_and_waiting(observer, usage.flush())
        for secret_id in (1, 2):
            usage.used(of(secret_id), NOON_S)
    await flush
    assert {(1, 0, 1): 11} == await by_secret(observer)

    await usage.flush()
    assert {(1, 0, 1): 12, (2, 0, 1): 1} == await by_secret(observer)


async def test_cancelled_flush_is_counted_once(database: Database, observer: Connection) -> None:
    """A flush that is cancelled in the middle, and again while it is repeated, has lost and doubled nothing."""
    usage = UsageBuffer(database)
    for _ in range(3):
        usage.used(of(1), NOON_S)
        async with database.transaction() as holder:
            await holder.execute(queries_usage.USAGE_ORGANIZATION_ADD, NOON_HOUR, ["acme"], [1], [0])
            flush = await started_and_waiting(observer, usage.flush())
            flush.cancel()
            await asyncio.wait({flush})
    await usage.flush()

    assert {(1, 0, 1): 3} == await by_secret(observer)
    assert {("acme", 0, 1): 3} == await by_organization(observer)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("usage_by_secret WHERE secret_id = 1", "usage_by_secret WHERE secret_id = 2"),
        ("usage_by_organization WHERE organization_id = 'a'", "usage_by_organization WHERE organization_id = 'b'"),
        ("usage_by_secret WHERE secret_id = 2", "usage_by_organization WHERE organization_id = 'a'"),
    ],
    ids=["secrets", "organizations", "secrets before organizations"],
)
async def test_rows_are_locked_in_their_order(
    database_url: str, database: Database, observer: Connection, low: str, high: str
) -> None:
    """A flush that waits for a row holds none that comes after it, whatever the order in which answers were given: so
    no two wait for each other.
    """
    usage = UsageBuffer(database)
    for _ in range(2):
        usage.used(of(2, "a"), NOON_S)
        usage.used(of(1, "b"), NOON_S)
        async with connected(database_url) as other, other.transaction():
            if await other.fetchval(f"SELECT 1 FROM {low} FOR UPDATE") is None:  # noqa: S608 - one of these
                await usage.flush()
                continue
            flushing = await started_and_waiting(observer, usage.flush())
            assert 1 == await observer.fetchval(f"SELECT 1 FROM {high} FOR UPDATE NOWAIT")  # noqa: S608 - the same
        await flushing

    assert {(1, 0, 1): 2, (2, 0, 1): 2} == await by_secret(observer)


async def test_workers_add_up(database_url: str, observer: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that count the same keys at once, in opposite orders and in several parts, lose nothing to each other,
    and none waits for another in a circle.
    """
    monkeypatch.setattr(usage_module, "FLUSH_ROWS", 7)
    async with opened(database_url, pool_size=6) as database:
        workers = [UsageBuffer(database) for _ in range(6)]
        for _ in range(4):
            for number, usage in enumerate(workers):
                secret_ids = range(30) if number % 2 else reversed(range(30))
                for secret_id in secret_ids:
                    usage.used(of(secret_id, f"o{secret_id % 3}"), NOON_S)
            await asyncio.gather(*(usage.flush() for usage in workers))

    assert {(secret_id, 0, 1): 24 for secret_id in range(30)} == await by_secret(observer)
    assert {(f"o{number}", 0, 1): 240 for number in range(3)} == await by_organization(observer)


async def test_old_counts_are_forgotten(
    database: Database, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of hours before the time that they are kept for go, all of them and no others; so does what is known of
    workers that have written nothing for long.
    """
    monkeypatch.setattr(usage_module, "FORGET_ROWS", 2)
    now_s: float = await observer.fetchval("SELECT extract(epoch FROM now())::float8")
    usage = UsageBuffer(database)
    for secret_id in range(5):
        # The last one of those that go, the first one of those that stay, and this very hour.
        for hours in (26, 24, 0):
            usage.used(of(secret_id), now_s - hours * HOUR_S)
    await usage.flush()
    await UsageBuffer(database).flush()
    await observer.execute(
        "INSERT INTO usage_flush (incarnation, sequence, flush_time)"
        " VALUES (gen_random_uuid(), 9, now() - interval '8 days')"
    )

    await forget_usage(database, timedelta(days=1))

    hours = int(now_s) // 3600 - NOON_HOUR
    assert {(each, hours - ago, 1): 1 for each in range(5) for ago in (24, 0)} == await by_secret(observer)
    assert {("acme", hours - ago, 1): 5 for ago in (24, 0)} == await by_organization(observer)
    flushes = await observer.fetch("SELECT incarnation FROM usage_flush")
    assert [usage.incarnation] == [row["incarnation"] for row in flushes]
