"""Lookups of digests: those that arrive together are one statement, and no answer is older than its question."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import Environment, KeyIdentity, KeyKind, KeyType, Lookup
from latchgate.domain.token import digest
from latchgate.storage.lookups import MAX_BATCH, RETRIED_WITHIN_S, BatchingKeyReader, FindMany, find_many, lookup_link
from latchgate.storage.postgres import Database
from latchgate.storage.stores import PostgresStore
from support.databases import (
    ROOT_CALLER,
    assert_all_usable,
    connected,
    draft,
    fault_proxy,
    finding,
    insert_key,
    insert_organization,
    opened,
    run_cancelled,
    store_organization,
    store_plan,
    until,
)
from support.records import NOW_S, ManualClock

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def lookup(revision: int) -> Lookup:
    """What a statement says of an unknown digest."""
    return Lookup(None, NOW_S, revision)


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

    async def fail(self, error: Exception) -> Sequence[bytes]:
        """Waits for the next statement, has it fail, and gives the digests that it asked for."""
        digests, answer = await self.sent.get()
        answer.set_exception(error)
        return digests

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
    statements: Statements,
    observer: Observer,
    spacing_s: float = 0.0,
    clock: ManualClock | None = None,
    plenty: int = MAX_BATCH,
) -> BatchingKeyReader:
    """The reader over statements that the test answers."""
    return BatchingKeyReader(
        statements.find, observer=observer, monotonic=clock or ManualClock(), spacing_s=spacing_s, plenty=plenty
    )


async def one(reader: BatchingKeyReader, digest: bytes) -> Lookup:
    """Asks and waits."""
    return await reader.find(digest)


def started(reader: BatchingKeyReader, *digests: bytes) -> list[asyncio.Task[Lookup]]:
    """Starts lookups; they have not asked yet."""
    return [asyncio.create_task(one(reader, each)) for each in digests]


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


async def test_lookups_gather_while_the_connection_is_at_work(statements: Statements, observer: Observer) -> None:
    """One statement is out at a time; what comes meanwhile goes out as one with the next."""
    reader = make_reader(statements, observer)
    first = await asked(reader, A)
    digests, answer = await statements.sent.get()
    second = [*await asked(reader, B), *await asked(reader, A, B, C)]
    await asyncio.sleep(0)
    assert statements.sent.empty()

    answer.set_result(dict.fromkeys(digests, lookup(1)))
    assert [B, A, C] == await statements.answer(2)
    assert [lookup(1), *[lookup(2)] * 4] == await asyncio.gather(*first, *second)


async def test_statements_are_kept_apart_where_lookups_come_in_numbers(
    statements: Statements, observer: Observer
) -> None:
    """After a statement for several, the next one waits for a moment, although the connection is free: all that come
    meanwhile go out with it, and none is answered by the one before.
    """
    reader = make_reader(statements, observer, spacing_s=0.2)
    first = await asked(reader, A, B)
    assert [A, B] == await statements.answer(1)
    second = [*await asked(reader, A), *await asked(reader, C)]
    assert statements.sent.empty()

    assert [A, C] == await statements.answer(2)
    assert [lookup(1), lookup(1), lookup(2), lookup(2)] == await asyncio.gather(*first, *second)


async def test_statements_are_kept_apart_from_the_answer_on(statements: Statements, observer: Observer) -> None:
    """However long a statement for several has taken, those that it was for are given time to come back together: the
    first of them does not have one of its own, for which all others would wait.
    """
    clock = ManualClock()
    reader = make_reader(statements, observer, spacing_s=0.2, clock=clock)
    first = await asked(reader, A, B)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not statements.sent.empty()
    clock.advance(7200)
    assert [A, B] == await statements.answer(1)
    await asyncio.gather(*first)
    back = await asked(reader, A)
    for _ in range(5):
        await asyncio.sleep(0)
    assert statements.sent.empty()
    back += await asked(reader, B)
    assert [A, B] == await statements.answer(2)
    assert [lookup(2)] * 2 == await asyncio.gather(*back)


async def test_plenty_of_lookups_are_not_kept_apart(statements: Statements, observer: Observer) -> None:
    """As soon as enough wait to be worth a statement it goes out, be it while they come or when the one before them has
    been answered; fewer of them wait on.
    """
    reader = make_reader(statements, observer, spacing_s=3600, plenty=3)
    first = await asked(reader, A, B)
    await statements.answer(1)
    second = [*await asked(reader, A), *await asked(reader, B)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert statements.sent.empty()
    second += await asked(reader, C)
    digests, answer = await statements.sent.get()
    assert [A, B, C] == digests

    third = await asked(reader, C, B, A)
    answer.set_result(dict.fromkeys(digests, lookup(2)))
    assert [C, B, A] == await statements.answer(3)
    (alone,) = await asked(reader, A)
    for _ in range(5):
        await asyncio.sleep(0)
    assert statements.sent.empty()
    assert [1, 1, 2, 2, 2, 3, 3, 3] == [each.revision for each in await asyncio.gather(*first, *second, *third)]

    await reader.close()
    with pytest.raises(StorageUnavailableError):
        await alone


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


AWAY = StorageUnavailableError("away")


async def fail_all(statements: Statements, reader: BatchingKeyReader) -> None:
    """Has the database be away, for a reader that is not asked anything else."""
    (task,) = await asked(reader, A)
    await statements.fail(AWAY)
    await statements.fail(AWAY)
    with pytest.raises(StorageUnavailableError, match="away"):
        await task


async def test_failure_is_told_to_all_who_wait(statements: Statements, observer: Observer) -> None:
    """When the database does not answer, all who wait are told at once, those of the statement and those behind it."""
    clock = ManualClock()
    reader = make_reader(statements, observer, clock=clock)
    waiting = await asked(reader, A, B)
    _, answer = await statements.sent.get()
    behind = await asked(reader, C)
    clock.advance(1)
    answer.set_exception(AWAY)

    answers = await asyncio.gather(*waiting, *behind, return_exceptions=True)
    assert ["away"] * 3 == [str(each) for each in answers]
    assert [StorageUnavailableError] * 3 == [type(each) for each in answers]
    assert [2, 1] == observer.failures
    await reader.close()


async def test_lookups_fail_at_once_until_the_database_is_back(statements: Statements, observer: Observer) -> None:
    """While the database is away no lookup waits for it, or is sent; it is tried with nothing asked until it answers,
    and from then on lookups are answered.
    """
    reader = make_reader(statements, observer)
    await fail_all(statements, reader)
    for _ in range(2):
        with pytest.raises(StorageUnavailableError, match="away"):
            await reader.find(B)
        assert () == await statements.fail(StorageUnavailableError("still away"))
    digests, answer = await statements.sent.get()
    with pytest.raises(StorageUnavailableError, match="still away"):
        await reader.find(B)
    assert [1] * 4 == observer.failures
    answer.set_result({})
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    (again,) = await asked(reader, A)
    assert ((), [A]) == (digests, await statements.answer(5))
    assert lookup(5) == await again


async def test_database_that_answers_with_an_error_is_back(statements: Statements, observer: Observer) -> None:
    """Where the database is away no more, but refuses what it is tried with, lookups are sent again: those who ask hear
    of it, and nobody is refused for ever.
    """
    reader = make_reader(statements, observer)
    await fail_all(statements, reader)
    assert () == await statements.fail(KeyError("allowed_cidrs"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    (again,) = await asked(reader, A)
    assert [A] == await statements.answer(5)
    assert lookup(5) == await again


async def test_statement_that_fails_quickly_is_sent_again(statements: Statements, observer: Observer) -> None:
    """A connection that was lost while nobody used it costs no lookup: the statement goes out once more, as it was."""
    clock = ManualClock()
    reader = make_reader(statements, observer, clock=clock)
    waiting = await asked(reader, A, B)
    clock.advance(RETRIED_WITHIN_S / 2)
    assert [A, B] == await statements.fail(AWAY)
    assert [A, B] == await statements.answer(3)
    assert [lookup(3)] * 2 == await asyncio.gather(*waiting)
    assert ([2], []) == (observer.batches, observer.failures)


async def test_statement_that_fails_slowly_is_not_sent_again(statements: Statements, observer: Observer) -> None:
    """Who has waited for a database that does not answer is not made to wait twice as long."""
    clock = ManualClock()
    reader = make_reader(statements, observer, clock=clock)
    (task,) = await asked(reader, A)
    _, answer = await statements.sent.get()
    clock.advance(RETRIED_WITHIN_S * 2)
    answer.set_exception(AWAY)
    with pytest.raises(StorageUnavailableError):
        await task
    # What comes next is the first try whether the database is back.
    assert () == await statements.answer(1)
    await reader.close()


async def test_lookup_that_came_after_a_failed_statement_is_not_in_its_repetition(
    statements: Statements, observer: Observer
) -> None:
    """A statement that is sent again is the same: who came since waits for the next, whose answer is no older."""
    reader = make_reader(statements, observer)
    (first,) = await asked(reader, A)
    _, answer = await statements.sent.get()
    (second,) = await asked(reader, A)
    answer.set_exception(AWAY)
    assert [A] == await statements.answer(1)
    assert [A] == await statements.answer(2)
    assert [lookup(1), lookup(2)] == [await first, await second]


async def test_suspicion_has_the_database_tried(statements: Statements, observer: Observer) -> None:
    """Who has reason to think that the database is away has it tried before a lookup must wait for it: if it is away,
    lookups fail at once; if it is not, nothing has happened.
    """
    reader = make_reader(statements, observer)
    reader.suspect()
    await statements.answer(1)
    (task,) = await asked(reader, A)
    await statements.answer(2)
    assert lookup(2) == await task

    reader.suspect()
    reader.suspect()
    await statements.fail(AWAY)
    await statements.fail(AWAY)
    await asyncio.sleep(0)
    with pytest.raises(StorageUnavailableError, match="away"):
        await reader.find(A)
    await reader.close()


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


async def test_known_and_unknown_digests_are_told_apart(store: PostgresStore, find: FindMany) -> None:
    """One statement answers for many digests, at one instant: a record with the key's, organization's and plan's values
    for each that is known, none for the others.
    """
    await insert_organization(store)
    limited, limited_token = await insert_key(store, rate_limit_per_minute=7, allowed_cidrs=("10.0.0.0/8",))
    plain, plain_token = await insert_key(store, permissions=("read",))
    await store_plan(store, "fast", 60, 10)
    await store_organization(store, "other", "Other", "fast")
    planned, planned_token = await insert_key(store, "other")
    tokens = [limited_token, plain_token, planned_token, "unknown"]

    found = await find([digest(token) for token in tokens])

    records = [found[digest(token)].record for token in tokens]
    assert [limited.id, plain.id, planned.id, None] == [record and record.key_id for record in records]
    assert [7, 0, 60, None] == [record and record.rate_limit_per_minute for record in records]
    assert 1 == len({(each.now_s, each.revision) for each in found.values()})
    (first, second, third, _) = records
    assert first is not None
    assert second is not None
    assert third is not None
    assert ("10.0.0.0/8",) == tuple(map(str, first.networks))
    assert (True, False) == (second.grants.cover("read"), first.grants.cover("read"))
    assert ("other", "fast", True) == (third.organization_id, third.plan_id, third.organization_active)
    assert ("acme", "acme", True) == (second.organization_id, second.plan_id, second.organization_active)


async def test_what_is_shown_of_a_key_is_all_of_it(database_url: str, store: PostgresStore) -> None:
    """What answers show of a key is written from all that was stored of it, with the earlier of the key's end and the
    token's as its end, when it is loaded and not later. What keys have in common is one object for all of them.
    """
    await insert_organization(store)
    sooner, later = (datetime(2090, 1, day, 12, 30, 0, 123456, tzinfo=UTC) for day in (1, 2))
    shown: dict[str, KeyIdentity] = {}
    expected = {}
    kinds: dict[tuple[KeyType, tuple[str, ...]], KeyKind] = {}

    def note(identity: KeyIdentity) -> bytes:
        shown[identity.key_id] = identity
        return identity.key_id.encode()

    link = lookup_link(database_url)
    both = ("read", "write")
    for key_type, permissions, expire_time, end_time, end in (
        (KeyType.SECRET, both, sooner, later, sooner),
        (KeyType.PUBLISHABLE, both, later, sooner, sooner),
        (KeyType.SECRET, (), later, None, later),
        (KeyType.SECRET, both, None, later, later),
        (KeyType.SECRET, both, None, None, None),
    ):
        key, token = await insert_key(
            store,
            name="Billing",
            key_type=key_type,
            environment=Environment.TEST,
            permissions=permissions,
            expire_time=expire_time,
            user_id="u1",
            user_email="u1@example.com",
            metadata={"team": "b"},
        )
        async with connected(database_url) as connection:
            await connection.execute("UPDATE secret SET end_time = $2 WHERE key_id = $1", key.id, end_time)
        record = (await find_many(link, note)([digest(token)]))[digest(token)].record
        kind = shown[key.id].kind
        assert (key_type, Environment.TEST, permissions) == (kind.key_type, kind.environment, kind.permissions)
        assert kind is kinds.setdefault((key_type, permissions), kind)
        expected[key.id] = KeyIdentity(
            key_id=key.id,
            organization_id="acme",
            user_id="u1",
            user_email="u1@example.com",
            key_name="Billing",
            kind=kind,
            create_s=key.create_time.timestamp(),
            end_s=end.timestamp() if end else math.inf,
            metadata={"team": "b"},
        )
        assert record is not None
        assert (key.id.encode(), expire_time.timestamp() if expire_time else math.inf) == (
            record.shown,
            record.expire_s,
        )
        assert kind.grants is record.grants
        assert (end_time.timestamp() if end_time else math.inf) == record.secret_end_s
    link.cut()

    assert expected == shown


async def test_lookup_shows_every_change_that_was_committed_before_it(
    store: PostgresStore, keys: KeyManager, find: FindMany
) -> None:
    """A lookup that begins after a change has returned shows it, however many others are under way."""
    await insert_organization(store)
    issued = await keys.create(ROOT_CALLER, "acme", draft())
    reader = BatchingKeyReader(find, observer=Observer(), monotonic=ManualClock())
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


async def test_times_are_those_of_the_statement(store: PostgresStore, find: FindMany) -> None:
    """A lookup's time is the database's, of the statement, so that an expiry is judged by one clock."""
    await insert_organization(store)
    _, token = await insert_key(store)
    first = (await find([digest(token)]))[digest(token)]
    second = (await find([digest(token)]))[digest(token)]

    assert first.now_s < second.now_s < first.now_s + 3600


async def test_lookups_recover_from_an_outage(database_url: str) -> None:
    """While the database is away each lookup is refused at once; soon after it is back lookups are answered."""
    observer = Observer()
    async with fault_proxy(database_url) as proxy, opened(proxy.url) as database, finding(proxy.url) as find:
        await insert_organization(PostgresStore(database))
        key, token = await insert_key(PostgresStore(database))
        reader = BatchingKeyReader(find, observer=observer, monotonic=time.monotonic)
        assert (await reader.find(digest(token))).record is not None
        proxy.refuse()
        for _ in range(3):
            answers = await asyncio.gather(*(one(reader, digest(token)) for _ in range(5)), return_exceptions=True)
            assert [StorageUnavailableError] * 5 == [type(answer) for answer in answers]
        proxy.accept()
        found = []

        async def is_answered() -> bool:
            with suppress(StorageUnavailableError):
                found.append((await reader.find(digest(token))).record)
            return bool(found)

        await until(is_answered)
        await reader.close()

    assert found[0] is not None
    assert key.id == found[0].key_id


async def test_connection_that_was_lost_unnoticed_costs_no_lookup(database_url: str) -> None:
    """A lookup over a connection that was cut since it was last used is answered: it is sent again over a new one."""
    observer = Observer()
    async with fault_proxy(database_url) as proxy, finding(proxy.url) as find:
        reader = BatchingKeyReader(find, observer=observer, monotonic=time.monotonic)
        for _ in range(3):
            assert (await reader.find(A)).record is None
            proxy.cut()
        await reader.close()
    assert [] == observer.failures


async def test_lookups_that_are_cancelled_leave_their_connection_clean(
    database: Database, database_url: str, find: FindMany
) -> None:
    """After a lookup that is cancelled at any of its waits the next is answered, and no session is left behind."""
    async with connected(database_url) as onlooker:
        for number in itertools.count(1):
            waits = await run_cancelled(_one_lookup(find), number)
            assert (await find([A]))[A].record is None
            await assert_all_usable(database, onlooker)
            if waits is not None:
                break
    assert number > 1


async def _one_lookup(find: FindMany) -> None:
    await find([A])
