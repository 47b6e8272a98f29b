"""Signals that mean one thing to a service with a terminal and another to one without."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.databases import until
from support.fleets import DEADLINE_S, fleet
from support.processes import END_TIMEOUT_S, SERVE, environment

NOBODY = "postgresql://127.0.0.1:1/x"


@pytest.fixture
def without_hangup() -> Iterator[None]:
    """Has what is started from here ignore SIGHUP, as nohup does."""
    action = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, action)


@pytest.mark.usefixtures("without_hangup")
async def test_nohup(database_url: str, tmp_path: Path) -> None:
    """A SIGHUP that whoever started the service wants ignored is ignored."""
    async with fleet(database_url, tmp_path) as service:
        status = await asyncio.to_thread(Path(f"/proc/{service.process.pid}/status").read_text)
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        assert ignored & 1 << signal.SIGHUP - 1
        service.process.tell(signal.SIGHUP)
        service.process.tell(signal.SIGTERM)
        assert 0 == await service.process.ended()
        assert [] == service.events("renewing_workers")


async def test_terminal_is_closed(tmp_path: Path) -> None:
    """A service that was started from a terminal stops when that is closed."""
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        # A terminal of its own, as a login has.
        f"import os; os.login_tty({theirs}); "
        f"os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'latchgate', 'serve'])",
        cwd=tmp_path,
        env=environment(**SERVE, DATABASE_URL=NOBODY),
        pass_fds=(theirs,),
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    said = b""
    try:

        async def is_waiting() -> bool:
            nonlocal said
            with suppress(BlockingIOError):
                said += os.read(ours, 65536)
            return b"waiting_for_database" in said

        await until(is_waiting, DEADLINE_S)
        os.close(ours)
        assert 0 == await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
