"""`make bench-flood`: what callers with good keys notice of a flood of made-up tokens; writes docs/flood.md.

Exit codes: 0 measured (whatever the figures), 1 the figures can not be had or not be believed, 2 bad arguments,
3 the machine lacks what it takes, 130 stopped.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, flood_page, servers, tokens  # noqa: E402 - found by the line above
from bench.command import counts, positive, say  # noqa: E402 - the same
from bench.flood_page import KEYS, LEAD_S, NICENESS, TURN_S, Flood, Plan, Results, Turn  # noqa: E402 - the same
from bench.load import Burst, Load  # noqa: E402 - the same
from bench.machine import BenchError, Layout, process_cpu_s  # noqa: E402 - the same
from bench.metrics import Scrape  # noqa: E402 - the same
from bench.report import as_text  # noqa: E402 - the same
from bench.rounds import check_sizes  # noqa: E402 - the same
from bench.servers import Figures, Service, Source  # noqa: E402 - the same
from bench.tokens import Kind  # noqa: E402 - the same

PAGE = ROOT / "docs" / "flood.md"
REFUSED = "latchgate_foreign_lookups_refused_total"


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = command.arguments("make bench-flood", "Floods a service with made-up tokens.", rounds=5, seconds=5.0)
    parser.add_argument("--flood", type=counts, default=(2, 8, 32), help="connections of the flood (2,8,32)")
    parser.add_argument("--good", type=positive, default=16, help="connections with good keys (%(default)s)")
    parser.add_argument("--rate", type=positive, default=50, help="calls a second of each of these (%(default)s)")
    arguments = parser.parse_args()
    layout = command.one_core_for_the_load()
    plan = Plan(
        floods=[Flood(kind=kind, connections=connections) for kind in Kind for connections in arguments.flood],
        good=arguments.good,
        each_per_s=arguments.rate,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    results = Results(plan=plan, layout=layout, turns=command.run(_measure(plan, layout)))
    say("")
    say(as_text(flood_page.table(results)))
    for line in flood_page.findings(results):
        say(line)
    command.write_page(flood_page.write(results), arguments.output, PAGE)
    return 0


async def _measure(plan: Plan, layout: Layout) -> Sequence[Turn]:
    """Has quiet and flooded turns take turns; a first round is not counted. Raises BenchError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(layout.database))
        seeded = await stack.enter_async_context(cluster.seeded(KEYS))
        service = await stack.enter_async_context(servers.service(seeded, Source.MEMORY, layout.server, folder))
        rng = random.Random(plan.seed)  # noqa: S311 - made-up tokens only have to differ
        flooding = _Flooding(plan, service, layout, folder, rng)
        quiet = await flooding.turn(None, [])
        turns = []
        for number in range(plan.rounds + 1):
            # Another one comes first in each round, so that none always follows the same one.
            first = number % len(plan.floods)
            for flood in (*plan.floods[first:], *plan.floods[:first]):
                flooded = await flooding.turn(flood, [quiet])
                quiet = await flooding.turn(None, [])
                flooded.quiet.append(quiet)
                say(f"{f'round {number}' if number else 'warm-up':8} {flood_page.line(flooded)}")
                if number:
                    turns.append(flooded)
        return turns


@dataclass(frozen=True, slots=True, kw_only=True)
class _Count:
    """What the service and its processor have counted."""

    figures: Figures
    refused: float
    unavailable: float
    cpu_s: float
    at_s: float


class _Flooding:
    """Loads the service with good keys, alone or in a flood."""

    def __init__(self, plan: Plan, service: Service, layout: Layout, folder: Path, rng: random.Random) -> None:
        self._plan = plan
        self._service = service
        self._rng = rng
        self._good = Load(
            cores=[layout.load],
            processes=plan.good,
            folder=folder / "good",
            rng=rng,
            each_per_s=plan.each_per_s,
            # A good key that is read half-way would be no good key.
            turn_s=None,
        )
        self._floods = {
            connections: Load(
                cores=[layout.load],
                processes=connections,
                folder=folder / f"flood-{connections}",
                rng=rng,
                niceness=NICENESS,
                turn_s=TURN_S,
            )
            for connections in {flood.connections for flood in plan.floods}
        }

    async def turn(self, flood: Flood | None, quiet: list[Turn]) -> Turn:
        """Measures one turn, and demands that every good key was called VALID, with `quiet` to be compared with."""
        await self._service.warm()
        await self._service.check_answers()
        before = await self._count()
        async with asyncio.TaskGroup() as group:
            flooding = group.create_task(self._flood(flood)) if flood else None
            good = await self._ask(LEAD_S if flood else 0)
        after = await self._count()
        check_sizes(good, self._service)
        grown = after.figures.since(before.figures)
        flooded = flooding.result() if flooding else None
        refused = after.unavailable - before.unavailable
        check_counts(good, flooded, grown.outcomes, refused)
        return Turn(
            flood=flood,
            good=good,
            flooded=flooded,
            lasted_s=after.at_s - before.at_s,
            statements=grown.statements,
            digests=grown.digests,
            over_budget=after.refused - before.refused,
            refused=refused,
            server_cpu_s=after.cpu_s - before.cpu_s,
            quiet=quiet,
        )

    async def _ask(self, lead_s: float) -> Burst:
        await asyncio.sleep(lead_s)
        bodies = self._service.bodies
        return await self._good.burst(self._service.url, bodies, self._plan.seconds)

    async def _flood(self, flood: Flood) -> Burst:
        feeds = tokens.feeds(flood.kind, flood.connections, self._rng)
        # From before the first good call until after the last.
        seconds = self._plan.seconds + 2 * LEAD_S
        return await self._floods[flood.connections].fed([self._service.url], feeds, seconds)

    async def _count(self) -> _Count:
        scrape = await Scrape.read(self._service.metrics_port)
        return _Count(
            figures=Figures.of(scrape),
            refused=scrape.total(REFUSED),
            unavailable=scrape.total("latchgate_calls_total", code="UNAVAILABLE"),
            cpu_s=process_cpu_s(self._service.pid),
            at_s=time.monotonic(),
        )


def check_counts(good: Burst, flooded: Burst | None, outcomes: Mapping[str, float], refused: float) -> None:
    """Demands as many VALID answers as there were good calls, and of the others none but of the flood.

    What was under way when the time was up may have been answered or not.
    """
    valid = outcomes.get("VALID", 0)
    others = sum(outcomes.values()) - valid + refused
    least, most = (flooded.succeeded, flooded.started) if flooded else (0, 0)
    if not (good.succeeded <= valid <= good.started and least <= others <= most) or set(outcomes) - {
        "VALID",
        "NOT_FOUND",
    }:
        raise BenchError(
            f"h2load saw {good.succeeded} answers to {good.started} calls with good keys, and {least} to {most} of the"
            f" flood, but the service counted {dict(outcomes)} and {refused:.0f} UNAVAILABLE"
        )


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
