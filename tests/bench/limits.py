"""`make bench-limits`: what it takes that all workers share rate limits, and how well they keep them.

Writes docs/limits.md. Exit codes: 0 measured, 1 the figures can not be had or not be believed, 2 bad arguments, 130
stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import asyncpg  # noqa: E402 - after the line above, as all that follows
import grpc  # noqa: E402 - the same
import uvloop  # noqa: E402 - the same

from apikeys.v1 import key_service_pb2 as pb  # noqa: E402 - the same
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub  # noqa: E402 - the same
from bench import command, database, servers  # noqa: E402 - found by the line above
from bench.command import positive, say  # noqa: E402 - the same
from bench.database import Cluster, Seeded  # noqa: E402 - the same
from bench.machine import BenchError, grown_s, own_cpu_s  # noqa: E402 - the same
from bench.page import machine_line, paragraph  # noqa: E402 - the same
from bench.report import Rows, as_markdown, as_text, spread  # noqa: E402 - the same
from latchgate.domain.allotments import Allotments  # noqa: E402 - the same
from latchgate.domain.model import NO_PERMITS, KeyRecord  # noqa: E402 - the same
from latchgate.domain.shares import WINDOW_SLOTS  # noqa: E402 - the same
from latchgate.limiting import SharedLimiter  # noqa: E402 - the same
from latchgate.storage.ratelimit import PostgresRateStore, rate_link  # noqa: E402 - the same
from support.limits import MemoryRateStore  # noqa: E402 - the same
from support.records import KEY_RECORD  # noqa: E402 - the same

PAGE = ROOT / "docs" / "limits.md"
PLENTY: Final = 100_000_000
MINUTE_S: Final = 60.0
# Of each key in turn.
KEYS: Final = 1000
TURNS: Final = 20
# Keys in use, calls a second, and each key's limit: twice what it is asked for, or far from that.
LOADS: Final = ((10_000, 1000, 12), (10_000, 3000, 36), (1000, 3000, 360), (10, 3000, 36_000), (10_000, 3000, 6000))
# So low that no worker may let anything through without telling of it.
LOW: Final = 30
LIMITS: Final = (1, 60, 600, 6000)
WORKERS: Final = 2
CALLERS: Final = 4
# How often calls are made that are due.
PACE_S: Final = 0.002
# For how long at a time nothing is done at the same pace, beside it.
PIECE_S: Final = 1.0

# The service's own clock.
boottime: Final[Callable[[], float]] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)

Take = Callable[[KeyRecord, int, float], object]


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = argparse.ArgumentParser(prog="make bench-limits", description="Measures rate limits that workers share.")
    parser.add_argument("--rounds", type=positive, default=25, help="of the comparison in one process (%(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each load (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="length of the overload (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    arguments = parser.parse_args()
    takes = compare_takes(arguments.rounds)
    say(as_text(takes))
    loads, overload, version = command.run(_measure(arguments.seconds, arguments.minutes * MINUTE_S))
    say(as_text(loads))
    say(as_text(overload))
    command.write_page(_page(takes, loads, overload, version), arguments.output, PAGE)
    return 0


def compare_takes(rounds: int) -> Rows:
    """Measures what a call adds in one process, in alternating rounds."""
    records = [replace(KEY_RECORD, key_id=f"key_{number:026d}") for number in range(KEYS)]
    allotments, store = Allotments(boottime), MemoryRateStore(time.time)

    def supplied() -> Take:
        for record in records:
            allotments.need(record.key_id, PLENTY, TURNS)
        asks, sent_s = allotments.asks(), boottime()
        allotments.hear(asks, store.step(asks), sent_s)
        for record in records:
            record.permits = allotments.permits(record.key_id)
        return partial(_take, allotments)

    ways: dict[str, tuple[Callable[[], Take], int, int]] = {
        "nothing but the call": (lambda: lambda _record, _limit, _now_s: None, PLENTY, TURNS),
        "with permits": (supplied, PLENTY, TURNS),
        "the first request of a key, on debt": (lambda: partial(_take, Allotments(boottime)), LOW, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (prepare, limit, turns) in ways.items():
            for record in records:
                record.permits = NO_PERMITS
            take, now_s = prepare(), boottime()
            start_s = time.perf_counter()
            for _ in range(turns):
                for record in records:
                    take(record, limit, now_s)
            times[name].append((time.perf_counter() - start_s) / (turns * KEYS) * 1e6)
    return [("way", "µs a call"), *((name, spread(values, ".2f")) for name, values in times.items())]


def _take(allotments: Allotments, record: KeyRecord, limit: int, now_s: float) -> object:
    """Takes a permit as Validator.recall does: in place, where the key has one."""
    permits = record.permits
    used = permits.used + 1
    if permits.left < 1 or used > limit or permits.until_s <= now_s:
        rate = allotments.take(record.key_id, limit, 1)
        record.permits = allotments.permits(record.key_id)
        return rate
    permits.used = used
    permits.left -= 1
    return True, limit, limit - used, WINDOW_SLOTS


@dataclass(slots=True, kw_only=True)
class Statements:
    """Is told of statements. Implements latchgate.limiting.RateObserver."""

    keys: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    def exchanged(self, keys: int, seconds: float) -> None:
        """Takes note."""
        self.keys.append(keys)
        self.seconds.append(seconds)

    def not_exchanged(self) -> None:
        """Takes note."""
        self.failed += 1


async def _measure(seconds: float, overload_s: float) -> tuple[Rows, Rows, str]:
    cores = sorted(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(cores))
        version = await cluster.version()
        async with cluster.seeded(KEYS, tokens=KEYS) as seeded:
            head = (
                "keys in use",
                "limit of each",
                "calls/s",
                "statements/s",
                "keys in each",
                "ms each",
                "waited",
                "worker, µs a call",
                "PostgreSQL, µs a call",
            )  # fmt: skip
            with another_process() as beside:
                loads = [head, *[await _load(cluster, seeded, load, seconds, beside) for load in LOADS]]
            overload = await _overload(seeded, cores, folder, overload_s)
        return loads, overload, version


def another_process() -> ProcessPoolExecutor:
    """Gives one in which nothing is done at a load's pace, beside it. Ctrl-C is left to those that have started it."""
    return ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )


async def _load(
    cluster: Cluster, seeded: Seeded, load: tuple[int, int, int], seconds: float, beside: Executor
) -> tuple[str, ...]:
    """Counts calls for keys at random against PostgreSQL, as a worker does, without the calls themselves."""
    keys, rate, limit = load
    store, statements = PostgresRateStore(rate_link(seeded.url)), Statements()
    # As after a worker's first seconds.
    with mock.patch("latchgate.limiting.SETTLE_S", 0.0):
        limiter = SharedLimiter(store=store, clock=boottime, observer=statements)
    running = asyncio.create_task(limiter.run())
    names = _names(keys)
    waiting: set[asyncio.Task[None]] = set()

    def call(key: str) -> None:
        if limiter.take(key, limit, 1) is None:
            task = asyncio.create_task(limiter.wait(key, limit, 1))
            waiting.add(task)
            task.add_done_callback(waiting.discard)

    # In the first part all keys are new: it is not counted.
    await _drive(call, names, rate, max(seconds / 3, 1.5 * keys / rate))
    # Here it is started.
    await _unloaded(beside, keys, rate, PIECE_S)
    waits, server_s = limiter.waits, await cluster.cpu_s(seeded.url)
    statements.keys.clear()
    statements.seconds.clear()
    (calls, span_s, cpu_s), unloaded_us = await asyncio.gather(
        _drive(call, names, rate, seconds), _unloaded(beside, keys, rate, seconds)
    )
    server_after_s, waits = await cluster.cpu_s(seeded.url), limiter.waits - waits
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await limiter.close()
    await asyncio.gather(*waiting)
    store.close()
    if statements.failed:
        raise BenchError("statements failed: the machine has too much else to do")
    used_s = None if server_s is None or server_after_s is None else grown_s(server_s, server_after_s)
    server = "" if used_s is None else f"{used_s / calls * 1e6:.1f}"
    return (
        f"{keys:,}",
        f"{limit:,}",
        f"{calls / span_s:,.0f}",
        f"{len(statements.keys) / span_s:.1f}",
        f"{statistics.mean(statements.keys):.0f}",
        f"{statistics.median(statements.seconds) * 1e3:.1f} (p99 {_p99(statements.seconds) * 1e3:.1f})",
        f"{waits / calls:.2%}",
        f"{cpu_s / calls * 1e6 - unloaded_us:.1f}",
        server,
    )


def _names(keys: int) -> Sequence[str]:
    return [f"key_{number:026d}" for number in range(keys)]


async def _unloaded(beside: Executor, keys: int, rate: int, seconds: float) -> float:
    """Makes the same calls in another process, where nothing is counted: gives its processor time for each, in us."""
    # Piece by piece, so that it ends soon when it is to.
    pieces = [
        await asyncio.get_running_loop().run_in_executor(beside, _piece, keys, rate)
        for _ in range(max(round(seconds / PIECE_S), 1))
    ]
    return statistics.mean(pieces)


def _piece(keys: int, rate: int) -> float:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        calls, _, cpu_s = runner.run(_drive(lambda _: None, _names(keys), rate, PIECE_S))
    return cpu_s / calls * 1e6


async def _drive(
    call: Callable[[str], None], names: Sequence[str], rate: int, seconds: float
) -> tuple[int, float, float]:
    """Makes calls at an even pace; gives how many, in how many seconds, and this process's processor time for them."""
    draw = random.Random(1)  # noqa: S311 - to repeat, not to hide
    begin_s, cpu_s, calls = boottime(), own_cpu_s(), 0
    for step in range(1, int(seconds / PACE_S) + 1):
        await asyncio.sleep(max(begin_s + step * PACE_S - boottime(), 0))
        while calls < rate * PACE_S * step:
            call(draw.choice(names))
            calls += 1
    return calls, boottime() - begin_s, own_cpu_s() - cpu_s


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def _overload(seeded: Seeded, cores: Sequence[int], folder: Path, seconds: float) -> Rows:
    """Asks for keys more than their limits let through, over connections to both workers."""
    tokens = dict(zip(LIMITS, seeded.tokens, strict=False))
    connection = await asyncpg.connect(seeded.url)
    for limit, token in tokens.items():
        statement = (
            "UPDATE key SET rate_limit_per_minute = $1 FROM secret s WHERE s.key_id = key.id AND s.digest = sha256($2)"
        )
        await connection.execute(statement, limit, token.encode())
    await connection.close()
    admitted: dict[int, list[float]] = {limit: [] for limit in LIMITS}
    async with servers.fleet(seeded, WORKERS, cores, folder) as fleet:
        end_s = time.monotonic() + seconds
        callers = [
            _keep_asking(fleet.address, token, limit, admitted[limit], end_s)
            for limit, token in tokens.items()
            for _ in range(CALLERS)
        ]
        asked = sum(await asyncio.gather(*callers))
        answered = (await fleet.scrape()).by("worker", "latchgate_worker_calls_total")
        waits = (await fleet.scrape()).total("latchgate_rate_limit_waits_total")
    say(f"{asked:,} calls, of which {waits:,.0f} waited; by worker {[round(each) for each in answered.values()]}")
    head = ("limit", "most in a sliding minute", "allowed", "admitted under overload, part of the limit")
    return [head, *(_kept(limit, times_s) for limit, times_s in admitted.items())]


async def _keep_asking(address: str, token: str, limit: int, admitted: list[float], end_s: float) -> int:
    options = [("grpc.use_local_subchannel_pool", 1)]
    asked = 0
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = KeyServiceStub(channel)
        while time.monotonic() < end_s:
            answer = await stub.Validate(pb.ValidateRequest(token=token))
            asked += 1
            if answer.outcome == pb.OUTCOME_VALID:
                # Somewhat later than it was admitted, each by nearly the same.
                admitted.append(time.monotonic())
            await asyncio.sleep(min(0.1, CALLERS * MINUTE_S / limit / 4))
    return asked


def _kept(limit: int, times_s: list[float]) -> tuple[str, ...]:
    times_s.sort()
    sums = [0, *accumulate(1 for _ in times_s)]
    most = max(sums[bisect_left(times_s, time_s + MINUTE_S)] - sums[number] for number, time_s in enumerate(times_s))
    part = _part(limit, times_s)
    return f"{limit:,}", f"{most:,}", f"{int(limit * 1.05) + WORKERS:,}", f"{part:.3f}" if part else "-"


def _part(limit: int, times_s: Sequence[float]) -> float:
    """Gives what was admitted of a limit in whole minutes after the first; 0 if there is no such minute."""
    begin_s = times_s[0] + MINUTE_S
    minutes = int((times_s[-1] - begin_s) / MINUTE_S)
    if minutes < 1:
        return 0.0
    admitted = bisect_left(times_s, begin_s + minutes * MINUTE_S) - bisect_left(times_s, begin_s)
    return admitted / (minutes * limit)


def _page(takes: Rows, loads: Rows, overload: Rows, version: str) -> str:
    blocks = (
        "# Rate limits that workers share",
        paragraph(
            "What it takes that a key's limit holds over all workers, and how well it is kept."
            " [Decision 7](decisions/0007-rate-limits-by-allotments.md) says how it is done. This page is written by"
            " `make bench-limits`; its figures are those of one run on one machine."
        ),
        "## What a call takes",
        as_markdown(takes),
        paragraph(
            f"Medians, least and most of rounds that alternate within one process, each over {KEYS:,} keys. What a"
            " request on debt takes is that of a key's first one, for which its entry in memory is made."
        ),
        "## What is beside the calls",
        as_markdown(loads),
        paragraph(
            "One worker's limiter, with PostgreSQL on the same machine, asked for keys at random so many times a"
            " second, without the calls themselves. Each key is known already, and is asked for half as often as its"
            " limit allows; in the last row it is far from it, and nothing is told of it. A key that is asked for less"
            " than once a second is one row written for each call; with more calls a key the rows become few. Waited:"
            " calls that came when the worker had no permits for the key. The processor time is all that the limiter"
            " takes, in the call and beside it: what the calls take with it, less what the same calls take without it"
            " in another process at the same time."
        ),
        "## How limits are kept",
        as_markdown(overload),
        paragraph(
            f"`latchgate serve` with {WORKERS} workers; for each limit a key that {CALLERS} clients ask for, each over"
            " a connection of its own, without a pause to speak of. By the times of the answers of VALID, so that what"
            " the answers were on their way differs by some milliseconds. Allowed are 1.05 of the limit and one"
            " request for each worker. The part is that of whole windows, without the first."
        ),
        paragraph(f"{machine_line(len(os.sched_getaffinity(0)))} PostgreSQL {version}."),
        "## Repeat it",
        "```\nmake bench-limits\n```",
    )
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    uvloop.install()
    sys.exit(command.exit_code(main))
