"""Rate limits: a sliding window a key, kept in memory.

The window is made of one-second slots (the sliding-window-counter family, without its interpolation): a request is
admitted when the cost of the newest 61 slots and its own stay within the limit. 61 slots always span the last 60
seconds, so no sliding minute admits more than the limit; under constant overload at least 60/61 of it is admitted.

One worker's memory is one limit. A limit shared by several workers is another implementation of the same port.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from latchgate.domain.model import RateState

WINDOW_SLOTS = 61
# A key that is used all the time takes some 7 KB, one that is idle 1 KB.
MAX_KEYS = 100_000


class _Window:
    """The slots of one key that hold anything, oldest first, and their sum."""

    __slots__ = ("slots", "used")

    def __init__(self) -> None:
        self.slots: deque[tuple[int, int]] = deque()
        self.used = 0

    def forget(self, now: int) -> None:
        """Drops the slots that have left the window."""
        while self.slots and self.slots[0][0] <= now - WINDOW_SLOTS:
            self.used -= self.slots.popleft()[1]

    def add(self, now: int, cost: int) -> None:
        """Counts a cost in the current slot."""
        self.used += cost
        if self.slots and self.slots[-1][0] == now:
            cost += self.slots.pop()[1]
        self.slots.append((now, cost))

    def seconds_until_empty(self, now: int) -> int:
        """Says after how many seconds nothing is used any more, if nothing is added."""
        return self.slots[-1][0] + WINDOW_SLOTS - now if self.slots else 0

    def seconds_until(self, now: int, room: int) -> int:
        """Says after how many seconds at most `room` is used, if nothing is added."""
        used, wait = self.used, 0
        for slot, cost in self.slots:
            if used <= room:
                break
            used -= cost
            wait = slot + WINDOW_SLOTS - now
        return wait


class WindowLimiter:
    """Keeps every key within its limit, for as many keys as `max_keys`; beyond it the longest unused is forgotten."""

    def __init__(self, monotonic: Callable[[], float], max_keys: int = MAX_KEYS) -> None:
        """Takes a clock in seconds that never goes back."""
        self._monotonic = monotonic
        self._max_keys = max_keys
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def take(self, key_id: str, limit: int, cost: int) -> RateState:
        """Charges `cost` to the key if it fits within `limit` requests a minute; a refused cost is not charged."""
        now = int(self._monotonic())
        window = self._windows.get(key_id)
        if window is None:
            window = _Window()
        else:
            self._windows.move_to_end(key_id)
            window.forget(now)
        allowed = window.used + cost <= limit
        if allowed and cost:
            window.add(now, cost)
            self._windows[key_id] = window
            if len(self._windows) > self._max_keys:
                self._windows.popitem(last=False)
        remaining = limit - window.used
        if allowed:
            return RateState(
                allowed=True, limit=limit, remaining=remaining, reset_after_s=float(window.seconds_until_empty(now))
            )
        # A cost beyond the limit never fits: whoever comes back nonetheless is kept from doing so at once.
        reset_after_s = WINDOW_SLOTS if cost > limit else window.seconds_until(now, limit - cost)
        return RateState(allowed=False, limit=limit, remaining=max(remaining, 0), reset_after_s=float(reset_after_s))
