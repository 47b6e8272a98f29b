"""The benchmark as a whole, in its smallest form: that its figures come out, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from bench.machine import pinned

RUN = Path(__file__).with_name("run.py")
SMALLEST = ("--rounds", "1", "--seconds", "0.4", "--keys", "200,1000", "--in-use", "200", "--processes", "4")

needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None,
    reason="h2load is not installed (Debian, Ubuntu: apt-get install nghttp2-client)",
)
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="the benchmark needs two cores")


@contextmanager
def _bench(*arguments: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Starts the benchmark; one that has not ended by the end of the block is stopped, with all that it has started."""
    command = [sys.executable, str(RUN), *arguments]
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


async def _databases(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'latchgate\\_bench\\_%'")
    finally:
        await connection.close()
    return [row["datname"] for row in rows]


def _children(parent: int, count: int) -> set[int]:
    """Waits until a process has started so many others, and gives their ids."""
    deadline_s = time.monotonic() + 30
    found: set[int] = set()
    while len(found) < count:
        assert time.monotonic() < deadline_s, f"only {len(found)} of {count} processes were started"
        time.sleep(0.02)
        found = {int(entry.name) for entry in Path("/proc").iterdir() if _parent(entry) == parent}
    return found


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _wait_until_stopped(pids: set[int], count: int) -> None:
    """Waits until so many of them stand, as those do whose turn it is not."""
    deadline_s = time.monotonic() + 30
    while sum(map(_is_stopped, pids)) < count:
        assert time.monotonic() < deadline_s, "no load is stopped"
        time.sleep(0.02)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


@pytest.mark.bench
@pytest.mark.timeout(300)
@needs_h2load
@needs_two_cores
async def test_a_run_writes_a_page_and_leaves_nothing_behind(postgres_url: str, tmp_path: Path) -> None:
    """A run gives figures for each number of keys, asks for many keys, writes a page, and drops its databases."""
    output = tmp_path / "page.md"
    with _bench(*SMALLEST, "--output", str(output), environment={"LATCHGATE_DATABASE_URL": postgres_url}) as process:
        said, complaints = process.communicate(timeout=240)

    assert ("", 0) == (complaints, process.returncode)
    page = output.read_text()
    for name in (
        "memory, 200 keys",
        "memory, 1,000 keys",
        "memory, 1,000 keys, 1,000 in use",
        "database, 200 keys",
        "database, 1,000 keys",
        "database, 1,000 keys, 1,000 in use",
    ):
        assert f"\n| {name} | " in page
        assert f"round 1  {name:26}" in said
    for finding in (
        "Validate from memory, 200 keys, over the no-op: ",
        "From memory, 1,000 keys over memory, 200 keys: ",
        "From memory over the no-op, of all these turns together: ",
        "From memory, 1,000 keys, 1,000 in use, over memory, 1,000 keys: ",
        "Another process of the no-op, over the no-op: ",
        "Validate from memory, 200 keys, over the no-op on default grpc.aio: ",
    ):
        assert finding in " ".join(page.split())
    asked = re.search(r"([0-9,]+) of 1,000 keys were asked for", " ".join(page.split()))
    # Not the same four again and again, although h2load repeats itself.
    assert asked is not None
    assert int(asked[1].replace(",", "")) > 40
    assert [] == await _databases(postgres_url)


@pytest.mark.bench
@needs_h2load
@needs_two_cores
async def test_ctrl_c_ends_all_that_was_started(postgres_url: str) -> None:
    """Ctrl-C amid a measurement ends the service, the no-ops and h2load, those that are stopped just then as well, and
    drops the databases.
    """
    with _bench(
        "--seconds", "60", "--keys", "1", "--processes", "4", environment={"LATCHGATE_DATABASE_URL": postgres_url}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("seeded 1 key ")
        assert process.stdout.readline().startswith("measuring: ")
        # A service, four no-ops and three others, and four of h2load for each of two.
        children = _children(process.pid, 16)
        _wait_until_stopped(children, 4)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=90)

    assert ("bench: stopped\n", 130) == (complaints, process.returncode)
    assert set() == _alive(children)
    assert [] == await _databases(postgres_url)


@needs_two_cores
def test_without_h2load_it_says_how_to_get_it(tmp_path: Path) -> None:
    """Where h2load is not installed, one line says so and names the package, and the exit code is 3."""
    with _bench(*SMALLEST, environment={"PATH": str(tmp_path)}) as process:
        said, complaints = process.communicate(timeout=90)

    assert "bench: h2load is not installed; on Debian and Ubuntu: apt-get install nghttp2-client\n" == complaints
    assert ("", 3) == (said, process.returncode)


@needs_h2load
def test_on_one_core_it_does_not_measure() -> None:
    """With a single core, where the load would take the server's time, one line says so and the exit code is 3."""
    with pinned(sorted(os.sched_getaffinity(0))[:1]), _bench(*SMALLEST, environment={}) as process:
        said, complaints = process.communicate(timeout=90)

    assert complaints.startswith("bench: there is only one core: ")
    assert 1 == complaints.count("\n")
    assert ("", 3) == (said, process.returncode)
