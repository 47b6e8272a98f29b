"""Housekeeping: done by one worker for all, one chore after the other, whatever becomes of one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from latchgate.background import Background
from latchgate.domain.errors import StorageUnavailableError
from latchgate.housekeeping import repeat_by_one
from latchgate.storage.housekeeping import take_turn
from latchgate.storage.postgres import Connection, Database
from support.databases import opened, until

HOUSE = "housekeeping"
MINUTE = timedelta(minutes=1)
SHORT_S = 0.001


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For which turns workers have asked."""
    names: list[str] = []

    async def take_note(database: Database, name: str, at_least: timedelta) -> bool:
        names.append(name)
        return await take_turn(database, name, at_least)

    monkeypatch.setattr("latchgate.housekeeping.take_turn", take_note)
    return names


async def _began(observer: Connection, ago: timedelta) -> None:
    await observer.execute("UPDATE housekeeping SET begin_time = now() - $1::interval", ago)


async def test_one_turn_within_the_time(database: Database, observer: Connection) -> None:
    """Whoever asks first has the turn, and then nobody until the time is over; another kind has turns of its own."""
    assert await take_turn(database, HOUSE, MINUTE)
    assert not await take_turn(database, HOUSE, MINUTE)
    assert await take_turn(database, "of another kind", MINUTE)
    await _began(observer, MINUTE - timedelta(seconds=10))
    assert not await take_turn(database, HOUSE, MINUTE)
    await _began(observer, MINUTE + timedelta(seconds=1))
    assert await take_turn(database, HOUSE, MINUTE)
    assert not await take_turn(database, HOUSE, MINUTE)


async def test_turn_after_a_clock_was_stepped_back(database: Database, observer: Connection) -> None:
    """A turn that began in the future keeps nobody from having the next one: who knows for how long it would."""
    assert await take_turn(database, HOUSE, MINUTE)
    await _began(observer, timedelta(days=-400))
    assert await take_turn(database, HOUSE, MINUTE)
    assert not await take_turn(database, HOUSE, MINUTE)


@pytest.mark.parametrize("is_first", [True, False])
async def test_of_many_at_once_one_has_the_turn(database_url: str, observer: Connection, *, is_first: bool) -> None:
    """Of many workers that ask in the same moment one has the turn: also of those that had to wait for its commit."""
    async with opened(database_url, pool_size=8) as database:
        if not is_first:
            await take_turn(database, HOUSE, MINUTE)
            await _began(observer, 2 * MINUTE)
        turns = await asyncio.gather(*(take_turn(database, HOUSE, MINUTE) for _ in range(8)))

    assert 1 == sum(turns)


async def test_one_worker_does_it_for_all(
    database: Database, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """Of several workers one does the chores, in their order; the others ask again and again, and leave it to it."""
    # Each asks a thousand times within the time that lies between two turns.
    monkeypatch.setattr("latchgate.background.random.uniform", lambda _, most: most * SHORT_S / MINUTE.total_seconds())
    done: list[str] = []

    def chore(name: str) -> tuple[str, Callable[[], Awaitable[None]]]:
        async def work() -> None:
            await asyncio.sleep(0)
            done.append(name)

        return name, work

    workers = [Background() for _ in range(3)]
    for worker in workers:
        repeat_by_one(worker, database, HOUSE, MINUTE.total_seconds(), [chore("sweeping"), chore("dusting")])

    async def is_asked() -> bool:
        return len(asked) >= 30

    await until(is_asked)
    for worker in workers:
        await worker.close()

    assert ["sweeping", "dusting"] == done


async def test_what_is_due_is_done_by_a_worker_that_is_young(
    database: Database, monkeypatch: pytest.MonkeyPatch, observer: Connection, asked: list[str]
) -> None:
    """What is done once an hour is done by workers none of which lives for an hour, and no more often for it."""
    monkeypatch.setattr("latchgate.housekeeping.FORGET_INTERVAL_S", SHORT_S)
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1

    async def is_asked() -> bool:
        return len(asked) >= 3

    for due in (1, 1, 2):
        if due == 2:
            await _began(observer, timedelta(hours=1))
        asked.clear()
        background = Background()
        repeat_by_one(background, database, HOUSE, 3600.0, [("keeping", work)])
        await until(is_asked)
        await background.close()
        assert due == times


@pytest.mark.parametrize("error", [KeyError("a fault"), StorageUnavailableError("waited for a lock")])
async def test_chore_that_fails_keeps_no_other_from_being_done(database: Database, error: Exception) -> None:
    """A chore that fails, be it by a fault or for a lock, is left for the next turn; those after it are done."""
    background, done = Background(), asyncio.Event()

    async def fail() -> None:
        raise error

    async def work() -> None:
        done.set()

    repeat_by_one(background, database, HOUSE, SHORT_S, [("failing", fail), ("working", work)])
    await asyncio.wait_for(done.wait(), 10)
    await background.close()

    assert isinstance(error, KeyError) == (background.failures["failing"] > 0)
    assert 0 == background.failures[HOUSE]


async def test_stop_begins_no_other_chore(database: Database) -> None:
    """At the stop the chore that is under way is finished, and none after it begun."""
    background, begun, go_on = Background(), asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def linger() -> None:
        begun.set()
        await go_on.wait()
        done.append("lingering")

    async def follow() -> None:
        done.append("following")

    repeat_by_one(background, database, HOUSE, SHORT_S, [("lingering", linger), ("following", follow)])
    await asyncio.wait_for(begun.wait(), 10)
    closing = asyncio.create_task(background.close())
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait_for(closing, 10)

    assert ["lingering"] == done
