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
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, servers, workers_page  # noqa: E402 - found by the line above
from bench.command import positive, say  # noqa: E402 - the same
from bench.load import Load, h2load_path  # noqa: E402 - the same
from bench.machine import own_cpu_s, stolen_s  # noqa: E402 - the same
from bench.report import as_text  # noqa: E402 - the same
from bench.rounds import check_outcomes, check_sizes  # noqa: E402 - the same
from bench.servers import Figures, Fleet  # noqa: E402 - the same
from bench.workers_page import APART, FEW, KEYS, MANY, ONE, TWO, Cores, Results, Turn, Width  # noqa: E402 - the same

PAGE = ROOT / "docs" / "workers.md"
CALLS, CPU = "latchgate_worker_calls_total", "process_cpu_seconds_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    rounds: int
    seconds: float
    width: Width
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One service, or two that are called at once."""

    name: str
    fleets: Sequence[Fleet]


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = command.arguments("make bench-workers", "Measures what a second worker adds.", rounds=12, seconds=5.0)
    parser.add_argument("--connections", type=positive, default=8, help="of each h2load (%(default)s)")
    parser.add_argument("--streams", type=positive, default=8, help="calls at a time of each of those (%(default)s)")
    arguments = parser.parse_args()
    h2load_path()
    cores = Cores.share_out(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores.load)
    width = Width(connections=arguments.connections, streams=arguments.streams)
    plan = Plan(rounds=arguments.rounds, seconds=arguments.seconds, width=width, seed=arguments.seed)
    turns = command.run(_measure(plan, cores))
    results = Results(cores=cores, turns=turns, width=width, seconds=plan.seconds)
    say("")
    say(as_text(workers_page.table(results)))
    for line in workers_page.findings(results):
        say(line)
    command.write_page(workers_page.write(results), arguments.output, PAGE)
    return 0


async def _measure(plan: Plan, cores: Cores) -> Sequence[Turn]:
    """Has all contenders take turns; a first round is not counted. Raises BenchError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(cores.load))
        contenders = [
            Contender(
                name=name,
                # With a database each, they know nothing of each other.
                fleets=[
                    await stack.enter_async_context(
                        servers.fleet(await stack.enter_async_context(cluster.seeded(KEYS)), workers, on, folder)
                    )
                    for workers in of_workers
                ],
            )
            for name, of_workers, on in (
                (ONE, [FEW], cores.few),
                (TWO, [MANY], cores.many),
                (APART, [FEW] * MANY, cores.many),
            )
        ]
        rng = random.Random(plan.seed)  # noqa: S311 - neither the order nor which keys are asked for is a secret
        load = Load(
            cores=cores.load,
            processes=plan.width.processes,
            connections=plan.width.connections,
            streams=plan.width.streams,
            folder=folder / "load",
            rng=rng,
        )
        turns = []
        for number in range(plan.rounds + 1):
            # None always follows the same one.
            for contender in rng.sample(contenders, len(contenders)):
                turn = await _turn(number, contender, load, plan, cores)
                say(
                    f"{f'round {number}' if number else 'warm-up':8} {contender.name:10} {turn.burst.per_s:7,.0f}/s "
                    f"{turn.cpu_us:4.0f} us/call  workers {turn.workers_share:.0%}  load {turn.load_share:.0%}  "
                    f"stolen {turn.stolen_share:.0%}"
                )
                if number:
                    turns.append(turn)
        return turns


async def _turn(number: int, contender: Contender, load: Load, plan: Plan, cores: Cores) -> Turn:
    """Loads one contender, and demands that every answer was VALID, and counted."""
    fleets = contender.fleets
    for fleet in fleets:
        await fleet.warm()
    bodies = [[servers.body(token) for token in fleet.seeded.tokens] for fleet in fleets]
    feeds = [load.drawn(bodies[process % len(fleets)]) for process in range(plan.width.processes)]
    used = {*cores.many, *cores.load}
    before = [await fleet.scrape() for fleet in fleets]
    began_s, own_s, taken_s = time.monotonic(), own_cpu_s(), stolen_s(used)
    burst = await load.fed([fleet.url for fleet in fleets], feeds, plan.seconds)
    lasted_s, load_s, taken_s = time.monotonic() - began_s, own_cpu_s() - own_s, stolen_s(used) - taken_s
    after = [await fleet.scrape() for fleet in fleets]
    check_sizes(burst, fleets[0])
    outcomes: Counter[str] = Counter()
    calls, cpu_s = [], 0.0
    for earlier, later in zip(before, after, strict=True):
        outcomes.update(Figures.of(later).since(Figures.of(earlier)).outcomes)
        for worker, count in earlier.by("worker", CALLS).items():
            calls.append(later.by("worker", CALLS)[worker] - count)
            cpu_s += later.by("worker", CPU)[worker] - earlier.by("worker", CPU)[worker]
    check_outcomes(burst, outcomes)
    return Turn(
        contender=contender.name,
        round=number,
        burst=burst,
        lasted_s=lasted_s,
        load_cpu_s=load_s,
        stolen_s=taken_s,
        cpu_s=cpu_s,
        calls=calls,
    )


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
