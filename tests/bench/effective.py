"""`make bench-effective`: how long a revocation takes to be effective on every worker; writes docs/effective.md.

Exit codes: 0 measured, 1 the figures can not be had or a worker broke the promise, 2 bad arguments, 130 stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import grpc  # noqa: E402 - found by the line above

from apikeys.v1 import key_pb2  # noqa: E402 - the same
from apikeys.v1 import key_service_pb2 as pb  # noqa: E402 - the same
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub  # noqa: E402 - the same
from bench import command, database, servers  # noqa: E402 - the same
from bench.command import counts, positive, say  # noqa: E402 - the same
from bench.histogram import draw  # noqa: E402 - the same
from bench.machine import BenchError  # noqa: E402 - the same
from bench.page import bullets, machine_line, paragraph  # noqa: E402 - the same
from bench.report import as_markdown, as_text, at_most  # noqa: E402 - the same
from bench.servers import AS_ROOT, OWN_CONNECTION  # noqa: E402 - the same

PAGE, PICTURE = ROOT / "docs" / "effective.md", ROOT / "docs" / "effective.svg"
ORGANIZATION = "bench-0000"
CALL_TIMEOUT_S = 30.0
# Connections to a service for each of its workers: the system spreads them, some workers get several.
CHANNELS_A_WORKER = 2
# What is wanted: at most so much at p99 with so many workers.
MANY_WORKERS, WANTED_P99_MS = 20, 50.0


@dataclass(slots=True, kw_only=True)
class Fleet:
    """A service of several workers, with connections that its workers share, and what was measured of it."""

    workers: int
    stubs: Sequence[Any]
    took_ms: list[float] = field(default_factory=list)

    async def revoke_one(self) -> None:
        """Has a key in memory wherever a connection leads, revokes it, and asks everywhere. Raises BenchError."""
        created = await self.stubs[0].CreateKey(
            pb.CreateKeyRequest(organization_id=ORGANIZATION, name="to be revoked", permissions=["read"]),
            metadata=AS_ROOT,
            timeout=CALL_TIMEOUT_S,
        )
        for _ in range(2):
            await self._demand(created.token, pb.OUTCOME_VALID)
        begin_s = time.perf_counter()
        revoked = await self.stubs[0].RevokeKey(
            pb.RevokeKeyRequest(key_id=created.key.id), metadata=AS_ROOT, timeout=CALL_TIMEOUT_S
        )
        self.took_ms.append((time.perf_counter() - begin_s) * 1000)
        if revoked.effect.state != key_pb2.EFFECT_STATE_EFFECTIVE:
            raise BenchError("a revocation was PENDING, though all workers are healthy")
        await self._demand(created.token, pb.OUTCOME_REVOKED)

    async def _demand(self, token: str, outcome: pb.Outcome.ValueType) -> None:
        request = pb.ValidateRequest(token=token)
        answers = await asyncio.gather(*(stub.Validate(request, timeout=CALL_TIMEOUT_S) for stub in self.stubs))
        wrong = {pb.Outcome.Name(answer.outcome) for answer in answers if answer.outcome != outcome}
        if wrong:
            raise BenchError(f"a worker answered {wrong} where {pb.Outcome.Name(outcome)} was due")


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = argparse.ArgumentParser(prog="make bench-effective", description="Measures revocations.")
    parser.add_argument("--workers", type=counts, default=(1, 4, 20), help="numbers of workers (1,4,20)")
    parser.add_argument("--rounds", type=positive, default=8, help="how many (%(default)s)")
    parser.add_argument(
        "--changes", type=positive, default=100, help="revocations of each service in a round (%(default)s)"
    )
    arguments = parser.parse_args()
    fleets = command.run(_measure(arguments.workers, arguments.rounds, arguments.changes))
    rows = [("workers", "revocations", "p50, ms", "p90, ms", "p99, ms", "most, ms"), *map(_row, fleets)]
    say(as_text(rows))
    if len(sys.argv) == 1:
        series = {f"{each.workers} {'worker' if each.workers == 1 else 'workers'}": each.took_ms for each in fleets}
        PICTURE.write_text(draw(series, "RevokeKey until EFFECTIVE, ms"))
        PAGE.write_text(_page(as_markdown(rows), findings(fleets), arguments.rounds))
    return 0


async def _measure(workers: Sequence[int], rounds: int, changes: int) -> list[Fleet]:
    """Measures all services in turns, on one database each of one server."""
    cores = sorted(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(cores))
        fleets = []
        for count in workers:
            seeded = await stack.enter_async_context(cluster.seeded(1000))
            await database.make_room(seeded.url)
            served = await stack.enter_async_context(servers.fleet(seeded, count, cores, folder))
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(served.address, options=OWN_CONNECTION))
                for _ in range(CHANNELS_A_WORKER * count)
            ]
            fleets.append(Fleet(workers=count, stubs=[KeyServiceStub(channel) for channel in channels]))
            say(f"{count} workers serve")
        for number in range(rounds + 1):
            for fleet in fleets:
                for _ in range(changes if number else 5):
                    await fleet.revoke_one()
                if not number:
                    # A round to warm up.
                    fleet.took_ms.clear()
            say(f"round {number} of {rounds}")
        return fleets


def _cuts(fleet: Fleet) -> Sequence[float]:
    """Gives the 99 times below which so many in a hundred are."""
    return statistics.quantiles(fleet.took_ms, n=100, method="inclusive")


def _row(fleet: Fleet) -> tuple[str, ...]:
    took, cuts = fleet.took_ms, _cuts(fleet)
    figures = (cuts[49], cuts[89], cuts[98], max(took))
    return (str(fleet.workers), f"{len(took):,}", *(f"{figure:.1f}" for figure in figures))


def findings(fleets: Sequence[Fleet]) -> list[str]:
    """Says how what was measured stands to what is wanted."""
    return [
        at_most(f"p99 with {MANY_WORKERS} workers, ms", [_cuts(fleet)[98]], WANTED_P99_MS)
        for fleet in fleets
        if fleet.workers == MANY_WORKERS
    ]


def _page(table: str, found: Sequence[str], rounds: int) -> str:
    cores = len(os.sched_getaffinity(0))
    blocks = (
        "# How long a revocation takes to be effective",
        paragraph(
            "From the call of RevokeKey to its answer, EFFECTIVE: the commit on disk, and every worker's"
            " acknowledgement. This page is written by `make bench-effective`; its figures are those of one run on one"
            " machine."
        ),
        table,
        bullets(found),
        "![Histogram of the times](effective.svg)",
        paragraph(
            "Each service ran with its number of workers and else default settings, on a database of its own on one"
            f" embedded PostgreSQL (fsync on, up to {database.MAX_CONNECTIONS} connections);"
            f" {rounds} rounds took turns between them. Before each revocation the key"
            " was asked for twice over two connections for each worker, so that it was in memory; after it, every one"
            " of these connections was answered with REVOKED at once, or the run would have failed. All of it, the"
            f" workers, PostgreSQL and the client, shared {cores} cores: with 20 workers the"
            " figures are those of a crowded machine."
        ),
        paragraph(machine_line(cores)),
    )
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
