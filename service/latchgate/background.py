"""The work beside the calls: done again and again, told of when it fails, and never gone without a word."""

from __future__ import annotations

import asyncio
import random
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import structlog

from latchgate.domain.errors import UnavailableError

# The part of an interval after which repeated work is done at the soonest.
SOONEST: Final = 0.75
_FRAMES = 6
_log = structlog.get_logger("latchgate.background")


class BackgroundError(Exception):
    """Work that the service can not do without has ended by itself. The message says which."""


class Background:
    """Runs work beside the calls until it is closed.

    `failures` counts by the name of the work how often it failed with an error that nobody expected.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self._stopping = asyncio.Event()
        self._died = asyncio.Event()
        self._death = ""
        # Work for which the database was away when it was last tried.
        self._put_off: set[str] = set()
        # What wakes the work that waits for its next time.
        self._waking: list[asyncio.Event] = []
        self._lasting: set[asyncio.Future[Any]] = set()
        self._repeated: set[asyncio.Future[Any]] = set()

    def keep(self, name: str, work: Awaitable[object]) -> None:
        """Runs work that lasts as long as the service; it is cancelled at the end."""
        self._lasting.add(self._watched(name, work))

    def repeat(
        self, name: str, interval_s: float, work: Callable[[], Awaitable[None]], news: asyncio.Event | None = None
    ) -> None:
        """Does some work again and again, and sooner when there is `news`; at the end what is under way is finished.

        Between two times lies up to a quarter less than the interval, as chance has it: workers that began together, or
        have waited for one and the same lock, would else do it at the same time ever after.
        """
        waking = news or self._stopping
        self._waking.append(waking)
        self._repeated.add(self._watched(name, self._again(name, interval_s, work, waking)))

    async def attempt(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does some work once, unless the stop has begun.

        A time at which the database is away is let pass, and so is a fault of the work itself: the next time may be
        better, and calls are worth more than what is done beside them. Both are logged, faults each time.
        """
        if self._stopping.is_set():
            return
        try:
            await work()
        except UnavailableError as error:
            if name not in self._put_off:
                _log.warning("work_put_off", work=name, problem=error.message)
            self._put_off.add(name)
        except Exception as error:  # noqa: BLE001 - see above
            self.failed(name, error)
        else:
            if name in self._put_off:
                _log.info("work_resumed", work=name)
            self._put_off.discard(name)

    def failed(self, name: str, error: Exception) -> None:
        """Takes note of an error that nobody expected. Not of its text: it may hold what a row holds."""
        self.failures[name] += 1
        _log.error("work_failed", work=name, error=type(error).__name__, where=where(error))

    async def death(self) -> None:
        """Waits until work has ended that should not. Raises BackgroundError."""
        await self._died.wait()
        raise BackgroundError(self._death)

    def stop(self) -> None:
        """Begins no work any more; from here on it is no fault that work ends."""
        self._stopping.set()
        for waking in self._waking:
            waking.set()

    async def close(self) -> None:
        """Ends all work and waits until it has ended."""
        self.stop()
        for task in self._lasting:
            task.cancel()
        await asyncio.gather(*self._lasting, *self._repeated, return_exceptions=True)

    def _watched(self, name: str, work: Awaitable[object]) -> asyncio.Future[Any]:
        begun = asyncio.ensure_future(work)
        begun.add_done_callback(lambda ended: self._has_ended(name, ended))
        return begun

    def _has_ended(self, name: str, work: asyncio.Future[Any]) -> None:
        reason = "it came to an end"
        error = None if work.cancelled() else work.exception()
        if isinstance(error, Exception):
            self.failed(name, error)
            reason = f"{type(error).__name__} at {' > '.join(where(error)[-1:]) or 'an unknown place'}"
        if not self._stopping.is_set():
            self._death = self._death or f"the service can not go on without its {name}: {reason}"
            self._died.set()

    async def _again(
        self, name: str, interval_s: float, work: Callable[[], Awaitable[None]], waking: asyncio.Event
    ) -> None:
        while not await self._is_stopped_within(self._pause(interval_s), waking):
            await self.attempt(name, work)

    @staticmethod
    def _pause(interval_s: float) -> float:
        return interval_s * random.uniform(SOONEST, 1)  # noqa: S311 - to spread, not to hide

    async def _is_stopped_within(self, seconds: float, waking: asyncio.Event) -> bool:
        # Not wait_for, as in latchgate.storage.coherence.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await waking.wait()
        if not self._stopping.is_set():
            waking.clear()
        return self._stopping.is_set()


def where(error: BaseException) -> list[str]:
    """Gives the places that an error came through, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames[-_FRAMES:]]


def fault(error: BaseException) -> str:
    """Says what ended the process that nobody expected: not the error's text, which may hold what no one should see."""
    return f"stopped by a fault of its own: {type(error).__name__} at {' > '.join(where(error))}"
