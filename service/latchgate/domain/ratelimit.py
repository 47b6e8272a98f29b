"""Rate limits: a sliding window a key, kept in memory.

The window is made of one-second slots (the sliding-window-counter family, without its interpolation): a request is
admitted when the cost of the newest 61 slots and its own stay within the limit. 61 slots always span the last 60
seconds, so no sliding minute admits more than the limit; under constant overload at least 60/61 of it is admitted.

This is a limit of one process: what each worker keeps to by itself while the store of the limits that all share
(latchgate.domain.allotments) is away.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from latchgate.domain.model import RateState

WINDOW_SLOTS = 61
# A key that is used all the time takes some 6 KB, one that is used now and then less than 1 KB.
MAX_KEYS = 100_000
# How many windows get a second chance before one has to go.
MAX_CHANCES = 64


class _Window:
    """The newest slot of one key and its cost, those before it that hold anything, oldest first, and the sum of all."""

    __slots__ = ("cost", "is_used", "older", "slot", "used")

    def __init__(self, now: int) -> None:
        self.slot = now
        self.cost = 0
        self.older: list[tuple[int, int]] = []
        self.used = 0
        self.is_used = False

    def move_to(self, now: int) -> None:
        """Makes `now` the newest slot, and drops those that have left the window by then."""
        older = self.older
        if self.cost:
            older.append((self.slot, self.cost))
            self.cost = 0
        self.slot = now
        while older and older[0][0] <= now - WINDOW_SLOTS:
            self.used -= older.pop(0)[1]

    def seconds_until_empty(self) -> int:
        """Says after how many seconds nothing is used any more, if nothing is added."""
        if self.cost:
            return WINDOW_SLOTS
        return self.older[-1][0] + WINDOW_SLOTS - self.slot if self.older else 0

    def seconds_until(self, room: int) -> int:
        """Says after how many seconds at most `room` is used, if nothing is added."""
        used, wait = self.used, 0
        for slot, cost in (*self.older, (self.slot, self.cost)):
            if used <= room:
                break
            used -= cost
            wait = slot + WINDOW_SLOTS - self.slot
        return wait


class WindowLimiter:
    """Keeps every key within its limit, for as many keys as `max_keys`.

    Beyond it the one goes that came first of those that were not used since they were last looked at (CLOCK, as in
    latchgate.domain.cache).
    """

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
            window = self._open(key_id, now)
        else:
            window.is_used = True
            if window.slot != now:
                window.move_to(now)
        used = window.used + cost
        if used <= limit:
            window.used = used
            window.cost += cost
            reset_after_s = WINDOW_SLOTS if window.cost else window.seconds_until_empty()
            return RateState(allowed=True, limit=limit, remaining=limit - used, reset_after_s=reset_after_s)
        # A cost beyond the limit never fits: whoever comes back nonetheless is kept from doing so at once.
        reset_after_s = WINDOW_SLOTS if cost > limit else window.seconds_until(limit - cost)
        return RateState(allowed=False, limit=limit, remaining=max(limit - window.used, 0), reset_after_s=reset_after_s)

    def charge(self, key_id: str, cost: int) -> None:
        """Charges what was used elsewhere, whatever the limit."""
        window = self._at_now(key_id)
        window.used += cost
        window.cost += cost

    def used(self, key_id: str) -> int:
        """Says what a key has used within the window."""
        return self._at_now(key_id).used

    def _at_now(self, key_id: str) -> _Window:
        now = int(self._monotonic())
        window = self._windows.get(key_id) or self._open(key_id, now)
        if window.slot != now:
            window.move_to(now)
        return window

    def _open(self, key_id: str, now: int) -> _Window:
        """Begins to count for a key; makes room for it first."""
        windows = self._windows
        if len(windows) >= self._max_keys:
            for _ in range(MAX_CHANCES):
                oldest, window = next(iter(windows.items()))
                if not window.is_used:
                    break
                window.is_used = False
                windows.move_to_end(oldest)
            windows.popitem(last=False)
        window = windows[key_id] = _Window(now)
        return window
