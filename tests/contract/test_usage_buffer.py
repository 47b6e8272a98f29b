"""Last-used times: gathered in memory, written in batches, never lost to a database that is away for a while."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from latchgate.domain.errors import StorageUnavailableError, WriteUnknownError
from latchgate.domain.model import NO_USES, KeyRecord
from latchgate.storage import usage as usage_module
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from latchgate.storage.usage import UsageBuffer
from support.databases import (
    Fault,
    assert_all_usable,
    connected,
    fault_proxy,
    insert_key,
    insert_organization,
    opened,
    started_and_waiting,
)
from support.records import KEY_RECORD

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
NOON_S = NOON.timestamp()
# All but that of the root key.
TIMES = "SELECT used_time FROM last_used WHERE secret_id > 1 ORDER BY secret_id"


def of(secret_id: int) -> KeyRecord:
    """A secret of which no more is known than whose it is."""
    return replace(KEY_RECORD, secret_id=secret_id)


async def _secrets(store: PostgresStore, observer: Connection, count: int) -> list[int]:
    """Makes keys, and gives the ids of their secrets."""
    await insert_organization(store)
    for _ in range(count):
        await insert_key(store)
    return [row["id"] for row in await observer.fetch("SELECT id FROM secret WHERE id > 1 ORDER BY id")]


async def _times(observer: Connection) -> list[datetime | None]:
    return [row["used_time"] for row in await observer.fetch(TIMES)]


async def test_flush_writes_what_gathered(database: Database, store: PostgresStore, observer: Connection) -> None:
    """A flush writes the latest time of each secret that was used, touches no other, and leaves nothing to write."""
    first, second, _ = await _secrets(store, observer, 3)
    usage = UsageBuffer(database)
    usage.used(of(second), NOON_S)
    usage.used(of(first), NOON_S)
    usage.used(of(first), NOON_S + 1)
    assert 2 == usage.pending

    await usage.flush()

    assert [NOON + SECOND, NOON, None] == await _times(observer)
    assert 0 == usage.pending


async def test_nothing_used_costs_no_statement(database: Database) -> None:
    """A flush of nothing does not ask the database at all."""
    await UsageBuffer(database).flush()

    assert 0 == database.management.get_size()


async def test_flush_is_split_into_batches(
    database: Database, store: PostgresStore, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a batch is written in several transactions, all of it."""
    monkeypatch.setattr(usage_module, "FLUSH_ROWS", 2)
    usage = UsageBuffer(database)
    for number, secret_id in enumerate(await _secrets(store, observer, 5)):
        usage.used(of(secret_id), NOON_S + number)

    await usage.flush()

    assert [NOON + number * SECOND for number in range(5)] == await _times(observer)
    transactions = await observer.fetchval("SELECT count(DISTINCT xmin::text) FROM last_used WHERE secret_id > 1")
    assert 3 == transactions


async def _written(observer: Connection) -> list[int]:
    return [number for number, time in enumerate(await _times(observer)) if time is not None]


async def test_of_many_the_oldest_are_written_first(
    database: Database, store: PostgresStore, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush writes no more than so many secrets: those that have waited for longest; what comes for one of the
    others until its turn is written with it.
    """
    monkeypatch.setattr(usage_module, "FLUSH_SECRETS", 2)
    usage = UsageBuffer(database)
    secrets = await _secrets(store, observer, 5)
    for place in (3, 0, 1, 4, 2):
        usage.used(of(secrets[place]), NOON_S)
    for written, pending in (([0, 3], 3), ([0, 1, 3, 4], 1), ([0, 1, 2, 3, 4], 0)):
        usage.used(of(secrets[2]), NOON_S + 1)
        await usage.flush()
        assert (written, pending) == (await _written(observer), usage.pending)
    assert [NOON, NOON, NOON + SECOND, NOON, NOON] == await _times(observer)
    assert 3 == await observer.fetchval("SELECT count FROM usage_by_secret WHERE secret_id = $1", secrets[2]) - 1


async def test_nothing_waits_for_more_than_six_flushes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many secrets were used, all are written by the sixth flush from then on, in about equal parts, also where
    others are used meanwhile.
    """
    monkeypatch.setattr(usage_module, "FLUSH_SECRETS", 1)
    usage = UsageBuffer(database)
    for number in range(600):
        usage.used(of(1000 + number), NOON_S)
    written = [0]
    for flush in range(1, 13):
        if flush in {1, 2, 3}:
            for number in range(60):
                usage.used(of(1000 + 600 * flush + number), NOON_S)
        await usage.flush()
        written.append(600 + 60 * min(flush, 3) - usage.pending)
    assert written[5] < 600 <= written[6]
    assert (660, 720, 780) <= tuple(written[6:9])
    assert max(after - before for before, after in pairwise(written)) <= 130


async def test_flush_is_bounded_over_hours(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an hour leaves of so many secrets a flush is for those of the next hour."""
    monkeypatch.setattr(usage_module, "FLUSH_SECRETS", 3)
    usage = UsageBuffer(database)
    for number in range(6):
        usage.used(of(1000 + number), NOON_S + 3600 * (number > 0))
    await usage.flush()
    assert 3 == usage.pending


async def test_finish_writes_all(
    database: Database, store: PostgresStore, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end everything is written at once, of whatever hours, with what was not known to be written before."""
    monkeypatch.setattr(usage_module, "FLUSH_SECRETS", 1)
    usage = UsageBuffer(database)
    for number, secret_id in enumerate(await _secrets(store, observer, 5)):
        usage.used(of(secret_id), NOON_S + 3600 * (number % 2))
    await usage.finish()
    assert ([0, 1, 2, 3, 4], 0) == (await _written(observer), usage.pending)


async def test_time_never_goes_back(database: Database, store: PostgresStore, observer: Connection) -> None:
    """An earlier time changes nothing: not in memory, and not when another worker has written a later one."""
    (secret_id,) = await _secrets(store, observer, 1)
    usage, other = UsageBuffer(database), UsageBuffer(database)
    usage.used(of(secret_id), NOON_S + 1)
    usage.used(of(secret_id), NOON_S)
    await usage.flush()
    assert [NOON + SECOND] == await _times(observer)

    other.used(of(secret_id), NOON_S)
    await other.flush()
    assert [NOON + SECOND] == await _times(observer)


async def test_secret_that_is_gone_is_passed_over(
    database: Database, store: PostgresStore, observer: Connection
) -> None:
    """A time for a secret that is not there any more does not keep the others from being written."""
    (secret_id,) = await _secrets(store, observer, 1)
    usage = UsageBuffer(database)
    usage.used(of(secret_id), NOON_S)
    usage.used(of(secret_id + 1000), NOON_S)

    await usage.flush()

    assert [NOON] == await _times(observer)
    assert 0 == usage.pending


async def test_what_is_used_during_a_flush_is_written_by_the_next(
    database: Database, store: PostgresStore, observer: Connection
) -> None:
    """Uses that come while a flush is under way wait for the next one."""
    (secret_id,) = await _secrets(store, observer, 1)
    usage = UsageBuffer(database)
    usage.used(of(secret_id), NOON_S)
    async with database.transaction() as holder:
        await holder.execute("SELECT 1 FROM last_used FOR UPDATE")
        flush = await started_and_waiting(observer, usage.flush())
        usage.used(of(secret_id), NOON_S + 1)
    await flush
    assert ([NOON], 1) == (await _times(observer), usage.pending)

    await usage.flush()
    assert [NOON + SECOND] == await _times(observer)


async def test_nothing_is_lost_while_the_database_is_away(database_url: str, observer: Connection) -> None:
    """What can not be written is kept, later uses win over it, and all of it is written once the database is back."""
    async with fault_proxy(database_url) as proxy, opened(proxy.url) as database:
        first, second = await _secrets(PostgresStore(database), observer, 2)
        usage = UsageBuffer(database)
        usage.used(of(first), NOON_S)
        usage.used(of(second), NOON_S)
        proxy.refuse()
        for _ in range(2):
            with pytest.raises(StorageUnavailableError):
                await usage.flush()
        usage.used(of(second), NOON_S + 1)
        # What was tried is kept as it was, apart from what came since.
        assert 3 == usage.pending
        proxy.accept()

        await usage.flush()

    assert [NOON, NOON + SECOND] == await _times(observer)


async def test_nothing_is_lost_when_it_is_not_known_whether_it_was_written(
    database_url: str, observer: Connection
) -> None:
    """Wherever the connection is lost during a flush, with whatever error, the times are kept, and the next flush
    brings them home.
    """
    async with fault_proxy(database_url) as proxy, opened(proxy.url) as database:
        (secret_id,) = await _secrets(PostgresStore(database), observer, 1)
        usage = UsageBuffer(database)
        errors = set()
        struck, number = True, 0
        while struck:
            number += 1
            async with database.transaction() as connection:
                await connection.execute("UPDATE last_used SET used_time = NULL")
            proxy.strike(number, Fault.LOSE_REQUEST)
            usage.used(of(secret_id), NOON_S)
            try:
                await usage.flush()
            except (StorageUnavailableError, WriteUnknownError) as error:
                errors.add(type(error))
            struck = proxy.struck.is_set()
            proxy.spare()
            await usage.flush()
            assert [NOON] == await _times(observer)

    assert {StorageUnavailableError, WriteUnknownError} == errors


async def test_flush_that_is_cancelled_keeps_what_it_took(
    database: Database, store: PostgresStore, observer: Connection
) -> None:
    """A service that stops in the middle of a flush has the times still, for its last one, and the latest of each."""
    (secret_id,) = await _secrets(store, observer, 1)
    usage = UsageBuffer(database)
    usage.used(of(secret_id), NOON_S)
    async with database.transaction() as holder:
        await holder.execute("SELECT 1 FROM last_used FOR UPDATE")
        flush = await started_and_waiting(observer, usage.flush())
        usage.used(of(secret_id), NOON_S + 1)
        flush.cancel()
        await asyncio.wait({flush})
    assert flush.cancelled()
    assert 2 == usage.pending

    await usage.flush()
    assert [NOON + SECOND] == await _times(observer)
    await assert_all_usable(database, observer)


async def test_flushes_at_the_same_time_do_not_wait_for_each_other_in_a_circle(
    database_url: str, observer: Connection
) -> None:
    """Several workers that flush the same secrets at once, noted in opposite orders, all come through, and the latest
    time stands.
    """
    async with opened(database_url, pool_size=6) as database:
        secret_ids = await _secrets(PostgresStore(database), observer, 30)
        workers = [UsageBuffer(database) for _ in range(6)]
        for turn in range(4):
            for number, usage in enumerate(workers):
                for secret_id in secret_ids if number % 2 else reversed(secret_ids):
                    usage.used(of(secret_id), NOON_S + 10 * turn + number)
            await asyncio.gather(*(usage.flush() for usage in workers))

    assert {NOON + 35 * SECOND} == set(await _times(observer))


async def test_rows_are_locked_in_the_order_of_their_ids(
    database_url: str, database: Database, store: PostgresStore, observer: Connection
) -> None:
    """A flush that waits for a row holds none with a higher id, whatever the order in which times come and rows lie:
    so no two wait for each other, as long as the server looks rows up one after the other.
    """
    low, high = await _secrets(store, observer, 2)
    statement = "SELECT 1 FROM last_used WHERE secret_id = $1 FOR UPDATE NOWAIT"

    name = await observer.fetchval("SELECT current_database()")
    for kind in ("hashjoin", "mergejoin", "seqscan", "material"):
        # What is the cheapest where there are many keys, is not where there are two.
        await observer.execute(f"ALTER DATABASE {name} SET enable_{kind} = off")
    await observer.execute("UPDATE last_used SET used_time = used_time WHERE secret_id = $1", low)
    await database.management.expire_connections()
    usage = UsageBuffer(database)
    usage.used(of(high), NOON_S)
    usage.used(of(low), NOON_S)
    async with connected(database_url) as other:
        async with other.transaction():
            await other.execute(statement, low)
            flushing = await started_and_waiting(observer, usage.flush())
            assert 1 == await observer.fetchval(statement, high)
        await flushing

    assert [NOON, NOON] == await _times(observer)


async def test_flush_does_not_wait_for_the_disk(database: Database, store: PostgresStore, observer: Connection) -> None:
    """A flush does not have the server wait for its disk, and a later transaction on the connection does again."""
    (secret_id,) = await _secrets(store, observer, 1)
    await observer.execute("CREATE TABLE setting AS SELECT current_setting('synchronous_commit') AS value LIMIT 0")
    await observer.execute(
        """
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO setting VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$
        """
    )
    await observer.execute("CREATE TRIGGER note AFTER UPDATE ON last_used FOR EACH ROW EXECUTE FUNCTION note()")
    await observer.execute(
        "ALTER DATABASE " + await observer.fetchval("SELECT current_database()") + " SET synchronous_commit = 'local'"
    )
    usage = UsageBuffer(database)
    await database.management.expire_connections()
    usage.used(of(secret_id), NOON_S)
    await usage.flush()

    assert ["off"] == [row["value"] for row in await observer.fetch("SELECT value FROM setting")]
    async with database.connection() as connection:
        assert "local" == await connection.fetchval("SHOW synchronous_commit")


async def test_uses_that_are_counted_in_place_are_written_once(
    database: Database, store: PostgresStore, observer: Connection
) -> None:
    """What is counted in what `used` gave is written with the rest; from a flush on, or an hour's end, it says that no
    more is to be counted in it, and the record does not hold it any more. It never holds the record, which memory may
    let go before it is written.
    """
    (secret_id,) = await _secrets(store, observer, 1)
    usage = UsageBuffer(database)
    record = of(secret_id)
    uses = usage.used(record, NOON_S)
    record.uses = uses
    assert uses.until_s == NOON_S + usage_module.HOUR_S
    assert not any(each is record for each in gc.get_referents(uses))
    uses.valid += 2
    uses.used_s = NOON_S + 1

    await usage.flush()

    assert uses.until_s < NOON_S
    assert record.uses is NO_USES
    assert [NOON + SECOND] == await _times(observer)
    assert 3 == await observer.fetchval("SELECT sum(count) FROM usage_by_secret")
    again = usage.used(of(secret_id), NOON_S + 2)
    assert again is not uses
    await usage.flush()
    assert 4 == await observer.fetchval("SELECT sum(count) FROM usage_by_secret")
