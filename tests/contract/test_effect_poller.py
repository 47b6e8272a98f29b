"""The wait until a change is effective, against rows of workers that a test writes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest
import structlog

from latchgate.app import LINK_TIMEOUT_S, boottime
from latchgate.domain.coherence import LeaseTerms
from latchgate.domain.effects import MAX_LEASE_S
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Effect
from latchgate.storage import queries_coherence
from latchgate.storage.effects import EffectPoller
from latchgate.storage.link import Link
from latchgate.storage.postgres import Connection
from support.databases import connected, fault_proxy, insert_worker, log_change, until, workers
from support.records import ManualClock

# For what a busy machine adds.
SLACK_S = 0.5
SHORT_S = 0.4


class Pokes:
    """Counts how often the worker's own membership was told to read the log."""

    def __init__(self) -> None:
        """Begins at 0."""
        self.count = 0

    def __call__(self) -> None:
        """Takes note."""
        self.count += 1


@asynccontextmanager
async def polling(url: str) -> AsyncIterator[EffectPoller]:
    """A poller with a connection of its own."""
    poller = EffectPoller(
        link=Link(url, timeout_s=LINK_TIMEOUT_S), boottime=boottime, poke=Pokes(), news=asyncio.Event()
    )
    try:
        yield poller
    finally:
        await poller.close()


@pytest.fixture
async def poller(database_url: str) -> AsyncIterator[EffectPoller]:
    """A poller of the test's own database."""
    async with polling(database_url) as made:
        yield made


async def acknowledge(connection: Connection, incarnation: UUID, revision: int) -> None:
    """Has a worker's row say what it has applied."""
    await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, incarnation, revision)


async def has_looked(connection: Connection) -> None:
    """Waits until the workers' rows were read once more than until now."""
    statement = "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = 'worker'"
    before = await connection.fetchval(statement)

    async def are_more() -> bool:
        more: bool = await connection.fetchval(f"SELECT ({statement}) > $1", before)
        return more

    await until(are_more)


def wait_of(lease_s: float) -> float:
    """How long a lease is waited for."""
    return LeaseTerms(length_s=lease_s).wait_s


async def test_nothing_to_wait_for() -> None:
    """What changed nothing is effective, and no database is asked."""
    async with polling("postgresql://postgres@127.0.0.1:1/none") as poller:
        assert Effect(revision=0) == await poller.wait(0, math.inf)


async def test_without_workers(poller: EffectPoller, observer: Connection) -> None:
    """Where no worker is registered a change is effective at once."""
    revision = await log_change(observer)
    assert Effect(revision=revision) == await asyncio.wait_for(poller.wait(revision, math.inf), SLACK_S)


async def test_effective_as_soon_as_all_have_applied_it(poller: EffectPoller, observer: Connection) -> None:
    """A change is effective when the last worker has applied it, and not before; long before any lease ends."""
    first, second = await insert_worker(observer), await insert_worker(observer)
    revision = await log_change(observer)
    waiting = asyncio.create_task(poller.wait(revision, math.inf))
    await acknowledge(observer, first, revision)
    await acknowledge(observer, second, revision - 1)
    for _ in range(3):
        await has_looked(observer)
    assert not waiting.done()
    await acknowledge(observer, second, revision)
    assert Effect(revision=revision) == await asyncio.wait_for(waiting, SLACK_S)
    assert {first, second} == set(await workers(observer))


async def test_own_worker_is_told_to_read_the_log(database_url: str, observer: Connection) -> None:
    """Each wait has the worker's own membership read the log at once, without a notification."""
    poke = Pokes()
    poller = EffectPoller(
        link=Link(database_url, timeout_s=LINK_TIMEOUT_S), boottime=boottime, poke=poke, news=asyncio.Event()
    )
    for count in range(1, 4):
        await poller.wait(await log_change(observer), math.inf)
        assert count == poke.count
    await poller.close()


async def test_looked_at_again_when_the_own_worker_has_acknowledged(
    database_url: str, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """News of this worker's acknowledgement has the rows read at once, and not at the end of the pause."""
    for pause in ("LEAST_PAUSE_S", "MOST_PAUSE_S"):
        monkeypatch.setattr(f"latchgate.storage.effects.{pause}", 60.0)
    news = asyncio.Event()
    poller = EffectPoller(link=Link(database_url, timeout_s=LINK_TIMEOUT_S), boottime=boottime, poke=Pokes(), news=news)
    incarnation = await insert_worker(observer)
    waiting = asyncio.create_task(poller.wait(revision := await log_change(observer), math.inf))
    await has_looked(observer)
    await acknowledge(observer, incarnation, revision)
    news.set()
    assert Effect(revision=revision) == await asyncio.wait_for(waiting, SLACK_S)
    await poller.close()


async def test_pending_at_the_callers_time(poller: EffectPoller, observer: Connection) -> None:
    """At the caller's time a change that some worker has not applied is PENDING, with how long it may take at most; a
    caller whose time has come already is told at once. Asked again, it is waited for anew.
    """
    incarnation = await insert_worker(observer, lease_s=10)
    revision = await log_change(observer)
    for patience_s in (0.3, 0.0, -5.0):
        start_s = time.monotonic()
        effect = await poller.wait(revision, boottime() + patience_s)
        assert max(patience_s, 0) <= time.monotonic() - start_s + 0.01 < max(patience_s, 0) + SLACK_S
        assert revision == effect.revision
        assert effect.max_remaining is not None
        if patience_s > 0:
            remaining_s = effect.max_remaining.total_seconds()
            assert wait_of(10) - patience_s - SLACK_S < remaining_s < wait_of(10)
    waiting = asyncio.create_task(poller.wait(revision, math.inf))
    await acknowledge(observer, incarnation, revision)
    assert Effect(revision=revision) == await asyncio.wait_for(waiting, SLACK_S)


async def test_silent_worker_is_waited_for_no_longer_than_its_lease(poller: EffectPoller, observer: Connection) -> None:
    """A worker that never applies a change is waited for until its lease must have ended, and not a moment less; then
    the change is effective, and the worker taken off, so that the next change need not wait for it.
    """
    silent = await insert_worker(observer, lease_s=SHORT_S)
    awake = await insert_worker(observer, lease_s=60, applied=1000)
    revision = await log_change(observer)
    start_s = boottime()
    assert Effect(revision=revision) == await poller.wait(revision, math.inf)
    assert wait_of(SHORT_S) <= boottime() - start_s < wait_of(SHORT_S) + SLACK_S

    async def is_taken_off() -> bool:
        return set(await workers(observer)) == {awake}

    await until(is_taken_off)
    assert silent != awake
    await asyncio.wait_for(poller.wait(await log_change(observer), math.inf), SHORT_S)


async def test_worker_that_renews_meanwhile_is_not_taken_off(poller: EffectPoller, observer: Connection) -> None:
    """A worker whose renewal has seen the change, but whose acknowledgement has not come, keeps its row: its lease
    begins after the change, which therefore holds, but later changes must wait for it.
    """
    renewing = await insert_worker(observer, lease_s=SHORT_S)
    revision = await log_change(observer)
    await observer.fetch(queries_coherence.LOG_READ_RENEWING, renewing, 0, 10)
    # Behind the other one, so that it is gone only when the other one was looked at.
    silent = await insert_worker(observer, lease_s=SHORT_S)
    assert Effect(revision=revision) == await poller.wait(revision, math.inf)

    async def is_taken_off() -> bool:
        return silent not in await workers(observer)

    await until(is_taken_off)
    assert {renewing} == set(await workers(observer))
    later = await poller.wait(await log_change(observer), boottime() + SHORT_S / 4)
    assert later.max_remaining is not None


async def test_worker_is_not_taken_off_before_it_was_seen_to_be_silent(
    poller: EffectPoller, observer: Connection
) -> None:
    """A worker that has renewed lately keeps its row though its renewal says nothing of the change: where the server's
    history is another one since, the change that was waited for may be gone, and its number another's. It is taken off
    when it has been silent for as long as its lease may last, though nobody waits any more.
    """
    worker = await insert_worker(observer, lease_s=SHORT_S)
    revision = await log_change(observer)
    waiting = asyncio.create_task(poller.wait(revision, math.inf))
    # Something happens in the middle of the wait.
    await asyncio.sleep(SHORT_S / 2)
    renewed_s = boottime()
    await observer.execute("UPDATE worker SET renewals = renewals + 7")
    assert Effect(revision=revision) == await waiting

    async def is_taken_off() -> bool:
        return worker not in await workers(observer)

    await until(is_taken_off)
    assert boottime() - renewed_s >= wait_of(SHORT_S)


async def test_taking_off_is_compare_and_set(observer: Connection) -> None:
    """A worker is taken off only if its row still is as it was judged."""
    worker = await insert_worker(observer)
    revision = await log_change(observer)
    await observer.fetch(queries_coherence.LOG_READ_RENEWING, worker, 0, 10)
    renewals = await observer.fetchval("SELECT renewals FROM worker")
    assert await observer.fetchval(queries_coherence.WORKER_EVICT, worker, renewals, revision) is None
    assert await observer.fetchval(queries_coherence.WORKER_EVICT_SILENT, worker, 0) is None
    assert {worker} == set(await workers(observer))
    assert await observer.fetchval(queries_coherence.WORKER_EVICT_SILENT, worker, renewals)
    worker = await insert_worker(observer)
    assert await observer.fetchval(queries_coherence.WORKER_EVICT, worker, 1, revision) is None
    assert await observer.fetchval(queries_coherence.WORKER_EVICT, worker, 0, revision)
    assert {} == await workers(observer)


async def test_one_reader_for_all_who_wait(poller: EffectPoller, observer: Connection) -> None:
    """However many calls wait, one connection reads the rows for all; each is told as soon as its own change holds, and
    one that is given up takes nothing from the others.
    """
    worker = await insert_worker(observer, lease_s=60)
    revisions = [await log_change(observer) for _ in range(50)]
    waiting = [asyncio.create_task(poller.wait(revision, math.inf)) for revision in revisions]
    await has_looked(observer)
    assert 1 == await observer.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'latchgate'"
    )
    waiting[0].cancel()
    await acknowledge(observer, worker, revisions[24])
    early = await asyncio.wait_for(asyncio.gather(*waiting[1:25]), SLACK_S)
    assert [Effect(revision=revision) for revision in revisions[1:25]] == early
    assert not any(task.done() for task in waiting[25:])
    await acknowledge(observer, worker, revisions[-1])
    late = await asyncio.wait_for(asyncio.gather(*waiting[25:]), SLACK_S)
    assert [Effect(revision=revision) for revision in revisions[25:]] == late


async def test_rows_are_read_no_more_when_nobody_waits(poller: EffectPoller, observer: Connection) -> None:
    """When the last call has its answer, the reading ends; the next call begins it anew."""
    for _ in range(3):
        await poller.wait(await log_change(observer), math.inf)

        async def has_ended() -> bool:
            return not [task for task in asyncio.all_tasks() if "_poll" in repr(task.get_coro())]

        await until(has_ended)


@pytest.mark.parametrize("failure", ["refuse", "freeze", "cut"])
async def test_database_that_is_away_meanwhile(database_url: str, observer: Connection, failure: str) -> None:
    """While the rows can not be read nothing is called effective: a caller whose time comes is told PENDING, with the
    longest time that there may be; those who wait on are told when the rows can be read again.
    """
    async with fault_proxy(database_url) as proxy, polling(proxy.url) as poller:
        worker = await insert_worker(observer, lease_s=60)
        revision = await log_change(observer)
        waiting = asyncio.create_task(poller.wait(revision, math.inf))
        await has_looked(observer)
        getattr(proxy, failure)()
        await acknowledge(observer, worker, revision)
        if failure != "cut":
            effect = await poller.wait(revision, boottime() + LINK_TIMEOUT_S * 2)
            assert effect.max_remaining is not None
            remaining_s = effect.max_remaining.total_seconds()
            assert wait_of(MAX_LEASE_S) - LINK_TIMEOUT_S * 2 - SLACK_S < remaining_s <= wait_of(MAX_LEASE_S)
            assert not waiting.done()
        proxy.thaw()
        proxy.accept()
        assert Effect(revision=revision) == await asyncio.wait_for(waiting, 5)


async def test_fault_is_told_to_those_who_wait(
    poller: EffectPoller, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the service itself ends the waits with it, and nobody waits for ever; the next wait is a new one."""
    await insert_worker(observer)
    revision = await log_change(observer)

    def fail(*_: object) -> None:
        raise KeyError("applied_revision")

    with monkeypatch.context() as patched:
        patched.setattr("latchgate.storage.effects.standing", fail)
        answers = await asyncio.gather(*(poller.wait(revision, math.inf) for _ in range(3)), return_exceptions=True)
    assert [KeyError] * 3 == [type(answer) for answer in answers]
    effect = await poller.wait(revision, boottime() + 0.1)
    assert effect.max_remaining is not None


async def test_close_leaves_nobody_without_an_answer(poller: EffectPoller, observer: Connection) -> None:
    """A service that stops tells those who still wait PENDING, at their own time: more it can not know."""
    await insert_worker(observer)
    revision = await log_change(observer)
    waiting = asyncio.create_task(poller.wait(revision, boottime() + SHORT_S))
    await has_looked(observer)
    await poller.close()
    effect = await asyncio.wait_for(waiting, SHORT_S + SLACK_S)
    assert effect.max_remaining is not None


async def test_sweep_takes_off_those_that_are_silent(database_url: str, observer: Connection) -> None:
    """A worker that has not renewed its row for longer than its lease, by the clock of the one who looks, is taken off
    also if no change waits for it. One that was seen for the first time, or has renewed since, stays.
    """
    clock = ManualClock()
    poller = EffectPoller(
        link=Link(database_url, timeout_s=LINK_TIMEOUT_S), boottime=clock, poke=Pokes(), news=asyncio.Event()
    )
    short, renewing, long = [await insert_worker(observer, lease_s=lease_s) for lease_s in (1, 1, 10)]
    await poller.sweep()
    clock.advance(wait_of(1))
    await observer.fetch(queries_coherence.LOG_READ_RENEWING, renewing, 0, 10)
    await poller.sweep()
    assert {short, renewing, long} == set(await workers(observer))
    clock.advance(0.001)
    late = await insert_worker(observer, lease_s=1)
    with structlog.testing.capture_logs() as lines:
        await poller.sweep()
    assert {renewing, long, late} == set(await workers(observer))
    assert [("worker_evicted", str(short))] == [(line["event"], line["incarnation"]) for line in lines]
    clock.advance(wait_of(10))
    await poller.sweep()
    assert {} == await workers(observer)
    await poller.close()


async def test_sweep_begins_anew_in_another_history(
    database_url: str, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a standby has taken over, a row may be one from before renewals that are lost: its worker is silent only if
    it has been so since.
    """
    clock = ManualClock()
    poller = EffectPoller(
        link=Link(database_url, timeout_s=LINK_TIMEOUT_S), boottime=clock, poke=Pokes(), news=asyncio.Event()
    )
    worker = await insert_worker(observer, lease_s=1)
    await poller.sweep()
    clock.advance(wait_of(1) + 1)
    history = "substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)"
    assert history in queries_coherence.WORKER_LIST
    monkeypatch.setattr(queries_coherence, "WORKER_LIST", queries_coherence.WORKER_LIST.replace(history, "'another'"))
    await poller.sweep()
    assert {worker} == set(await workers(observer))
    clock.advance(wait_of(1) + 0.001)
    await poller.sweep()
    assert {} == await workers(observer)
    await poller.close()


async def test_sweep_while_the_database_is_away(database_url: str, observer: Connection) -> None:
    """A sweep that can not be done is StorageUnavailableError, to be done another time."""
    await insert_worker(observer)
    async with fault_proxy(database_url) as proxy, polling(proxy.url) as poller, connected(database_url) as onlooker:
        proxy.refuse()
        with pytest.raises(StorageUnavailableError):
            await poller.sweep()
        proxy.accept()
        await poller.sweep()
        assert 1 == len(await workers(onlooker))
