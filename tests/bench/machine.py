"""The machine: its cores, who runs on which, and what the kernel says of time spent. Linux alone."""

from __future__ import annotations

import os
import platform
import resource
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """The benchmark can not be run, or its figures can not be believed. The message is one line that says why."""


class SpoiledError(BenchError):
    """What was measured was not what was to be, as it can be where the load does not get the processor: try again."""


class UnfitError(BenchError):
    """The machine lacks what the benchmark takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who runs on which core. With two cores PostgreSQL shares the load's."""

    total: int
    server: int
    load: int
    database: tuple[int, ...]

    @classmethod
    def share_out(cls, available: Iterable[int]) -> Layout:
        """Shares out cores. Raises UnfitError if there is only one."""
        cores = sorted(available)
        if len(cores) == 1:
            raise UnfitError(
                "there is only one core: the load would take its time from the server that it measures; "
                "give at least two"
            )
        return cls(total=len(cores), server=cores[-1], load=cores[0], database=tuple(cores[1:-1] or cores[:1]))


@contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """Processes that this thread starts within the block run on these cores, for as long as they live."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """Gives a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def process_cpu_s(pid: int) -> float:
    """Gives the processor time that a process and its threads have used, in seconds; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def threads_cpu_s(pid: int) -> dict[int, float]:
    """Gives the processor time of each thread that a process has now, in seconds, to the nanosecond."""
    used_s = {}
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        # One may end meanwhile.
        with suppress(OSError):
            used_s[int(thread.name)] = int((thread / "schedstat").read_text().split()[0]) / 1e9
    return used_s


def grown_s(before_s: Mapping[int, float], after_s: Mapping[int, float]) -> float:
    """Gives by how much processor times have grown: not by those of who has ended, and by all of who has begun."""
    return sum(used_s - before_s.get(each, 0.0) for each, used_s in after_s.items())


def own_cpu_s() -> float:
    """Gives the processor time of this process and of those that it has started and that have ended, in seconds."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def process_name(pid: int) -> str:
    """Gives the name of a process; empty for one that is not on this machine."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def core_busy_s(core: int) -> float:
    """Gives how long a core has not been idle since the machine was started, in seconds."""
    user, nice, system, _idle, _iowait, *rest = _core_s(core)
    # The rest: interrupts and what the hypervisor took. Guests' time is part of the user's.
    return user + nice + system + sum(rest[:3])


def stolen_s(cores: Iterable[int]) -> float:
    """Gives for how long the hypervisor has kept cores that had something to do, since the machine was started."""
    return sum(_core_s(core)[7] for core in cores)


def _core_s(core: int) -> list[float]:
    """Gives what a core has done since the machine was started, in seconds, in the order of /proc/stat."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            return [int(each) / _TICKS_PER_S for each in ticks]
    raise BenchError(f"the system does not tell how busy core {core} is")


def cpu_model() -> str:
    """Gives the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            return value.strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """Gives the versions of what the servers are made of."""
    libraries = {name: version(name) for name in ("grpcio", "protobuf", "asyncpg", "uvloop")}
    return {"Linux": platform.release(), "Python": platform.python_version(), **libraries}
