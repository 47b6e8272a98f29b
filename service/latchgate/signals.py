"""What a process does when it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")


class Signals:
    """Listens for signals, from when it is made. Needs a running loop in the main thread.

    The first SIGINT or SIGTERM sets `stopping`; the second calls all of `at_once` and ends the process with status 1.
    SIGHUP sets `renewing`, but stops where it means that the terminal is gone, or where `is_renewable` is not set.
    """

    def __init__(self, *, is_renewable: bool = False) -> None:
        """Begins to listen."""
        self.stopping = asyncio.Event()
        self.renewing = asyncio.Event()
        self.at_once: list[Callable[[], None]] = []
        self._is_renewable = is_renewable
        self._had_terminal = _has_terminal()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        # Who starts it with nohup wants it to outlive the terminal.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    async def unless_stopped(self, work: Awaitable[Result]) -> Result | None:
        """Waits for some work or for the signal to stop, whichever comes first."""
        return await unless_stopped(self.stopping, work)

    def _stop(self) -> None:
        if self.stopping.is_set():
            for end in self.at_once:
                end()
            os._exit(1)
        self.stopping.set()

    def _hang_up(self) -> None:
        if self._is_renewable and self._had_terminal == _has_terminal():
            self.renewing.set()
        else:
            self._stop()


def _has_terminal() -> bool:
    """Says whether a terminal controls this process; one that was closed does so no more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def unless_stopped(stopping: asyncio.Event, work: Awaitable[Result]) -> Result | None:
    """Waits for some work or for `stopping`, whichever comes first; work that is not done then is cancelled."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None
