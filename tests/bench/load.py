"""The load: h2load, many processes of it, each sending one request at a time over a connection of its own.

h2load sends the same body again and again. It maps the file that holds it, though, and reads it anew for each request:
so the files are rewritten all the time, each with another token, and practically every request asks for another key.
"""

from __future__ import annotations

import asyncio
import mmap
import random
import re
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import BenchError, core_busy_s, pinned

TURN_S = 0.002
"""How often each body is replaced."""

PATIENCE_S = 15.0
"""For how long after its time h2load may go on."""

_REQUESTS = re.compile(r"^requests: \d+ total, (\d+) started, \d+ done, (\d+) succeeded, (\d+) failed", re.MULTILINE)
_DATA = re.compile(r"^traffic: .*\((\d+)\) data$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What one run of all h2load processes saw.

    `per_s` is counted over the time during which every process was at work. `started` counts also what was under way
    when the time was up. `data_bytes` is what came as bodies of answers. `core_share` is for how much of the time the
    load's core was busy, whoever ran on it.
    """

    per_s: float
    p50_ms: float
    p99_ms: float
    started: int
    succeeded: int
    failed: int
    data_bytes: int
    core_share: float


def h2load_path() -> str:
    """Gives where h2load is. Raises BenchError if it is not installed."""
    found = shutil.which("h2load")
    if found is None:
        raise BenchError("h2load is not installed; on Debian and Ubuntu: apt-get install nghttp2-client")
    return found


class Load:
    """Calls a server with `processes` requests under way at any time."""

    def __init__(self, *, core: int, processes: int, folder: Path, rng: random.Random) -> None:
        """Takes the core to run on, and a folder for the bodies. Raises BenchError if there is no h2load."""
        self._h2load = h2load_path()
        self._core = core
        self._rng = rng
        self._paths = [folder / f"body-{number}" for number in range(processes)]

    async def burst(self, url: str, bodies: Sequence[bytes], seconds: float) -> Burst:
        """Loads a server for so long with bodies of one length. Raises BenchError if h2load fails."""
        async with AsyncExitStack() as stack:
            views = [stack.enter_context(_mapped(path, self._rng.choice(bodies))) for path in self._paths]
            await stack.enter_async_context(_cancelled_at_the_end(self._turn(views, bodies)))
            running = [await stack.enter_async_context(self._running(url, path, seconds)) for path in self._paths]
            began_s, busy_s = time.monotonic(), core_busy_s(self._core)
            try:
                async with asyncio.timeout(seconds + PATIENCE_S):
                    outputs = [(await process.communicate())[0].decode() for process in running]
            except TimeoutError:
                raise BenchError("h2load does not come to an end") from None
            core_share = (core_busy_s(self._core) - busy_s) / (time.monotonic() - began_s)
        if any(process.returncode for process in running):
            raise BenchError(f"h2load failed: {outputs[0].strip().splitlines()[-1:]}")
        return evaluated(outputs, [_log_of(path).read_text() for path in self._paths], core_share=core_share)

    @asynccontextmanager
    async def _running(self, url: str, body: Path, seconds: float) -> AsyncIterator[asyncio.subprocess.Process]:
        _log_of(body).unlink(missing_ok=True)
        with pinned([self._core]):
            process = await asyncio.create_subprocess_exec(
                self._h2load,
                f"--duration={round(seconds * 1000)}ms",
                "--clients=1",
                "--max-concurrent-streams=1",
                "--header=te: trailers",
                "--header=content-type: application/grpc",
                f"--data={body}",
                f"--log-file={_log_of(body)}",
                url,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await asyncio.shield(process.wait())

    async def _turn(self, views: Sequence[mmap.mmap], bodies: Sequence[bytes]) -> None:
        """Replaces the bodies again and again. It runs on the core of those that read them: none is read half-way."""
        while True:
            for view, body in zip(views, self._rng.choices(bodies, k=len(views)), strict=True):
                view[:] = body
            await asyncio.sleep(TURN_S)


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
