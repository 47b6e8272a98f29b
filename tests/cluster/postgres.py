"""A PostgreSQL of a test's own that writes its changes to disk, and can be killed and frozen."""

from __future__ import annotations

import asyncio
import signal
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from cluster.clock import Clock
from latchgate.storage.embedded import EmbeddedPostgres
from support.databases import until
from support.processes import children, postmaster, tell_each


class Postgres:
    """The server and its processes."""

    def __init__(self, folder: Path, clock: Clock, server: EmbeddedPostgres, url: str) -> None:
        """Takes a running server, its folder and clock, and the address of a database in it."""
        self._folder = folder
        self.clock = clock
        self._server = server
        self.url = url
        # For one fault at a time.
        self.lock = asyncio.Lock()

    @classmethod
    async def start(cls, folder: Path) -> Postgres:
        """Starts a new server in an empty folder."""
        clock = Clock(folder / "clock", is_read_each_time=False)
        server = await asyncio.to_thread(_started, folder, clock)
        try:
            return cls(folder, clock, server, await server.create_database())
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
            tell_each(pids, number)

        async def are_gone() -> bool:
            return not any(map(_exists, pids))

        await until(are_gone)

    async def restart(self) -> None:
        """Starts it again after it was killed."""
        await asyncio.to_thread(self._server.stop)
        self._server = await asyncio.to_thread(_started, self._folder, self.clock)

    def freeze(self) -> None:
        """Stops all of its processes where they are."""
        tell_each(self._pids(), signal.SIGSTOP)
        # Those that the first one started meanwhile.
        tell_each(self._pids(), signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets them go on."""
        tell_each(self._pids(), signal.SIGCONT)

    def stop(self) -> None:
        """Stops it for good."""
        with suppress(FileNotFoundError):
            self.thaw()
        self._server.stop()

    def _pids(self) -> list[int]:
        """Lists its processes, the one first that starts the others."""
        first = postmaster(self._folder)
        return [first, *children(first)]


def _started(folder: Path, clock: Clock) -> EmbeddedPostgres:
    """Starts the server, with all of its processes living by the clock."""
    with clock.inherited():
        return EmbeddedPostgres.start(folder)


def _exists(pid: int) -> bool:
    """Says whether a process is there, be it only to be asked how it ended: its package can not tell that apart."""
    return Path(f"/proc/{pid}").exists()
