"""When a worker may answer from memory: a state machine, without any input or output (docs/coherence.md).

A worker is a member of the protocol while its row stands in the database. It reads the log of changes again and again,
and each renewal gives it a lease: until the lease ends, no change that it has not applied can have been called
effective. All times are in seconds of one clock that counts while the machine is suspended too (CLOCK_BOOTTIME); clocks
of two machines are never compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from latchgate.domain.cache import KeyCache
from latchgate.domain.model import Lookup

NEVER: Final = float("-inf")

# An answer from memory is never older than this, whatever was or was not heard; some tokens' become only half as old.
MAX_AGE_S: Final = 600.0
_AGE_BYTES: Final = 2
# Tokens of foreign formats that are known to be none: few, and for a short time.
MAX_UNKNOWN: Final = 10_000
UNKNOWN_AGE_S: Final = 10.0
# By how much of its length the clocks of two machines may go apart within a lease. Ten times what NTP corrects at most.
CLOCK_DRIFT: Final = 0.005


class Entity(Enum):
    """What a change is a change of."""

    KEY = "key"
    ORGANIZATION = "organization"
    PLAN = "plan"


class Change(NamedTuple):
    """An entry of the change log."""

    entity: Entity
    entity_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """How long leases last. Those of different workers may differ; who waits for one asks for its length."""

    length_s: float

    @property
    def margin_s(self) -> float:
        """What is taken off a lease and added to a wait, beyond what clocks may do."""
        return self.length_s / 100

    @property
    def usable_s(self) -> float:
        """For how long from before the renewal was sent its worker may answer from memory."""
        return self.length_s * (1 - CLOCK_DRIFT) - self.margin_s

    @property
    def wait_s(self) -> float:
        """How long after a commit no worker that has not heard of it can have a lease any more."""
        return self.length_s * (1 + CLOCK_DRIFT) + self.margin_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReading:
    """What one statement has seen: the log beyond what was applied, and its newest revision.

    `changes` is None where they were too many to be read one by one. `timeline` changes when a standby takes over.
    `now_s` is the database's clock, in seconds since 1970; `is_member` says whether the worker's row still stands.
    """

    head: int
    timeline: str
    now_s: float
    is_member: bool
    changes: Sequence[Change] | None


class Reading(Enum):
    """What a reading of the log has led to."""

    APPLIED = "applied"
    EVICTED = "evicted"
    TAKEN_OVER = "taken_over"
    """A standby has taken over; nothing that was applied is missing, but it may not be the same any more."""
    WENT_BACK = "went_back"
    """The log is shorter than it was: the database has lost changes that were called effective."""


class Coherence:
    """What a worker has in memory, and whether it may answer from it.

    Implements latchgate.domain.ports.KeyMemory.
    """

    def __init__(self, *, terms: LeaseTerms, cache: KeyCache, boottime: Callable[[], float]) -> None:
        """Takes how long leases last, where records are held, and the clock."""
        self.terms = terms
        self.cache = cache
        self._boottime = boottime
        # The clock by which leases end and rows are held.
        self.now_s = boottime
        self.entries = cache.entries
        self._clock = DatabaseClock()
        self.ahead_s = self._clock.ahead_s
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._timeline = ""
        self.lease_until_s = NEVER
        # From when on statements may have been sent whose rows are held; never before the first reading of the log.
        self._kept_from_s = float("inf")
        self.applied_revision = 0
        # How often memory has answered.
        self.hits = 0

    @property
    def lease_left_s(self) -> float:
        """For how long the worker may still answer from memory; 0 without a lease."""
        return max(self.lease_until_s - self._boottime(), 0.0)

    def find(self, fingerprint: bytes, min_revision: int) -> Lookup | None:
        """Answers from memory, if there is a lease now and all changes up to `min_revision` are applied."""
        now_s = self._boottime()
        revision = self.applied_revision
        if now_s >= self.lease_until_s or revision < min_revision:
            return None
        record = self.cache.get(fingerprint, now_s)
        if record is None and self._unknown.get(fingerprint, NEVER) <= now_s:
            return None
        self.hits += 1
        return Lookup(record, now_s + self.ahead_s, revision)

    def keep(self, fingerprint: bytes, lookup: Lookup, *, sent_s: float) -> None:
        """Holds what a statement has found that was sent at `sent_s`, unless something newer is known already.

        Whatever was applied since the statement read is not in what it read: such a row would never be dropped.
        """
        if lookup.record is not None and self._is_current(lookup, sent_s):
            self.cache.put(fingerprint, lookup.record, sent_s + _age_s(fingerprint))

    def keep_unknown(self, fingerprint: bytes, lookup: Lookup, *, sent_s: float) -> None:
        """Holds that a token of a foreign format is none, for a short time and until any key changes."""
        if not self._is_current(lookup, sent_s):
            return
        self._unknown[fingerprint] = sent_s + UNKNOWN_AGE_S
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.popitem(last=False)

    def _is_current(self, lookup: Lookup, sent_s: float) -> bool:
        return sent_s >= self._kept_from_s and lookup.revision >= self.applied_revision

    def leave(self) -> None:
        """Stops answering from memory and forgets everything: before the worker's row goes, or after it went."""
        self.lease_until_s = NEVER
        self._kept_from_s = float("inf")
        self._forget()
        self._timeline = ""
        self.applied_revision = 0

    def read(self, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
        """Applies what was read by a statement that was sent at `sent_s`; a renewal gives a lease from then on."""
        if not reading.is_member:
            self.leave()
            return Reading.EVICTED
        heard_s = self._boottime()
        self._clock.hear(reading.now_s, sent_s=sent_s, heard_s=heard_s)
        self.ahead_s = self._clock.ahead_s
        result = self._judge(reading)
        if result is not Reading.APPLIED or reading.changes is None or not self._timeline:
            self._forget()
            self._kept_from_s = heard_s
        else:
            self._apply(reading.changes)
        self._timeline = reading.timeline
        self.applied_revision = reading.head
        if is_renewal:
            self.lease_until_s = sent_s + self.terms.usable_s
        elif result is not Reading.APPLIED:
            # It was given by a server that is no more, and the one that there is may not know of it.
            self.lease_until_s = NEVER
        return result

    def _judge(self, reading: LogReading) -> Reading:
        if reading.head < self.applied_revision:
            return Reading.WENT_BACK
        if self._timeline and reading.timeline != self._timeline:
            return Reading.TAKEN_OVER
        return Reading.APPLIED

    def _apply(self, changes: Sequence[Change]) -> None:
        for entity, entity_id in changes:
            match entity:
                case Entity.KEY:
                    self.cache.drop_key(entity_id)
                    self._unknown.clear()
                case Entity.ORGANIZATION:
                    self.cache.drop_organization(entity_id)
                case Entity.PLAN:
                    self.cache.drop_plan(entity_id)

    def _forget(self) -> None:
        self.cache.clear()
        self._unknown.clear()


def _age_s(fingerprint: bytes) -> float:
    """Says how old the answers to a token may become: with each token something else, between half of the most and all.

    What came into memory at one moment, as after a start, would all be looked up again at one moment otherwise.
    """
    part = int.from_bytes(fingerprint[:_AGE_BYTES]) / (1 << 8 * _AGE_BYTES)
    return MAX_AGE_S * (1 - part / 2)


class DatabaseClock:
    """Tells the database's wall clock by a local one, from what statements have brought (Cristian, 1989).

    A statement's answer tells that the database's clock stood at `now_s` some time between sending and hearing. Of what
    this leaves possible the latest is taken: a key ends a moment early rather than late. A clock that was set is
    believed at once.
    """

    def __init__(self) -> None:
        self._least_s = NEVER
        # What is to be added to a local time for the database's.
        self.ahead_s = float("inf")
        self._heard_s = 0.0

    def at(self, local_s: float) -> float:
        """Gives the database's time, in seconds since 1970, at a local time."""
        return local_s + self.ahead_s

    def hear(self, now_s: float, *, sent_s: float, heard_s: float) -> None:
        """Takes note of what the database's clock showed between two local times."""
        least_s, most_s = now_s - heard_s, now_s - sent_s
        drift_s = CLOCK_DRIFT * max(heard_s - self._heard_s, 0.0)
        least_known_s, most_known_s = self._least_s - drift_s, self.ahead_s + drift_s
        self._heard_s = heard_s
        if least_s > most_known_s or most_s < least_known_s:
            self._least_s, self.ahead_s = least_s, most_s
        else:
            self._least_s, self.ahead_s = max(least_s, least_known_s), min(most_s, most_known_s)
