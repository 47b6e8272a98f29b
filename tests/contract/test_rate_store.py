"""The windows that workers share: PostgreSQL's, and those in memory that other tests stand on, by the same rules."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.ports import RateAnswer, RateAsk, RateTold
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.ratelimit import PostgresRateStore, forget_windows, rate_link
from support.databases import connected, insert_worker, lock_waiters, started_and_waiting, until
from support.limits import MemoryRateStore

KEY = "key_1"


def ask(key_id: str = KEY, limit: int = 10, **fields: int) -> RateAsk:
    """Asks for nothing, but for what is said."""
    values = {"charged": 0, "least": 1, "needed": 0, "wanted": 0, "slot": 0, "back": 0}
    return RateAsk(key_id, limit, **(values | fields))


@asynccontextmanager
async def opened_store(url: str) -> AsyncIterator[PostgresRateStore]:
    """A store, whose connection is cut at the end."""
    store = PostgresRateStore(rate_link(url))
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[PostgresRateStore]:
    """The store of one worker."""
    async with opened_store(database_url) as store:
        yield store


async def told(store: PostgresRateStore, asked: RateAsk) -> RateTold:
    """Asks of one key."""
    return (await store.exchange([asked])).told[asked.key_id]


class ServerClock:
    """The clock of a database, which stands still until it is told to move, in both directions."""

    def __init__(self, observer: Connection) -> None:
        self._observer = observer
        self.now_s = 1_900_000_000.25

    async def start(self) -> None:
        """Has all sessions that begin from now on, and this one, go by it."""
        await self._observer.execute("CREATE TABLE clock AS SELECT $1::float8 AS now_s", self.now_s)
        await self._observer.execute(
            """
            CREATE FUNCTION public.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE sql
            AS 'SELECT to_timestamp(now_s) FROM public.clock'
            """
        )
        name = await self._observer.fetchval("SELECT current_database()")
        await self._observer.execute(f"ALTER DATABASE {name} SET search_path = public, pg_catalog")

    async def advance(self, seconds: float) -> None:
        """Moves it."""
        self.now_s += seconds
        await self._observer.execute("UPDATE clock SET now_s = $1", self.now_s)


@pytest.fixture
async def clock(observer: Connection) -> ServerClock:
    """The clock of the test's database. To be asked for by tests that move it."""
    clock = ServerClock(observer)
    await clock.start()
    return clock


@pytest.mark.parametrize("seed", range(12))
async def test_both_stores_answer_alike(
    clock: ServerClock, store: PostgresRateStore, observer: Connection, seed: int
) -> None:
    """Whatever is told and asked, over whatever time, also when the clock is set back: the statement and the store in
    memory, on which the bound is tried, give the same permits and show the same windows.
    """
    draw = random.Random(seed)  # noqa: S311 - to repeat, not to hide
    twin = MemoryRateStore(lambda: clock.now_s, workers=draw.choice((0, 1, 3, 7)))
    for _ in range(twin.workers):
        await insert_worker(observer)
    keys = [f"key_{number}" for number in range(draw.choice((1, 3)))]
    limit, slots = draw.choice((1, 5, 60)), [0]
    for step in range(100):
        await clock.advance(draw.choice((0, 0, 0, 0.5, 1, 2, 17, 61, 62, -1, -2, -90 if step % 20 == 0 else 0)))
        asks = [
            ask(
                key_id,
                limit=draw.choice((limit, limit, limit + 2)),
                charged=draw.choice((0, 0, 1, 3)),
                least=draw.choice((1, 1, 2, 3)),
                needed=draw.choice((0, 0, 1, 4)),
                wanted=draw.choice((0, 1, 4, 30)),
                slot=draw.choice(slots),
                back=draw.choice((0, 1, 2)),
            )
            for key_id in keys
        ]
        found, expected = await store.exchange(asks), await twin.exchange(asks)
        assert plain(expected) == plain(found)
        slots = [*slots[-4:], *(each.slot for each in found.told.values())]


def plain(answer: RateAnswer) -> object:
    """Gives an answer in a form that can be compared."""
    told = {
        key_id: (*each[:3], [(round(after_s, 3), cost) for after_s, cost in each.leaves])
        for key_id, each in answer.told.items()
    }
    return answer.workers, told


async def test_never_more_than_the_limit_is_granted(database_url: str) -> None:
    """However many workers ask for the same keys at the same time, no window holds more than its limit."""
    limits = {"key_a": 1, "key_b": 57, "key_c": 600}
    granted = dict.fromkeys(limits, 0)

    async def work(seed: int) -> None:
        draw = random.Random(seed)  # noqa: S311 - to repeat, not to hide
        async with opened_store(database_url) as store:
            for _ in range(60):
                keys = draw.sample(sorted(limits), draw.randint(1, 3))
                wanted = draw.randint(1, 9)
                answer = await store.exchange([ask(key, limit=limits[key], needed=1, wanted=wanted) for key in keys])
                for key, found in answer.told.items():
                    granted[key] += found.granted

    await asyncio.gather(*(work(seed) for seed in range(6)))

    assert limits == granted


async def test_what_is_admitted_is_charged_beyond_the_limit(store: PostgresRateStore) -> None:
    """What was admitted already is charged whatever the limit, and nothing is granted beside it."""
    found = await told(store, ask(limit=2, charged=3, needed=1, wanted=1))
    assert (0, 3) == (found.granted, found.used)
    found = await told(store, ask(limit=2, charged=1, needed=1, wanted=1))
    assert (0, 4) == (found.granted, found.used)
    assert 4 == sum(cost for _, cost in found.leaves)


async def test_permits_come_back_to_their_slot(clock: ServerClock, store: PostgresRateStore) -> None:
    """What was not used can be had again; what is given back of another second, or too much, gives nothing."""
    first = await told(store, ask(needed=10, wanted=10))
    assert (10, 10) == (first.granted, first.used)
    assert 10 == (await told(store, ask(slot=first.slot + 100, back=4))).used
    assert 6 == (await told(store, ask(slot=first.slot, back=4))).used
    await clock.advance(61)
    assert 0 == (await told(store, ask(slot=first.slot, back=40))).used


@pytest.mark.parametrize(("seconds", "used"), [(60, 10), (61.5, 10), (61.75, 0), (63, 0)])
async def test_a_slot_leaves_after_62_seconds(
    clock: ServerClock, store: PostgresRateStore, seconds: float, used: int
) -> None:
    """What was granted counts until 62 seconds after its second began: with it a permit is used within two of them."""
    await told(store, ask(needed=10, wanted=10))
    await clock.advance(seconds)
    assert used == (await told(store, ask())).used


async def test_a_clock_that_is_set_back_keeps_the_window(clock: ServerClock, store: PostgresRateStore) -> None:
    """When the server's clock is set back by an hour, what was used counts on for a minute, and no longer."""
    await told(store, ask(needed=10, wanted=10))
    await clock.advance(-3600)
    found = await told(store, ask(needed=1, wanted=1))
    assert (0, 10) == (found.granted, found.used)
    await clock.advance(63)
    assert 0 == (await told(store, ask())).used


async def test_the_last_permits_are_not_hoarded(store: PostgresRateStore, observer: Connection) -> None:
    """Beyond what is needed now a worker is given a part of what is left: a quarter where there are four or more."""
    for count, wanted in ((1, 100), (2, 50), (3, 33), (4, 25), (5, 25)):
        await insert_worker(observer)
        assert wanted == (await told(store, ask(f"key_{count}", limit=100, wanted=100))).granted
    assert 60 == (await told(store, ask("key_6", limit=100, needed=60, wanted=100))).granted


async def test_requests_that_cost_more_are_not_given_a_part(store: PostgresRateStore) -> None:
    """No permits are given that no request could use: not less than the cheapest one costs, nor half of one."""
    assert 7 == (await told(store, ask(limit=10, least=7, needed=7, wanted=10))).granted
    assert 0 == (await told(store, ask(limit=10, least=7, needed=7, wanted=10))).granted


async def test_rows_are_taken_in_the_order_of_their_keys(
    database_url: str, store: PostgresRateStore, observer: Connection
) -> None:
    """A statement that waits for a row holds none of a later key, however its keys are ordered and its rows lie: so no
    two statements wait for each other.
    """
    keys = ["key_C", "key_a", "key_b"]
    for key in reversed(keys):
        await told(store, ask(key))
    lock = "SELECT 1 FROM rate_window WHERE key_id = $1 FOR UPDATE NOWAIT"
    async with connected(database_url) as other:
        async with other.transaction():
            await other.execute(lock, "key_a")
            waiting = await started_and_waiting(observer, store.exchange([ask(key) for key in reversed(keys)]))
            await observer.execute(lock, "key_b")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await observer.execute(lock, "key_C")
        await waiting
    assert 0 == await lock_waiters(observer)


async def test_a_statement_that_waited_charges_to_the_newest_second(
    database_url: str, store: PostgresRateStore, observer: Connection
) -> None:
    """A statement that had to wait for a row, which another has charged to a later second meanwhile, charges to that
    second too: a window's seconds stay in order.
    """
    first = await told(store, ask(needed=1, wanted=1))
    async with connected(database_url) as other:
        async with other.transaction():
            await other.execute(
                "UPDATE rate_window SET newest = newest + 1, ages = '{1, 0}', costs = '{1, 1}' WHERE key_id = $1", KEY
            )
            waiting = await started_and_waiting(observer, told(store, ask(needed=1, wanted=1)))
        found = await waiting
    assert (first.slot + 1, 3) == (found.slot, found.used)


async def test_nothing_is_asked(store: PostgresRateStore, observer: Connection) -> None:
    """A statement for no key tells how many workers there are, and fails where the windows can not be reached."""
    await insert_worker(observer)
    assert (1, {}) == await store.exchange([])
    await observer.execute("ALTER TABLE rate_window RENAME TO away")
    with pytest.raises(StorageUnavailableError):
        await store.exchange([])
    await observer.execute("ALTER TABLE away RENAME TO rate_window")
    assert (1, {}) == await store.exchange([])


async def test_empty_windows_are_forgotten(
    clock: ServerClock, database: Database, store: PostgresRateStore, observer: Connection
) -> None:
    """Windows in which nothing is left are removed, all others stay."""
    await store.exchange([ask(f"old_{number}", charged=1) for number in range(20)])
    await clock.advance(63)
    await told(store, ask("new", charged=1))
    await forget_windows(database)
    assert ["new"] == [row["key_id"] for row in await observer.fetch("SELECT key_id FROM rate_window")]


async def test_windows_are_not_written_ahead(store: PostgresRateStore, observer: Connection) -> None:
    """Counting writes nothing ahead but the end of each transaction, and its rows stay on their pages."""
    keys = [f"key_{number}" for number in range(100)]
    for _ in range(3):
        await store.exchange([ask(key, limit=1000, charged=1) for key in keys])
    before = await observer.fetchval("SELECT pg_current_wal_insert_lsn()")
    for _ in range(20):
        await store.exchange([ask(key, limit=1000, charged=1) for key in keys])
    written = await observer.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1::pg_lsn)", before)
    assert written < 20 * 1000

    # At the end of their sessions, and not some seconds later, servers count what was done.
    await observer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def is_hot() -> bool:
        row = await observer.fetchrow(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'rate_window'"
        )
        return row is not None and row["n_tup_upd"] >= 2000 and row["n_tup_hot_upd"] > 0.9 * row["n_tup_upd"]

    await until(is_hot)
