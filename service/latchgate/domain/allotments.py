"""Rate limits that all workers share: permits taken from shared windows in advance, and used from memory.

For each key the store (latchgate.domain.ports.RateStore) holds one sliding window of one-second slots, as
latchgate.domain.ratelimit does for one process. A worker takes permits from it in small, expiring allotments; a request
is admitted by using one up, without a word to the store. Such leases of a quota are known from Doorman
(https://github.com/youtube/doorman, which leases rates); here it is permits that are leased, so that the bound is one
of counting:

- A permit is charged to the slot in which it is granted, and may be used until LIFE_S after it was asked for. So a
  request is admitted less than 2 seconds after its slot began, and WINDOW_SLOTS = 62 slots always cover a sliding
  minute: of what is granted never more than the limit is admitted within one, and at least 60/62 of the limit is under
  constant overload. Unused permits go back to the slot that they were taken from.
- A worker that has no permits, and was not told that the window is full, admits one request on debt rather than have it
  wait, and reports it soon; the store charges it even beyond the limit. Until it is reported there is no second one,
  and after one that went beyond the limit there is none for a whole window. So each worker adds at most one request to
  what the limit lets through in a minute.
- Of STANDING_PART of the limit, shared out among the workers, the store is never told, so that keys which are far from
  their limits cost it nothing.
- Of LASTING_PART of the limit, shared out as well, each worker may hold permits for LASTING_S, so that keys which are
  far from their limits are asked for less often. Such a permit may be used when what it is charged to has left the
  window; but only one that was held when the minute began, and of these there are no more than that part.
- So no sliding minute admits more than 1.05 of the limit, and one for each worker.
- Whoever is told that the window is full is told when what leaves it, and refuses from memory until then.

While the store is away each worker keeps a fair share of the limit by a window of its own.

The store's clock makes the slots; a worker's clock only measures how long ago it asked. Clocks are never compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Final

from latchgate.domain.model import NO_PERMITS, Permits, RateState
from latchgate.domain.ports import RateAnswer, RateAsk
from latchgate.domain.ratelimit import MAX_CHANCES, MAX_KEYS, WindowLimiter
from latchgate.domain.shares import NEVER, WINDOW_SLOTS, Share

# How old what is known may be to tell where a key stands.
FRESH_S: Final = 1.0
# How many shares are looked at for each new one.
LOOKED_AT: Final = 2


class Allotments:
    """What a worker holds of all keys: at most `max_keys`, and those that there is something to report of.

    Says None where memory can not say; `need` then has the store asked.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_keys: int = MAX_KEYS,
        *,
        stands_after_s: float = NEVER,
        stirred: Callable[[], object] = lambda: None,
    ) -> None:
        """Takes a clock in seconds that never goes back, and goes on while the machine is suspended.

        Standing permits are taken from `stands_after_s` on: when all workers have heard how many they are. `stirred` is
        called when there is something to ask or to report again.
        """
        self._clock = clock
        self._stands_after_s = stands_after_s
        self._max_keys = max_keys
        self._shares: OrderedDict[str, Share] = OrderedDict()
        self._find = self._shares.get
        self._active: dict[str, Share] = {}
        self._stirred = stirred
        self._alone = WindowLimiter(clock, max_keys)
        self._lost_s = NEVER
        # How many workers share the limits, as the store has last told.
        self.workers = 1
        # Whether each worker counts for itself, because the store is away.
        self.is_alone = False
        # Whether there is something that should not wait for long.
        self.is_urgent = False

    def __len__(self) -> int:
        return len(self._shares)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to ask or to report, until `stirred` is called."""
        return not self._active

    def take(self, key_id: str, limit: int, cost: int) -> RateState | None:
        """Charges `cost` to the key if it fits within `limit` requests a minute; a refused cost is not charged.

        None, and nothing is charged, if only the store can say.
        """
        now_s = self._clock()
        share = self._find(key_id) or self._open(key_id, now_s)
        permits = share.permits
        if permits.left >= cost and permits.until_s > now_s and permits.used + cost <= limit:
            permits.used += cost
            permits.left -= cost
            # As RateState itself would, but for a call of Python's: it is what most lookups come to.
            return tuple.__new__(RateState, (True, limit, limit - permits.used, WINDOW_SLOTS))
        return self._look_closely(share, limit, cost, now_s)

    def _look_closely(self, share: Share, limit: int, cost: int, now_s: float) -> RateState | None:
        if limit != share.limit:
            share.limit = limit
            share.lacking = 0
        share.age(now_s)
        if share.reserve and cost > share.permits.left:
            share.release()
            self._activate(share, is_urgent=not share.is_patient)
        if cost > share.permits.left and now_s >= self._stands_after_s:
            share.stand(limit, self.workers, cost, now_s)
        if cost <= share.permits.left and cost and share.permits.used + cost <= limit:
            share.permits.used += cost
            share.permits.left -= cost
            return RateState(
                allowed=True, limit=limit, remaining=limit - share.permits.used, reset_after_s=WINDOW_SLOTS
            )
        if self.is_alone:
            return self._take_alone(share, limit, cost)
        if not cost or cost > limit:
            return _tell(share, limit, cost, now_s)
        share.cost = cost
        if 0 < share.lacking <= cost or share.is_short_of(cost, limit):
            return self._refuse(share, limit, cost, now_s)
        return self._take_on_debt(share, limit, cost, now_s)

    def _take_on_debt(self, share: Share, limit: int, cost: int, now_s: float) -> RateState | None:
        """Admits one request that will be reported, unless another one is to be, or the store has to be asked."""
        if cost > 1 or share.debt or share.waiting or now_s < share.free_after_s or share.permits.used >= limit:
            return None
        share.debt = 1
        share.permits.used += 1
        self._activate(share)
        return RateState(allowed=True, limit=limit, remaining=limit - share.permits.used, reset_after_s=WINDOW_SLOTS)

    def _refuse(self, share: Share, limit: int, cost: int, now_s: float) -> RateState:
        share.lacking = min(cost, share.lacking or cost)
        share.refused += cost
        self._activate(share)
        reset_after_s = share.fits_after_s(cost, limit, now_s)
        return RateState(
            allowed=False, limit=limit, remaining=max(limit - share.permits.used, 0), reset_after_s=reset_after_s
        )

    def _take_alone(self, share: Share, limit: int, cost: int) -> RateState:
        """Keeps the worker's fair share, in which at least one request fits."""
        if share.lost_s != self._lost_s:
            share.lost_s = self._lost_s
            # Of what was used before, its part.
            self._alone.charge(share.key_id, ceil(share.permits.used / self.workers))
        part = max(limit // self.workers, min(cost, limit), 1)
        allowed, _, remaining, reset_after_s = self._alone.take(share.key_id, part, cost)
        if allowed and cost:
            share.debt += cost
            share.permits.used += cost
            self._activate(share)
        return RateState(allowed=allowed, limit=limit, remaining=remaining, reset_after_s=reset_after_s)

    def permits(self, key_id: str) -> Permits:
        """Gives what the key's requests can be counted in, once `take` has admitted one."""
        share = self._find(key_id)
        return share.permits if share else NO_PERMITS

    def need(self, key_id: str, limit: int, cost: int) -> None:
        """Has the store asked for a request that waits for it."""
        share = self._find(key_id) or self._open(key_id, self._clock())
        share.limit = limit
        share.is_looked_at = True
        if cost:
            share.waiting += cost
            share.least = min(cost, share.least or cost)
        self._activate(share)

    def asks(self, key_ids: Sequence[str] | None = None) -> list[RateAsk]:
        """Says what the store is to be told and asked now: of these keys, or of all of which there is something."""
        now_s = self._clock()
        active, workers = self._active, self._sharing(now_s)
        if key_ids is None:
            shares = [share for share in active.values() if share.due_s <= now_s]
            self.is_urgent = False
        else:
            shares = [active[each] for each in key_ids if each in active]
        asks = []
        for share in shares:
            ask = share.ask(now_s, workers)
            if ask is not None:
                asks.append(ask)
            elif share.permits.left + share.reserve == share.standing() and not share.lacking:
                self._deactivate(share)
            elif share.due_s == NEVER:
                self.is_urgent = True
        return asks

    def hear(self, asks: Sequence[RateAsk], answer: RateAnswer, sent_s: float) -> None:
        """Takes note of what the store has answered to a statement that was sent at `sent_s` of the clock."""
        now_s = self._clock()
        self.workers = max(answer.workers, 1)
        workers = self._sharing(now_s)
        for ask in asks:
            told = answer.told.get(ask.key_id)
            if told is not None:
                share = self._shares[ask.key_id]
                share.hear(ask, told, sent_s, now_s, workers)
                self.is_urgent = self.is_urgent or share.due_s == NEVER

    def _sharing(self, now_s: float) -> int:
        """Gives how many workers share what each may have for itself; 0 as long as not all of them have heard so."""
        return self.workers if now_s >= self._stands_after_s else 0

    def lose(self) -> None:
        """Takes note that the store is away: from now on each worker counts for itself."""
        self.is_alone = True
        self._lost_s = self._clock()
        for share in self._active.values():
            share.waiting = share.refused = share.least = share.lacking = 0
            share.is_looked_at = False

    def regain(self, answer: RateAnswer) -> None:
        """Takes note that the store is back: what was admitted meanwhile, and still counts, is to be charged."""
        self.workers = max(answer.workers, 1)
        self.is_alone = False
        for share in self._active.values():
            self._forget_old_debt(share)
            # It may be another store, which knows nothing of these slots.
            share.backs = share.leaves = ()
            share.permits.used = share.used_before = share.debt

    def forget_old_debts(self) -> None:
        """Lets go of what was admitted too long ago to count, while the store is away."""
        for share in list(self._active.values()):
            self._forget_old_debt(share)
            if not share.debt:
                self._deactivate(share)

    def _forget_old_debt(self, share: Share) -> None:
        if share.lost_s == self._lost_s:
            share.debt = min(share.debt, self._alone.used(share.key_id))

    def farewell(self) -> Iterator[list[RateAsk]]:
        """Says what is to be reported and given back before the worker goes, a statement's worth at a time.

        What calls have come to want meanwhile, and were granted, goes back as well.
        """
        while True:
            for share in self._active.values():
                share.expire()
            asks = self.asks()
            if not asks:
                return
            yield asks

    def _activate(self, share: Share, *, is_urgent: bool = True) -> None:
        """Has it looked at with the next tick, or with a later one if nothing is urgent until then."""
        share.due_s = NEVER
        if self.is_idle or (is_urgent and not self.is_urgent):
            self.is_urgent = is_urgent
            self._stirred()
        if not share.is_active:
            share.is_active = True
            self._active[share.key_id] = share

    def _deactivate(self, share: Share) -> None:
        share.is_active = False
        del self._active[share.key_id]

    def _open(self, key_id: str, now_s: float) -> Share:
        """Begins to count for a key; makes room for it first."""
        self._let_go_of_past(now_s)
        if len(self._shares) >= self._max_keys:
            self._make_room()
        share = self._shares[key_id] = Share(key_id, now_s)
        return share

    def _let_go_of_past(self, now_s: float) -> None:
        """Looks at a few, each time at others, and lets go of those of which nothing counts any more.

        More than one, so that of the past there are in the end no more than what is in use.
        """
        shares = self._shares
        for _ in range(min(LOOKED_AT, len(shares))):
            oldest, share = next(iter(shares.items()))
            if share.is_past(now_s):
                self._forget(oldest)
            else:
                shares.move_to_end(oldest)

    def _make_room(self) -> None:
        """Lets go of one.

        The first goes that is found not to have been used since it was last looked at (CLOCK, as in
        latchgate.domain.cache). What there is something to report of stays: of that there is no more than what comes in
        a minute.
        """
        shares, idle = self._shares, None
        for _ in range(MAX_CHANCES):
            oldest, share = next(iter(shares.items()))
            if not share.is_active:
                idle = idle or oldest
                if share.seen == share.permits.used:
                    idle = oldest
                    break
            share.seen = share.permits.used
            shares.move_to_end(oldest)
        if idle is not None:
            self._forget(idle)

    def _forget(self, key_id: str) -> None:
        # Whoever still holds them finds no permits in them.
        permits = self._shares.pop(key_id).permits
        permits.left = permits.used = 0
        permits.until_s = NEVER


def _tell(share: Share, limit: int, cost: int, now_s: float) -> RateState | None:
    """Answers what charges nothing: a cost of 0, if enough is known, and one that never fits."""
    remaining = max(limit - share.permits.used, 0)
    if cost:
        # Whoever comes back nonetheless is kept from doing so at once.
        return RateState(allowed=False, limit=limit, remaining=remaining, reset_after_s=WINDOW_SLOTS)
    if now_s - share.told_s > FRESH_S:
        return None
    return RateState(allowed=True, limit=limit, remaining=remaining, reset_after_s=share.empty_after_s(now_s))
