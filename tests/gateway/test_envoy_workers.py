"""The real Envoy in front of a service of several processes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from support.databases import until
from support.edge import Edge
from support.edge import edge as run_edge
from support.envoy import needs_envoy
from support.fleets import Fleet, fleet, value

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

WORKERS = range(1, 3)
AT_ONCE = 64
"""As many requests as a busy gateway has under way: many more than go to one connection."""


async def calls_by_worker(service: Fleet) -> list[float]:
    """Says how many calls each worker has answered."""
    metrics = await service.metrics()
    return [value(metrics, "latchgate_worker_calls_total", worker=str(worker)) for worker in WORKERS]


async def ask(edge: Edge, times: int) -> set[int]:
    """Sends requests that ext_authz refuses, all at once, and gives the codes of the answers."""
    answers = await asyncio.gather(*(edge.call("GET", "/orders", token="lk_nonsense") for _ in range(times)))
    return {answer.status for answer in answers}


async def test_workers_share_the_load(database_url: str, tmp_path: Path) -> None:
    """Though one thread asks, and a connection belongs to one worker, all workers have their share.

    With a connection for each thread, as is Envoy's default, it would be one of them that has it all.
    """
    async with (
        fleet(database_url, tmp_path, WORKERS=len(WORKERS), LOG_LEVEL="info") as service,
        run_edge(tmp_path, service.address, threads=1) as edge,
    ):
        before = await calls_by_worker(service)

        async def all_have_some() -> bool:
            await ask(edge, AT_ONCE)
            after = await calls_by_worker(service)
            # Health checks are not counted among calls.
            return all(now - then >= AT_ONCE for now, then in zip(after, before, strict=True))

        await until(all_have_some)
        connections = (await edge.envoy.stats("cluster.latchgate."))["cluster.latchgate.upstream_cx_active"]
        assert len(WORKERS) < connections <= AT_ONCE


async def test_renewal_is_not_noticed(database_url: str, tmp_path: Path) -> None:
    """While all workers are replaced, no request of the gateway's clients fails for that."""
    async with (
        fleet(database_url, tmp_path, WORKERS=len(WORKERS), LOG_LEVEL="info") as service,
        run_edge(tmp_path, service.address) as edge,
    ):
        assert {401} == await ask(edge, 8)
        service.process.tell(signal.SIGHUP)
        codes: set[int] = set()
        while not service.events("workers_renewed"):
            codes |= await ask(edge, 8)
        codes |= await ask(edge, 8)
        assert {401} == codes
