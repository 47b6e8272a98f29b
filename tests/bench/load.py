"""The load: h2load, many processes of it, each sending one request at a time over a connection of its own.

h2load sends the same body again and again. It maps the file that holds it, though, and reads it anew for each request:
so the files are rewritten all the time, each with another token, and practically every request asks for another key.
Whoever rewrites them has to run on the core of those that read them: then hardly any is read half-way, as it can be
where one is interrupted by the other. A load whose every body must be whole sends the same ones throughout a turn.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.machine import BenchError, UnfitError, core_busy_s, pinned

TURN_S = 0.002
"""How often each body is replaced."""

PATIENCE_S = 15.0
"""For how long after its time h2load may go on."""

Feed = Callable[[], bytes]
"""Gives a body, each time another one, of one and the same length."""

_REQUESTS = re.compile(r"^requests: \d+ total, (\d+) started, \d+ done, (\d+) succeeded, (\d+) failed", re.MULTILINE)
_DATA = re.compile(r"^traffic: .*\((\d+)\) data$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What one run of all h2load processes saw.

    `per_s` is counted over the time during which every process was at work. `started` counts also what was under way
    when the time was up. `data_bytes` is what came as bodies of answers. `core_share` is for how much of the time the
    load's cores were busy, whoever ran on them. `bodies` counts the bodies that were laid before h2load, of
    which it may have sent one twice and another one never.
    """

    per_s: float
    p50_ms: float
    p99_ms: float
    started: int
    succeeded: int
    failed: int
    data_bytes: int
    core_share: float
    bodies: int = 0


def h2load_path() -> str:
    """Gives where h2load is. Raises UnfitError if it is not installed."""
    found = shutil.which("h2load")
    if found is None:
        raise UnfitError("h2load is not installed; on Debian and Ubuntu: apt-get install nghttp2-client")
    return found


class Load:
    """Calls a server with up to `processes` requests under way at a time."""

    def __init__(
        self,
        *,
        cores: Sequence[int],
        processes: int,
        folder: Path,
        rng: random.Random,
        each_per_s: int | None = None,
        niceness: int = 0,
        turn_s: float | None = TURN_S,
    ) -> None:
        """Takes the cores to run on, and a folder of its own for the bodies. Raises UnfitError if there is no h2load.

        Each process asks `each_per_s` times a second; where none is given, again as soon as it is answered. Bodies are
        replaced every `turn_s` seconds, or never.
        """
        self._h2load = h2load_path()
        self._cores = cores
        self._rng = rng
        self._pace = [] if each_per_s is None else [f"--rps={each_per_s}"]
        self._niceness = niceness
        self._turn_s = turn_s
        self._bodies = 0
        self._paths = [folder / f"body-{number}" for number in range(processes)]
        folder.mkdir(exist_ok=True)

    async def burst(self, url: str, bodies: Sequence[bytes], seconds: float) -> Burst:
        """Loads a server for so long with bodies of one length, drawn at random. Raises BenchError if h2load fails."""
        return await self.fed(url, [partial(self._rng.choice, bodies)] * len(self._paths), seconds)

    async def fed(self, url: str, feeds: Sequence[Feed], seconds: float) -> Burst:
        """Loads a server for so long, each process with the bodies of a feed. Raises BenchError if h2load fails."""
        async with AsyncExitStack() as stack:
            self._bodies = len(feeds)
            views = [stack.enter_context(_mapped(path, feed())) for path, feed in zip(self._paths, feeds, strict=True)]
            if self._turn_s is not None:
                await stack.enter_async_context(_cancelled_at_the_end(self._turn(views, feeds, self._turn_s)))
            running = [await stack.enter_async_context(self._running(url, path, seconds)) for path in self._paths]
            began_s, busy_s = time.monotonic(), self._busy_s()
            try:
                async with asyncio.timeout(seconds + PATIENCE_S):
                    outputs = [(await process.communicate())[0].decode() for process in running]
            except TimeoutError:
                raise BenchError("h2load does not come to an end") from None
            core_share = (self._busy_s() - busy_s) / (time.monotonic() - began_s)
        if any(process.returncode for process in running):
            raise BenchError(f"h2load failed: {outputs[0].strip().splitlines()[-1:]}")
        burst = evaluated(outputs, [_log_of(path).read_text() for path in self._paths], core_share=core_share)
        return replace(burst, bodies=self._bodies)

    def _busy_s(self) -> float:
        return sum(map(core_busy_s, self._cores)) / len(self._cores)

    @asynccontextmanager
    async def _running(self, url: str, body: Path, seconds: float) -> AsyncIterator[asyncio.subprocess.Process]:
        _log_of(body).unlink(missing_ok=True)
        with pinned(self._cores):
            process = await asyncio.create_subprocess_exec(
                self._h2load,
                f"--duration={round(seconds * 1000)}ms",
                "--clients=1",
                "--max-concurrent-streams=1",
                "--header=te: trailers",
                "--header=content-type: application/grpc",
                f"--data={body}",
                f"--log-file={_log_of(body)}",
                *self._pace,
                url,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            if self._niceness:
                os.setpriority(os.PRIO_PROCESS, process.pid, self._niceness)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await asyncio.shield(process.wait())

    async def _turn(self, views: Sequence[mmap.mmap], feeds: Sequence[Feed], turn_s: float) -> None:
        """Replaces the bodies again and again."""
        while True:
            await asyncio.sleep(turn_s)
            for view, feed in zip(views, feeds, strict=True):
                view[:] = feed()
            self._bodies += len(views)


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


def evaluated(outputs: Sequence[str], logs: Sequence[str], *, core_share: float) -> Burst:
    """Reads what h2load has printed and logged, process by process. Raises BenchError if that gives no figures."""
    counts = [match for output in outputs if (match := _REQUESTS.search(output))]
    data = [match for output in outputs if (match := _DATA.search(output))]
    if len(counts) != len(outputs) or len(data) != len(outputs):
        raise BenchError("h2load writes its results in a form that is not known here")
    started, succeeded, failed = (sum(int(match[group]) for match in counts) for group in (1, 2, 3))
    calls = [[_call(line) for line in log.splitlines()] for log in logs]
    if not all(calls):
        raise BenchError("a connection of h2load was given no answer at all")
    # A process logs in the order of the answers; all were at work from the last first answer to the first last one.
    begin, end = max(each[0][0] for each in calls), min(each[-1][0] for each in calls)
    taken = sorted(took for each in calls for at, took in each if begin < at <= end)
    if not taken:
        raise BenchError("the connections of h2load were never at work at the same time; give it more seconds")
    return Burst(
        per_s=len(taken) * 1e6 / (end - begin),
        p50_ms=taken[len(taken) // 2] / 1000,
        p99_ms=taken[len(taken) * 99 // 100] / 1000,
        started=started,
        succeeded=succeeded,
        failed=failed,
        data_bytes=sum(int(match[1]) for match in data),
        core_share=core_share,
    )


def _call(line: str) -> tuple[int, int]:
    """Gives when a call was answered and how long it took, both in microseconds."""
    began, _status, took = line.split("\t")[:3]
    return int(began) + int(took), int(took)
