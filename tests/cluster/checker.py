"""Judges a history: whether any reading was answered from before a change that was called effective.

What is demanded of a reading that was invoked at a time t and answered with revision r:

1. It is from a state that has all changes which held everywhere at t, by what their callers were told, and all up
   to r.
2. r is not less than the revision of any change that held everywhere at t, whatever that was a change of.
3. It is no error, unless one that says that the service could not decide.

A change that held everywhere at t makes sure of all changes of lower revisions, too: whatever shows it shows them.
A later change may undo an earlier one. A change of unknown result may be made at any time from its invocation on, or
never: both are allowed for ever after.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from cluster.history import NANOSECONDS, VALID, Answer, Change, History, Reading, Subject

UNDECIDED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
"""The errors with which a worker may answer that can not reach its database, or is gone."""
SHOWN_BEFORE = 3
_EXPECTED = {Answer.REFUSED: frozenset({"FAILED_PRECONDITION"}), Answer.UNKNOWN: UNDECIDED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A call that must not have been answered so. `call` is a reading or a change."""

    kind: str
    call: Reading | Change
    allowed: frozenset[str] = frozenset()
    because: Change | None = None


class _Steps:
    """The changes that bear on one subject, in the order of their revisions."""

    def __init__(self, subject: Subject, changes: Iterable[Change]) -> None:
        names = {fact for fact, _ in subject.facts}
        mine = [change for change in changes if change.fact in names]
        self._facts = subject.facts
        self.known = sorted(
            (change for change in mine if change.holds_from_ns is not None), key=lambda each: each.revision
        )
        self._unknown = sorted(
            (change for change in mine if change.answer is Answer.UNKNOWN), key=lambda each: each.invoked_ns
        )
        self._revisions = [change.revision for change in self.known]
        self._unknown_ns = [change.invoked_ns for change in self._unknown]
        # How many of the known must be seen from a time on.
        holding = sorted((change.holds_from_ns or 0, place + 1) for place, change in enumerate(self.known))
        self._holds_ns = [holds_ns for holds_ns, _ in holding]
        self._least = list(itertools.accumulate((place for _, place in holding), max))
        # How many of them at most can have been made by a time: none whose call was still to come.
        invoked = [change.invoked_ns for change in self.known]
        self._earliest_ns = list(reversed(list(itertools.accumulate(reversed(invoked), min))))
        self._outcomes = cache(self._find_outcomes)

    def span(self, reading: Reading) -> tuple[int, int, int]:
        """Gives how many known changes a reading shows at least and at most, and how many unknown ones it may show."""
        index = bisect_right(self._holds_ns, reading.invoked_ns)
        least = self._least[index - 1] if index else 0
        least = max(least, bisect_right(self._revisions, reading.revision or 0))
        most = bisect_left(self._earliest_ns, reading.returned_ns)
        return least, max(least, most), bisect_left(self._unknown_ns, reading.returned_ns)

    def allowed(self, reading: Reading) -> frozenset[str]:
        """Gives the outcomes that a reading may have."""
        return self._outcomes(*self.span(reading))

    def _find_outcomes(self, least: int, most: int, unknown: int) -> frozenset[str]:
        may_be: dict[str, set[bool]] = {fact: set() for fact, _ in self._facts}
        for change in self._unknown[:unknown]:
            may_be[change.fact].add(change.value)
        outcomes = set()
        for count in range(least, most + 1):
            values = {fact: {False} for fact, _ in self._facts}
            for change in self.known[:count]:
                values[change.fact] = {change.value}
            choices = [sorted(values[fact] | may_be[fact]) for fact, _ in self._facts]
            for choice in itertools.product(*choices):
                holding = (outcome for (_, outcome), holds in zip(self._facts, choice, strict=True) if holds)
                outcomes.add(next(holding, VALID))
        return frozenset(outcomes)


def check(history: History) -> list[Violation]:
    """Gives what must not have been, in the order in which it returned."""
    found: list[Violation] = []
    steps: dict[Subject, _Steps] = {}
    by_fact: dict[str, list[Change]] = defaultdict(list)
    changes = _sharpened(history.changes)
    for change in changes:
        by_fact[change.fact].append(change)
        if change.error and change.error not in _EXPECTED[change.answer]:
            found.append(Violation(kind="ERROR", call=change))
    floors = _Floors(changes)
    for reading in history.readings:
        if reading.error:
            if reading.error not in UNDECIDED:
                found.append(Violation(kind="ERROR", call=reading))
            continue
        subject = reading.subject
        if subject not in steps:
            steps[subject] = _Steps(subject, [each for fact, _ in subject.facts for each in by_fact[fact]])
        found += _judged(reading, steps[subject], floors)
    return sorted(found, key=lambda each: each.call.returned_ns)


def _sharpened(changes: Iterable[Change]) -> list[Change]:
    """Gives the changes, each to hold from when it or any of a higher revision does."""
    sharpened: list[Change] = []
    least_ns: int | None = None
    for change in sorted(changes, key=lambda each: each.revision, reverse=True):
        if change.holds_from_ns is None:
            sharpened.append(change)
            continue
        least_ns = change.holds_from_ns if least_ns is None else min(least_ns, change.holds_from_ns)
        sharpened.append(replace(change, holds_from_ns=least_ns))
    return sharpened


def _judged(reading: Reading, steps: _Steps, floors: _Floors) -> list[Violation]:
    allowed = steps.allowed(reading)
    if reading.outcome not in allowed:
        least, _, _ = steps.span(reading)
        because = steps.known[least - 1] if least else None
        return [Violation(kind="LOST" if reading.is_final else "STALE", call=reading, allowed=allowed, because=because)]
    floor = floors.at(reading.invoked_ns)
    if reading.revision is not None and floor is not None and reading.revision < floor.revision:
        return [Violation(kind="REVISION", call=reading, allowed=allowed, because=floor)]
    return []


class _Floors:
    """The newest change that held everywhere at a time."""

    def __init__(self, changes: Iterable[Change]) -> None:
        known = sorted(
            (change for change in changes if change.holds_from_ns is not None),
            key=lambda change: change.holds_from_ns or 0,
        )
        self._times_ns = [change.holds_from_ns or 0 for change in known]
        self._newest: list[Change] = list(itertools.accumulate(known, _newer))

    def at(self, time_ns: int) -> Change | None:
        index = bisect_right(self._times_ns, time_ns)
        return self._newest[index - 1] if index else None


def _newer(one: Change, other: Change) -> Change:
    return one if one.revision >= other.revision else other


def revocations_checked(history: History) -> int:
    """Counts the changes by which something ceased to be good, that held, and that some reading came after."""
    last_ns: dict[str, int] = defaultdict(int)
    for reading in history.readings:
        if not reading.error:
            for fact, _ in reading.subject.facts:
                last_ns[fact] = max(last_ns[fact], reading.invoked_ns)
    return sum(
        change.value and change.holds_from_ns is not None and last_ns[change.fact] >= change.holds_from_ns
        for change in history.changes
    )


def explain(violation: Violation, history: History) -> str:
    """Writes the smallest part of a history by which a violation can be understood."""
    call = violation.call
    lines = [f"{violation.kind}: {_line(call, history.began_ns)}"]
    if violation.allowed:
        lines.append(f"  allowed: {', '.join(sorted(violation.allowed))}")
    if violation.because is not None:
        lines.append(f"  because of: {_line(violation.because, history.began_ns)}")
    if isinstance(call, Reading):
        lines.append("  changes of it:")
        lines += [f"    {_line(each, history.began_ns)}" for each in _changes_of(call, history.changes)]
        lines.append(f"  before it on {call.worker}:")
        before = [
            each
            for each in history.readings
            if each.subject == call.subject and each.worker == call.worker and each.returned_ns <= call.invoked_ns
        ]
        lines += [f"    {_line(each, history.began_ns)}" for each in before[-SHOWN_BEFORE:]]
    return "\n".join(lines)


def _changes_of(reading: Reading, changes: Sequence[Change]) -> list[Change]:
    facts = {fact for fact, _ in reading.subject.facts}
    return [each for each in changes if each.fact in facts and each.invoked_ns <= reading.returned_ns]


def _line(call: Reading | Change, began_ns: int) -> str:
    span = f"{_seconds(call.invoked_ns - began_ns)} to {_seconds(call.returned_ns - began_ns)} on {call.worker}"
    if isinstance(call, Reading):
        return f"{span}: {call.subject.name} is {call.error or f'{call.outcome} at revision {call.revision}'}"
    told = call.answer.value + (f" ({call.error})" if call.error else f" at revision {call.revision}")
    if call.answer is Answer.PENDING and call.holds_from_ns is not None:
        told += f", holds from {_seconds(call.holds_from_ns - began_ns)}"
    return f"{span}: {call.what}: {told}"


def _seconds(time_ns: int) -> str:
    return f"{time_ns / NANOSECONDS:.4f} s"
