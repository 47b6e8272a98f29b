"""`make bench-usage`: what it takes to count how keys are used, and to tell it, with 1,000,000 keys.

Writes docs/usage-performance.md. Exit codes: 0 measured, 1 the figures can not be had or not be believed, 2 bad
arguments, 130 stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import asyncpg  # noqa: E402 - after the line above, as all that follows
import uvloop  # noqa: E402 - the same

from bench import command, database, usage_page  # noqa: E402 - the same
from bench.command import counts, positive, say  # noqa: E402 - the same
from bench.history import (  # noqa: E402 - the same
    BUSY,
    DAYS_OF_BUSY,
    LARGE,
    LARGE_KEYS,
    USED,
    USED_KEYS,
    remember,
)
from bench.report import Rows, as_text, spread  # noqa: E402 - the same
from latchgate.domain.model import NO_USES, KeyRecord, Outcome  # noqa: E402 - the same
from latchgate.domain.usage import MAX_EXAMINED  # noqa: E402 - the same
from latchgate.storage.postgres import Database  # noqa: E402 - the same
from latchgate.storage.reports import PostgresUsageStore  # noqa: E402 - the same
from latchgate.storage.stores import PostgresStore  # noqa: E402 - the same
from latchgate.storage.usage import UsageBuffer  # noqa: E402 - the same
from support.records import KEY_RECORD  # noqa: E402 - the same

PAGE = ROOT / "docs" / "usage-performance.md"
# In the comparison within a process.
KEYS: Final = 1000
TURNS: Final = 20


@dataclass(slots=True, kw_only=True)
class Flushes:
    """What writing so many keys has taken, in as many flushes as the service makes of it."""

    keys: int
    flushes: int = 0
    seconds: list[float] = field(default_factory=list)
    wal_bytes: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)


Note = Callable[[KeyRecord, float], object]


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = argparse.ArgumentParser(prog="make bench-usage", description="Measures how keys' usage is counted.")
    parser.add_argument("--keys", type=positive, default=1_000_000, help="in the database (%(default)s)")
    parser.add_argument("--changed", type=counts, default=(1000, 10_000, 100_000), help="keys of a flush")
    parser.add_argument("--rounds", type=positive, default=7, help="of flushes; of queries five times as many")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    command.take_note(parser)
    arguments = parser.parse_args()
    notes = compare_notes(101)
    say(as_text(notes))
    flushes, queries, sizes = command.run(_measure(arguments.keys, arguments.changed, arguments.rounds))
    say(as_text(flushes))
    say(as_text(queries))
    tables = (notes, flushes, queries)
    page = usage_page.write(arguments.keys, tables, compared=KEYS, sizes=sizes, note=arguments.note)
    command.write_page(page, arguments.output, PAGE)
    return 0


def compare_notes(rounds: int) -> Rows:
    """Measures what taking note of an answer adds to it in one process, in alternating rounds."""
    records = [replace(KEY_RECORD, secret_id=number) for number in range(KEYS)]
    now_s = time.time()
    ways: dict[str, tuple[Callable[[], Note], int]] = {
        "nothing but the call": (lambda: lambda _record, _now_s: None, TURNS),
        "VALID": (lambda: partial(_use, UsageBuffer(_unused())), TURNS),
        "VALID, a key's first answer after a flush": (lambda: partial(_use, UsageBuffer(_unused())), 1),
        "a refusal": (lambda: partial(_refuse, UsageBuffer(_unused())), TURNS),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (prepare, turns) in ways.items():
            note = prepare()
            for record in records:
                record.uses = NO_USES
            start_s = time.thread_time()
            for turn in range(turns):
                at_s = now_s + turn * 1e-3
                for record in records:
                    note(record, at_s)
            times[name].append((time.thread_time() - start_s) / (turns * KEYS) * 1e9)
    return [("what is noted of an answer", "ns"), *((name, spread(values, ".0f")) for name, values in times.items())]


def _use(buffer: UsageBuffer, record: KeyRecord, now_s: float) -> None:
    """Takes note of a VALID as Validator.recall does: in place, but for a key's first one after a flush."""
    uses = record.uses
    if uses.until_s > now_s:
        uses.valid += 1
        if uses.used_s < now_s:  # noqa: PLR1730 - as it is there
            uses.used_s = now_s
    else:
        record.uses = buffer.used(record, now_s)


def _refuse(buffer: UsageBuffer, record: KeyRecord, now_s: float) -> None:
    buffer.refused(record, Outcome.RATE_LIMITED, now_s)


def _unused() -> Database:
    """Gives a database that nobody asks."""
    return object.__new__(Database)


async def _measure(keys: int, changed: Sequence[int], rounds: int) -> tuple[Rows, Rows, str]:
    cores = sorted(os.sched_getaffinity(0))
    async with database.cluster(cores) as cluster, cluster.seeded(keys) as seeded:
        connection = await asyncpg.connect(seeded.url)
        hour = int(time.time()) // 3600
        say(f"{keys:,} keys are there; their history comes now")
        sizes = await remember(connection, hour)
        say(sizes)
        pool = await Database.open(seeded.url, pool_size=2)
        try:
            flushes = [await _flush(pool, connection, keys, count, rounds) for count in changed]
            queries = await _query(pool, connection, hour, rounds * 5)
        finally:
            await pool.close()
            await connection.close()
        sizes += f" PostgreSQL {await cluster.version()}, shared_buffers {await cluster.setting('shared_buffers')}."
    return _flush_table(flushes), queries, sizes


async def _flush(
    pool: Database, connection: asyncpg.Connection[asyncpg.Record], keys: int, count: int, rounds: int
) -> Flushes:
    """Writes the usage of keys at random, as a worker does. A first round is not counted."""
    flushes = Flushes(keys=count)
    draw = random.Random(count)  # noqa: S311 - to repeat, not to hide
    for number in range(rounds + 1):
        buffer = UsageBuffer(pool)
        for secret_id in draw.sample(range(1, keys + 1), min(count, keys)):
            owner = f"bench-{(secret_id - 1) // 1000:04}"
            buffer.used(replace(KEY_RECORD, secret_id=secret_id, organization_id=owner), time.time())
        written = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
        stall = _Stall()
        watching = asyncio.create_task(stall.watch())
        await asyncio.sleep(0)
        start_s = time.perf_counter()
        flushes.flushes = 0
        while buffer.pending:
            await buffer.flush()
            flushes.flushes += 1
        seconds = time.perf_counter() - start_s
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        if number:
            flushes.seconds.append(seconds)
            flushes.stall_s.append(stall.longest_s)
            flushes.wal_bytes.append(
                float(await connection.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", written))
            )
    say(f"{count:,} keys: {spread(flushes.seconds, '.2f')} s")
    return flushes


class _Stall:
    """Finds out for how long at most, in processor time, the loop answers nobody else."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def watch(self) -> None:
        """Watches until it is cancelled."""
        before_s = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now_s = time.thread_time()
            self.longest_s, before_s = max(self.longest_s, now_s - before_s), now_s


def _flush_table(flushes: Sequence[Flushes]) -> Rows:
    head = ("keys with something to write", "flushes", "s", "µs a key", "WAL, bytes a key", "longest piece of work, ms")
    return [
        head,
        *(
            (
                f"{each.keys:,}",
                str(each.flushes),
                spread(each.seconds, ".3f"),
                spread([seconds / each.keys * 1e6 for seconds in each.seconds], ".0f"),
                spread([size / each.keys for size in each.wal_bytes], ".0f"),
                spread([seconds * 1e3 for seconds in each.stall_s], ".1f"),
            )
            for each in flushes
        ),
    ]


async def _query(pool: Database, connection: asyncpg.Connection[asyncpg.Record], hour: int, rounds: int) -> Rows:
    """Asks as the use cases do."""
    store = PostgresUsageStore(pool, PostgresStore(pool))
    busy = [row["id"] for row in await connection.fetch("SELECT id FROM key WHERE organization_id = $1", BUSY)]
    owners = [
        row["id"]
        for row in await connection.fetch(
            "SELECT id FROM organization o WHERE id LIKE 'bench-0%'"
            " AND EXISTS (SELECT 1 FROM key k WHERE k.organization_id = o.id)"
        )
    ]
    draw = random.Random(1)  # noqa: S311 - to repeat, not to hide
    spans = (("24 hours", 24, 1), ("1000 hours", 1000, 1), (f"{DAYS_OF_BUSY} days", DAYS_OF_BUSY * 24, 24))
    asked: dict[str, Callable[[], Awaitable[object]]] = {}
    for span, hours, step in spans:
        of = (hour - hours, hour, step)
        asked[f"GetUsage of a key, {span}"] = partial(_of_one, store.usage_of_key, draw, busy, of)
        asked[f"GetUsage of an organization, {span}"] = partial(_of_one, store.usage_of_organization, draw, owners, of)
    page = "ListUnusedKeys, first page of 100, organization of"
    asked[f"{page} 1,000 keys, 1 in 100 unused"] = lambda: _first_page(store, draw.choice(owners))
    asked[f"{page} {LARGE_KEYS:,} keys, 1 in 100 unused"] = lambda: _first_page(store, LARGE)
    asked[f"{page} {USED_KEYS:,} keys, none unused"] = lambda: _first_page(store, USED)
    return [("query", "ms"), *[await _timed(name, ask, rounds) for name, ask in asked.items()]]


async def _of_one(
    ask: Callable[[str, int, int, int], Awaitable[object]],
    draw: random.Random,
    ids: Sequence[str],
    of: tuple[int, int, int],
) -> None:
    await ask(draw.choice(ids), *of)


async def _first_page(store: PostgresUsageStore, organization_id: str) -> None:
    now, reach = await store.reach(organization_id, "", MAX_EXAMINED)
    # All keys are new: tomorrow they were made long enough ago.
    await store.unused_keys(organization_id, "", reach, now + timedelta(days=1), 101)


async def _timed(name: str, ask: Callable[[], Awaitable[object]], rounds: int) -> tuple[str, str]:
    times = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        await ask()
        times.append((time.perf_counter() - start_s) * 1e3)
    return name, spread(times, ".1f")


if __name__ == "__main__":
    uvloop.install()
    sys.exit(command.exit_code(main))
