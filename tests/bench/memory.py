"""`make bench-memory`: what a worker takes for each key that it holds in memory; writes docs/memory.md.

Exit codes: 0 measured, 1 the figures can not be had or not be believed, 2 bad arguments, 130 stopped.
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
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, servers  # noqa: E402 - found by the line above
from bench.command import counts, say  # noqa: E402 - the same
from bench.database import Cluster  # noqa: E402 - the same
from bench.machine import BenchError  # noqa: E402 - the same
from bench.metrics import Scrape  # noqa: E402 - the same
from bench.page import machine_line, paragraph  # noqa: E402 - the same
from bench.report import Rows, as_markdown, as_text  # noqa: E402 - the same
from bench.servers import Fleet  # noqa: E402 - the same
from latchgate.domain.ratelimit import MAX_KEYS  # noqa: E402 - the same

PAGE = ROOT / "docs" / "memory.md"
WORKER = "1"
# Of so many keys uses may wait to be written at a time: these take memory as well, that is not the keys'.
AT_ONCE = 10_000
# Last uses are written every five seconds.
WRITTEN_WITHIN_S = 60.0


class Kind(Enum):
    """What keys are measured: a limit has a window in memory as well."""

    LIMITED = "with a rate limit"
    UNLIMITED = "without"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A worker's resident memory with so many keys in it, and before the first was asked for."""

    kind: Kind
    keys: int
    empty_bytes: float
    rss_bytes: float


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = argparse.ArgumentParser(prog="make bench-memory", description="Measures what a key takes in memory.")
    parser.add_argument("--keys", type=counts, default=(1000, 50_000, 100_000), help="(1000,50000,100000)")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    arguments = parser.parse_args()
    held = command.run(_measure(arguments.keys))
    say(as_text(table(held)))
    for kind in Kind:
        say(finding(held, kind))
    command.write_page(_page(held), arguments.output, PAGE)
    return 0


async def _measure(sizes: Sequence[int]) -> Sequence[Held]:
    cores = sorted(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(cores))
        return [await _hold(cluster, kind, keys, cores, folder) for kind in Kind for keys in sizes]


async def _hold(cluster: Cluster, kind: Kind, keys: int, cores: Sequence[int], folder: Path) -> Held:
    """Fills a worker's memory with keys, on a database of theirs. Raises BenchError."""
    began_s = time.monotonic()
    settings = {"LATCHGATE_CACHE_KEYS": str(keys)}
    async with cluster.seeded(keys, tokens=keys) as seeded:
        if kind is Kind.UNLIMITED:
            await database.lift_limits(seeded.url)
        async with servers.fleet(seeded, 1, cores, folder, settings) as fleet:
            empty_bytes = _rss_bytes(await fleet.scrape())
            for first in range(0, keys, AT_ONCE):
                await fleet.ask(seeded.tokens[first : first + AT_ONCE])
                scrape = await _all_written(fleet)
            if scrape.total("latchgate_memory_keys") < keys:
                raise BenchError(f"the worker does not hold all {keys:,} keys")
            rss_bytes = _rss_bytes(scrape)
    say(f"{keys:,} keys {kind.value}: {rss_bytes / 1e6:.1f} MB, after {time.monotonic() - began_s:.0f} s")
    return Held(kind=kind, keys=keys, empty_bytes=empty_bytes, rss_bytes=rss_bytes)


async def _all_written(fleet: Fleet) -> Scrape:
    """Waits until the worker does not hold any last uses any more, which are no keys."""
    deadline_s = time.monotonic() + WRITTEN_WITHIN_S
    while (scrape := await fleet.scrape()).total("latchgate_last_used_pending"):
        if time.monotonic() > deadline_s:
            raise BenchError("the last uses are not written")
        await asyncio.sleep(0.5)
    return scrape


def _rss_bytes(scrape: Scrape) -> float:
    return scrape.by("worker", "process_resident_memory_bytes")[WORKER]


def bytes_a_key(held: Sequence[Held], kind: Kind) -> float | None:
    """Gives the slope of memory over keys, by least squares; None for a single number of keys."""
    points = [(each.keys, each.rss_bytes) for each in held if each.kind is kind]
    if len(points) == 1:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def finding(held: Sequence[Held], kind: Kind) -> str:
    """Says what a key takes, in a sentence."""
    slope = bytes_a_key(held, kind)
    if slope is None:
        return f"What a key {kind.value} takes is not told by a single number of keys."
    return f"A key in memory {kind.value} takes {slope:,.0f} bytes of a worker's resident memory."


def table(held: Sequence[Held]) -> Rows:
    """Gives a row for each number of keys, the head first."""
    head = ("keys", "", "RSS before the first, MB", "RSS with all, MB", "grown by, bytes a key")
    return [
        head,
        *(
            (
                f"{each.keys:,}",
                each.kind.value,
                f"{each.empty_bytes / 1e6:,.1f}",
                f"{each.rss_bytes / 1e6:,.1f}",
                f"{(each.rss_bytes - each.empty_bytes) / each.keys:,.0f}",
            )
            for each in held
        ),
    ]


def _page(held: Sequence[Held]) -> str:
    blocks = (
        "# Memory",
        paragraph(
            "What a worker takes for each key that it holds in memory. This page is written by `make bench-memory`; its"
            " figures are those of one run on one machine."
        ),
        as_markdown(table(held)),
        paragraph(
            f"**{finding(held, Kind.LIMITED)} {finding(held, Kind.UNLIMITED)}** It is the slope of the line of least"
            " squares through the rows of each. With few keys, what a worker takes once for its first calls counts for"
            " more than the keys. With a rate limit its window is in memory as well; of these a worker holds at most"
            f" {MAX_KEYS:,}."
        ),
        paragraph(
            "Each row is one `latchgate serve` with one worker, room for so many keys (`LATCHGATE_CACHE_KEYS`) and else"
            " default settings, on a database of its own. Every key was asked for once by BatchValidate, 100 in a call;"
            f" after each {AT_ONCE:,} keys it was waited until their uses were written. In the end"
            " `process_resident_memory_bytes` and `latchgate_memory_keys` were read from the metrics. The keys have"
            " three permissions, a user with a mail address and two entries of metadata, and 1,000 of them each belong"
            " to an organization; those without a limit are of a plan that has none. Each worker has a memory of its"
            " own."
        ),
        paragraph(machine_line(len(os.sched_getaffinity(0)))),
        "## Repeat it",
        "```\nmake bench-memory\n```",
    )
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
