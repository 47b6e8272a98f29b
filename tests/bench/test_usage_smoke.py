"""The benchmark of usage, in its smallest form: what it calls a flush is all of it."""

from __future__ import annotations

import asyncpg
import pytest

from bench import database
from bench.usage import _flush, _flush_table, compare_notes
from latchgate.storage import usage as storage
from latchgate.storage.postgres import Database


@pytest.mark.bench
async def test_all_that_has_gathered_is_written(monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
    """Of more keys than a flush writes all are written in the time that is told, each round's anew."""
    monkeypatch.setenv("LATCHGATE_DATABASE_URL", postgres_url)
    monkeypatch.setattr(storage, "FLUSH_SECRETS", 100)
    async with database.cluster([0]) as cluster, cluster.seeded(1000) as seeded:
        pool, connection = await Database.open(seeded.url, pool_size=2), await asyncpg.connect(seeded.url)
        few, many = [await _flush(pool, connection, 1000, count, 2) for count in (50, 350)]
        written = await connection.fetchval("SELECT sum(count) FROM usage_by_secret")
        await pool.close()
        await connection.close()

    # The first round of each is not counted, and is written all the same.
    assert 3 * (50 + 350) == written
    assert (1, 4) == (few.flushes, many.flushes)
    assert (2, 2) == (len(many.seconds), len(many.wal_bytes))
    _, (keys, flushes, *_) = _flush_table([many])
    assert ("350", "4") == (keys, flushes)


def test_what_is_noted_is_told() -> None:
    """Each way to take note of an answer has its row, of figures above nothing."""
    head, *rows = compare_notes(1)
    assert len(head) == 2
    assert ["nothing but the call", "VALID", "VALID, a key's first answer after a flush", "a refusal"] == [
        name for name, _ in rows
    ]
    assert all(float(figures.split()[0]) > 0 for _, figures in rows)
