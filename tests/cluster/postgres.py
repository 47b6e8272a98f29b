"""A PostgreSQL of a test's own that writes its changes to disk, and can be killed and frozen."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from latchgate.storage.embedded import EmbeddedDatabaseError, EmbeddedPostgres
from support.databases import until
from support.processes import postmaster

# How long a recovery may take on a machine that is busy.
START_S = 120.0
RETRY_S = 0.5


class Postgres:
    """The server and its processes."""

    def __init__(self, folder: Path, server: EmbeddedPostgres, url: str) -> None:
        """Takes a running server, its folder and the address of a database in it."""
        self._folder = folder
        self._server = server
        self.url = url
        # For one fault at a time.
        self.lock = asyncio.Lock()

    @classmethod
    async def start(cls, folder: Path) -> Postgres:
        """Starts a new server in an empty folder."""
        server = await asyncio.to_thread(EmbeddedPostgres.start, folder)
        try:
            return cls(folder, server, await server.create_database())
        except BaseException:
            server.stop()
            raise

    async def make_database(self) -> str:
        """Makes an empty database, and gives its address."""
        name = f"cluster_{uuid.uuid4().hex}"
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    async def kill(self) -> None:
        """Ends all of its processes at once: what is not on disk is lost."""
        pids = self._pids()
        # The first may not see the others die: it would begin to tidy up.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            _tell(pids, number)

        async def are_gone() -> bool:
            return not any(map(_exists, pids))

        await until(are_gone)

    async def restart(self) -> None:
        """Starts it again after it was killed."""
        await asyncio.to_thread(self._server.stop)
        async with asyncio.timeout(START_S):
            while True:
                try:
                    self._server = await asyncio.to_thread(EmbeddedPostgres.start, self._folder)
                except (EmbeddedDatabaseError, AssertionError):
                    # Its package gives it ten seconds, and then asserts that one that is still recovering is ready.
                    await asyncio.sleep(RETRY_S)
                else:
                    return

    def freeze(self) -> None:
        """Stops all of its processes where they are."""
        _tell(self._pids(), signal.SIGSTOP)
        # Those that the first one started meanwhile.
        _tell(self._pids(), signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets them go on."""
        _tell(self._pids(), signal.SIGCONT)

    def stop(self) -> None:
        """Stops it for good."""
        with suppress(FileNotFoundError):
            self.thaw()
        self._server.stop()

    def _pids(self) -> list[int]:
        """Lists its processes, the one first that starts the others."""
        first = postmaster(self._folder)
        return [first, *_children(first)]


def _exists(pid: int) -> bool:
    """Says whether a process is there, be it only to be asked how it ended: its package can not tell that apart."""
    return Path(f"/proc/{pid}").exists()


def _tell(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found
