"""Keeps a worker's allotments of rate limits supplied: asks the store ahead of the calls, and for those that wait."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

import structlog

from latchgate.domain.allotments import Allotments
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.ports import RateAnswer, RateAsk, RateStore

# How often what there is to report and to ask goes out. Drawn anew each time, so that no worker is always the first to
# ask for what has just left a window.
TICK_S: Final = (0.03, 0.07)
# The same while nothing is urgent, so that each statement carries more.
LATE_TICK_S: Final = (0.2, 0.3)
# How far statements for calls that wait are kept apart, so that each carries several.
SPACING_S: Final = 0.004
MAX_BATCH: Final = 500
# A store that takes longer counts as away: calls wait for it.
PATIENCE_S: Final = 0.25
# The same where no call waits: to connect, to try again and to say farewell.
LONG_PATIENCE_S: Final = 1.0
# How much longer it is waited for, so that an answer is read that came while this process did not get the processor.
READ_S: Final = 0.01
# How often a store that nobody needs is asked nevertheless.
HEAR_S: Final = 5.0
# For how long a worker lets nothing through without a word: until all that have started together have heard of each
# other.
SETTLE_S: Final = 2 * HEAR_S
# How often a store that is away is tried.
TRY_PAUSE_S: Final = 1.0
# A statement that failed within this time is sent again, once: it most likely met a connection that was lost before.
RETRIED_WITHIN_S: Final = 0.1

_log = structlog.get_logger("latchgate.limiting")


class RateObserver(Protocol):
    """Is told of every statement."""

    def exchanged(self, keys: int, seconds: float) -> None:
        """A statement for so many keys was answered after `seconds`."""

    def not_exchanged(self) -> None:
        """A statement was not answered."""


class SharedLimiter:
    """Implements latchgate.domain.ports.Limiter over a store that all workers share.

    One statement is under way at a time, and carries what there is of all keys, up to MAX_BATCH.
    """

    def __init__(self, *, store: RateStore, clock: Callable[[], float], observer: RateObserver) -> None:
        """Takes the store, a clock in seconds that goes on while the machine is suspended, and who is told."""
        self._store = store
        self._clock = clock
        self._observer = observer
        self._stirred = asyncio.Event()
        self.allotments = Allotments(clock, stands_after_s=clock() + SETTLE_S, stirred=self._stirred.set)
        # Nothing stands between a call and what it is counted by.
        self.take = self.allotments.take
        self.permits = self.allotments.permits
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._wake = asyncio.Event()
        # When everything is sent next, when that is if nothing is urgent, and what calls wait for at the soonest.
        self._tick_s = 0.0
        self._late_tick_s = 0.0
        self._next_s = 0.0
        # The statement that is under way.
        self._sending: asyncio.Task[bool] | None = None
        # When the store was last asked with success.
        self._heard_s = float("-inf")
        # How many calls have waited for the store.
        self.waits = 0

    async def wait(self, key_id: str, limit: int, cost: int) -> None:
        """Waits for the next statement's answer; while the store is away, for nothing."""
        allotments = self.allotments
        if allotments.is_alone:
            return
        self.waits += 1
        allotments.need(key_id, limit, cost)
        told = self._waiting.get(key_id)
        if told is None:
            told = self._waiting[key_id] = asyncio.get_running_loop().create_future()
        self._wake.set()
        # Not to be cancelled with one of those who wait for it.
        await asyncio.shield(told)

    async def run(self) -> None:
        """Works until it is cancelled."""
        await self._send([], LONG_PATIENCE_S)
        while True:
            if self.allotments.is_alone:
                await self._try_again()
            else:
                await self._send_due()

    async def close(self) -> None:
        """Reports what is not reported and gives back what is not used; whoever still waits is answered locally.

        To be called when `run` has ended.
        """
        if self._sending is not None:
            # What it is granted could be given back by nobody else.
            await asyncio.wait([self._sending])
        if not self.allotments.is_alone:
            for asks in self.allotments.farewell():
                if not await self._send(asks, LONG_PATIENCE_S):
                    break
        self.allotments.lose()
        self._release()

    async def _send_due(self) -> None:
        """Sends what calls wait for as soon as they do, and everything with each tick."""
        is_tick = await self._is_tick_next()
        self._wake.clear()
        now_s = self._clock()
        if is_tick:
            self._plan_ticks(now_s)
            asks = self.allotments.asks()
        else:
            asks = self.allotments.asks(list(self._waiting))
        self._next_s = now_s + SPACING_S
        if not asks and now_s >= self._heard_s + HEAR_S - TICK_S[0]:
            # How many workers there are is to be known before the store is away.
            await self._send([], LONG_PATIENCE_S)
        while asks and await self._send(asks[:MAX_BATCH], PATIENCE_S):
            asks = asks[MAX_BATCH:]

    async def _is_tick_next(self) -> bool:
        """Waits for what comes first: a call that waits, or the next tick, if there is anything to send."""
        while not self.allotments.is_urgent:
            is_idle = self.allotments.is_idle
            end_s = self._heard_s + HEAR_S if is_idle else self._late_tick_s
            self._stirred.clear()
            try:
                async with asyncio.timeout(max(end_s - self._clock(), 0)):
                    await self._stirred.wait()
            except TimeoutError:
                return True
            if is_idle:
                self._plan_ticks(self._clock())
        left_s = self._tick_s - self._clock()
        if left_s <= 0:
            return True
        try:
            async with asyncio.timeout(left_s):
                await self._wake.wait()
                await asyncio.sleep(max(self._next_s - self._clock(), 0))
        except TimeoutError:
            return True
        return False

    def _plan_ticks(self, now_s: float) -> None:
        self._tick_s, self._late_tick_s = now_s + _drawn(TICK_S), now_s + _drawn(LATE_TICK_S)

    async def _send(self, asks: Sequence[RateAsk], patience_s: float) -> bool:
        """Sends a statement, and takes note of what it has brought; says whether it was answered.

        Whoever is cancelled meanwhile leaves it under way.
        """
        told = [self._waiting.pop(ask.key_id) for ask in asks if ask.key_id in self._waiting]
        self._sending = asyncio.create_task(self._exchange(asks, told, patience_s))
        return await asyncio.shield(self._sending)

    async def _exchange(self, asks: Sequence[RateAsk], told: Sequence[asyncio.Future[None]], patience_s: float) -> bool:
        sent_s = self._clock()
        try:
            async with _patience(patience_s):
                answer = await self._ask(asks)
            self.allotments.hear(asks, answer, sent_s)
            self._heard_s = sent_s
        except Exception as error:  # noqa: BLE001 - whatever it is, calls are answered without the store
            self._lose(error)
            return False
        else:
            self._observer.exchanged(len(asks), self._clock() - sent_s)
            return True
        finally:
            for each in told:
                if not each.done():
                    each.set_result(None)

    async def _ask(self, asks: Sequence[RateAsk]) -> RateAnswer:
        sent_s = self._clock()
        try:
            return await self._store.exchange(asks)
        except StorageUnavailableError:
            if self._clock() - sent_s > RETRIED_WITHIN_S:
                raise
        # It may have been done: what is given back twice could be used twice, what is charged twice does no harm.
        return await self._store.exchange([ask._replace(back=0) for ask in asks])

    async def _try_again(self) -> None:
        await asyncio.sleep(TRY_PAUSE_S)
        self.allotments.forget_old_debts()
        try:
            async with _patience(LONG_PATIENCE_S):
                answer = await self._store.exchange([])
        except Exception:  # noqa: BLE001 - the same
            self._observer.not_exchanged()
        else:
            self.allotments.regain(answer)
            _log.info("rate_limits_shared", workers=answer.workers)

    def _lose(self, error: Exception) -> None:
        self._observer.not_exchanged()
        self.allotments.lose()
        self._release()
        # Not another error's text: it may hold what a row holds.
        problem = error.message if isinstance(error, StorageUnavailableError) else type(error).__name__
        _log.warning("rate_limits_local", problem=problem, workers=self.allotments.workers)

    def _release(self) -> None:
        """Lets all calls go on that wait."""
        waiting, self._waiting = self._waiting, {}
        for told in waiting.values():
            if not told.done():
                told.set_result(None)


@asynccontextmanager
async def _patience(seconds: float) -> AsyncIterator[None]:
    """Has what is in the block end with TimeoutError after so many seconds, and not before what has come is read.

    A loop that stood still finds timers that are over and answers that are there at the same time.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        timer = loop.call_later(seconds, lambda: timeout.reschedule(loop.time() + READ_S))
        try:
            yield
        finally:
            timer.cancel()


def _drawn(span_s: tuple[float, float]) -> float:
    """Draws a time of a span."""
    return random.uniform(*span_s)  # noqa: S311 - to spread, not to hide
