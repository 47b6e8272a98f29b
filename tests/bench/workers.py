"""`make bench-workers`: what a second worker adds to Validate from memory; writes docs/workers.md.

Exit codes: 0 measured (whatever the figures), 1 the figures can not be had or not be believed, 2 bad arguments,
3 the machine lacks what it takes, 130 stopped.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, servers, workers_page  # noqa: E402 - found by the line above
from bench.command import positive, say  # noqa: E402 - the same
from bench.load import Load, h2load_path  # noqa: E402 - the same
from bench.machine import own_cpu_s  # noqa: E402 - the same
from bench.report import as_text  # noqa: E402 - the same
from bench.rounds import check_outcomes, check_sizes  # noqa: E402 - the same
from bench.servers import Figures, Fleet  # noqa: E402 - the same
from bench.workers_page import FEW, KEYS, MANY, Cores, Results, Turn  # noqa: E402 - the same

PAGE = ROOT / "docs" / "workers.md"
CALLS, CPU = "latchgate_worker_calls_total", "process_cpu_seconds_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    rounds: int
    seconds: float
    processes: int
    seed: int


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = command.arguments("make bench-workers", "Measures what a second worker adds.", rounds=7, seconds=5.0)
    parser.add_argument("--processes", type=positive, default=32, help="connections (%(default)s)")
    arguments = parser.parse_args()
    h2load_path()
    cores = Cores.share_out(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores.load)
    plan = Plan(rounds=arguments.rounds, seconds=arguments.seconds, processes=arguments.processes, seed=arguments.seed)
    turns = command.run(_measure(plan, cores))
    results = Results(cores=cores, turns=turns, processes=plan.processes, seconds=plan.seconds)
    say("")
    say(as_text(workers_page.table(results)))
    for line in workers_page.findings(results):
        say(line)
    command.write_page(workers_page.write(results), arguments.output, PAGE)
    return 0


async def _measure(plan: Plan, cores: Cores) -> Sequence[Turn]:
    """Has the two services take turns; a first round is not counted. Raises BenchError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(cores.load))
        seeded = await stack.enter_async_context(cluster.seeded(KEYS))
        fleets = [
            await stack.enter_async_context(servers.fleet(seeded, FEW, cores.few, folder)),
            await stack.enter_async_context(servers.fleet(seeded, MANY, cores.many, folder)),
        ]
        rng = random.Random(plan.seed)  # noqa: S311 - which keys are asked for is no secret
        load = Load(cores=cores.load, processes=plan.processes, folder=folder / "load", rng=rng, turn_s=cores.turn_s)
        bodies = [servers.body(token) for token in seeded.tokens]
        turns = []
        for number in range(plan.rounds + 1):
            # Neither always follows the other.
            for fleet in fleets if number % 2 else reversed(fleets):
                await fleet.warm()
                turn = await _turn(number, fleet, load, bodies, plan.seconds)
                say(
                    f"{f'round {number}' if number else 'warm-up':8} {fleet.name:9} {turn.burst.per_s:7,.0f}/s "
                    f"{turn.cpu_us:4.0f} us/call  workers {turn.workers_share:.0%}  load {turn.load_share:.0%}"
                )
                if number:
                    turns.append(turn)
        return turns


async def _turn(number: int, fleet: Fleet, load: Load, bodies: Sequence[bytes], seconds: float) -> Turn:
    """Loads one service, and demands that every answer was VALID, and counted."""
    before, own_s, began_s = await fleet.scrape(), own_cpu_s(), time.monotonic()
    burst = await load.burst(fleet.url, bodies, seconds)
    lasted_s, load_s = time.monotonic() - began_s, own_cpu_s() - own_s
    after = await fleet.scrape()
    check_sizes(burst, fleet)
    check_outcomes(burst, Figures.of(after).since(Figures.of(before)).outcomes)
    calls, cpu = (
        {worker: after.by("worker", name)[worker] - value for worker, value in before.by("worker", name).items()}
        for name in (CALLS, CPU)
    )
    return Turn(
        round=number,
        workers=fleet.workers,
        burst=burst,
        lasted_s=lasted_s,
        load_cpu_s=load_s,
        cpu_s={worker: cpu[worker] for worker in calls},
        calls=calls,
    )


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
