"""`make bench-same-server`: Validate from memory and a no-op RPC by turns, on the same server.

Writes docs/same-server.md. Exit codes: 0 measured (whatever the figures), 1 the figures can not be had or not be
believed, 2 bad arguments, 3 the machine lacks what it takes, 130 stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, servers  # noqa: E402 - after the line above, as all that follows
from bench.command import counts, positive, say  # noqa: E402 - the same
from bench.database import Seeded  # noqa: E402 - the same
from bench.load import Load, Window  # noqa: E402 - the same
from bench.machine import BenchError, Layout  # noqa: E402 - the same
from bench.page import bullets, machine_line, paragraph  # noqa: E402 - the same
from bench.report import RATIO_WANTED, Rows, as_markdown, as_text, at_least, bounds, spread  # noqa: E402 - the same
from bench.rounds import NICENESS  # noqa: E402 - the same
from bench.servers import Source  # noqa: E402 - the same
from bench.twofold import SLICE_S  # noqa: E402 - the same
from latchgate.domain.shares import LASTING_S  # noqa: E402 - the same
from latchgate.limiting import SETTLE_S  # noqa: E402 - the same

PAGE = ROOT / "docs" / "same-server.md"
IN_USE = (100, 1000, 10_000)
PROGRAM = (str(Path(__file__).with_name("twofold.py")),)
LEAD_S = 0.005
"""What is not counted of each turn: until then calls of the other kind are under way."""
PAIRS = 30
"""How many turns of each kind make a ratio."""
STARTING_S = SETTLE_S + LASTING_S
"""How long the load runs before the turns begin: until a worker that has just started asks the store of rate limits no
more than it will for good, and has permits of all keys that are often asked for."""
CONNECTION_AGE_S = 3600
"""For how long a connection may last: longer than any load, because h2load makes no other one when it has ended."""
ENDING_S = 1.0
"""How long it runs beyond those that count, so that all are at work to the last of them."""
COUNTED_TOLERANCE = 0.02
"""By how much the VALID answers that the service has counted may differ from those that came in Validate's turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A turn: whether it was Validate's, and from when to when, in seconds since 1970."""

    is_own: bool
    begin_s: float
    end_s: float

    @property
    def window(self) -> Window:
        """What is counted of it."""
        return Window(begin_s=self.begin_s + LEAD_S, told_s=self.end_s, end_s=self.end_s)

    @property
    def whole(self) -> Window:
        """All of it."""
        return Window(begin_s=self.begin_s, told_s=self.end_s, end_s=self.end_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure: with so many keys in use, in so many processes one after the other, for so long in each."""

    in_use: tuple[int, ...]
    rounds: int
    seconds: float
    processes: int
    seed: int


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    arguments = _arguments()
    layout = command.one_core_for_the_load()
    plan = Plan(
        in_use=arguments.in_use,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        processes=arguments.processes,
        seed=arguments.seed,
    )
    found = command.run(_measure(plan, layout))
    say("")
    say(as_text(_table(found)))
    command.write_page(_page(plan, layout, found), arguments.output, PAGE)
    return 0


def _arguments() -> argparse.Namespace:
    parser = command.arguments(
        "make bench-same-server", "Measures Validate against a no-op RPC on the same server.", rounds=4, seconds=24.0
    )
    parser.add_argument("--processes", type=positive, default=32, help="calls under way at a time (%(default)s)")
    parser.add_argument(
        "--in-use", type=counts, default=IN_USE, help=f"how many keys are asked for ({','.join(map(str, IN_USE))})"
    )
    return parser.parse_args()


async def _measure(plan: Plan, layout: Layout) -> dict[int, list[float]]:
    """Gives the ratios by the number of keys in use. Each process serves one of these numbers, in an order by turns."""
    rng = random.Random(plan.seed)  # noqa: S311 - which keys are asked for is no secret
    found: dict[int, list[float]] = {in_use: [] for in_use in plan.in_use}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(layout.database))
        seeded = await stack.enter_async_context(cluster.seeded(max(plan.in_use)))
        for number in range(plan.rounds):
            for in_use in rng.sample(plan.in_use, len(plan.in_use)):
                own = Path(tempfile.mkdtemp(dir=folder))
                load = Load(
                    cores=[layout.load], processes=plan.processes, folder=own / "load", rng=rng, niceness=NICENESS
                )
                ratios = await _ratios(seeded, load, plan, in_use=in_use, core=layout.server, folder=own)
                found[in_use] += ratios
                say(f"round {number + 1}  {in_use:7,} keys in use  ratio {spread(ratios, '.3f')}")
    return found


async def _ratios(seeded: Seeded, load: Load, plan: Plan, *, in_use: int, core: int, folder: Path) -> list[float]:
    """Starts a service, and has it called for so long.

    Gives Validate's calls a second over the no-op's, about every two seconds. Raises BenchError.
    """
    answer, told = folder / "answer", folder / "slices"
    settings = {
        "BENCH_ANSWER": str(answer),
        "BENCH_SLICES": str(told),
        "LATCHGATE_CONNECTION_AGE_SECONDS": str(CONNECTION_AGE_S),
    }
    async with servers.service(
        seeded, Source.MEMORY, core, folder, settings, in_use=in_use, program=PROGRAM
    ) as service:
        answer.write_bytes(service.answer.SerializeToString())
        await service.warm()
        await service.check_answers()
        figures = await service.figures()
        feeds = [load.drawn(service.bodies)] * plan.processes
        async with load.calling([service.url], feeds, STARTING_S + plan.seconds + ENDING_S) as callers:
            await asyncio.sleep(STARTING_S)
            end_s = time.time() + plan.seconds
            os.kill(service.pid, signal.SIGUSR1)
            burst = await callers.burst()
            slices = read(told)
            answers = callers.answered_within([each.whole for each in slices])
            full = [each for each in slices if each.end_s <= end_s]
            counted = callers.answered_within([each.window for each in full])
        if burst.failed:
            raise BenchError(f"{burst.failed} calls failed")
        outcomes = (await service.figures()).since(figures).outcomes
        of_noop = sum(count for count, each in zip(answers, slices, strict=True) if not each.is_own)
        check(service.name, burst.succeeded - of_noop, outcomes.get("VALID", 0.0))
    return ratios_of(full, counted)


def check(name: str, answered: float, valid: float) -> None:
    """Demands that Validate was answered in its turns, and the no-op in its own. Raises BenchError."""
    if abs(answered - valid) > COUNTED_TOLERANCE * answered:
        raise BenchError(f"{answered:.0f} calls were answered in Validate's turns, but {name} has counted {valid:.0f}")


def ratios_of(slices: Sequence[Slice], counted: Sequence[int]) -> list[float]:
    """Compares the calls a second of each so many turns of both kinds, one after the other. Raises BenchError."""
    found = []
    turns = list(zip(slices, counted, strict=True))
    for first in range(0, len(turns) - 2 * PAIRS + 1, 2 * PAIRS):
        per_s = {True: 0.0, False: 0.0}
        for is_own in per_s:
            own = [(each, count) for each, count in turns[first : first + 2 * PAIRS] if each.is_own is is_own]
            per_s[is_own] = sum(count for _, count in own) / sum(each.window.lasts_s for each, _ in own)
        if not per_s[False]:
            raise BenchError("the no-op has answered nothing")
        found.append(per_s[True] / per_s[False])
    if not found:
        raise BenchError(f"the server has had {len(slices)} turns only")
    return found


def read(told: Path) -> list[Slice]:
    """Reads what turns the server has had."""
    if not told.exists():
        raise BenchError("the server has not begun to take turns")
    lines = (line.split() for line in told.read_text(encoding="ascii").splitlines())
    return [Slice(is_own=kind == "own", begin_s=float(begin), end_s=float(end)) for kind, begin, end in lines]


def _table(found: dict[int, list[float]]) -> Rows:
    """Gives a row for each number of keys in use, the head first."""
    head = ("keys in use", "Validate over the no-op", "ratios", "its median lies between (95 %)")
    return [
        head,
        *(
            (
                f"{in_use:,}",
                spread(ratios, ".3f"),
                str(len(ratios)),
                " to ".join(f"{each:.3f}" for each in bounds(ratios) or ()) or "-",
            )
            for in_use, ratios in found.items()
        ),
    ]


def _page(plan: Plan, layout: Layout, found: dict[int, list[float]]) -> str:
    """Writes the page."""
    wanted = RATIO_WANTED[Source.MEMORY]
    blocks = (
        "# Validate and a no-op on the same server",
        paragraph(
            "What answering a validation from memory takes beyond the RPC that carries it."
            " [Performance](performance.md) compares processes, where more differs, more is counted, and figures spread"
            " more. This page is written by `make bench-same-server`; its figures are those of one run on one machine."
        ),
        "## Results",
        as_markdown(_table(found)),
        bullets(at_least(f"{in_use:,} keys in use", ratios, wanted, ".3f") for in_use, ratios in found.items()),
        "## How it is measured",
        bullets(_method(plan)),
        paragraph(
            f"The server ran on core {layout.server}, h2load and PostgreSQL on core {layout.load}. "
            + machine_line(layout.total)
        ),
        "## Repeat it",
        "```\nmake bench-same-server\n```",
    )
    return "\n\n".join(blocks) + "\n"


def _method(plan: Plan) -> Iterator[str]:
    yield (
        "**On the same server**: one worker of `latchgate serve`, with its default settings but for how long"
        f" connections last, whose Validate is by turns the service's own and a no-op, {SLICE_S * 1000:g} ms each."
        " The no-op is a handler with protobuf's own serializers: it reads the request, and gives to all one of the"
        " service's answers."
        " Callers notice nothing: process, event loop, grpc's servers, connections and requests are the same."
    )
    yield (
        "**Not in these figures** is what the service does beside the calls, in its own time: it renews its"
        " lease, asks for permits of rate limits and writes how keys were used during turns of both kinds."
        " In [performance](performance.md) it is."
    )
    yield (
        f"**Settled**: turns began after {STARTING_S:g} s of load. A worker asks the store of rate limits more in its"
        f" first {SETTLE_S:g} s, until it may let a part of each limit through without a word; and more of keys that"
        " were not asked for lately."
    )
    yield (
        f"**Counted**: the answers in h2load's log, without those of the first {LEAD_S * 1000:g} ms of each"
        f" turn, when calls of the other kind were still under way. {PAIRS} turns of each kind, one after the"
        f" other, make a ratio. Each number of keys in use had {plan.rounds} processes of its own, each for"
        f" {plan.seconds:g} s."
    )
    yield (
        f"**Keys in use**: {plan.processes} processes of `h2load` with one connection and one request at a time"
        " send tokens of so many keys at random. The more there are, the longer it was that a key was used last: more"
        " calls are then the first of their key since its uses were written or its permits have ended, and presumably"
        " more of what is held of it has to come from farther away than the processor's caches."
    )
    yield (
        "**Checked**: no call failed, and the service counted as many VALID answers as came in Validate's"
        f" turns, within {COUNTED_TOLERANCE:.0%}. Medians, with the least and the most in brackets."
    )


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
