"""When a change holds everywhere, judged by the workers' rows and the time that has passed."""

from __future__ import annotations

from typing import Final
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latchgate.domain.coherence import LeaseTerms
from latchgate.domain.effects import MAX_LEASE_S, Member, Standing, longest_wait_s, standing

REVISION: Final = 42
SINCE_S: Final = 1000.0


def member(number: int = 1, *, applied: int = 0, lease_s: float = 10.0) -> Member:
    """Makes a worker's row."""
    return Member(
        incarnation=UUID(int=number), applied_revision=applied, seen_revision=applied, renewals=7, lease_s=lease_s
    )


def wait_of(lease_s: float) -> float:
    """How long a lease is waited for."""
    return LeaseTerms(length_s=lease_s).wait_s


def test_without_workers_a_change_holds() -> None:
    """Where nobody answers from memory, a change holds as soon as it is committed."""
    assert Standing(remaining_s=0.0, overdue=()) == standing(REVISION, SINCE_S, [], SINCE_S)


@pytest.mark.parametrize(("applied", "is_effective"), [(REVISION - 1, False), (REVISION, True), (REVISION + 1, True)])
def test_worker_that_has_applied_it(applied: int, is_effective: bool) -> None:
    """A worker that has applied the change, or a later one, is not waited for."""
    stands = standing(REVISION, SINCE_S, [member(applied=applied)], SINCE_S)
    assert is_effective is (stands.remaining_s == 0)
    assert () == stands.overdue


def test_all_workers_must_have_applied_it() -> None:
    """One worker that lags behind is enough for a change not to hold everywhere; it is waited for as long as the
    longest lease among those that lag, and not for those that do not.
    """
    members = [
        member(1, applied=REVISION, lease_s=60),
        member(2, applied=REVISION - 1, lease_s=1),
        member(3, lease_s=5),
    ]
    stands = standing(REVISION, SINCE_S, members, SINCE_S + 0.25)
    assert pytest.approx(wait_of(5) - 0.25) == stands.remaining_s
    assert () == stands.overdue


@pytest.mark.parametrize(("ahead_s", "is_over"), [(-0.001, False), (0.0, True), (0.001, True)])
def test_silent_worker_is_waited_for_no_longer_than_its_lease(ahead_s: float, is_over: bool) -> None:
    """When the lease of a worker that has not applied the change must have ended, the change holds, and the worker may
    be taken off; a moment before, it does not and may not.
    """
    silent = member(lease_s=1)
    stands = standing(REVISION, 0.0, [silent], wait_of(1) + ahead_s)
    assert ((silent,) if is_over else ()) == stands.overdue
    assert is_over is (stands.remaining_s <= 0)


def test_only_those_whose_lease_is_over_are_overdue() -> None:
    """Of several workers that lag, those with short leases are overdue while others are still waited for."""
    short, long, done = member(1, lease_s=1), member(2, lease_s=10), member(3, applied=REVISION, lease_s=1)
    stands = standing(REVISION, SINCE_S, [short, long, done], SINCE_S + 5)
    assert (short,) == stands.overdue
    assert pytest.approx(wait_of(10) - 5) == stands.remaining_s


@given(
    rows=st.lists(st.tuples(st.integers(REVISION - 2, REVISION + 2), st.sampled_from([0.2, 1.0, 10.0, MAX_LEASE_S]))),
    passed_s=st.floats(0, 100),
)
def test_standing_against_its_meaning(rows: list[tuple[int, float]], passed_s: float) -> None:
    """Whatever the rows, nothing remains exactly if each worker has applied the change or is overdue; and what remains
    is never more than what is said of workers that can not be asked.
    """
    members = [member(number, applied=applied, lease_s=lease_s) for number, (applied, lease_s) in enumerate(rows)]
    stands = standing(REVISION, SINCE_S, members, SINCE_S + passed_s)
    settled = [each.applied_revision >= REVISION or each in stands.overdue for each in members]
    assert all(settled) is (stands.remaining_s <= 0)
    assert all(each.applied_revision < REVISION for each in stands.overdue)
    assert stands.remaining_s <= max(longest_wait_s(SINCE_S, SINCE_S + passed_s), 0) + 1e-9


def test_waiting_without_rows_ends() -> None:
    """Where the workers can not be asked, a change holds once the longest lease there may be has ended."""
    assert wait_of(MAX_LEASE_S) == longest_wait_s(0.0, 0.0)
    assert 0.0 == longest_wait_s(0.0, wait_of(MAX_LEASE_S))
    assert longest_wait_s(0.0, wait_of(MAX_LEASE_S) - 0.001) > 0
