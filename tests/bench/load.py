"""The load: h2load, some processes of it, by default each sending one request at a time over a connection of its own.

h2load sends the same body again and again. It maps the file that holds it, though, and reads it anew for each request:
so the files are rewritten all the time, each with another token, and practically every request asks for another key.
Hardly any is read half-way, less than one in ten thousand. A load whose every body must be whole sends the same ones
throughout a turn.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import re
import shutil
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

from bench.machine import BenchError, UnfitError, core_busy_s, pinned

TURN_S = 0.002
"""How often each body is replaced."""

PATIENCE_S = 15.0
"""For how long after its time h2load may go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Some time, in seconds since 1970. Calls that began after `told_s` may have been told of too late."""

    begin_s: float
    told_s: float
    end_s: float

    @property
    def lasts_s(self) -> float:
        """How long it is."""
        return self.end_s - self.begin_s


Feed = Callable[[], bytes]
"""Gives a body, each time another one, of one and the same length."""

_REQUESTS = re.compile(r"^requests: \d+ total, (\d+) started, \d+ done, (\d+) succeeded, (\d+) failed", re.MULTILINE)
_DATA = re.compile(r"^traffic: .*\((\d+)\) data$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What one run of all h2load processes saw.

    `per_s` is counted over the time during which every process was at work, or some windows of it. `started` counts
    also what was under way when the time was up. `data_bytes` is what came as bodies of answers. `bodies` counts the
    bodies that were laid before h2load, of which it may have sent one twice and another one never.
    """

    per_s: float
    p50_ms: float
    p99_ms: float
    started: int
    succeeded: int
    failed: int
    data_bytes: int
    bodies: int = 0


def h2load_path() -> str:
    """Gives where h2load is. Raises UnfitError if it is not installed."""
    found = shutil.which("h2load")
    if found is None:
        raise UnfitError("h2load is not installed; on Debian and Ubuntu: apt-get install nghttp2-client")
    return found


class Load:
    """Calls servers with up to `processes` x `connections` x `streams` requests under way at a time."""

    def __init__(
        self,
        *,
        cores: Sequence[int],
        processes: int,
        folder: Path,
        rng: random.Random,
        connections: int = 1,
        streams: int = 1,
        each_per_s: int | None = None,
        niceness: int = 0,
        turn_s: float | None = TURN_S,
    ) -> None:
        """Takes the cores to run on, and a folder of its own for the bodies. Raises UnfitError if there is no h2load.

        Each process has so many connections, and each of those so many requests under way. A process that has many of
        both takes less of the processor for a call, as it finds several answers at a time. A connection asks
        `each_per_s` times a second; where none is given, again as soon as it is answered. Bodies are replaced every
        `turn_s` seconds, or never.
        """
        self._h2load = h2load_path()
        self._cores = cores
        self._rng = rng
        self._width = [f"--clients={connections}", f"--max-concurrent-streams={streams}"]
        self._pace = [] if each_per_s is None else [f"--rps={each_per_s}"]
        self._niceness = niceness
        self._turn_s = turn_s
        self._paths = [folder / f"body-{number}" for number in range(processes)]
        folder.mkdir(exist_ok=True)

    async def burst(self, url: str, bodies: Sequence[bytes], seconds: float) -> Burst:
        """Loads a server for so long with bodies of one length, drawn at random. Raises BenchError if h2load fails."""
        return await self.fed([url], [self.drawn(bodies)] * len(self._paths), seconds)

    def drawn(self, bodies: Sequence[bytes]) -> Feed:
        """Gives bodies of one length at random."""
        return partial(self._rng.choice, bodies)

    async def fed(self, urls: Sequence[str], feeds: Sequence[Feed], seconds: float) -> Burst:
        """Loads servers for so long, each process with the bodies of a feed. Raises BenchError if h2load fails."""
        async with self.calling(urls, feeds, seconds) as callers:
            return await callers.burst()

    @asynccontextmanager
    async def calling(self, urls: Sequence[str], feeds: Sequence[Feed], seconds: float) -> AsyncIterator[Callers]:
        """Has each process call a server for so long; those that still do when the block ends are killed.

        The servers are given to the processes by turns: the first to the first of them, and so on.
        """
        async with AsyncExitStack() as stack:
            views = [stack.enter_context(_mapped(path, feed())) for path, feed in zip(self._paths, feeds, strict=True)]
            callers = Callers([_log_of(path) for path in self._paths], time.monotonic() + seconds)
            if self._turn_s is not None:
                await stack.enter_async_context(_cancelled_at_the_end(callers.turn(views, feeds, self._turn_s)))
            for url, path in zip(cycle(urls), self._paths, strict=False):
                callers.processes.append(await stack.enter_async_context(self._running(url, path, seconds)))
            yield callers

    def busy_s(self) -> float:
        """Gives for how long its cores were busy since the machine was started, on average, whoever ran on them."""
        return sum(map(core_busy_s, self._cores)) / len(self._cores)

    @asynccontextmanager
    async def _running(self, url: str, body: Path, seconds: float) -> AsyncIterator[asyncio.subprocess.Process]:
        _log_of(body).unlink(missing_ok=True)
        with pinned(self._cores):
            process = await asyncio.create_subprocess_exec(
                self._h2load,
                f"--duration={round(seconds * 1000)}ms",
                *self._width,
                "--header=te: trailers",
                "--header=content-type: application/grpc",
                f"--data={body}",
                f"--log-file={_log_of(body)}",
                *self._pace,
                url,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Out of reach of a Ctrl-C at the terminal, but not of the system if this process is gone: it may stand.
                process_group=0,
            )
        try:
            if self._niceness:
                os.setpriority(os.PRIO_PROCESS, process.pid, self._niceness)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await asyncio.shield(process.wait())


class Callers:
    """The h2load processes of a load that is under way."""

    def __init__(self, logs: Sequence[Path], until_s: float) -> None:
        """Takes where they log, and when they are done, by the monotonic clock."""
        self.processes: list[asyncio.subprocess.Process] = []
        self._logs = logs
        self._until_s = until_s
        self._bodies = len(logs)
        self._is_paused = False

    def pause(self) -> None:
        """Stops them where they are: no call begins, and no answer is read."""
        self._is_paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Has them go on."""
        self._signal(signal.SIGCONT)
        self._is_paused = False

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            # Of one that has ended `burst` tells.
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def turn(self, views: Sequence[mmap.mmap], feeds: Sequence[Feed], turn_s: float) -> None:
        """Replaces the bodies again and again."""
        while True:
            await asyncio.sleep(turn_s)
            if not self._is_paused:
                for view, feed in zip(views, feeds, strict=True):
                    view[:] = feed()
                self._bodies += len(views)

    async def burst(self, windows: Sequence[Window] = ()) -> Burst:
        """Waits until they are done, and counts, within the windows if there are any. Raises BenchError."""
        try:
            async with asyncio.timeout(self._until_s + PATIENCE_S - time.monotonic()):
                outputs = [(await process.communicate())[0].decode() for process in self.processes]
        except TimeoutError:
            raise BenchError("h2load does not come to an end") from None
        if any(process.returncode for process in self.processes):
            raise BenchError(f"h2load failed: {outputs[0].strip().splitlines()[-1:]}")
        burst = evaluated(outputs, [log.read_text() for log in self._logs], windows)
        return replace(burst, bodies=self._bodies)

    def answered_within(self, windows: Sequence[Window]) -> list[int]:
        """Counts the answers of each of some windows. To be called once they are done."""
        answered = sorted(_call(line)[0] for log in self._logs for line in log.read_text().splitlines())
        return [
            bisect_right(answered, each.end_s * 1e6) - bisect_right(answered, each.begin_s * 1e6) for each in windows
        ]


@asynccontextmanager
async def _cancelled_at_the_end(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


def _mapped(path: Path, body: bytes) -> mmap.mmap:
    path.write_bytes(body)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), len(body))


def _log_of(body: Path) -> Path:
    return body.with_suffix(".log")


def evaluated(outputs: Sequence[str], logs: Sequence[str], windows: Sequence[Window] = ()) -> Burst:
    """Reads what h2load has printed and logged, process by process. Raises BenchError if that gives no figures."""
    counts = [match for output in outputs if (match := _REQUESTS.search(output))]
    data = [match for output in outputs if (match := _DATA.search(output))]
    if len(counts) != len(outputs) or len(data) != len(outputs):
        raise BenchError("h2load writes its results in a form that is not known here")
    started, succeeded, failed = (sum(int(match[group]) for match in counts) for group in (1, 2, 3))
    calls = [[_call(line) for line in log.splitlines()] for log in logs]
    if not all(calls):
        raise BenchError("a connection of h2load was given no answer at all")
    counted, took_us, lasted_s = _within(windows, calls) if windows else _all_at_work(calls)
    if not counted or not took_us:
        raise BenchError("h2load was answered nothing while it was counted; give it more seconds")
    return Burst(
        per_s=counted / lasted_s,
        p50_ms=took_us[len(took_us) // 2] / 1000,
        p99_ms=took_us[len(took_us) * 99 // 100] / 1000,
        started=started,
        succeeded=succeeded,
        failed=failed,
        data_bytes=sum(int(match[1]) for match in data),
    )


Calls = Sequence[Sequence[tuple[int, int]]]
"""When each call of each process was answered and how long it took, both in microseconds, in the order of answers."""


def _all_at_work(calls: Calls) -> tuple[int, list[int], float]:
    """Gives how many calls were answered while all processes were at work, how long each took, and how long that was.

    All were at work from the last first answer to the first last one.
    """
    begin, end = max(each[0][0] for each in calls), min(each[-1][0] for each in calls)
    taken = sorted(took for each in calls for at, took in each if begin < at <= end)
    return len(taken), taken, (end - begin) / 1e6


def _within(windows: Sequence[Window], calls: Calls) -> tuple[int, list[int], float]:
    """Gives the same of windows, with how long those took that were told in time."""
    answered = sorted(at for each in calls for at, _ in each)
    begun = sorted((at - took, took) for each in calls for at, took in each)
    counted, took_us = 0, []
    for window in windows:
        begin, told, end = (at_s * 1e6 for at_s in (window.begin_s, window.told_s, window.end_s))
        counted += bisect_right(answered, end) - bisect_right(answered, begin)
        took_us += [took for _, took in begun[bisect_left(begun, (begin, 0)) : bisect_left(begun, (told, 0))]]
    return counted, sorted(took_us), sum(window.lasts_s for window in windows)


def _call(line: str) -> tuple[int, int]:
    """Gives when a call was answered and how long it took, both in microseconds."""
    began, _status, took = line.split("\t")[:3]
    return int(began) + int(took), int(took)
