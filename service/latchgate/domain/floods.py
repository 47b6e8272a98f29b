"""Floods of tokens that nobody knows: how many are looked up, and how long those wait who send them."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable


class _Bucket:
    """Lets `per_second` through in each second, and as many that were saved up."""

    def __init__(self, monotonic: Callable[[], float], per_second: float) -> None:
        self._monotonic = monotonic
        self._per_second = per_second
        self._left = per_second
        self._filled_s = monotonic()

    def take(self) -> bool:
        """Says whether one more is let through now."""
        now_s = self._monotonic()
        self._left = min(self._per_second, self._left + (now_s - self._filled_s) * self._per_second)
        self._filled_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ForeignLookupBudget:
    """Bounds how often tokens of foreign formats, which anyone can invent, reach the database.

    Foreign tokens that were found before are always let through, so that a flood of invented ones can not starve them;
    all others share `per_second` lookups. What is remembered is bounded: the longest unused digest is forgotten first.
    """

    def __init__(self, monotonic: Callable[[], float], per_second: float = 500.0, remembered: int = 100_000) -> None:
        """Takes a clock in seconds that never goes back."""
        self._bucket = _Bucket(monotonic, per_second)
        self._remembered = remembered
        self._known: OrderedDict[bytes, None] = OrderedDict()
        # How many lookups were refused for want of budget.
        self.refused = 0

    def spend(self, token_digest: bytes) -> bool:
        """Says whether this digest may be looked up now."""
        if token_digest in self._known:
            self._known.move_to_end(token_digest)
            return True
        if self._bucket.take():
            return True
        self.refused += 1
        return False

    def remember(self, token_digest: bytes, *, found: bool) -> None:
        """Takes note of a lookup's result."""
        if not found:
            self._known.pop(token_digest, None)
            return
        self._known[token_digest] = None
        if len(self._known) > self._remembered:
            self._known.popitem(last=False)


class Patience:
    """Makes those wait who try tokens that nobody knows, when they are many.

    `per_second` such answers are given at once; each beyond waits for `delay_s` seconds, more or less by a half: those
    who wait do not all come back in one moment, in which a good token would wait for them. Who asks again as soon as an
    answer is there, as a flood does behind a gateway with so many connections, is slowed down by its own waiting, and
    leaves the processor to those with good tokens. Nobody else waits for it.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        per_second: float = 200.0,
        delay_s: float = 0.1,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Takes a clock in seconds that never goes back, what waits, and what draws a number from two others."""
        self._bucket = _Bucket(monotonic, per_second)
        self._sleep = sleep
        self._delay_s = delay_s
        self._draw = draw

    async def wait(self) -> None:
        """Waits before an answer, if there were many."""
        if not self._bucket.take():
            await self._sleep(self._draw(self._delay_s / 2, self._delay_s * 3 / 2))
