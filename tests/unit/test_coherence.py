"""When a worker may answer from memory: the lease, what is kept, and the database's clock, at times a test sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2s
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latchgate.domain.cache import KeyCache
from latchgate.domain.coherence import (
    CLOCK_DRIFT,
    MAX_AGE_S,
    MAX_UNKNOWN,
    UNKNOWN_AGE_S,
    Change,
    Coherence,
    DatabaseClock,
    Entity,
    LeaseTerms,
    LogReading,
    Reading,
)
from latchgate.domain.model import KeyRecord, Lookup
from support.records import KEY_RECORD, NOW_S, ManualClock

TERMS: Final = LeaseTerms(length_s=10)
A, B = b"a" * 32, b"b" * 32
UNKNOWN = b"u" * 32

KEY_CHANGED: Final = Change(Entity.KEY, KEY_RECORD.key_id)
OTHER_KEY_CHANGED: Final = Change(Entity.KEY, "key_other")
EVERY_CHANGE: Final = (
    KEY_CHANGED,
    Change(Entity.ORGANIZATION, KEY_RECORD.organization_id),
    Change(Entity.PLAN, KEY_RECORD.plan_id),
)
OTHER_CHANGES: Final = (OTHER_KEY_CHANGED, Change(Entity.ORGANIZATION, "other"), Change(Entity.PLAN, "other"))


class Worker:
    """A worker's memory under a clock that stands still until a test moves it; its log is at `head`."""

    def __init__(self, head: int = 5) -> None:
        self.clock = ManualClock()
        self.memory = Coherence(terms=TERMS, cache=KeyCache(100), boottime=self.clock)
        self.head = head
        self.timeline = "00000001"

    def read(
        self,
        *changes: Change,
        too_many: bool = False,
        is_member: bool = True,
        is_renewal: bool = True,
        took_s: float = 0.0,
    ) -> Reading:
        """Reads the log, which has these changes more."""
        sent_s = self.clock()
        self.head += len(changes)
        self.clock.advance(took_s)
        reading = LogReading(
            head=self.head,
            timeline=self.timeline,
            now_s=NOW_S + sent_s,
            is_member=is_member,
            changes=None if too_many else changes,
        )
        return self.memory.read(reading, sent_s=sent_s, is_renewal=is_renewal)

    def keep(
        self,
        digest: bytes = A,
        record: KeyRecord | None = KEY_RECORD,
        *,
        revision: int | None = None,
        ago_s: float = 0.0,
    ) -> None:
        """Gives memory what a statement has found, by default now and with all changes."""
        lookup = Lookup(record, NOW_S, self.head if revision is None else revision)
        self.memory.keep(digest, lookup, sent_s=self.clock() - ago_s)

    def keep_unknown(self, digest: bytes = UNKNOWN, *, revision: int | None = None, ago_s: float = 0.0) -> None:
        """Gives memory what a statement has not found."""
        lookup = Lookup(None, NOW_S, self.head if revision is None else revision)
        self.memory.keep_unknown(digest, lookup, sent_s=self.clock() - ago_s)

    def knows(self, digest: bytes = A, min_revision: int = 0) -> bool:
        """Says whether memory answers."""
        return self.memory.find(digest, min_revision) is not None


def member(head: int = 5) -> Worker:
    """A worker that has joined, and knows one key and one token that is none."""
    worker = Worker(head)
    worker.read()
    worker.keep()
    worker.keep_unknown()
    return worker


def test_answer_holds_what_is_known() -> None:
    """An answer from memory is the record, at the database's present time, with the newest change that is applied."""
    worker = member()
    worker.clock.advance(3)
    found, none = worker.memory.find(A, 5), worker.memory.find(UNKNOWN, 5)
    assert found is not None
    assert none is not None
    assert (KEY_RECORD, 5) == (found.record, found.revision)
    assert Lookup(None, found.now_s, found.revision) == none
    assert pytest.approx(NOW_S + worker.clock(), abs=1e-3) == found.now_s
    assert worker.memory.find(B, 0) is None
    assert 2 == worker.memory.hits


def test_nothing_before_the_first_reading() -> None:
    """A worker that has not read the log yet neither answers from memory nor keeps anything."""
    worker = Worker()
    worker.keep()
    worker.keep_unknown()
    assert (False, False, 0.0) == (worker.knows(), worker.knows(UNKNOWN), worker.memory.lease_left_s)
    worker.read()
    assert (False, False) == (worker.knows(), worker.knows(UNKNOWN))
    assert pytest.approx(TERMS.usable_s) == worker.memory.lease_left_s


def test_nothing_sent_before_the_first_reading_was_heard_is_kept() -> None:
    """What a statement found that was sent before the worker was a member is not kept, also if it is answered after: a
    change since then may not be in the part of the log that the worker applies.
    """
    worker = Worker()
    worker.clock.advance(1)
    worker.read(took_s=0.5)
    for ago_s in (2.0, 0.5, 0.001):
        worker.keep(ago_s=ago_s)
        worker.keep_unknown(ago_s=ago_s)
        assert (False, False) == (worker.knows(), worker.knows(UNKNOWN))
    worker.keep()
    worker.keep_unknown()
    assert (True, True) == (worker.knows(), worker.knows(UNKNOWN))


@pytest.mark.parametrize("took_s", [0.0, 0.4, 9.0])
def test_lease_is_counted_from_sending(took_s: float) -> None:
    """However long the answer to a renewal takes, the lease ends a lease's length after the renewal was sent."""
    worker = Worker()
    sent_s = worker.clock()
    worker.read(took_s=took_s)
    worker.keep()
    assert pytest.approx(TERMS.usable_s - took_s) == worker.memory.lease_left_s
    worker.clock.now_s = sent_s + TERMS.usable_s - 0.001
    assert worker.knows()


@pytest.mark.parametrize(("ahead_s", "answers"), [(-0.001, True), (0.0, False), (0.001, False)])
def test_end_of_the_lease(ahead_s: float, answers: bool) -> None:
    """Memory is answered from until the very moment at which the lease ends."""
    worker = member()
    start_s = worker.clock()
    worker.clock.now_s = start_s + TERMS.usable_s + ahead_s
    assert (answers, answers) == (worker.knows(), worker.knows(UNKNOWN))
    assert answers is (worker.memory.lease_left_s > 0)


def test_lease_ends_before_others_stop_waiting() -> None:
    """For any length, with clocks as far apart as they may be, a lease has ended when those who wait for it go on."""
    for length_s in (0.2, 1.0, 10.0, 60.0):
        terms = LeaseTerms(length_s=length_s)
        slow, fast = 1 - CLOCK_DRIFT, 1 + CLOCK_DRIFT
        assert 0 < terms.usable_s / slow < terms.length_s < terms.wait_s / fast
        assert terms.margin_s > 0


def test_late_answer_gives_no_lease() -> None:
    """A renewal that is answered after its lease would have ended gives none; what it tells is applied."""
    worker = member()
    assert Reading.APPLIED is worker.read(OTHER_KEY_CHANGED, took_s=TERMS.usable_s)
    assert (0.0, 6, False) == (worker.memory.lease_left_s, worker.memory.applied_revision, worker.knows())


def test_renewal_lengthens_the_lease_and_reading_does_not() -> None:
    """Only what has renewed the worker's row gives a lease: without it nobody knows that there is one."""
    worker = member()
    worker.clock.advance(4)
    worker.read(is_renewal=False)
    assert pytest.approx(TERMS.usable_s - 4) == worker.memory.lease_left_s
    worker.read()
    assert pytest.approx(TERMS.usable_s) == worker.memory.lease_left_s


def test_knowledge_outlives_a_lapse_of_the_lease() -> None:
    """A worker whose row still stands has heard of every change once it reads the log again: it need not start anew."""
    worker = member()
    worker.clock.advance(TERMS.usable_s + 5)
    assert not worker.knows()
    worker.read()
    assert worker.knows()


@pytest.mark.parametrize("change", EVERY_CHANGE)
def test_change_drops_what_it_changed(change: Change) -> None:
    """A change of a key, its organization or its plan takes the key out of memory; all that was read before it."""
    worker = member()
    worker.keep(B, replace(KEY_RECORD, key_id="key_b", organization_id="org_b", plan_id="plan_b"))
    assert Reading.APPLIED is worker.read(change, is_renewal=False)
    assert (False, True, 6) == (worker.knows(A), worker.knows(B), worker.memory.applied_revision)


def test_other_changes_drop_nothing() -> None:
    """Changes of others leave a key in memory."""
    worker = member()
    worker.read(*OTHER_CHANGES)
    assert (True, 8) == (worker.knows(A), worker.memory.applied_revision)


def test_rows_from_before_what_was_applied_are_not_kept() -> None:
    """What a statement has found is kept only if it read all that was applied since: the change that it missed would
    never drop it.
    """
    worker = member()
    worker.read(*EVERY_CHANGE)
    for revision, is_kept in ((7, False), (8, True), (9, True)):
        worker.keep(B, revision=revision)
        worker.keep_unknown(B[::-1] + A, revision=revision)
        assert (is_kept, is_kept) == (worker.knows(B), worker.knows(B[::-1] + A))


def test_row_that_is_newer_than_what_was_applied_is_dropped_by_its_change() -> None:
    """A row that shows a change which is not applied yet is kept until that is applied, and then read once more."""
    worker = member()
    worker.keep(revision=6)
    assert worker.knows()
    worker.read(KEY_CHANGED)
    assert not worker.knows()


def test_own_token_that_is_none_is_not_kept() -> None:
    """That a token of the service's own form is none is not remembered: it may be made any moment."""
    worker = member()
    worker.keep(B, None)
    assert not worker.knows(B)


@pytest.mark.parametrize(("min_revision", "answers"), [(0, True), (5, True), (6, False)])
def test_min_revision(min_revision: int, answers: bool) -> None:
    """Memory answers only if it holds all the changes that were asked for."""
    worker = member()
    assert (answers, answers) == (worker.knows(A, min_revision), worker.knows(UNKNOWN, min_revision))
    worker.read(OTHER_KEY_CHANGED)
    assert worker.knows(A, 6)


def test_eviction_empties_everything() -> None:
    """A worker whose row is gone forgets all that it knew, answers nothing, and keeps nothing, until it has joined
    anew; what was sent before that is not kept then either.
    """
    worker = member()
    assert Reading.EVICTED is worker.read(is_member=False)
    worker.keep()
    worker.keep_unknown()
    assert (0.0, 0, 0) == (worker.memory.lease_left_s, worker.memory.applied_revision, len(worker.memory.cache))
    assert (False, False) == (worker.knows(), worker.knows(UNKNOWN))
    worker.clock.advance(1)
    assert Reading.APPLIED is worker.read(took_s=0.1)
    assert (False, False) == (worker.knows(), worker.knows(UNKNOWN))
    worker.keep(ago_s=0.5)
    assert not worker.knows()
    worker.keep()
    assert worker.knows()


def test_eviction_gives_no_lease() -> None:
    """A renewal that found no row to renew gives no lease, whatever else it tells."""
    worker = member()
    worker.read(OTHER_KEY_CHANGED, is_member=False, is_renewal=True)
    assert 0.0 == worker.memory.lease_left_s


def test_leaving_ends_the_lease_at_once() -> None:
    """A worker that is about to give up its row answers nothing from memory from then on."""
    worker = member()
    worker.memory.leave()
    assert (False, False, 0.0) == (worker.knows(), worker.knows(UNKNOWN), worker.memory.lease_left_s)


def test_head_that_went_back() -> None:
    """If the log has become shorter, the database has lost changes: all is forgotten, what is read from then on is kept
    although its revision is lower than what was applied, and what was sent before is not.
    """
    worker = member(head=9)
    worker.head = 4
    assert Reading.WENT_BACK is worker.read(took_s=0.1)
    assert (False, False, 4) == (worker.knows(), worker.knows(UNKNOWN), worker.memory.applied_revision)
    worker.keep(revision=9, ago_s=0.1)
    assert not worker.knows()
    worker.keep(revision=4)
    assert worker.knows()
    assert Reading.APPLIED is worker.read(KEY_CHANGED)
    assert not worker.knows()


def test_timeline_that_changed() -> None:
    """If a standby has taken over, all is forgotten, also if the log is as long as it was or longer: what stands in it
    may not be what was applied.
    """
    for more in (0, 3):
        worker = member()
        worker.timeline = "00000002"
        worker.head += more
        assert Reading.TAKEN_OVER is worker.read(took_s=0.1)
        assert (False, False, 5 + more) == (worker.knows(), worker.knows(UNKNOWN), worker.memory.applied_revision)
        worker.keep(ago_s=0.1)
        assert not worker.knows()
        worker.keep()
        assert Reading.APPLIED is worker.read()
        assert worker.knows()


def test_too_many_changes_at_once() -> None:
    """Changes that were too many to be read one by one take everything out of memory, and leave the lease."""
    worker = member()
    worker.head += 5000
    assert Reading.APPLIED is worker.read(too_many=True, took_s=0.1)
    assert (False, False, 5005) == (worker.knows(), worker.knows(UNKNOWN), worker.memory.applied_revision)
    worker.keep(ago_s=0.1)
    assert not worker.knows()
    worker.keep()
    assert worker.knows()


@pytest.mark.parametrize(("digest", "age_s"), [(bytes(32), MAX_AGE_S), (b"\x80" + bytes(31), MAX_AGE_S * 3 / 4)])
def test_answers_are_never_older_than_their_age(digest: bytes, age_s: float) -> None:
    """A record is not answered from memory once it is as old as it may become, ten minutes at most, counted from before
    it was asked for, although leases were renewed all the time.
    """
    worker = Worker()
    worker.read()
    worker.clock.advance(2)
    worker.keep(digest, ago_s=2)
    for span_s, answers in ((age_s - 2.001, True), (0.001, False)):
        worker.clock.advance(span_s)
        worker.read()
        assert answers is worker.knows(digest)


def test_what_came_together_does_not_leave_together() -> None:
    """Keys that came into memory at one moment are looked up again one after the other, evenly over five minutes."""
    worker = Worker()
    worker.read()
    keys = [blake2s(bytes((number,))).digest() for number in range(100)]
    for number, digest in enumerate(keys):
        worker.keep(digest, replace(KEY_RECORD, key_id=f"key_{number}"))
    held = [len(keys)]
    for span_s in (MAX_AGE_S / 2, *[MAX_AGE_S / 20] * 10):
        worker.clock.advance(span_s)
        worker.read()
        held.append(sum(worker.knows(digest) for digest in keys))
    assert (100, 100, 0) == (held[0], held[1], held[-1])
    gone = [before - after for before, after in pairwise(held[1:])]
    assert min(gone) > 0
    assert max(gone) < 25


@pytest.mark.parametrize(("ahead_s", "answers"), [(-0.001, True), (0.0, False)])
def test_unknown_tokens_are_asked_for_again(ahead_s: float, answers: bool) -> None:
    """That a foreign token is none is believed for ten seconds from before it was asked for, and no longer."""
    worker = member()
    worker.clock.advance(UNKNOWN_AGE_S - 1)
    worker.read()
    worker.clock.advance(1 + ahead_s)
    assert answers is worker.knows(UNKNOWN)


def test_unknown_tokens_are_forgotten_when_a_key_changes() -> None:
    """Any change of a key may be that a foreign token was stored; those of organizations and plans are none."""
    worker = member()
    worker.read(*OTHER_CHANGES[1:])
    assert worker.knows(UNKNOWN)
    worker.read(OTHER_KEY_CHANGED)
    assert not worker.knows(UNKNOWN)


def test_unknown_tokens_are_bounded() -> None:
    """A flood of invented foreign tokens takes a bounded part of memory, and drives no key out of it."""
    worker = member()
    tokens = [number.to_bytes(32, "big") for number in range(MAX_UNKNOWN + 5)]
    for token in tokens:
        worker.keep_unknown(token)
    known = [token for token in tokens if worker.knows(token)]
    assert tokens[5:] == known
    assert worker.knows()


def test_unknown_token_that_was_stored_is_found() -> None:
    """A token that was none, and is one by now, is answered as what it is."""
    worker = member()
    worker.read(KEY_CHANGED)
    worker.keep(UNKNOWN)
    found = worker.memory.find(UNKNOWN, 0)
    assert found is not None
    assert KEY_RECORD == found[0]


class World:
    """A database's clock and a local one. The local one runs at a pace within what clocks may differ by."""

    def __init__(self, pace: float = 1.0) -> None:
        self.clock = DatabaseClock()
        self.pace = pace
        self.local_s = 5000.0
        self.offset_s = NOW_S

    @property
    def now_s(self) -> float:
        """The database's time."""
        return self.offset_s + (self.local_s - 5000.0) * self.pace

    @property
    def error_s(self) -> float:
        """By how much the clock that was told is ahead."""
        return self.clock.at(self.local_s) - self.now_s

    def hear(self, there_s: float, back_s: float) -> None:
        """Reads the database's clock; the statement and its answer take so long."""
        sent_s = self.local_s
        self.local_s += there_s
        now_s = self.now_s
        self.local_s += back_s
        self.clock.hear(now_s, sent_s=sent_s, heard_s=self.local_s)


hundredths = st.integers(0, 200).map(lambda each: each / 100)
readings = st.lists(st.tuples(hundredths, hundredths, st.integers(0, 1000).map(lambda each: each / 10)), min_size=1)
paces = st.sampled_from([1 - CLOCK_DRIFT, 1 - CLOCK_DRIFT / 10, 1.0, 1 + CLOCK_DRIFT / 10, 1 + CLOCK_DRIFT])


@given(readings=readings, pace=paces)
@example(readings=[(0.0, 0.0, 0.0)], pace=1.0)
def test_clock_is_never_late(readings: Sequence[tuple[float, float, float]], pace: float) -> None:
    """Whatever statements take there and back, the time told is not behind the database's by more than the clocks may
    have drifted since the last reading: no key lives longer than it should. When a reading has just been heard it is
    ahead by no more than that reading took there and back.
    """
    world = World(pace)
    for there_s, back_s, pause_s in readings:
        world.hear(there_s, back_s)
        # The reading itself is no older than its way back.
        assert -CLOCK_DRIFT * (there_s + back_s) - 1e-6 <= world.error_s
        assert world.error_s <= (there_s + back_s) * (1 + CLOCK_DRIFT) + 1e-6
        world.local_s += pause_s
        assert -CLOCK_DRIFT * (there_s + back_s + pause_s) - 1e-6 <= world.error_s


def test_clock_is_made_better_by_quick_readings() -> None:
    """One statement that took long does not put out what quick ones have shown."""
    world = World()
    world.hear(0.001, 0.001)
    world.local_s += 1
    world.hear(2.0, 2.0)
    assert 0 <= world.error_s <= 0.001 * 2 + 5 * CLOCK_DRIFT + 1e-6
    world.hear(0.0, 0.001)
    assert 0 <= world.error_s <= 0.001 + 1e-6


@given(
    readings=readings, jump_s=st.sampled_from([-86_400.0, -30.0, 30.0, 86_400.0]), there_s=hundredths, back_s=hundredths
)
def test_clock_that_was_set_is_believed(
    readings: Sequence[tuple[float, float, float]], jump_s: float, there_s: float, back_s: float
) -> None:
    """If the database's clock was set, the first reading after it is believed, whatever was thought before."""
    world = World()
    for there, back, pause_s in readings:
        world.hear(there, back)
        world.local_s += pause_s
    world.offset_s += jump_s
    world.hear(there_s, back_s)
    assert -1e-6 <= world.error_s <= there_s + back_s + 1e-6
