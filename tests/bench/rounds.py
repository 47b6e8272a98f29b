"""The measurement: rounds in which the no-op and the service on each database take turns."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import database, servers
from bench.database import Cluster
from bench.load import Burst, Load
from bench.machine import BenchError, Layout, process_cpu_s
from bench.servers import Service, Source, Target

FRAME_BYTES = 5
# Times in an answer are written with as many bytes as they need, so answers differ by some bytes.
SIZE_TOLERANCE_BYTES = 8
MOST_LOOKUPS, LEAST_LOOKUPS = 0.001, 0.9
MOST_TORN = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    keys: tuple[int, ...]
    rounds: int
    seconds: float
    processes: int
    in_use: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One server under load for the seconds of a turn. The processor time is that of one call."""

    burst: Burst
    server_cpu_us: float

    @property
    def server_share(self) -> float:
        """How much of its core's time the server used."""
        return self.server_cpu_us * self.burst.per_s / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookups:
    """What the database was asked in a turn; the processor time is that of one call, None if it is not known."""

    postgres_cpu_us: float | None
    statements: float
    digests_per_statement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedTurn(Turn):
    """A server under load, with the no-op's turns before and after it."""

    name: str
    round: int
    before: Turn
    after: Turn
    lookups: Lookups | None

    @property
    def noop_per_s(self) -> float:
        """What the no-op did around it."""
        return statistics.mean([self.before.burst.per_s, self.after.burst.per_s])

    @property
    def ratio(self) -> float:
        """Its throughput over the no-op's."""
        return self.burst.per_s / self.noop_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured. The turns of the warm-up are left out."""

    turns: Sequence[ComparedTurn]
    keys: dict[str, int]
    sources: dict[str, Source]
    request_bytes: int
    answer_bytes: int
    database_bytes: dict[int, int]
    distinct_keys: dict[int, int]
    in_use: dict[str, int]
    postgres_version: str
    shared_buffers: str
    is_embedded: bool


Say = Callable[[str], None]


async def measure(plan: Plan, layout: Layout, say: Say) -> Results:
    """Makes databases and servers, measures, and ends all that it has started. Raises BenchError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(layout.database))
        databases = []
        for keys in plan.keys:
            started_s = time.monotonic()
            databases.append(await stack.enter_async_context(cluster.seeded(keys)))
            say(f"seeded {keys:,} {'key' if keys == 1 else 'keys'} in {time.monotonic() - started_s:.0f} s")
        rng = random.Random(plan.seed)  # noqa: S311 - which keys are asked for is no secret
        load = Load(cores=[layout.load], processes=plan.processes, folder=folder / "load", rng=rng)
        turns: list[ComparedTurn] = []
        services: list[Service] = []
        for each in databases:
            async with AsyncExitStack() as running:
                # As many keys in use with any number of them; and, where that is the most, more as well.
                in_use = {plan.in_use: ""}
                if each is databases[-1] and len(each.tokens) > plan.in_use:
                    in_use[len(each.tokens)] = f", {len(each.tokens):,} in use"
                own = [
                    await running.enter_async_context(
                        servers.service(each, source, layout.server, folder, in_use=count, beside=beside)
                    )
                    for count, beside in in_use.items()
                    for source in Source
                    # A single key is in a memory of any size.
                    if source is Source.MEMORY or each.keys > 1
                ]
                answer = own[-1].answer
                yardstick = await running.enter_async_context(servers.noop(answer, layout.server, folder))
                targets: list[Target] = [*own]
                if each is databases[0]:
                    targets.append(
                        await running.enter_async_context(servers.single_noop(answer, layout.server, folder))
                    )
                    targets.append(await running.enter_async_context(servers.plain_noop(answer, layout.server, folder)))
                turns += await _Comparison(plan, load, cluster, yardstick, say).run(targets, own[-1].bodies)
            services += own
        return Results(
            turns=turns,
            keys={each.name: each.seeded.keys for each in services},
            sources={each.name: each.source for each in services},
            request_bytes=len(services[-1].bodies[0]) - FRAME_BYTES,
            answer_bytes=answer.ByteSize(),
            database_bytes={each.keys: each.size_bytes for each in databases},
            # A service that stops writes the last uses that it still holds.
            distinct_keys={each.keys: await database.distinct_keys_used(each.url) for each in databases},
            in_use={each.name: len(each.tokens) for each in services},
            postgres_version=await cluster.version(),
            shared_buffers=await cluster.setting("shared_buffers"),
            is_embedded=cluster.is_embedded,
        )


class _Comparison:
    """Alternates between the no-op and the services: no-op, service, no-op, service ... no-op."""

    def __init__(self, plan: Plan, load: Load, cluster: Cluster, yardstick: Target, say: Say) -> None:
        self._plan = plan
        self._load = load
        self._cluster = cluster
        self._yardstick = yardstick
        self._say = say

    async def run(self, targets: Sequence[Target], bodies: Sequence[bytes]) -> list[ComparedTurn]:
        """Gives the turns of the counted rounds, one of each server a round; a round of warming up comes first.

        The no-ops are sent any of the bodies.
        """
        turns = 1 + 2 * len(targets) * (self._plan.rounds + 1)
        self._say(f"measuring: {turns} turns of {self._plan.seconds:g} s")
        counted = []
        before = await self._noop(self._yardstick, bodies)
        for number in range(self._plan.rounds + 1):
            # Another one comes first in each round, so that none always follows the same one.
            first = number % len(targets)
            for target in (*targets[first:], *targets[:first]):
                if isinstance(target, Service):
                    if target.source is Source.MEMORY:
                        # Each time: nothing stays in memory for ever.
                        await target.warm()
                    await target.check_answers()
                    turn, lookups = await self._service(target)
                    await target.check_answers()
                    # What it has yet to write would be taken from the no-op's turn.
                    await target.written()
                else:
                    turn, lookups = await self._noop(target, bodies), None
                after = await self._noop(self._yardstick, bodies)
                compared = ComparedTurn(
                    name=target.name,
                    round=number,
                    burst=turn.burst,
                    server_cpu_us=turn.server_cpu_us,
                    before=before,
                    after=after,
                    lookups=lookups,
                )
                before = after
                self._report(compared)
                if number:
                    counted.append(compared)
        return counted

    def _report(self, turn: ComparedTurn) -> None:
        self._say(
            f"{f'round {turn.round}' if turn.round else 'warm-up':8} {turn.name:26} "
            f"{turn.burst.per_s:7,.0f}/s  no-op {turn.noop_per_s:7,.0f}/s  ratio {turn.ratio:.3f}  "
            f"p50 {turn.burst.p50_ms:.1f} ms  p99 {turn.burst.p99_ms:.1f} ms  server {turn.server_cpu_us:.0f} us/call"
        )

    async def _noop(self, target: Target, bodies: Sequence[bytes]) -> Turn:
        turn = await self._turn(target, bodies)
        check_sizes(turn.burst, target)
        return turn

    async def _service(self, service: Service) -> tuple[Turn, Lookups]:
        figures, postgres_s = await service.figures(), await self._cluster.cpu_s()
        turn = await self._turn(service, service.bodies)
        postgres_after_s = await self._cluster.cpu_s()
        grown = (await service.figures()).since(figures)
        check_sizes(turn.burst, service)
        check_outcomes(turn.burst, grown.outcomes)
        valid = grown.outcomes["VALID"]
        check_source(service.source, valid, grown.digests)
        postgres_cpu_us = None
        # Where nothing was looked up, what is left is connections that came and went.
        if grown.digests and postgres_s is not None and postgres_after_s is not None:
            postgres_cpu_us = (postgres_after_s - postgres_s) * 1e6 / valid
        return turn, Lookups(
            postgres_cpu_us=postgres_cpu_us,
            statements=grown.statements,
            digests_per_statement=grown.digests / grown.statements if grown.statements else 0.0,
        )

    async def _turn(self, target: Target, bodies: Sequence[bytes]) -> Turn:
        cpu_s = process_cpu_s(target.pid)
        burst = await self._load.burst(target.url, bodies, self._plan.seconds)
        return Turn(burst=burst, server_cpu_us=(process_cpu_s(target.pid) - cpu_s) * 1e6 / burst.succeeded)


def check_sizes(burst: Burst, target: Target) -> None:
    """Demands that every answer was one, and as long as it must be: an error has no body."""
    if burst.failed or burst.succeeded < 1:
        raise BenchError(f"{burst.failed} calls failed, {burst.succeeded} did not")
    size = FRAME_BYTES + target.answer.ByteSize()
    least, most = burst.succeeded * (size - SIZE_TOLERANCE_BYTES), burst.started * (size + SIZE_TOLERANCE_BYTES)
    if not least <= burst.data_bytes <= most:
        raise BenchError(
            f"{burst.succeeded} answers of about {size} bytes have {burst.data_bytes} bytes: some are something else"
        )


def check_outcomes(burst: Burst, outcomes: Mapping[str, float]) -> None:
    """Demands that the service counted as many VALID answers as h2load saw, and no others.

    What was under way when the time was up may have been answered or not. A few bodies were sent while they were being
    replaced by others: their tokens were never made, and are NOT_FOUND.
    """
    torn, others = outcomes.get("NOT_FOUND", 0), set(outcomes) - {"VALID", "NOT_FOUND"}
    answered = outcomes.get("VALID", 0) + torn
    if others or torn > MOST_TORN * burst.started or not burst.succeeded <= answered <= burst.started:
        raise BenchError(
            f"h2load saw {burst.succeeded} answers to {burst.started} calls, but the service counted {dict(outcomes)}"
        )


def check_source(source: Source, valid: float, digests: float) -> None:
    """Demands that answers came from where they were to come from: none from the database, or nearly all.

    Calls for the same key that arrive together share one digest.
    """
    share = digests / valid
    if (source is Source.MEMORY and share > MOST_LOOKUPS) or (source is Source.DATABASE and share < LEAST_LOOKUPS):
        raise BenchError(f"of {valid:.0f} answers that were to come from {source.value}, {digests:.0f} were looked up")
