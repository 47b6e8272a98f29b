"""The faults themselves: that each kind does to real processes what it is called after. A fault that does nothing shows
nothing.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Final
from uuid import uuid4

import pytest
import pytest_asyncio

from cluster.client import Client, HeldKey
from cluster.clock import CAN_BE_STEPPED, HOUR_S
from cluster.faults import until_databases_clock_is
from cluster.nodes import Cluster, Worker, running_cluster
from cluster.postgres import Postgres
from support.databases import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ABOUT_S: Final = 30.0

needs_clocks = pytest.mark.skipif(not CAN_BE_STEPPED, reason="libfaketime has no library for this platform")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(postgres: Postgres) -> AsyncIterator[Cluster]:
    """One worker, prepared. Tests leave it as it was."""
    async with running_cluster(postgres, "a") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def held(cluster: Cluster) -> tuple[Client, HeldKey]:
    """A client, and a key that the worker has in memory."""
    client = Client()
    worker = cluster.workers[0]
    organization_id = f"acme-{uuid4().hex}"
    await client.make_organization(worker, organization_id)
    key = await client.make_key(worker, organization_id)

    async def is_answered() -> bool:
        return await _answer(client, worker, key) == "VALID"

    await until(is_answered)
    return client, key


async def _answer(client: Client, worker: Worker, key: HeldKey) -> str:
    reading = await client.validate(worker, key.tokens[0])
    return reading.error or reading.outcome


async def test_a_stopped_worker_answers_nothing(cluster: Cluster, held: tuple[Client, HeldKey]) -> None:
    """SIGSTOP reaches the process that answers calls, not its supervisor alone; SIGCONT has it go on."""
    client, key = held
    worker = cluster.workers[0]
    worker.tell(signal.SIGSTOP)
    assert "DEADLINE_EXCEEDED" == await _answer(client, worker, key)
    worker.tell(signal.SIGCONT)

    async def goes_on() -> bool:
        return await _answer(client, worker, key) == "VALID"

    await until(goes_on)


async def test_a_blocked_worker_answers_nothing(cluster: Cluster, held: tuple[Client, HeldKey]) -> None:
    """SIGUSR1 has the event loop that answers calls stand still for longer than a call waits, and then go on."""
    client, key = held
    worker = cluster.workers[0]
    worker.tell(signal.SIGUSR1)
    assert "DEADLINE_EXCEEDED" == await _answer(client, worker, key)

    async def goes_on() -> bool:
        return await _answer(client, worker, key) == "VALID"

    await until(goes_on)


async def test_a_killed_worker_says_no_last_word(cluster: Cluster, held: tuple[Client, HeldKey]) -> None:
    """A worker that is killed leaves its row behind, as one does that gave up its lease to nobody."""
    client, key = held
    worker = cluster.workers[0]
    await worker.kill()
    assert "UNAVAILABLE" == await _answer(client, worker, key)
    async with cluster.database() as database:
        assert 1 == await database.fetchval("SELECT count(*) FROM worker")
    await worker.start()


@needs_clocks
@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S])
async def test_a_workers_clock_is_stepped(cluster: Cluster, held: tuple[Client, HeldKey], ahead_s: int) -> None:
    """The step comes about in the process that answers calls while it runs: its log is written by the wall clock. It
    goes on answering from memory.
    """
    client, key = held
    worker = cluster.workers[0]
    with worker.clock.stepped(ahead_s):
        assert ABOUT_S > abs(await _logged_s(client, worker, key) - time.time() - ahead_s)
        assert "VALID" == await _answer(client, worker, key)
    assert ABOUT_S > abs(await _logged_s(client, worker, key) - time.time())


async def _logged_s(client: Client, worker: Worker, key: HeldKey) -> float:
    """Makes a call that is logged, and gives the time that the line has."""
    worker.process.out.clear()
    worker.process.err.clear()
    await client.get(worker, key)
    logged = await worker.process.event("call")
    return datetime.fromisoformat(logged["timestamp"]).timestamp()


@needs_clocks
@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S])
async def test_the_databases_clock_is_stepped(cluster: Cluster, ahead_s: int) -> None:
    """The step comes about in PostgreSQL's processes while they run, in sessions that were there before."""
    async with cluster.database() as before:
        with cluster.postgres.clock.stepped(ahead_s):
            await until_databases_clock_is(cluster, ahead_s)

            async def is_known() -> bool:
                now_s: float = await before.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
                return abs(now_s - time.time() - ahead_s) < ABOUT_S

            await until(is_known)
        await until_databases_clock_is(cluster, 0)
