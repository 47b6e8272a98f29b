"""`make bench-settings`: what each choice of how gRPC is run costs, and Validate itself; writes docs/settings.md.

Servers are loaded side by side, on one core and at the same time, and their processor time for each call is compared:
whatever else the machine does meanwhile, it does to all of them. Exit codes are those of `make bench`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from apikeys.v1 import key_service_pb2 as pb  # noqa: E402 - the same
from bench import command, database, servers  # noqa: E402 - found by the line above
from bench.command import say  # noqa: E402 - the same
from bench.load import Load  # noqa: E402 - the same
from bench.machine import Layout, grown_s, threads_cpu_s  # noqa: E402 - the same
from bench.metrics import Scrape  # noqa: E402 - the same
from bench.page import machine_line, paragraph  # noqa: E402 - the same
from bench.report import Rows, as_markdown, as_text, spread  # noqa: E402 - the same
from bench.rounds import check_sizes  # noqa: E402 - the same
from bench.servers import Service, Source, Target  # noqa: E402 - the same
from latchgate.limiting import SETTLE_S  # noqa: E402 - the same
from latchgate.rpc.server import SERVERS  # noqa: E402 - the same

PAGE = ROOT / "docs" / "settings.md"
KEYS = 1000
PROCESSES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A way to run the no-op: choices as in noop.py, and the environment."""

    name: str
    choices: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    taken: str


BASE = Setting(name="no-op", taken="")
VALIDATES = ("Validate from memory, a key with a limit", "Validate from memory, a key without a limit")

METHOD = (
    paragraph(
        "Validate adds three things to grpc's own work: to read the request (what follows after the token is read once"
        " for all requests that say the same), to find the key (BLAKE2s of the token, one dictionary, the lease and the"
        " ends) and count it against its limit, and to put the answer together from what was written when the key was"
        " loaded. Each step meets a processor whose caches and predictions grpc and the kernel have used since the last"
        " call, and takes several times what it takes in a loop of its own. So what counts is how little is done, not"
        " how cleverly: it is one row of plain calls, counters are plain numbers, and nothing is allocated that could"
        " be made before. Part of it is won back, because the no-op reads and writes messages and its handler is looked"
        " into by grpc at every call."
    ),
    paragraph(
        "Methods that are registered with grpc's core, as generated code does, cost every call a little, Validate's"
        " too: for each of them grpc.aio asks for one more call, and each time one comes it goes over all that it has"
        " asked for. So those of health and reflection are found by their names alone."
    ),
    paragraph(
        "Also tried, without a gain: registering Validate with grpc's core instead of a generic handler, fewer runs of"
        " the garbage collector, answering with a ready-made awaitable instead of a coroutine, one malloc arena. With a"
        " gain of two to five in a hundred each, and not taken: longer slices of time from the scheduler"
        " (sched_setattr, 10 to 50 ms), because whatever else runs on the core would wait for as long; and a shorter"
        " wait for the next call than asyncio.wait, which grpc uses for the one task that it makes for it, because that"
        " would replace a name within grpc's own module."
    ),
)

# Few beside each other: the more there are, the less each finds of its own in the processor's caches.
GROUPS: tuple[tuple[Setting, ...], ...] = (
    tuple(
        Setting(name=f"{count} of grpc's servers on the port", choices=(f"servers={count}",), taken=f"{SERVERS}")
        for count in (1, 2, 4, 16)
    ),
    (
        Setting(
            name="grpc.aio and uvloop as they come", choices=("plain",), environment={"GRPC_EXPERIMENTS": ""}, taken=""
        ),
        Setting(name="grpc's newer listener", environment={"GRPC_EXPERIMENTS": ""}, taken="the former one"),
        Setting(name="the usual scheduling policy", choices=("policy",), taken="SCHED_BATCH"),
        Setting(name="asyncio's own event loop", choices=("asyncio",), taken="uvloop"),
    ),
    (
        Setting(name="BDP probes", choices=("grpc.http2.bdp_probe=1",), taken="without"),
        Setting(name="health and reflection, registered with grpc", choices=("registered",), taken="by name alone"),
        Setting(name="bytes instead of messages", choices=("bytes",), taken="so"),
        Setting(name="bytes, and a handler that says it is a coroutine", choices=("bytes", "coroutine"), taken="so"),
    ),
    (
        Setting(name="the no-op once more: how far two of the same are apart", taken=""),
        Setting(name="grpc's minimal stack", choices=("grpc.minimal_stack=1",), taken="no: connections would not age"),
        Setting(name="without channelz", choices=("grpc.enable_channelz=0",), taken="no: nothing to be gained"),
        Setting(
            name="huge pages for malloc",
            environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
            taken="no: little, and it takes memory",
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What calls cost a server, round by round: in microseconds of processor time, and over the no-op beside it.

    `handler_us` are the microseconds, by the service's own clock, from a request's bytes to those of its answer.
    """

    name: str
    taken: str
    handler_us: list[float] = field(default_factory=list)
    call_us: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def main() -> int:
    """Measures and gives the exit code."""
    parser = command.arguments(
        "make bench-settings", "Measures what choices of how gRPC is run cost.", rounds=6, seconds=4.0
    )
    command.take_note(parser)
    arguments = parser.parse_args()
    layout = command.one_core_for_the_load()
    costs = command.run(_measure(arguments.rounds, arguments.seconds, layout, random.Random(arguments.seed)))  # noqa: S311 - no secret
    say(as_text(table(costs)))
    command.write_page(
        write(costs, arguments.rounds, arguments.seconds, layout, arguments.note), arguments.output, PAGE
    )
    return 0


class _Comparison:
    """Loads servers side by side, the no-op first among them."""

    def __init__(self, rounds: int, seconds: float, layout: Layout, folder: Path, rng: random.Random) -> None:
        self._rounds = rounds
        self._seconds = seconds
        self._layout = layout
        self._folder = folder
        self._rng = rng

    async def noop(self, stack: AsyncExitStack, answer: pb.ValidateResponse, setting: Setting) -> Target:
        """Starts a no-op, until the stack ends it."""
        running = servers.noop(
            answer, self._layout.server, self._folder, choices=setting.choices, environment=setting.environment
        )
        return await stack.enter_async_context(running)

    async def run(self, targets: Sequence[Target], bodies: Sequence[bytes], costs: Sequence[Cost]) -> None:
        """Fills in what calls cost all servers but the first. A first round is not counted."""
        loads = [
            Load(
                cores=[self._layout.load],
                processes=PROCESSES,
                folder=self._folder / f"load-{target.port}",
                rng=self._rng,
            )
            for target in targets
        ]
        for number in range(self._rounds + 1):
            turns = (self._turn(load, target, bodies) for load, target in zip(loads, targets, strict=True))
            base_us, *others_us = await asyncio.gather(*turns)
            if not number:
                continue
            for cost, call_us in zip(costs, others_us, strict=True):
                cost.call_us.append(call_us)
                cost.ratios.append(call_us / base_us)
        for cost in costs:
            say(f"{cost.name:45} {spread(cost.ratios, '.3f')}")

    async def _turn(self, load: Load, target: Target, bodies: Sequence[bytes]) -> float:
        before_s = threads_cpu_s(target.pid)
        burst = await load.burst(target.url, bodies, self._seconds)
        used_s = grown_s(before_s, threads_cpu_s(target.pid))
        check_sizes(burst, target)
        return used_s * 1e6 / burst.succeeded


async def _handled(service: Service) -> tuple[float, float]:
    """Gives how many seconds the service has taken for calls of Validate, and for how many."""
    scrape = await Scrape.read(service.metrics_port)
    seconds, count = (
        scrape.total(f"latchgate_call_seconds_{each}", method="KeyService/Validate") for each in ("sum", "count")
    )
    return seconds, count


async def _measure(rounds: int, seconds: float, layout: Layout, rng: random.Random) -> list[Cost]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(layout.database))
        limited = await stack.enter_async_context(cluster.seeded(KEYS))
        unlimited = await stack.enter_async_context(cluster.seeded(KEYS))
        await database.lift_limits(unlimited.url)
        comparison = _Comparison(rounds, seconds, layout, folder, rng)
        costs = [Cost(name=name, taken="") for name in VALIDATES]
        for seeded, cost in zip((limited, unlimited), costs, strict=True):
            async with AsyncExitStack() as running:
                service = await running.enter_async_context(
                    servers.service(seeded, Source.MEMORY, layout.server, folder)
                )
                await service.warm()
                # Before that calls wait for permits that the worker has none of yet.
                await asyncio.sleep(SETTLE_S)
                before_s, before = await _handled(service)
                answer, bodies = service.answer, service.bodies
                await comparison.run([await comparison.noop(running, answer, BASE), service], bodies, [cost])
                after_s, after = await _handled(service)
                cost.handler_us.append((after_s - before_s) * 1e6 / (after - before))
        for group in GROUPS:
            async with AsyncExitStack() as running:
                targets = [await comparison.noop(running, answer, each) for each in (BASE, *group)]
                found = [Cost(name=each.name, taken=each.taken) for each in group]
                await comparison.run(targets, bodies, found)
                costs += found
        return costs


def table(costs: Sequence[Cost]) -> Rows:
    """Gives a row for each server, the head first."""
    rows = [(cost.name, spread(cost.ratios, ".3f"), spread(cost.call_us, ".0f"), cost.taken) for cost in costs]
    return [("server", "CPU of a call, over the no-op's beside it", "µs/call", "what the service does"), *rows]


def write(costs: Sequence[Cost], rounds: int, seconds: float, layout: Layout, note: str) -> str:
    """Writes the page, with a note on how the machine was used besides."""
    blocks = (
        "# What Validate costs, and what was tried",
        paragraph(
            "The processor time of a call that is answered from memory, and how it depends on the way in which gRPC is"
            " run, all compared with a no-op of the same size (as in [performance](performance.md)) that runs as the"
            " service does. This page is written by `make bench-settings`; its figures are those of one run on one"
            " machine."
        ),
        as_markdown(table(costs)),
        *(
            paragraph(
                f"{cost.name}: {us:.0f} µs from a request's bytes to those of its answer, the mean by the service's own"
                " clock (`latchgate_call_seconds`), moments in which something else ran on its core included."
            )
            for cost in costs
            for us in cost.handler_us
        ),
        paragraph(f"Medians of {rounds} rounds of {seconds:g} s, with the least and the most in brackets."),
        paragraph(
            "Servers were loaded side by side, at the same time on one core: whatever else the machine did, it did to"
            " all of them. How far the no-op once more is from the no-op is what a difference has to be beyond to be"
            " one. It is also why a call costs more here than where one server has the core to itself: each finds the"
            " processor's caches as the others have left them."
        ),
        *METHOD,
        paragraph(f"{machine_line(layout.total)} {note}".strip()),
        "```\nmake bench-settings\n```",
    )
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
