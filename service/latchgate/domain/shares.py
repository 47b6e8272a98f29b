"""What one worker holds and knows of one key's shared window; latchgate.domain.allotments says what for."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from math import ceil
from operator import attrgetter, itemgetter
from typing import Final

from latchgate.domain.model import Permits
from latchgate.domain.ports import RateAsk, RateTold

NEVER: Final = float("-inf")

WINDOW_SLOTS: Final = 62
# Less than a second by what clocks may go apart, and by what a minute may be longer by one than by the other.
LIFE_S: Final = 0.95
# The same for permits that last. A worker hears within 5 seconds and a tick that there is one more, which begins to
# hold some of them 10 seconds after its start: by then those have ended that were too many.
LASTING_S: Final = 4.5
# For how long permits are asked for in advance, and for how long there are some left when more are asked for.
AHEAD_S: Final = 0.5
REFILL_S: Final = 0.2
# The same where less than a part of the limit is used: what lies idle here is missed by nobody, and each key is asked
# for half as often; where the permits last, a tenth as often.
FAR_PART: Final = 0.75
FAR_AHEAD_S: Final = 0.9
LASTING_AHEAD_S: Final = 4.2
# For how long there are some left when more are asked for where nobody hurries, and how long the permits have to last
# for that; of those that stand it is a part.
LATE_REFILL_S: Final = 0.5
LATE_AHEAD_S: Final = 2.0
STANDING_RESERVE_PART: Final = 0.125
# Keys that are asked for less often than about once a second need none.
LEAST_AHEAD: Final = 0.5
# Over what span the demand for a key is averaged, and the shortest one that it is told from.
SPAN_S: Final = 0.5
SHORTEST_S: Final = 0.05
# How often a full window is looked at again while requests are refused: others may have given permits back.
LOOK_AGAIN_S: Final = 0.35
# Below so many requests a second none is asked for ahead of them while a window is nearly full.
STEADY: Final = 4.0


# What part of a limit the workers may let through together without telling the store of it. A third of it is for each
# window of the clock's, of which a minute touches two; the last third is for workers that take the place of others,
# which have let their own part through.
STANDING_PART: Final = 0.04
# What part of a limit the workers may hold together of permits that last: so many may be used when what they are
# charged to has left the window.
LASTING_PART: Final = 0.01
# Stands for the slot of permits that were never taken from one.
_NOWHERE: Final = -1
_BY_END = attrgetter("until_s")


@lru_cache(maxsize=2)
def _end_s(block: int) -> float:
    """Gives when a window of the clock's ends: one and the same number for all keys, so that it is at hand."""
    return (block + 1.0) * WINDOW_SLOTS


class _Layer:
    """Permits of one grant that are not used up: their slot, how many, and until when they may be used."""

    __slots__ = ("count", "slot", "until_s")

    def __init__(self, slot: int, count: int, until_s: float) -> None:
        self.slot = slot
        self.count = count
        self.until_s = until_s


class Share:
    """The state is open to latchgate.domain.allotments, and the permits to whoever counts in them."""

    __slots__ = (
        "asked_s", "backs", "block", "cost", "debt", "due_s", "free_after_s", "is_active", "is_looked_at",
        "is_patient", "key_id", "lacking", "layers", "least", "leaves", "limit", "lost_s", "permits", "rate",
        "refused", "reserve", "seen", "told_s", "used_before", "waiting",
    )  # fmt: skip

    def __init__(self, key_id: str, now_s: float) -> None:
        """Begins with nothing."""
        self.key_id = key_id
        self.limit = 0
        # Apart from the rest, because whoever counts in them may keep them for longer than the share lasts. Their
        # `used` is what the window holds as far as is known, less what is left here, and with what was not reported.
        self.permits = Permits()
        # Of which grants the permits are that are left, by when they end. A tuple, as below: most are empty or of one,
        # and there is a share for each key that is in use.
        self.layers: tuple[_Layer, ...] = ()
        # How many more there are than `permits` has: whoever has used up those is to see that others are asked for.
        self.reserve = 0
        # Permits that have expired, by slot.
        self.backs: tuple[tuple[int, int], ...] = ()
        # For which window of the clock's it was given standing permits.
        self.block = -1
        # What was admitted without a permit and not reported, and when that may be done again.
        self.debt = 0
        self.free_after_s = NEVER
        self.told_s = NEVER
        # If the window was short of permits when that was told: when which cost leaves it, the soonest first.
        self.leaves: tuple[tuple[float, int], ...] = ()
        # What waits for the store since it was asked, and the cheapest of it.
        self.waiting = 0
        self.least = 0
        self.is_looked_at = False
        # What was refused lately, and the cheapest request for which the next tick is to ask permits; 0 if for none.
        self.refused = 0
        self.lacking = 0
        # What a request costs, as the last one did that was looked at closely.
        self.cost = 1
        # Demand in permits a second, and from when and from what `used` it is told next.
        self.rate = 0.0
        # As if it had not been asked for lately: one request is no reason to expect another soon.
        self.asked_s = now_s - 2.0
        self.used_before = 0
        # Whether what is in reserve is enough to wait for a later tick with once it is released.
        self.is_patient = True
        # Whether there is, or may soon be, something to ask or to report; and when that is to be seen to again.
        self.is_active = False
        self.due_s = NEVER
        # What `used` was when this was last looked at for being forgotten.
        self.seen = -1
        # Which time that the store was lost its part of a local window was begun for.
        self.lost_s = NEVER

    def is_past(self, now_s: float) -> bool:
        """Says whether nothing of it counts any more, so that a new one in its place would do the same."""
        return (
            now_s - self.told_s > WINDOW_SLOTS
            and now_s // WINDOW_SLOTS > self.block
            and self.free_after_s <= now_s
            and not (self.is_active or self.debt or self.backs)
        )

    def age(self, now_s: float) -> None:
        """Takes account of what has left the window, and of permits that have expired."""
        if self.leaves and self.leaves[0][0] <= now_s:
            gone = bisect_right(self.leaves, now_s, key=itemgetter(0))
            self._lower(sum(cost for _, cost in self.leaves[:gone]))
            self.leaves = self.leaves[gone:]
        if now_s - self.told_s > WINDOW_SLOTS:
            # At least as old is all of it.
            self.leaves = ()
            self.used_before -= self.permits.used - self.debt
            self.permits.used = self.debt
        if self.layers:
            self.settle(now_s)

    def _lower(self, gone: int) -> None:
        """Lowers what is used, by no more than is not this worker's own news."""
        gone = min(gone, self.permits.used - self.debt)
        self.permits.used -= gone
        self.used_before -= gone

    def settle(self, now_s: float) -> None:
        """Finds out of which grants the permits are that are left; those that have expired are to be given back.

        Where more have expired than were at hand, there are less than none until the others are released.
        """
        layers = self.layers
        if len(layers) == 1 and layers[0].slot == _NOWHERE and layers[0].until_s <= now_s:
            # As below, in short: of most keys nothing else is ever held, and each time they are used it is of the past.
            self.layers = ()
            self.permits.left = self.reserve = 0
            self.permits.until_s = NEVER
            return
        used_up = -self.permits.left - self.reserve
        for layer in layers:
            used_up += layer.count
        good = []
        for layer in layers:
            part = min(used_up, layer.count)
            used_up -= part
            layer.count -= part
            if layer.count and layer.until_s > now_s:
                good.append(layer)
            elif layer.count:
                self.permits.left -= layer.count
                if layer.slot != _NOWHERE:
                    self.backs = (*self.backs, (layer.slot, layer.count))
        self.layers = tuple(good)
        self.permits.until_s = good[0].until_s if good else NEVER

    def release(self) -> None:
        """Has what was in reserve at hand."""
        self.permits.left += self.reserve
        self.reserve = 0

    def _reserve(self, count: int) -> None:
        """Holds so many more in reserve, of those that are at hand."""
        self.reserve += count
        self.permits.left -= count

    def stand(self, limit: int, workers: int, cost: int, now_s: float) -> None:
        """Takes the permits of which the store is never told, once for each window of the clock's, to use `cost`."""
        block = int(now_s // WINDOW_SLOTS)
        if block != self.block:
            self.block = block
            count = int(limit * STANDING_PART / 3) // workers
            if count:
                self._hold(_Layer(_NOWHERE, count, _end_s(block)))
                self._reserve(max(min(int(count * STANDING_RESERVE_PART), self.permits.left - cost), 0))

    def _hold(self, layer: _Layer) -> None:
        """Has permits at hand until the first of all of them end; those are the first to be used."""
        place = bisect_right(self.layers, layer.until_s, key=_BY_END)
        self.layers = (*self.layers[:place], layer, *self.layers[place:])
        self.permits.left += layer.count
        self.permits.until_s = self.layers[0].until_s

    def standing(self) -> int:
        """Gives how many permits are left of which the store is not told; to be asked after `settle`."""
        count = 0
        for layer in self.layers:
            if layer.slot == _NOWHERE:
                count += layer.count
        return count

    def _lasting(self, workers: int) -> int:
        """Gives how many permits may last; none where `workers` are not known yet, which is 0."""
        return int(self.limit * LASTING_PART) // workers if workers else 0

    def is_short_of(self, cost: int, limit: int) -> bool:
        """Says whether it is known that there is no room for a cost; to be asked after `age`."""
        return bool(self.leaves) and self.permits.used + cost > limit

    def fits_after_s(self, cost: int, limit: int, now_s: float) -> int:
        """Says after how many seconds there is room for a cost, as far as is known; at least one."""
        used = self.permits.used
        for time_s, gone in self.leaves:
            used -= gone
            if used + cost <= limit:
                return max(ceil(time_s - now_s), 1)
        return 1

    def empty_after_s(self, now_s: float) -> int:
        """Says after how many seconds nothing is used any more, if nothing is added."""
        if not self.permits.used:
            return 0
        return ceil(self.leaves[-1][0] - now_s) if self.leaves and not self.debt else WINDOW_SLOTS

    def ask(self, now_s: float, workers: int) -> RateAsk | None:
        """Says what the store is to be told and asked, if there is anything; `workers` as `hear` has them."""
        self.age(now_s)
        self.release()
        self._tell_rate(now_s)
        is_far, is_steady = self._is_far(), self._is_steady()
        stock = 0.0
        if is_steady:
            stock = self.rate * AHEAD_S
            if is_far:
                stock = max(self.rate * FAR_AHEAD_S, min(self.rate * LASTING_AHEAD_S, self._lasting(workers)))
        self.is_patient = is_steady and stock >= self.rate * LATE_AHEAD_S
        needed, wanted = self._wanted(now_s, stock)
        least = max((self.least or self.lacking or self.cost) - self.permits.left, 1)
        is_looked_at, self.is_looked_at = self.is_looked_at or bool(self.waiting), False
        self.waiting = self.least = 0
        # What nobody misses goes back with what is asked next.
        is_back_due = self.backs and not (is_far and is_steady)
        if not (wanted or self.debt or is_back_due or is_looked_at):
            self._rest(now_s)
            return None
        slot, back = 0, 0
        if self.backs:
            *others, (slot, back) = self.backs
            self.backs = tuple(others)
        return RateAsk(self.key_id, self.limit, self.debt, least, needed, wanted, slot, back)

    def _is_far(self) -> bool:
        """Says whether the limit is far, so that what lies idle here is missed by nobody."""
        return self.permits.used < self.limit * FAR_PART

    def _is_steady(self) -> bool:
        """Says whether it is asked for so often that it needs permits.

        Keys that are asked for less often find the last request reported each time.
        """
        return self.rate * AHEAD_S >= LEAST_AHEAD * self.cost

    def _few(self) -> int:
        """Gives how many permits are left when more are to be asked for."""
        return ceil(self.rate * (LATE_REFILL_S if self.is_patient else REFILL_S))

    def _rest(self, now_s: float) -> None:
        """Has it not looked at before few permits are left, or these have expired; where the limit is far."""
        reserve = self._few() if self._is_steady() else 0
        if self.permits.left > reserve and self._is_far():
            self._reserve(reserve)
            # Those that stand do not go back.
            self.due_s = max([layer.until_s for layer in self.layers if layer.slot != _NOWHERE], default=now_s + LIFE_S)
        else:
            self.due_s = NEVER

    def _tell_rate(self, now_s: float) -> None:
        span_s = max(now_s - self.asked_s, SHORTEST_S)
        demand = (self.permits.used - self.used_before + self.refused + self.waiting) / span_s
        if self.waiting and demand > self.rate:
            self.rate = demand
        else:
            self.rate += (demand - self.rate) * min(span_s / SPAN_S, 1.0)
        self.asked_s = now_s
        self.used_before = self.permits.used
        self.refused = 0

    def _wanted(self, now_s: float, demand: float) -> tuple[int, int]:
        """Says how many permits are needed now, and how many are wanted to meet a demand ahead."""
        stock = min(ceil(demand / self.cost) * self.cost, self.limit)
        if self.waiting:
            needed = max(min(self.waiting, self.limit) - self.permits.left, 0)
            return needed, max(needed, stock - self.permits.left) if needed else 0
        if self.leaves and self.rate < STEADY * self.cost:
            # Few requests, for which few permits are left: each asks for itself, and none lies idle.
            self.lacking = 0
            return 0, 0
        least = self.lacking or self.cost
        if self.permits.left >= least:
            self.lacking = 0
        is_full = self.is_short_of(least, self.limit)
        if self.lacking:
            if is_full and now_s - self.told_s < LOOK_AGAIN_S:
                return 0, 0
            return least - self.permits.left, max(least, stock) - self.permits.left
        if is_full or self.permits.left > self._few():
            return 0, 0
        return 0, max(stock - self.permits.left, 0)

    def expire(self) -> None:
        """Makes all permits ones that are to be given back, and wants no more."""
        for layer in self.layers:
            layer.until_s = NEVER
        self.permits.until_s = NEVER
        self.waiting = self.refused = self.lacking = 0
        self.is_looked_at = False
        self.used_before = self.permits.used
        self.rate = 0.0
        self.due_s = NEVER

    def hear(self, ask: RateAsk, told: RateTold, sent_s: float, now_s: float, workers: int) -> None:
        """Takes note of the store's answer to a statement that was sent at `sent_s`, and came now.

        Permits that last are shared by `workers`; 0 as long as it is not known how many there are.
        """
        self.debt -= ask.charged
        taken = self.permits.used - self.used_before
        if self.layers:
            self.settle(now_s)
        if told.granted:
            held = self.permits.left + self.reserve - self.standing() + told.granted
            life_s = LASTING_S if held <= self._lasting(workers) else LIFE_S
            self._hold(_Layer(told.slot, told.granted, sent_s + life_s))
            self.settle(now_s)
        self.permits.used = (
            told.used - (self.permits.left - self.standing()) - sum(back for _, back in self.backs) + self.debt
        )
        self.used_before = self.permits.used - taken
        self.told_s = now_s
        self.leaves = tuple((now_s + after_s, cost) for after_s, cost in told.leaves)
        if ask.wanted and (told.granted >= ask.wanted or told.used + ask.least > ask.limit):
            self.lacking = 0
        if ask.charged and told.used > ask.limit:
            self.free_after_s = now_s + WINDOW_SLOTS
        if not (self.debt or self.is_looked_at):
            self._rest(now_s)
