"""Latchgate as a process of its own: started, read line by line, told to stop, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from support.databases import until

LINE_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 60.0
TRACEBACK: Final = "Traceback (most recent call last)"


class Latchgate:
    """A process that runs `python -m latchgate`, and all that it has written so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Takes the process, with both of its outputs piped."""
        self._process = process
        self._news = asyncio.Condition()
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self.out)),
            asyncio.create_task(self._read(process.stderr, self.err)),
        ]

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.returncode is not None

    @property
    def text(self) -> str:
        """All that was written, for people to read in a failure."""
        return "\n".join(["-- stdout", *self.out, "-- stderr", *self.err])

    async def line(self, pattern: str) -> re.Match[str]:
        """Waits for a line of either output that matches, and gives the match."""

        def found() -> re.Match[str] | None:
            matches = (re.search(pattern, line) for line in [*self.out, *self.err])
            return next((match for match in matches if match), None)

        async with asyncio.timeout(LINE_TIMEOUT_S), self._news:
            while (match := found()) is None:
                assert not all(reader.done() for reader in self._readers), f"no line matches {pattern!r}\n{self.text}"
                await self._news.wait()
            return match

    async def event(self, name: str) -> dict[str, Any]:
        """Waits for a log line of this event, and gives it. Needs LOG_FORMAT json."""
        found: dict[str, Any] = json.loads((await self.line(rf'^{{.*"event": "{name}".*}}$'))[0])
        return found

    async def address(self) -> str:
        """Waits until the service says that it serves, and gives its address. Needs logs of level info."""
        return str((await self.event("serving"))["listen"])

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone."""
        self._process.send_signal(number)

    def tell_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process and all that it started in its group, as a terminal does for Ctrl-C."""
        os.killpg(self.pid, number)

    async def ended(self) -> int:
        """Waits until the process has ended and all is read, and gives its exit status."""
        async with asyncio.timeout(END_TIMEOUT_S):
            status = await self._process.wait()
            await asyncio.gather(*self._readers)
        assert TRACEBACK not in self.text, self.text
        return status

    async def kill(self) -> None:
        """Ends the process at once, if it is still there."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await asyncio.gather(*self._readers)

    async def _read(self, stream: asyncio.StreamReader | None, lines: list[str]) -> None:
        assert stream is not None
        while line := await stream.readline():
            async with self._news:
                lines.append(line.decode().rstrip("\n"))
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()


def environment(**variables: Any) -> dict[str, str]:
    """This process's environment with no setting of latchgate's but those that are named (without the prefix)."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LATCHGATE_")}
    return inherited | {f"LATCHGATE_{name}": str(value) for name, value in variables.items()}


SERVE: Final[Mapping[str, str]] = {
    "LISTEN": "127.0.0.1:0",
    "METRICS_LISTEN": "127.0.0.1:0",
    "WORKERS": "2",
    "LOG_FORMAT": "json",
}
"""Settings for a service of a test's own: free ports, as many workers on every machine, lines that a test can read."""


def postmaster(data_dir: Path) -> int:
    """Gives the process number of the PostgreSQL that runs on a data directory."""
    return int((data_dir / "postgres" / "postmaster.pid").read_text().split(maxsplit=1)[0])


def children(parent: int) -> list[int]:
    """Lists the processes that a process has started, wherever their group and session are."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found


def tell_each(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends a signal to those of some processes that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def is_running(pid: int) -> bool:
    """Says whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_gone(pid: int) -> None:
    """Waits until a process that is not this one's child has ended."""

    async def is_gone() -> bool:
        return not is_running(pid)

    await until(is_gone)


@asynccontextmanager
async def latchgate(command: str, folder: Path, variables: Mapping[str, str]) -> AsyncIterator[Latchgate]:
    """Starts a command in a folder, in a process group of its own; kills what is left of it at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "latchgate",
        *command.split(),
        cwd=folder,
        env=dict(variables),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    started = Latchgate(process)
    try:
        yield started
    finally:
        await started.kill()


async def run_latchgate(command: str, folder: Path, variables: Mapping[str, str]) -> tuple[int, list[str], list[str]]:
    """Runs a command to its end, and gives its exit status and the lines of both outputs."""
    async with latchgate(command, folder, variables) as started:
        status = await started.ended()
        return status, started.out, started.err
