"""A worker's membership against a real PostgreSQL: its row, its readings of the log, and connections that fail."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from latchgate.app import LINK_TIMEOUT_S, boottime
from latchgate.domain.cache import KeyCache
from latchgate.domain.coherence import Coherence, LeaseTerms, Reading
from latchgate.domain.model import Lookup
from latchgate.storage.coherence import MAX_CHANGES, Membership
from latchgate.storage.link import Link
from latchgate.storage.postgres import Connection
from support.databases import DEADLINE_S, connected, fault_proxy, log_change, until, workers
from support.records import KEY_RECORD

DIGEST = b"d" * 32
# Within which a connection that is dead must be known to be; and what a busy machine adds.
NOTICED_S = 1.0
SLACK_S = 0.5
QUIET_S = 0.3
NOWHERE = "postgresql://postgres@127.0.0.1:1/none"


class Observer:
    """Remembers what it was told."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self.readings: Counter[Reading] = Counter()
        self.changes = 0
        self.lost: Counter[str] = Counter()

    def reading(self, result: Reading, changes: int) -> None:
        """The log was read."""
        self.readings[result] += 1
        self.changes += changes

    def link_lost(self, link: str) -> None:
        """A connection failed."""
        self.lost[link] += 1


class Worker:
    """A member that runs until the test ends it."""

    def __init__(self, url: str, listening_url: str, lease_s: float) -> None:
        self.observer = Observer()
        self.coherence = Coherence(terms=LeaseTerms(length_s=lease_s), cache=KeyCache(100), boottime=boottime)
        self.membership = Membership(
            link=Link(url, timeout_s=LINK_TIMEOUT_S),
            listening=Link(listening_url, timeout_s=LINK_TIMEOUT_S),
            coherence=self.coherence,
            boottime=boottime,
            observer=self.observer,
        )

    def start(self) -> None:
        """Begins to run."""
        self._task = asyncio.create_task(self.membership.run())

    async def stop(self) -> None:
        """Ends the running; it stays a member."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def has_lease(self) -> bool:
        """Whether it may answer from memory."""
        return self.coherence.lease_left_s > 0

    def keep(self) -> None:
        """Takes KEY_RECORD into memory, as found by a statement of this moment."""
        lookup = Lookup(KEY_RECORD, 0.0, self.coherence.applied_revision)
        self.coherence.keep(DIGEST, lookup, sent_s=boottime())
        assert self.knows()

    def knows(self) -> bool:
        """Says whether it answers from memory."""
        return self.coherence.find(DIGEST, 0) is not None

    async def until_lease(self) -> None:
        """Waits until it may answer from memory."""

        async def is_there() -> bool:
            return self.has_lease

        await until(is_there)

    async def until_applied(self, revision: int) -> None:
        """Waits until it has applied a change."""

        async def is_applied() -> bool:
            return self.coherence.applied_revision >= revision

        await until(is_applied)

    async def until_lost(self, link: str, more_than: int = 0) -> None:
        """Waits until it has noticed that a connection is dead."""

        async def is_noticed() -> bool:
            return self.observer.lost[link] > more_than

        await until(is_noticed)


@asynccontextmanager
async def running(url: str, *, listening_url: str = "", lease_s: float = 1.0) -> AsyncIterator[Worker]:
    """Runs a worker, and has it leave at the end."""
    worker = Worker(url, listening_url or url, lease_s)
    worker.start()
    try:
        yield worker
    finally:
        await worker.stop()
        await worker.membership.leave()


@asynccontextmanager
async def joined(url: str, *, listening_url: str = "", lease_s: float = 1.0) -> AsyncIterator[Worker]:
    """Runs a worker that has its first lease."""
    async with running(url, listening_url=listening_url, lease_s=lease_s) as worker:
        await worker.until_lease()
        yield worker


async def test_join(database_url: str, observer: Connection) -> None:
    """A worker that joins has one row, which tells its lease's length, has applied all changes that were before it, and
    then has a lease.
    """
    revision = await log_change(observer)
    async with joined(database_url, lease_s=7.5) as worker:
        assert [worker.membership.incarnation] == list(await workers(observer))
        assert 7.5 == await observer.fetchval("SELECT lease_s FROM worker")
        assert revision == worker.coherence.applied_revision
        assert 0 < worker.coherence.lease_left_s <= worker.coherence.terms.usable_s


async def test_lease_is_renewed(database_url: str, observer: Connection) -> None:
    """A worker renews its row several times a lease, and never is without a lease meanwhile."""
    async with joined(database_url) as worker:
        start_s = time.monotonic()
        seen: list[int] = []

        async def is_renewed() -> bool:
            assert worker.has_lease
            renewals: int = await observer.fetchval("SELECT renewals FROM worker")
            if renewals not in seen:
                seen.append(renewals)
            return len(seen) >= 8

        await until(is_renewed)
        assert time.monotonic() - start_s > 1
        assert sorted(seen) == seen
        assert set(worker.observer.readings) == {Reading.APPLIED}
        assert not worker.observer.lost


async def test_row_tells_how_far_its_renewal_has_read(database_url: str, observer: Connection) -> None:
    """A renewal notes in the row how far it has read the log: who waits for a later change knows its lease is older."""
    async with joined(database_url) as worker:
        revision = await log_change(observer)
        await worker.until_applied(revision)

        async def has_seen() -> bool:
            seen: int = await observer.fetchval("SELECT seen_revision FROM worker")
            return seen == revision

        await until(has_seen)


async def test_changes_are_applied_before_they_are_acknowledged(database_url: str, observer: Connection) -> None:
    """What a row says is applied has left memory: a change is applied while its acknowledgement can not be written yet,
    and the row has it afterwards.
    """
    async with joined(database_url, lease_s=60) as worker, connected(database_url) as holder:
        worker.keep()
        async with holder.transaction():
            await holder.execute("SELECT 1 FROM worker FOR UPDATE")
            revision = await log_change(observer, "key", KEY_RECORD.key_id)
            await worker.until_applied(revision)
            assert not worker.knows()
            assert [0] == list((await workers(observer)).values())

        async def is_acknowledged() -> bool:
            return [revision] == list((await workers(observer)).values())

        await until(is_acknowledged)


async def test_every_kind_of_change_is_applied(database_url: str, observer: Connection) -> None:
    """Changes of keys, organizations and plans take out of memory what they changed, and those of others do not."""
    async with joined(database_url) as worker:
        for entity, entity_id, others in (
            ("key", KEY_RECORD.key_id, "key_other"),
            ("organization", KEY_RECORD.organization_id, "other"),
            ("plan", KEY_RECORD.plan_id, "other"),
        ):
            worker.keep()
            await worker.until_applied(await log_change(observer, entity, others))
            assert worker.knows()
            await worker.until_applied(await log_change(observer, entity, entity_id))
            assert not worker.knows()
        assert 6 == worker.observer.changes


async def test_too_many_changes_at_once(database_url: str, observer: Connection) -> None:
    """So many changes that they are not read one by one take everything out of memory, and are acknowledged as well."""
    async with joined(database_url) as worker:
        worker.keep()
        statement = (
            "INSERT INTO change_log (revision, entity, entity_id) "
            "SELECT nextval('change_revision'), 'key', 'k' || n FROM generate_series(1, $1::int) n"
        )
        await observer.execute(statement, MAX_CHANGES + 1)
        head = await observer.fetchval("SELECT max(revision) FROM change_log")
        await worker.until_applied(head)
        assert not worker.knows()
        assert worker.has_lease


async def test_notification_wakes_at_once(
    database_url: str, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change is applied and acknowledged long before the next heartbeat, time and again."""
    monkeypatch.setattr("latchgate.storage.coherence.HEARTBEAT_S", DEADLINE_S * 3)
    async with joined(database_url, lease_s=60) as worker:
        for _ in range(5):
            start_s = time.monotonic()
            revision = await log_change(observer)

            async def is_acknowledged(revision: int = revision) -> bool:
                return [revision] == list((await workers(observer)).values())

            await until(is_acknowledged)
            assert time.monotonic() - start_s < SLACK_S
        assert worker.has_lease


async def test_notification_of_what_is_known_is_let_pass(
    database_url: str, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a change that was read before its notification came the log is not read again; of what says nothing that is
    known, it is.
    """
    monkeypatch.setattr("latchgate.storage.coherence.HEARTBEAT_S", DEADLINE_S * 3)
    async with joined(database_url, lease_s=60) as worker:
        revision = await log_change(observer)
        await worker.until_applied(revision)
        await asyncio.sleep(QUIET_S)
        for known in (str(revision), str(revision - 1), "0"):
            before = worker.observer.readings.total()
            await observer.execute("SELECT pg_notify('latchgate_change', $1)", known)
            await asyncio.sleep(QUIET_S)
            assert before == worker.observer.readings.total()
        for unknown in (str(revision + 1), "", "-1", "1.5", "x", "9" * 7999):
            before = worker.observer.readings.total()
            await observer.execute("SELECT pg_notify('latchgate_change', $1)", unknown)

            async def is_read(before: int = before) -> bool:
                return worker.observer.readings.total() > before

            async with asyncio.timeout(SLACK_S):
                await until(is_read)


async def test_news_of_an_acknowledgement(database_url: str, observer: Connection) -> None:
    """Who waits for this worker's acknowledgement of a change hears of it as soon as it is there."""
    async with joined(database_url, lease_s=60) as worker:
        for _ in range(3):
            worker.membership.news.clear()
            revision = await log_change(observer)
            await asyncio.wait_for(worker.membership.news.wait(), SLACK_S)
            assert [revision] == list((await workers(observer)).values())


async def test_poke_has_the_log_read_at_once(
    database_url: str, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that makes a change itself needs no notification to apply it."""
    monkeypatch.setattr("latchgate.storage.coherence.HEARTBEAT_S", DEADLINE_S * 3)
    async with joined(database_url, listening_url=NOWHERE, lease_s=60) as worker:
        revision = await log_change(observer)
        worker.membership.poke()
        start_s = time.monotonic()
        await worker.until_applied(revision)
        assert time.monotonic() - start_s < SLACK_S


async def test_leave(database_url: str, observer: Connection) -> None:
    """A worker that leaves answers nothing from memory any more, and then takes its row with it: nobody waits for it.
    Leaving twice does no harm.
    """
    async with joined(database_url) as worker:
        worker.keep()
        await worker.stop()
        assert worker.knows()
        await worker.membership.leave()
        assert (False, False) == (worker.knows(), worker.has_lease)
        assert {} == await workers(observer)
    assert worker.membership.incarnation is None
    assert {} == await workers(observer)


async def test_leave_while_the_database_is_away(database_url: str, observer: Connection) -> None:
    """A worker that can not take its row with it leaves all the same, within a bound, and answers nothing any more."""
    async with fault_proxy(database_url) as proxy:
        for fail in (proxy.refuse, proxy.freeze):
            async with joined(proxy.url) as worker:
                worker.keep()
                fail()
                await worker.stop()
                start_s = time.monotonic()
                await worker.membership.leave()
                assert time.monotonic() - start_s < LINK_TIMEOUT_S * 2 + SLACK_S
                assert (False, False) == (worker.knows(), worker.has_lease)
            proxy.accept()
    assert 2 == len(await workers(observer))


async def test_eviction_leads_to_a_new_start(database_url: str, observer: Connection) -> None:
    """A worker that was taken off finds out, forgets all that it knew, and joins anew under another name."""
    async with joined(database_url) as worker:
        before = worker.membership.incarnation
        worker.keep()
        await observer.execute("DELETE FROM worker")

        async def is_back() -> bool:
            return worker.membership.incarnation not in {before, None} and worker.has_lease

        await until(is_back)
        assert 1 == worker.observer.readings[Reading.EVICTED]
        assert not worker.knows()
        assert [worker.membership.incarnation] == list(await workers(observer))
        worker.keep()


@pytest.mark.parametrize("failure", ["freeze", "refuse", "cut"])
async def test_failure_of_the_log_link(database_url: str, observer: Connection, failure: str) -> None:
    """A connection to the log that is silent, refused or cut is known to be so within a second; the lease ends in its
    time; once the log can be read again, what was missed is applied, and there is a lease again.
    """
    async with fault_proxy(database_url) as proxy, joined(proxy.url, listening_url=database_url) as worker:
        worker.keep()
        getattr(proxy, failure)()
        start_s = time.monotonic()
        revision = await log_change(observer, "key", KEY_RECORD.key_id)
        if failure == "cut":
            # It may be replaced without a word, when nothing was under way on it.
            await worker.until_applied(revision)
            assert time.monotonic() - start_s < NOTICED_S + SLACK_S
        else:
            await worker.until_lost("log")
            assert time.monotonic() - start_s < NOTICED_S + SLACK_S

            async def is_over() -> bool:
                return not worker.has_lease

            await until(is_over)
            assert not worker.knows()
            assert worker.coherence.applied_revision < revision
        proxy.thaw()
        proxy.accept()
        await worker.until_applied(revision)
        assert not worker.knows()
        await worker.until_lease()
        worker.keep()


@pytest.mark.parametrize("failure", ["freeze", "refuse", "cut"])
async def test_failure_of_the_listening_link(
    database_url: str, observer: Connection, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listening connection that is silent, refused or cut is known to be so within a second. Changes are applied
    meanwhile, by the next heartbeat; and at once again when it is back. The lease does not depend on it.
    """
    async with fault_proxy(database_url) as proxy, joined(database_url, listening_url=proxy.url) as worker:
        await worker.until_applied(await log_change(observer))
        getattr(proxy, failure)()
        start_s = time.monotonic()
        revision = await log_change(observer)
        await worker.until_applied(revision)
        assert time.monotonic() - start_s < NOTICED_S + SLACK_S
        await worker.until_lost("listen")
        assert time.monotonic() - start_s < NOTICED_S + SLACK_S
        assert worker.has_lease
        proxy.thaw()
        proxy.accept()

        async def listens() -> bool:
            count: int = await observer.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
            )
            return count > 0

        await until(listens)
        monkeypatch.setattr("latchgate.storage.coherence.HEARTBEAT_S", DEADLINE_S * 3)
        for _ in range(3):
            await worker.until_applied(await log_change(observer))
        assert worker.observer.lost.keys() == {"listen"}


async def test_change_that_was_told_before_anyone_listened(database_url: str, observer: Connection) -> None:
    """A change whose notification was lost with the listening connection is applied none the less, and acknowledged."""
    async with fault_proxy(database_url) as proxy, joined(database_url, listening_url=proxy.url, lease_s=60) as worker:
        for _ in range(5):
            proxy.cut()
            revision = await log_change(observer)

            async def is_acknowledged(revision: int = revision) -> bool:
                return [revision] == list((await workers(observer)).values())

            await until(is_acknowledged)
        assert worker.has_lease
