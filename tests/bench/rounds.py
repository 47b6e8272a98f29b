"""The measurement: rounds in which each server is called by turns with the no-op."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench import database, servers
from bench.alternation import Called, at_rest, by_turns
from bench.database import Cluster, Seeded
from bench.load import Burst, Load
from bench.machine import BenchError, Layout, SpoiledError, grown_s
from bench.servers import Service, Source, Target

FRAME_BYTES = 5
# Times in an answer are written with as many bytes as they need, so answers differ by some bytes.
SIZE_TOLERANCE_BYTES = 8
MOST_LOOKUPS, LEAST_LOOKUPS = 0.03, 0.9
MOST_TORN = 0.001
MOST_REPEATED = 5
"""How often one turn is done again, before the run ends with what was wrong with it.

What always goes wrong is found so; a slow spell of the machine, which spoils one turn here and there, loses no others.
"""
NOOPS = 4
"""As many processes of the no-op: those of the same code may differ by some percents, each for as long as it runs."""
NICENESS = 10
"""The load's. PostgreSQL, which may have to share its core, comes first, as it would with a machine of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    keys: tuple[int, ...]
    rounds: int
    seconds: float
    processes: int
    in_use: int
    seed: int

    @property
    def rest_s(self) -> float:
        """For how long servers are watched that nobody calls, so that all that they do every few seconds is seen."""
        return 7 * self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookups:
    """What the database was asked in a turn; the processor time is that of one call, None if it is not known."""

    postgres_cpu_us: float | None
    statements: float
    digests_per_statement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A server, and the no-op that was called by turns with it."""

    name: str
    round: int
    server: Called
    noop: Called
    noop_name: str
    lookups: Lookups | None

    @property
    def ratio(self) -> float:
        """Its throughput over the no-op's."""
        return self.server.per_s / self.noop.per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured. The turns of the warm-up are left out."""

    turns: Sequence[Turn]
    repeated: int
    rests: dict[str, float]
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
        loads = tuple(
            Load(
                cores=[layout.load],
                processes=plan.processes,
                folder=folder / f"load-{number}",
                rng=rng,
                niceness=NICENESS,
            )
            for number in range(2)
        )
        async with AsyncExitStack() as running:
            services = [
                await running.enter_async_context(
                    servers.service(each, source, layout.server, folder, in_use=count, beside=beside)
                )
                for each in databases
                for count, beside in _in_use(each, plan, is_largest=each is databases[-1])
                for source in Source
                # A single key is in a memory of any size.
                if source is Source.MEMORY or each.keys > 1
            ]
            answer = services[-1].answer
            noops = [
                await running.enter_async_context(servers.noop(answer, layout.server, folder, name=f"no-op {number}"))
                for number in range(1, NOOPS + 1)
            ]
            others = [
                await running.enter_async_context(start(answer, layout.server, folder))
                for start in (servers.another_noop, servers.single_noop, servers.plain_noop)
            ]
            comparison = _Comparison(plan, (loads[0], loads[1]), cluster, noops, say)
            turns = await comparison.run([*services, *others], services[-1].bodies)
        return Results(
            turns=turns,
            repeated=comparison.repeated,
            rests=comparison.rests,
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


def _in_use(seeded: Seeded, plan: Plan, *, is_largest: bool) -> list[tuple[int, str]]:
    """Gives how many keys are to be in use, and what is said of that in a name.

    They are as many with any number of keys; with the most, others are asked for more as well.
    """
    more = len(seeded.tokens)
    return [(plan.in_use, ""), *([(more, f", {more:,} in use")] if is_largest and more > plan.in_use else [])]


class _Comparison:
    """Has each server called by turns with a no-op."""

    def __init__(
        self, plan: Plan, loads: tuple[Load, Load], cluster: Cluster, noops: Sequence[Target], say: Say
    ) -> None:
        self._plan = plan
        self._loads = loads
        self._cluster = cluster
        self._noops = noops
        self._say = say
        self.repeated = 0
        # What part of a core each server takes while none is called.
        self.rests: dict[str, float] = {}
        # One of their own for the order, which is the same each time so.
        self._order, self._choice = (random.Random(plan.seed + number) for number in range(2))  # noqa: S311 - no secret

    async def run(self, targets: Sequence[Target], bodies: Sequence[bytes]) -> list[Turn]:
        """Gives the turns of the counted rounds, one of each server a round; a round of warming up comes first.

        The order is drawn anew for each round, so that none always follows the same one. A server is called by turns
        with one no-op for two rounds, in one of which it goes first, and then with the next. No-ops are sent any of the
        bodies, where the server beside has none of its own.
        """
        turns = len(targets) * (self._plan.rounds + 1)
        self._say(f"measuring: {turns} turns of {self._plan.seconds:g} s for each of two")
        counted = []
        for number in range(self._plan.rounds + 1):
            if number == 1:
                everyone = [*self._noops, *targets]
                self.rests = dict(
                    zip((each.name for each in everyone), await at_rest(everyone, self._plan.rest_s), strict=True)
                )
            for place, target in self._order.sample(list(enumerate(targets)), len(targets)):
                noop = self._noops[(number // 2 + place) % len(self._noops)]
                turn = await self._unspoiled(number, target, noop, bodies)
                self._report(turn)
                if number:
                    counted.append(turn)
        return counted

    async def _unspoiled(self, number: int, target: Target, noop: Target, bodies: Sequence[bytes]) -> Turn:
        """Gives a turn that is what it is to be. One that is not is done again: all others are as good as they were."""
        left = MOST_REPEATED
        while True:
            try:
                if isinstance(target, Service):
                    return await self._service(number, target, noop)
                return await self._turn(number, target, noop, bodies)
            except SpoiledError as error:
                if not left:
                    raise
                left -= 1
                self.repeated += 1
                self._say(f"again: {error}")

    def _report(self, turn: Turn) -> None:
        burst = turn.server.burst
        self._say(
            f"{f'round {turn.round}' if turn.round else 'warm-up':8} {turn.name:40} "
            f"{turn.server.per_s:7,.0f}/s  no-op {turn.noop.per_s:7,.0f}/s  ratio {turn.ratio:.3f}  "
            f"p50 {burst.p50_ms:.1f} ms  p99 {burst.p99_ms:.1f} ms  server {turn.server.server_cpu_us:.0f} us/call"
        )

    async def _service(self, number: int, service: Service, noop: Target) -> Turn:
        if service.source is Source.MEMORY:
            # Each time: nothing stays in memory for ever.
            await service.warm()
        await service.check_answers()
        figures, postgres_s = await service.figures(), await self._cluster.cpu_s(service.seeded.url)
        turn = await self._turn(number, service, noop, service.bodies)
        postgres_after_s = await self._cluster.cpu_s(service.seeded.url)
        grown = (await service.figures()).since(figures)
        check_outcomes(turn.server.burst, grown.outcomes)
        valid = grown.outcomes["VALID"]
        check_source(service.source, valid, grown.digests)
        await service.check_answers()
        # What it has yet to write would be taken from the next one.
        await service.written()
        postgres_cpu_us = None
        # Where nothing was looked up, what is left is connections that came and went.
        if grown.digests and postgres_s is not None and postgres_after_s is not None:
            postgres_cpu_us = grown_s(postgres_s, postgres_after_s) * 1e6 / valid
        lookups = Lookups(
            postgres_cpu_us=postgres_cpu_us,
            statements=grown.statements,
            digests_per_statement=grown.digests / grown.statements if grown.statements else 0.0,
        )
        return replace(turn, lookups=lookups)

    async def _turn(self, number: int, target: Target, noop: Target, bodies: Sequence[bytes]) -> Turn:
        """Calls a server and a no-op; in every second round the no-op goes first."""
        order = (noop, target) if number % 2 else (target, noop)
        feeds = [partial(self._choice.choice, bodies)] * self._plan.processes
        first, second = (self.rests.get(each.name, 0.0) for each in order)
        called = await by_turns(self._loads, order, feeds, self._plan.seconds, rests=(first, second))
        for each, one in zip(called, order, strict=True):
            check_sizes(each.burst, one)
        of_noop, of_target = called if number % 2 else reversed(called)
        return Turn(name=target.name, round=number, server=of_target, noop=of_noop, noop_name=noop.name, lookups=None)


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

    Calls for the same key that arrive together share one digest, and one that follows finds it in memory, small as that
    is: so where bodies are not replaced for some time, some of them need none. What has been in memory for five to ten
    minutes is looked up anew: in a turn that is one or two in a hundred of the keys in use, and less of the answers.
    """
    share = digests / valid
    said = f"of {valid:.0f} answers that were to come from {source.value}, {digests:.0f} were looked up"
    is_right = share <= MOST_LOOKUPS if source is Source.MEMORY else share >= LEAST_LOOKUPS
    if not is_right:
        raise SpoiledError(said)
