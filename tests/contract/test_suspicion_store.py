"""Suspicious use in a real database: written once and for all, and let go of."""

from __future__ import annotations

import asyncio

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Outcome
from latchgate.domain.suspicion import SuspicionCounter
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.suspicion import SuspicionStore
from support.databases import fault_proxy, opened
from support.records import ManualClock

TOTAL = "SELECT coalesce(sum(count), 0) FROM suspicious_use"


async def test_two_workers_write_at_once(database: Database, observer: Connection) -> None:
    """What several workers have counted of the same sources is summed up."""
    counters = [SuspicionCounter(ManualClock()) for _ in range(4)]
    for _ in range(5):
        for counter in counters:
            for number in range(50):
                counter.suspect(f"192.0.2.{number}", Outcome.NOT_FOUND, None)
        await asyncio.gather(*(SuspicionStore(database, counter).flush() for counter in counters))
    assert (1000, 50) == (
        await observer.fetchval(TOTAL),
        await observer.fetchval("SELECT count(*) FROM suspicious_use"),
    )


async def test_what_is_not_written_is_kept(database_url: str, observer: Connection) -> None:
    """What could not be written while the database was away is written when it is back."""
    counter = SuspicionCounter(ManualClock())
    async with fault_proxy(database_url) as proxy, opened(proxy.url) as database:
        store = SuspicionStore(database, counter)
        await store.flush()
        counter.suspect("192.0.2.1", Outcome.REVOKED, None)
        proxy.cut()
        proxy.refuse()
        with pytest.raises(StorageUnavailableError):
            await store.flush()
        proxy.accept()
        await store.flush()
    assert 1 == await observer.fetchval(TOTAL)


async def test_what_is_old_is_forgotten(database: Database, observer: Connection) -> None:
    """What is older than 30 days goes, and nothing else."""
    await observer.execute(
        "INSERT INTO suspicious_use (hour, source, outcome, organization_id, key_id, count) "
        "SELECT now() - make_interval(days => n), n::text, 'not_found', '', '', 1 FROM unnest(ARRAY[1, 29, 31, 90]) n"
    )
    await SuspicionStore(database, SuspicionCounter(ManualClock())).forget()
    assert ["1", "29"] == [
        row["source"] for row in await observer.fetch("SELECT source FROM suspicious_use ORDER BY 1")
    ]
