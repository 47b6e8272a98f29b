"""Lookups of digests: those that arrive together are one statement, and no answer is older than its question."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import Environment, KeyType, Lookup
from latchgate.domain.token import digest
from latchgate.storage.lookups import MAX_BATCH, BatchingKeyReader, FindMany, find_many
from latchgate.storage.postgres import LOOKUP_CONNECTIONS, Database
from latchgate.storage.stores import PostgresStore
from support.databases import (
    ROOT_CALLER,
    assert_all_usable,
    connected,
    draft,
    fault_proxy,
    insert_key,
    insert_organization,
    opened,
    run_cancelled,
)
from support.records import ManualClock

NOW = datetime(2030, 1, 1, tzinfo=UTC)
A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def lookup(revision: int) -> Lookup:
    """What a statement says of an unknown digest."""
    return Lookup(record=None, now=NOW, revision=revision)


class Statements:
    """Stands where statements are sent: they are answered when the test says so."""

    def __init__(self) -> None:
        """Begins with none."""
        self.sent: asyncio.Queue[tuple[Sequence[bytes], asyncio.Future[Mapping[bytes, Lookup]]]] = asyncio.Queue()

    async def find(self, digests: Sequence[bytes]) -> Mapping[bytes, Lookup]:
        """Sends a statement."""
        answer: asyncio.Future[Mapping[bytes, Lookup]] = asyncio.get_running_loop().create_future()
        self.sent.put_nowait((digests, answer))
        return await answer

    async def answer(self, revision: int) -> Sequence[bytes]:
        """Waits for the next statement, answers it, and gives the digests that it asked for."""
        digests, answer = await self.sent.get()
        answer.set_result(dict.fromkeys(digests, lookup(revision)))
        return digests


class Observer:
    """Remembers what it was told."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self.batches: list[int] = []
        self.failures: list[int] = []

    def batch(self, size: int, seconds: float) -> None:
        """A statement was answered."""
        assert seconds >= 0
        self.batches.append(size)

    def failed(self, size: int) -> None:
        """A statement was not answered."""
        self.failures.append(size)


@pytest.fixture
def statements() -> Statements:
    """Statements that the test answers."""
    return Statements()


@pytest.fixture
def observer() -> Observer:
    """Who is told."""
    return Observer()


def make_reader(
    statements: Statements, observer: Observer, connections: int = 1, spacing_s: float = 0.0
) -> BatchingKeyReader:
    """The reader over statements that the test answers."""
    return BatchingKeyReader(
        statements.find, connections=connections, observer=observer, monotonic=ManualClock(), spacing_s=spacing_s
    )


def started(reader: BatchingKeyReader, *digests: bytes) -> list[asyncio.Task[Lookup]]:
    """Starts lookups; they have not asked yet."""
    return [asyncio.create_task(reader.find(each)) for each in digests]


async def asked(reader: BatchingKeyReader, *digests: bytes) -> list[asyncio.Task[Lookup]]:
    """Starts lookups, and comes back once all have asked."""
    tasks = started(reader, *digests)
    await asyncio.sleep(0)
    return tasks


async def test_lookups_that_arrive_together_are_one_statement(statements: Statements, observer: Observer) -> None:
    """What is asked for in the same turn of the loop goes out together, each digest once, and all get its answer."""
    reader = make_reader(statements, observer)
    tasks = started(reader, A, B, A)

    assert [A, B] == await statements.answer(1)
    assert [lookup(1)] * 3 == await asyncio.gather(*tasks)
    assert statements.sent.empty()
    assert [2] == observer.batches


async def test_lookup_never_joins_a_statement_that_was_sent(statements: Statements, observer: Observer) -> None:
    """A lookup that comes after a statement for the same digest was sent is answered by a later one: what the one that
    was sent says may be older than the question.
    """
    reader = make_reader(statements, observer)
    (early,) = await asked(reader, A)
    digests, answer = await statements.sent.get()
    (late,) = await asked(reader, A)
    answer.set_result(dict.fromkeys(digests, lookup(1)))

    assert lookup(1) == await early
    assert not late.done()
    assert [A] == await statements.answer(2)
    assert lookup(2) == await late


async def test_lookups_gather_while_all_connections_are_at_work(statements: Statements, observer: Observer) -> None:
    """No more statements are out than there are connections; what comes meanwhile goes out as one with the next free
    connection.
    """
    reader = make_reader(statements, observer, connections=2)
    first = await asked(reader, A)
    held = [await statements.sent.get()]
    second = await asked(reader, B)
    held.append(await statements.sent.get())
    third = await asked(reader, A, B, C)
    await asyncio.sleep(0)
    assert statements.sent.empty()

    digests, answer = held[1]
    answer.set_result(dict.fromkeys(digests, lookup(2)))
    assert [A, B, C] == await statements.answer(3)
    held[0][1].set_result(dict.fromkeys(held[0][0], lookup(1)))
    assert [lookup(1), lookup(2), *[lookup(3)] * 3] == await asyncio.gather(*first, *second, *third)


async def test_statements_are_kept_apart_where_lookups_come_in_numbers(
    statements: Statements, observer: Observer
) -> None:
    """After a statement for several, the next one waits for a moment, although a connection is free: all that come
    meanwhile go out with it, and none is answered by the one before.
    """
    reader = make_reader(statements, observer, connections=2, spacing_s=0.2)
    first = await asked(reader, A, B)
    assert [A, B] == await statements.answer(1)
    second = [*await asked(reader, A), *await asked(reader, C)]
    assert statements.sent.empty()

    assert [A, C] == await statements.answer(2)
    assert [lookup(1), lookup(1), lookup(2), lookup(2)] == await asyncio.gather(*first, *second)


async def test_lookup_that_comes_alone_waits_for_nothing(statements: Statements, observer: Observer) -> None:
    """Where lookups come one by one, each is sent at once."""
    reader = make_reader(statements, observer, spacing_s=3600)
    for revision in range(3):
        (task,) = await asked(reader, A)
        assert [A] == await statements.answer(revision)
        assert lookup(revision) == await task


async def test_close_does_not_wait_for_a_statement_that_is_kept_apart(
    statements: Statements, observer: Observer
) -> None:
    """When the service stops, those whose statement was to be sent later are told so at once."""
    reader = make_reader(statements, observer, spacing_s=3600)
    first = await asked(reader, A, B)
    await statements.answer(1)
    await asyncio.gather(*first)
    (waiting,) = await asked(reader, C)

    await reader.close()

    with pytest.raises(StorageUnavailableError):
        await waiting


async def test_batch_is_bounded(statements: Statements, observer: Observer) -> None:
    """A statement asks for no more than the largest batch; the rest follow in the order in which they came."""
    reader = make_reader(statements, observer)
    digests = [number.to_bytes(32, "big") for number in range(2 * MAX_BATCH + 1)]
    tasks = started(reader, *digests)

    sent = [await statements.answer(number) for number in range(3)]

    assert [digests[:MAX_BATCH], digests[MAX_BATCH : 2 * MAX_BATCH], digests[2 * MAX_BATCH :]] == sent
    assert {0, 1, 2} == {each.revision for each in await asyncio.gather(*tasks)}


async def test_failure_is_told_to_all_who_wait_and_then_forgotten(statements: Statements, observer: Observer) -> None:
    """When the database does not answer, all who wait are told at once, those of the statement and those behind it;
    the next lookup tries anew.
    """
    reader = make_reader(statements, observer)
    waiting = await asked(reader, A, B)
    _, answer = await statements.sent.get()
    behind = await asked(reader, C)
    answer.set_exception(StorageUnavailableError("away"))

    answers = await asyncio.gather(*waiting, *behind, return_exceptions=True)
    assert ["away"] * 3 == [str(each) for each in answers]
    assert [StorageUnavailableError] * 3 == [type(each) for each in answers]
    assert [2, 1] == observer.failures

    (again,) = await asked(reader, A)
    assert [A] == await statements.answer(5)
    assert lookup(5) == await again


async def test_fault_is_told_to_those_who_asked_and_the_next_are_served(
    statements: Statements, observer: Observer
) -> None:
    """A fault of the service itself, such as a row that can not be read, is told as what it is to those of that
    statement; those behind it are answered, and connections are not used up by it.
    """
    reader = make_reader(statements, observer)
    for revision in range(3):
        (broken,) = await asked(reader, A)
        _, answer = await statements.sent.get()
        (behind,) = await asked(reader, B)
        answer.set_exception(KeyError("allowed_cidrs"))
        assert [B] == await statements.answer(revision)
        assert lookup(revision) == await behind
        with pytest.raises(KeyError, match="allowed_cidrs"):
            await broken

    assert ([1] * 3, [1] * 3) == (observer.batches, observer.failures)


async def test_answer_that_leaves_a_digest_out_keeps_nobody_waiting(statements: Statements, observer: Observer) -> None:
    """Whoever is left out of an answer is told so, and does not wait for ever."""
    reader = make_reader(statements, observer)
    waiting = await asked(reader, A, B)
    _, answer = await statements.sent.get()
    answer.set_result({A: lookup(1)})

    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [KeyError] * 2 == [type(each) for each in answers]


async def test_who_gives_up_waiting_takes_nothing_from_the_others(statements: Statements, observer: Observer) -> None:
    """A lookup that is cancelled, before its statement is sent or after, leaves the others to be answered."""
    reader = make_reader(statements, observer)
    before, sent, other = await asked(reader, A, A, B)
    before.cancel()
    digests, answer = await statements.sent.get()
    sent.cancel()
    (behind,) = await asked(reader, C)
    behind.cancel()
    await asyncio.sleep(0)
    answer.set_result(dict.fromkeys(digests, lookup(1)))

    assert lookup(1) == await other
    assert [C] == await statements.answer(2)
    assert all(task.cancelled() for task in await _ended(before, sent, behind))


async def _ended(*tasks: asyncio.Task[Lookup]) -> tuple[asyncio.Task[Lookup], ...]:
    await asyncio.wait(tasks)
    return tasks


async def test_close_leaves_nobody_waiting(statements: Statements, observer: Observer) -> None:
    """When the service stops, those whose statement is out and those behind it are told so."""
    reader = make_reader(statements, observer)
    waiting = await asked(reader, A)
    await statements.sent.get()
    waiting += await asked(reader, B)

    await reader.close()

    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [StorageUnavailableError] * 2 == [type(answer) for answer in answers]
    assert ["the lookup was not finished", "the service is stopping"] == [str(answer) for answer in answers]


async def test_known_and_unknown_digests_are_told_apart(database: Database, store: PostgresStore) -> None:
    """One statement answers for many digests, at one instant: a record with the key's, organization's and plan's values
    for each that is known, none for the others.
    """
    await insert_organization(store)
    limited, limited_token = await insert_key(store, rate_limit_per_minute=7, allowed_cidrs=("10.0.0.0/8",))
    plain, plain_token = await insert_key(store, permissions=("read",), key_type=KeyType.PUBLISHABLE)
    await store.insert_plan("fast", 60, 10)
    await store.insert_organization("other", "Other", "fast", ())
    planned, planned_token = await insert_key(store, "other", environment=Environment.TEST)
    tokens = [limited_token, plain_token, planned_token, "unknown"]

    found = await find_many(database)([digest(token) for token in tokens])

    records = [found[digest(token)].record for token in tokens]
    assert [limited.id, plain.id, planned.id, None] == [record and record.key_id for record in records]
    assert [7, 0, 60, None] == [record and record.rate_limit_per_minute for record in records]
    assert 1 == len({(each.now, each.revision) for each in found.values()})
    (first, second, third, _) = records
    assert first is not None
    assert second is not None
    assert third is not None
    assert ("10.0.0.0/8",) == tuple(map(str, first.networks))
    assert (True, KeyType.PUBLISHABLE, ("read",)) == (
        second.grants.cover("read"),
        second.key_type,
        second.permissions,
    )
    assert ("other", Environment.TEST, True) == (third.organization_id, third.environment, third.organization_active)


async def test_lookup_shows_every_change_that_was_committed_before_it(
    database: Database, store: PostgresStore, keys: KeyManager
) -> None:
    """A lookup that begins after a change has returned shows it, however many others are under way."""
    await insert_organization(store)
    issued = await keys.create(ROOT_CALLER, "acme", draft())
    reader = BatchingKeyReader(
        find_many(database), connections=LOOKUP_CONNECTIONS, observer=Observer(), monotonic=ManualClock()
    )
    wanted = digest(issued.token)
    stop = asyncio.Event()

    async def ask_all_the_time() -> None:
        while not stop.is_set():
            await reader.find(wanted)

    crowd = [asyncio.create_task(ask_all_the_time()) for _ in range(10)]
    for number in range(20):
        changed = await keys.toggle(ROOT_CALLER, issued.key.id, active=number % 2 == 1)
        found = await reader.find(wanted)
        assert found.record is not None
        assert (number % 2 == 1, True) == (found.record.active, found.revision >= changed.effect.revision)
    stop.set()
    await asyncio.gather(*crowd)
    await reader.close()


async def test_times_are_those_of_the_statement(database: Database, store: PostgresStore) -> None:
    """A lookup's time is the database's, of the statement, so that an expiry is judged by one clock."""
    await insert_organization(store)
    _, token = await insert_key(store)
    find = find_many(database)
    first = (await find([digest(token)]))[digest(token)]
    second = (await find([digest(token)]))[digest(token)]

    assert first.now < second.now < first.now + timedelta(hours=1)


async def test_lookups_recover_from_an_outage(database_url: str) -> None:
    """While the database is away each lookup is refused at once; when it is back the next one is answered."""
    observer = Observer()
    async with fault_proxy(database_url) as proxy, opened(proxy.url) as database:
        await insert_organization(PostgresStore(database))
        key, token = await insert_key(PostgresStore(database))
        reader = BatchingKeyReader(
            find_many(database), connections=LOOKUP_CONNECTIONS, observer=observer, monotonic=ManualClock()
        )
        assert (await reader.find(digest(token))).record is not None
        proxy.refuse()
        for _ in range(3):
            answers = await asyncio.gather(*(reader.find(digest(token)) for _ in range(5)), return_exceptions=True)
            assert [StorageUnavailableError] * 5 == [type(answer) for answer in answers]
        proxy.accept()

        found = (await reader.find(digest(token))).record
        await reader.close()

    assert found is not None
    assert key.id == found.key_id


async def test_lookups_that_are_cancelled_leave_their_connections_clean(database: Database, database_url: str) -> None:
    """A lookup that is cancelled at any of its waits leaves both lookup connections usable."""
    find = find_many(database)
    number, waits = 0, None
    async with connected(database_url) as onlooker:
        while waits is None:
            number += 1
            waits = await run_cancelled(_one_lookup(find), number)
            await assert_all_usable(database, onlooker)
    assert number > 1


async def _one_lookup(find: FindMany) -> None:
    await find([A])
