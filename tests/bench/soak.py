"""`make soak`: an hour of steady load on two workers, to see whether anything grows; writes docs/soak.md.

Exit codes: 0 done, or stopped by SIGTERM or Ctrl-C with nothing wrong until then; 1 a wrong answer or an error was
seen, or the figures can not be had; 2 bad arguments. Samples are in build/soak.csv as soon as they are taken.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, samples, servers, soak_page  # noqa: E402 - found by the line above
from bench.command import say  # noqa: E402 - the same
from bench.metrics import Scrape  # noqa: E402 - the same
from bench.report import as_text  # noqa: E402 - the same
from bench.samples import Sample, SampleFile  # noqa: E402 - the same
from bench.servers import Fleet  # noqa: E402 - the same
from bench.soak_page import CACHE_KEYS, KEYS, WORKERS, Soaked  # noqa: E402 - the same
from bench.steady import SteadyLoad, Tally, until_set  # noqa: E402 - the same

PAGE, SAMPLES = ROOT / "docs" / "soak.md", ROOT / "build" / "soak.csv"
# So often in a row the service may not tell its figures before it is taken for gone.
MAX_SILENT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to load and how much, and how often to look."""

    seconds: float
    settling_s: float
    every_s: float
    per_s: float
    file: Path


def main() -> int:
    """Soaks and gives the exit code."""
    parser = argparse.ArgumentParser(prog="make soak", description="Loads a service for long, and looks what grows.")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (%(default)s)")
    parser.add_argument("--settling-minutes", type=float, default=10.0, help="left out of the slopes (%(default)s)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples (%(default)s)")
    parser.add_argument("--rate", type=float, default=300.0, help="calls of Validate a second (%(default)s)")
    parser.add_argument("--samples", type=Path, default=SAMPLES, help="the file of samples (build/soak.csv)")
    parser.add_argument("--output", type=Path, help="write the page to this file, and the picture beside it")
    command.take_note(parser)
    arguments = parser.parse_args()
    plan = Plan(
        seconds=arguments.minutes * 60,
        settling_s=arguments.settling_minutes * 60,
        every_s=arguments.every,
        per_s=arguments.rate,
        file=arguments.samples,
    )
    soaked = asyncio.run(_soak(plan))
    say(as_text(soak_page.table(soaked)))
    for line in soak_page.findings(soaked):
        say(line)
    output = arguments.output or (PAGE if len(sys.argv) == 1 else None)
    if output is not None:
        picture = output.with_suffix(".svg")
        picture.write_text(soak_page.picture(soaked))
        output.write_text(soak_page.write(soaked, picture.name, arguments.note))
        say(f"written: {output.name}, {picture.name}")
    return 0 if soaked.is_clean else 1


async def _soak(plan: Plan) -> Soaked:
    """Starts all that is needed, loads and looks, and ends it; SIGTERM and Ctrl-C end it early, in order."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    cores = sorted(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-soak-")))
        cluster = await stack.enter_async_context(database.cluster(cores))
        seeded = await stack.enter_async_context(cluster.seeded(KEYS))
        await database.make_room(seeded.url)
        settings = {"LATCHGATE_CACHE_KEYS": str(CACHE_KEYS)}
        fleet = await stack.enter_async_context(servers.fleet(seeded, WORKERS, cores, folder, settings))
        load = SteadyLoad(address=fleet.address, tokens=seeded.tokens, per_s=plan.per_s, rng=Random())  # noqa: S311 - no secret
        say(f"{WORKERS} workers serve; loading for {plan.seconds / 60:g} min, samples in {plan.file}")
        before = await fleet.scrape()
        looking = _Looking(fleet, load.tally, plan, stopping)
        began_s = time.monotonic()
        async with load.running():
            await looking.run()
        return Soaked(
            wanted_s=plan.seconds,
            lasted_s=time.monotonic() - began_s,
            settling_s=plan.settling_s,
            per_s=plan.per_s,
            samples=looking.samples,
            tally=load.tally,
            cancelled_seen=_cancelled(looking.last or before) - _cancelled(before),
            deaths=(looking.last or before).total("latchgate_worker_deaths_total"),
        )


class _Looking:
    """Looks at the workers again and again, and writes down what it sees."""

    def __init__(self, fleet: Fleet, tally: Tally, plan: Plan, stopping: asyncio.Event) -> None:
        self.samples: list[Sample] = []
        self.last: Scrape | None = None
        self._fleet = fleet
        self._tally = tally
        self._plan = plan
        self._stopping = stopping

    async def run(self) -> None:
        """Looks until the time is over, somebody says stop, or the service is gone."""
        plan, silent = self._plan, 0
        plan.file.parent.mkdir(parents=True, exist_ok=True)
        with plan.file.open("w") as text:
            file = SampleFile(text, ("answered", "cancelled", "changes", "errors", "wrong"))
            began_s = time.monotonic()
            at_s = 0.0
            while silent < MAX_SILENT:
                try:
                    self.last = await self._fleet.scrape()
                    silent = 0
                except OSError as error:
                    silent += 1
                    self._tally.failed(error, "reading the metrics")
                else:
                    self._take(self.last, file, time.monotonic() - began_s)
                if at_s >= plan.seconds:
                    return
                at_s = min(at_s + plan.every_s, plan.seconds)
                if await until_set(self._stopping, began_s + at_s - time.monotonic()):
                    return

    def _take(self, scrape: Scrape, file: SampleFile, at_s: float) -> None:
        seen, tally = samples.taken(scrape, at_s), self._tally
        self.samples += seen
        file.write(seen, (tally.answered, tally.cancelled, tally.changes, tally.errors.total(), tally.wrong))
        workers = ", ".join(
            f"worker {each.worker} {each.values['rss_bytes'] / 1e6:.1f} MB {each.values['descriptors']:.0f} descriptors"
            for each in seen
        )
        say(f"{at_s / 60:6.1f} min  {workers}  answered {tally.answered:,}  errors {tally.errors.total()}")


def _cancelled(scrape: Scrape) -> float:
    return scrape.total("latchgate_calls_total", method="KeyService/Validate", code="CANCELLED")


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
