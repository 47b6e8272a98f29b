"""The checker itself, on made-up histories."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.checker import check, explain, revocations_checked
from cluster.history import INACTIVE, NANOSECONDS, REVOKED, Answer, Change, History, Reading, Subject

TOKEN = Subject(name="key 1.1", facts=(("key 1 revoked", REVOKED), ("key 1 off", INACTIVE)))


def _at(seconds: float) -> int:
    return int(seconds * NANOSECONDS)


def _change(what: str, span: tuple[float, float], revision: int, *, after_s: float = 0.0, **fields: Any) -> Change:
    """A change of key 1: `revoke`, `off` or `on`; PENDING for `after_s`, or whatever the fields say."""
    answer = fields.pop("answer", Answer.PENDING if after_s else Answer.EFFECTIVE)
    is_known = answer in {Answer.EFFECTIVE, Answer.PENDING}
    return Change(
        what=what,
        fact="key 1 revoked" if what == "revoke" else "key 1 off",
        value=what != "on",
        worker="b",
        invoked_ns=_at(span[0]),
        returned_ns=_at(span[1]),
        answer=answer,
        revision=revision,
        holds_from_ns=_at(span[1] + after_s) if is_known else None,
        **fields,
    )


def _reading(span: tuple[float, float], outcome: str, revision: int | None = 0, **fields: Any) -> Reading:
    return Reading(
        subject=fields.pop("subject", TOKEN),
        worker="a",
        invoked_ns=_at(span[0]),
        returned_ns=_at(span[1]),
        outcome=outcome,
        revision=revision,
        **fields,
    )


def _kinds(changes: list[Change], *readings: Reading) -> list[str]:
    history = History(began_ns=0, changes=changes, readings=list(readings))
    return [violation.kind for violation in check(history)]


REVOKE = _change("revoke", (1, 2), 7)


def test_what_must_be_is_allowed() -> None:
    """VALID before a revocation, either while it is under way, REVOKED once it is effective: no violation."""
    readings = [
        _reading((0, 0.5), "VALID"),
        _reading((0.5, 1.5), "VALID"),
        _reading((1.9, 3), "VALID", 6),
        _reading((1.2, 1.3), "REVOKED", 7),
        _reading((2.1, 2.2), "REVOKED", 7),
    ]
    assert [] == _kinds([REVOKE], *readings)


def test_an_answer_from_before_an_effective_change_is_stale() -> None:
    """A token that is VALID in a call invoked after its revocation was called effective is found."""
    assert ["STALE"] == _kinds([REVOKE], _reading((2.1, 2.2), "VALID", 7))


def test_a_change_can_not_show_before_it_was_asked_for() -> None:
    """REVOKED before anyone has asked for it is found."""
    assert ["STALE"] == _kinds([REVOKE], _reading((0, 0.9), "REVOKED", 0))


def test_a_revision_binds_its_own_answer() -> None:
    """An answer that names a revision must be from a state that has it, also while the change is under way."""
    assert ["STALE"] == _kinds([REVOKE], _reading((1.2, 1.3), "VALID", 7))


def test_a_revision_from_before_an_effective_change_of_anything_is_found() -> None:
    """No answer for any key may be of a lower revision than a change that was effective before the call."""
    other = Subject(name="key 2.1", facts=(("key 2 revoked", REVOKED),))
    assert ["REVISION"] == _kinds([REVOKE], _reading((2.1, 2.2), "VALID", 6, subject=other))
    assert [] == _kinds([REVOKE], _reading((1.9, 2.2), "VALID", 6, subject=other))


def test_a_change_may_be_undone() -> None:
    """After off and on again the key is VALID, and INACTIVE no more."""
    changes = [_change("off", (1, 2), 7), _change("on", (3, 4), 8)]
    assert [] == _kinds(changes, _reading((3.5, 3.6), "INACTIVE", 7), _reading((4.1, 4.2), "VALID", 8))
    assert ["STALE"] == _kinds(changes, _reading((4.1, 4.2), "INACTIVE", 8))


def test_a_pending_change_holds_when_its_time_is_over() -> None:
    """What is PENDING may be seen or not until max_remaining has passed, and must be seen from then on."""
    changes = [_change("revoke", (1, 2), 7, after_s=1)]
    assert [] == _kinds(changes, _reading((2.9, 3.1), "VALID", 6), _reading((2.5, 2.6), "REVOKED", 7))
    assert ["STALE"] == _kinds(changes, _reading((3.1, 3.2), "VALID", 6))


def test_a_later_effective_change_makes_sure_of_those_before_it() -> None:
    """A PENDING change holds as soon as one of a higher revision is effective."""
    changes = [_change("revoke", (1, 2), 7, after_s=60), _change("on", (3, 4), 8)]
    assert ["STALE"] == _kinds(changes, _reading((4.1, 4.2), "VALID", 8))


@pytest.mark.parametrize("outcome", ["VALID", "REVOKED"])
def test_an_unknown_change_may_come_at_any_time(outcome: str) -> None:
    """After an unknown result either is allowed for ever, but not from before it was asked for."""
    changes = [_change("revoke", (1, 2), 0, answer=Answer.UNKNOWN, error="UNAVAILABLE")]
    assert [] == _kinds(changes, _reading((1.5, 1.6), outcome), _reading((99, 100), outcome))
    assert ([] if outcome == "VALID" else ["STALE"]) == _kinds(changes, _reading((0, 0.9), outcome))


def test_an_unknown_change_does_not_excuse_another() -> None:
    """What an unknown change can not bring about stays a violation: switching a key on does not make it good again."""
    unknown = _change("on", (1, 2), 0, answer=Answer.UNKNOWN, error="UNAVAILABLE")
    assert ["STALE"] == _kinds([unknown, REVOKE], _reading((2.1, 2.2), "VALID", 7))


def test_a_retry_may_name_the_revision_of_the_attempt_before() -> None:
    """A change that was made by an attempt of unknown result is seen before the retry that tells of it is made."""
    changes = [
        _change("revoke", (1, 2), 0, answer=Answer.UNKNOWN, error="UNAVAILABLE"),
        _change("revoke", (4, 5), 7),
    ]
    assert [] == _kinds(changes, _reading((3, 3.1), "REVOKED", 7), _reading((5.1, 5.2), "REVOKED", 7))
    assert ["STALE"] == _kinds(changes, _reading((5.1, 5.2), "VALID", 7))


def test_only_errors_that_say_undecided_are_allowed() -> None:
    """A worker may fail closed; any other error is a violation, and so is an answer that fits nothing."""
    assert [] == _kinds([], *(_reading((1, 2), "", error=each) for each in ("UNAVAILABLE", "DEADLINE_EXCEEDED")))
    assert ["ERROR"] == _kinds([], _reading((1, 2), "", error="INTERNAL"))
    assert ["STALE"] == _kinds([], _reading((1, 2), "NOT_FOUND"))


def test_a_change_may_be_refused_for_its_state_alone() -> None:
    """FAILED_PRECONDITION tells that an earlier attempt was made; no other refusal is expected."""
    assert [] == _kinds([_change("off", (1, 2), 0, answer=Answer.REFUSED, error="FAILED_PRECONDITION")])
    assert ["ERROR"] == _kinds([_change("off", (1, 2), 0, answer=Answer.REFUSED, error="UNAUTHENTICATED")])
    assert ["ERROR"] == _kinds([_change("off", (1, 2), 0, answer=Answer.UNKNOWN, error="INTERNAL")])


def test_a_lost_change_is_found_at_the_end() -> None:
    """A last reading that disagrees with the last acknowledged change tells that it was lost."""
    assert ["LOST"] == _kinds([REVOKE], _reading((9, 9.1), "VALID", None, is_final=True))


def test_revocations_count_when_they_were_looked_at() -> None:
    """Only a change that took something away, held, and was followed by an answer counts as checked."""
    changes = [_change("off", (1, 2), 7), _change("on", (3, 4), 8), _change("revoke", (5, 6), 9)]
    history = History(began_ns=0, changes=changes, readings=[_reading((2.1, 2.2), "INACTIVE", 7)])
    assert 1 == revocations_checked(history)


def test_a_violation_is_explained_by_what_belongs_to_it() -> None:
    """The account names the call, what was allowed and why, and nothing of other keys."""
    other = Subject(name="key 2.1", facts=())
    history = History(
        began_ns=0,
        changes=[REVOKE],
        readings=[_reading((0, 1), "VALID", 7, subject=other), _reading((2.1, 2.2), "VALID", 6)],
    )
    account = explain(check(history)[0], history)
    assert "STALE: 2.1000 s to 2.2000 s on a: key 1.1 is VALID at revision 6" in account
    assert "allowed: REVOKED" in account
    assert "1.0000 s to 2.0000 s on b: revoke: EFFECTIVE at revision 7" in account
    assert "key 2.1" not in account
