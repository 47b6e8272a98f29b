"""Which database is used: the one that the settings name, or one that comes with the service."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from latchgate.config import Settings, SettingsError
from latchgate.storage.embedded import EmbeddedDatabaseError, EmbeddedPostgres
from latchgate.storage.postgres import translated


class DatabaseAddress(NamedTuple):
    """Where the database is: for the service, and for the owner of its schema, who may be another user."""

    service: str
    owner: str


async def database_address(stack: AsyncExitStack, settings: Settings) -> DatabaseAddress:
    """Gives where the database is, after starting the embedded one if none is named; `stack` stops that one.

    Raises SettingsError, EmbeddedDatabaseError and StorageUnavailableError.
    """
    if settings.database_url is not None:
        service = settings.database_url.get_secret_value()
        owner = settings.owner_database_url
        return DatabaseAddress(service, owner.get_secret_value() if owner else service)
    _make_data_dir(settings.data_dir)
    # On a thread: starting and stopping take seconds, and signals must be heard meanwhile.
    starting = asyncio.create_task(asyncio.to_thread(EmbeddedPostgres.start, settings.data_dir))
    stack.push_async_callback(_stop_embedded, starting)
    embedded = await asyncio.shield(starting)
    with translated():
        owner_address = await embedded.create_database()
    return DatabaseAddress(embedded.service_address(), owner_address)


def _make_data_dir(path: Path) -> None:
    # The program that starts the embedded PostgreSQL hands its folder to a shell as it is.
    if not re.fullmatch(r"[\w/.,:@%+=-]+", str(path.resolve())):
        raise SettingsError(
            f"LATCHGATE_DATA_DIR: {path}: the embedded PostgreSQL needs a folder whose whole path has no spaces and "
            "signs that mean something to a shell; name another, or set LATCHGATE_DATABASE_URL"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"LATCHGATE_DATA_DIR: {path}: {error.strerror}") from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise SettingsError(f"LATCHGATE_DATA_DIR: {path}: can not be written")


async def _stop_embedded(starting: asyncio.Task[EmbeddedPostgres]) -> None:
    """Stops the embedded database, and one that is about to start: the thread that does it can not be called back."""
    try:
        embedded = await starting
    except EmbeddedDatabaseError:
        return
    await asyncio.to_thread(embedded.stop)


def end_embedded(folder: Path) -> None:
    """Tells the embedded PostgreSQL to end in an orderly way, which it does without this process.

    Only where the system can be asked whether the process is the server: its number may be another's by now, and while
    the database is being made the file holds a negative one, which would mean a whole group of processes.
    """
    with suppress(OSError, ValueError, IndexError):
        pid = int((folder / "postmaster.pid").read_text().split(maxsplit=1)[0])
        if os.fsencode(folder.resolve()) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGINT)
