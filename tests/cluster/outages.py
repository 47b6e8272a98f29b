"""What an outage of the database is like: memory answers until the lease ends, then every answer is a refusal at once;
and how soon all is as before when the database is back.

What is measured here is written on the page, with its goal. Only what no machine is too slow for is demanded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import asyncpg

from cluster.client import Client, HeldKey
from cluster.history import NANOSECONDS, VALID, Reading
from cluster.nodes import READY_S, Cluster, Worker
from cluster.wire import Wire
from support.databases import until

LEASE_S: Final = 10.0
"""The default of LATCHGATE_LEASE_SECONDS."""
REFUSED_WITHIN_S: Final = 0.05
BACK_WITHIN_S: Final = 5.0
_PACE_S: Final = 0.01
# For how long refusals are counted; longer than any time limit towards the database.
_REFUSALS_S: Final = 3.0
_BURST_S: Final = 0.1
_AFTER_RETURN_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """What came of an outage. Times of workers are in no order."""

    way: str
    lease_s: float
    memory_s: tuple[float, ...] = field(repr=False)
    """For how long each worker answered from memory, from when the database was away."""
    refused_s: tuple[float, ...] = field(repr=False)
    """How long each refusal took, of all workers, from the first after memory's end on."""
    back_s: tuple[float, ...]
    """How long after the database's return each worker first answered from it."""
    burst: int
    """How many connections all workers together began to make in the busiest tenth of a second after the return."""
    links: int
    """How many connections they have in the end."""


class _Away:
    """When the database went, and when it was back."""

    def __init__(self) -> None:
        self.since_ns = 0
        self.back_ns: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def has_gone(self) -> None:
        self.since_ns = time.monotonic_ns()

    def is_back(self) -> None:
        self.back_ns.set_result(time.monotonic_ns())


Way = Callable[[Cluster, _Away], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _killed(cluster: Cluster, away: _Away) -> AsyncIterator[None]:
    async with cluster.postgres.lock:
        await cluster.postgres.kill()
        away.has_gone()
        yield
        restarting = asyncio.create_task(cluster.postgres.restart())

        async def answers() -> bool:
            try:
                async with cluster.database() as database:
                    return bool(await database.fetchval("SELECT true"))
            except (asyncpg.PostgresError, OSError):
                return False

        async with asyncio.timeout(READY_S):
            await until(answers, READY_S)
        away.is_back()
        await restarting


@asynccontextmanager
async def _frozen(cluster: Cluster, away: _Away) -> AsyncIterator[None]:
    async with cluster.postgres.lock:
        cluster.postgres.freeze()
        away.has_gone()
        try:
            yield
        finally:
            cluster.postgres.thaw()
        away.is_back()


def _wires(begin: Callable[[Wire, ExitStack], object]) -> Way:
    @asynccontextmanager
    async def fail(cluster: Cluster, away: _Away) -> AsyncIterator[None]:
        with ExitStack() as stack:
            for worker in cluster.workers:
                begin(worker.wire, stack)
            away.has_gone()
            yield
        away.is_back()

    return fail


WAYS: Final[dict[str, tuple[str, Way]]] = {
    "killed": ("kill -9 of all of PostgreSQL's processes, and a new start", _killed),
    "frozen": ("SIGSTOP of all of PostgreSQL's processes", _frozen),
    "black hole": (
        "nothing passes between the workers and the database",
        _wires(lambda wire, stack: stack.enter_context(wire.holding())),
    ),
    "refused": (
        "all connections are cut, and new ones refused",
        _wires(lambda wire, stack: stack.enter_context(wire.refusing())),
    ),
}
"""How a database can be away."""


async def measure(cluster: Cluster, way: str, lease_s: float) -> Outage:
    """Takes the database away in one way for as long as the leases last and somewhat longer, and gives it back.

    Until the leases end nothing is asked for that is not in memory: no lookup finds out beforehand that the database is
    away. Raises AssertionError if a worker answers from memory when its lease has ended.
    """
    client = Client()
    first = cluster.workers[0]
    organization_id = await client.make_organization(first, f"outage-{time.monotonic_ns()}")
    known = await client.make_key(first, organization_id)
    # One for each worker that no worker has been asked for.
    fresh = [await client.make_key(first, organization_id) for _ in cluster.workers]
    for worker in cluster.workers:
        await _until_valid(client, worker, known)
    away = _Away()
    _, begin = WAYS[way]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(begin(cluster, away))
        watches = [
            asyncio.create_task(_watch(client, worker, known, other, away, lease_s))
            for worker, other in zip(cluster.workers, fresh, strict=True)
        ]
        try:
            refusals = await asyncio.gather(*watches)
        finally:
            for watch in watches:
                watch.cancel()
        returns = [
            asyncio.create_task(_until_valid(client, worker, other))
            for worker, other in zip(cluster.workers, fresh, strict=True)
        ]
        # Ends the outage; what waits for its end is under way.
        await stack.aclose()
        async with asyncio.timeout(READY_S):
            back_ns = [reading.returned_ns for reading in await asyncio.gather(*returns)]
    returned_ns = await away.back_ns
    await asyncio.sleep(_AFTER_RETURN_S)
    accepted_s = sorted(
        when_s for worker in cluster.workers for when_s in worker.wire.accepted_s if when_s * NANOSECONDS >= returned_ns
    )
    memory_s = tuple(seconds for seconds, _ in refusals)
    return Outage(
        way=way,
        lease_s=lease_s,
        memory_s=memory_s,
        refused_s=tuple(seconds for _, some in refusals for seconds in some),
        back_s=tuple((each - returned_ns) / NANOSECONDS for each in back_ns),
        burst=max((sum(0 <= late - early < _BURST_S for late in accepted_s) for early in accepted_s), default=0),
        links=sum(worker.wire.open_count for worker in cluster.workers),
    )


async def _until_valid(client: Client, worker: Worker, key: HeldKey) -> Reading:
    while True:
        reading = await client.validate(worker, key.tokens[0])
        if reading.outcome == VALID:
            return reading
        await asyncio.sleep(_PACE_S)


async def _watch(
    client: Client, worker: Worker, known: HeldKey, fresh: HeldKey, away: _Away, lease_s: float
) -> tuple[float, list[float]]:
    """Asks for what is in memory until that is over, and then for this and for more; gives how long each took."""
    last_ns = away.since_ns
    while (reading := await client.validate(worker, known.tokens[0])).outcome == VALID:
        last_ns = reading.invoked_ns
        memory_s = (last_ns - away.since_ns) / NANOSECONDS
        assert memory_s < lease_s, f"answered from memory {memory_s:.2f} s after the database had gone"
        await asyncio.sleep(_PACE_S)
    refused = [reading]
    while time.monotonic_ns() - refused[0].returned_ns < _REFUSALS_S * NANOSECONDS:
        await asyncio.sleep(_PACE_S)
        key = (known, fresh)[len(refused) % 2]
        refused.append(await client.validate(worker, key.tokens[0]))
    decided = [each for each in refused if not each.error]
    assert not decided, f"answered while the database was away and the lease had ended: {decided[0]}"
    return (last_ns - away.since_ns) / NANOSECONDS, [
        (each.returned_ns - each.invoked_ns) / NANOSECONDS for each in refused
    ]
