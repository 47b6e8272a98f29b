"""What is done to a cluster while it is called. Each fault begins, lasts, and is over when its function returns."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from random import Random
from typing import Final

import asyncpg

from cluster.clock import CAN_BE_STEPPED, HOUR_S
from cluster.nodes import LEASE_S, READY_S, Cluster, Worker
from cluster.wire import Link, Loss, Way, Wire
from support.databases import until

_LASTS_S: Final = 2.5 * LEASE_S
_AT_ONCE: Final = 10
_CUTS: Final = 4
_ABOUT_S: Final = 30.0

Fault = Callable[[Cluster, Random], Awaitable[None]]


@asynccontextmanager
async def _some_worker(cluster: Cluster, rng: Random) -> AsyncIterator[Worker]:
    """Picks a worker whose process no other fault is at."""
    worker = rng.choice(cluster.workers)
    async with worker.lock:
        yield worker


async def worker_killed(cluster: Cluster, rng: Random) -> None:
    """A worker is killed, and started again."""
    async with _some_worker(cluster, rng) as worker:
        await worker.kill()
        await worker.start()


def _worker_stopped(leases: float) -> Fault:
    async def stop(cluster: Cluster, rng: Random) -> None:
        async with _some_worker(cluster, rng) as worker:
            worker.tell(signal.SIGSTOP)
            try:
                await asyncio.sleep(leases * LEASE_S)
            finally:
                worker.tell(signal.SIGCONT)

    return stop


async def worker_blocked(cluster: Cluster, rng: Random) -> None:
    """The event loop of the worker that is prepared for it stands still for two leases."""
    del rng
    worker = cluster.workers[-1]
    async with worker.lock:
        worker.tell(signal.SIGUSR1)
        await asyncio.sleep(2 * LEASE_S)


async def rolling_restart(cluster: Cluster, rng: Random) -> None:
    """All workers are stopped in order and started again, one after the other."""
    for worker in rng.sample(cluster.workers, k=len(cluster.workers)):
        async with worker.lock:
            await worker.end()
            await worker.start()


async def database_killed(cluster: Cluster, rng: Random) -> None:
    """All processes of PostgreSQL are killed at once, and it is started again."""
    async with cluster.postgres.lock:
        await cluster.postgres.kill()
        await asyncio.sleep(rng.uniform(0, 2 * LEASE_S))
        await cluster.postgres.restart()


def _database_frozen(leases: float) -> Fault:
    async def freeze(cluster: Cluster, rng: Random) -> None:
        del rng
        async with cluster.postgres.lock:
            cluster.postgres.freeze()
            try:
                await asyncio.sleep(leases * LEASE_S)
            finally:
                cluster.postgres.thaw()

    return freeze


def _commits_lost(loss: Loss) -> Fault:
    """Each worker's next commits of management meet a loss."""

    async def lose(cluster: Cluster, rng: Random) -> None:
        wires = [worker.wire for worker in cluster.workers]
        for wire in wires:
            for _ in range(rng.randint(1, 3)):
                wire.lose_commit(loss)
        await asyncio.sleep(_LASTS_S)
        for wire in wires:
            wire.spare_commits()

    return lose


async def backends_ended(cluster: Cluster, rng: Random) -> None:
    """Sessions of the workers are ended by the server, again and again, whatever they are at."""
    async with cluster.database() as database:
        for _ in range(20):
            pids = [
                row["pid"]
                for row in await database.fetch(
                    "SELECT pid FROM pg_stat_activity "
                    "WHERE datname = current_database() AND application_name = 'latchgate' ORDER BY state, pid"
                )
            ]
            if pids:
                await database.execute("SELECT pg_terminate_backend($1)", rng.choice(pids))
            await asyncio.sleep(_LASTS_S / 20)


async def connections_exhausted(cluster: Cluster, rng: Random) -> None:
    """Somebody else takes every connection that the server has to give, while workers' connections are cut."""
    async with AsyncExitStack() as stack:
        is_full = asyncio.Event()

        async def take() -> None:
            while True:
                try:
                    await stack.enter_async_context(cluster.database())
                except (asyncpg.PostgresError, OSError):
                    is_full.set()
                    await asyncio.sleep(0.001)

        takers = [asyncio.create_task(take()) for _ in range(_AT_ONCE)]
        try:
            async with asyncio.timeout(READY_S):
                await is_full.wait()
            for _ in range(_CUTS):
                rng.choice(cluster.workers).wire.cut()
                await asyncio.sleep(_LASTS_S / _CUTS)
        finally:
            for taker in takers:
                taker.cancel()
            await asyncio.gather(*takers, return_exceptions=True)


def _workers_clock_stepped(ahead_s: int) -> Fault:
    """A worker's wall clock is stepped, and stepped back after a while."""

    async def step(cluster: Cluster, rng: Random) -> None:
        async with _some_worker(cluster, rng) as worker:
            with worker.clock.stepped(ahead_s):
                await asyncio.sleep(_LASTS_S)

    return step


def _databases_clock_stepped(ahead_s: int) -> Fault:
    """The wall clock of all of PostgreSQL's processes is stepped, and stepped back after a while."""

    async def step(cluster: Cluster, rng: Random) -> None:
        del rng
        async with cluster.postgres.lock:
            with cluster.postgres.clock.stepped(ahead_s):
                await until_databases_clock_is(cluster, ahead_s)
                await asyncio.sleep(_LASTS_S)
            await until_databases_clock_is(cluster, 0)

    return step


async def until_databases_clock_is(cluster: Cluster, ahead_s: int) -> None:
    """Waits until PostgreSQL says that its clock is so far ahead of the real one, by half a minute more or less."""

    async def is_set() -> bool:
        try:
            async with cluster.database() as database:
                now_s: float = await database.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        except (asyncpg.PostgresError, OSError):
            # Another fault is at the server.
            return False
        return abs(now_s - time.time() - ahead_s) < _ABOUT_S

    await until(is_set)


def _wire_fault(begin: Callable[[Wire, ExitStack], object]) -> Fault:
    """Makes a fault of one worker's wire that lasts until the stack is closed."""

    async def fail(cluster: Cluster, rng: Random) -> None:
        with ExitStack() as stack:
            begin(rng.choice(cluster.workers).wire, stack)
            await asyncio.sleep(_LASTS_S)

    return fail


def _held(links: Link = Link.ALL, ways: Way = Way.BOTH) -> Fault:
    return _wire_fault(lambda wire, stack: stack.enter_context(wire.holding(links, ways)))


def _slow(delay_s: float) -> Fault:
    return _wire_fault(lambda wire, stack: stack.enter_context(wire.delaying(delay_s)))


def _half_open(*, towards_server: bool) -> Fault:
    return _wire_fault(lambda wire, _: wire.half_open(towards_server=towards_server))


CLOCK_FAULTS: Final[dict[str, tuple[str, Fault]]] = {
    "worker's clock, +1 h": (
        "a worker's wall clock stepped an hour ahead, and back after 2.5 leases",
        _workers_clock_stepped(HOUR_S),
    ),
    "worker's clock, -1 h": ("the same, an hour back and ahead", _workers_clock_stepped(-HOUR_S)),
    "database's clock, +1 h": (
        "the wall clock of all of PostgreSQL's processes stepped an hour ahead, and back after 2.5 leases",
        _databases_clock_stepped(HOUR_S),
    ),
    "database's clock, -1 h": ("the same, an hour back and ahead", _databases_clock_stepped(-HOUR_S)),
}
"""Those that need cluster.clock."""

FAULTS: Final[dict[str, tuple[str, Fault]]] = {
    "worker killed": ("kill -9 of a worker, and a new start", worker_killed),
    "worker stopped, 0.5 leases": ("SIGSTOP of a worker for half a lease", _worker_stopped(0.5)),
    "worker stopped, 2 leases": ("the same for two leases", _worker_stopped(2)),
    "worker stopped, 10 leases": ("the same for ten leases", _worker_stopped(10)),
    "worker blocked": ("an event loop that stands still for two leases", worker_blocked),
    "rolling restart": ("SIGTERM of each worker in turn, and a new start", rolling_restart),
    "database killed": ("kill -9 of all of PostgreSQL's processes, and a new start", database_killed),
    "database frozen, 0.5 leases": ("SIGSTOP of all of PostgreSQL's processes for half a lease", _database_frozen(0.5)),
    "database frozen, 2 leases": ("the same for two leases", _database_frozen(2)),
    "sessions ended": ("pg_terminate_backend of 20 of the workers' sessions, one after the other", backends_ended),
    "connections exhausted": (
        "all of the server's connections taken while workers' are cut",
        connections_exhausted,
    ),
    "commit lost": ("connections cut before the server gets a COMMIT", _commits_lost(Loss.BEFORE)),
    "commit's answer lost": ("connections cut after a COMMIT, before its answer", _commits_lost(Loss.AFTER)),
    "commit's answer withheld": ("no answer to a COMMIT, and silence from then on", _commits_lost(Loss.SILENCE)),
    "partition": ("nothing passes between a worker and the database", _held()),
    "partition, to the server": ("nothing passes from a worker to the database", _held(ways=Way.TO_SERVER)),
    "partition, to the worker": ("nothing passes from the database to a worker", _held(ways=Way.TO_CLIENT)),
    "refused": (
        "a worker's connections are cut, and new ones refused",
        _wire_fault(lambda wire, stack: stack.enter_context(wire.refusing())),
    ),
    "listening link silent": ("nothing passes on a worker's link for notifications", _held(Link.LISTEN)),
    "log link silent": ("nothing passes on the link by which a worker reads the log", _held(Link.LOG)),
    "log link silent, to the worker": (
        "the same one way: the server renews, no answer comes",
        _held(Link.LOG, Way.TO_CLIENT),
    ),
    "+50 ms": ("all of a worker's traffic with the database 50 ms later each way", _slow(0.05)),
    "+500 ms": ("the same with 500 ms", _slow(0.5)),
    "half-open, server gone": (
        "the server's ends of a worker's connections closed, unknown to it",
        _half_open(towards_server=True),
    ),
    "half-open, worker gone": ("the worker's ends closed, unknown to the server", _half_open(towards_server=False)),
} | (CLOCK_FAULTS if CAN_BE_STEPPED else {})
"""All faults by their names, with what they do."""
