"""Which key signs now, which are published, and when there is to be another."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from latchgate.domain.families import MAX_ACCESS
from latchgate.domain.signing import KEPT, PREPARED, SIGNS, SigningKey, Upkeep, jwk, signing_key, upkeep

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
INSTANT = timedelta(microseconds=1)
DAY = timedelta(days=1)


def key(kid: str, sign_time: datetime) -> SigningKey:
    """A key that signs from a time on."""
    return SigningKey(kid=kid, x=f"x-{kid}", y=f"y-{kid}", sealed=kid.encode(), sign_time=sign_time)


def test_the_newest_that_may_signs() -> None:
    """The key that signs is the last one whose time has come, whatever the order in which they are given."""
    old, current, later = key("old", NOW - 40 * DAY), key("current", NOW), key("later", NOW + INSTANT)
    assert current == signing_key([later, current, old], NOW)
    assert old == signing_key([later, current, old], NOW - INSTANT)
    assert signing_key([], NOW) is None


def test_one_that_was_made_meanwhile_signs() -> None:
    """A transaction that began before the first key was made takes it, and of several the first."""
    first, second = key("first", NOW + INSTANT), key("second", NOW + DAY)
    assert first == signing_key([second, first], NOW)


@pytest.mark.parametrize(
    ("age", "make_for"),
    [
        (timedelta(0), None),
        (SIGNS - PREPARED - INSTANT, None),
        (SIGNS - PREPARED, NOW + PREPARED),
        (SIGNS - DAY, NOW + DAY),
        (SIGNS - DAY + INSTANT, NOW + DAY),
        (SIGNS, NOW + DAY),
        (365 * DAY, NOW + DAY),
    ],
)
def test_when_the_next_is_made(age: timedelta, make_for: datetime | None) -> None:
    """The next key is made two days before it signs, and where that was missed it signs a day after it was made."""
    assert Upkeep(make_for=make_for, drop=[]) == upkeep([key("a", NOW - age)], (), NOW)


def test_the_first() -> None:
    """Where there is no key, one is made that signs at once; nobody has read the keys before."""
    assert Upkeep(make_for=NOW, drop=[]) == upkeep([], (), NOW)


def test_one_successor_is_enough() -> None:
    """No second successor is made while one waits, however old the key is."""
    assert Upkeep(make_for=None, drop=[]) == upkeep([key("a", NOW - 60 * DAY), key("b", NOW + INSTANT)], (), NOW)


def test_when_one_goes() -> None:
    """A key that signs no more goes when the longest token that it may have signed is over, with an hour to spare."""
    old = key("old", NOW - 40 * DAY)
    assert [] == upkeep([old, key("next", NOW - KEPT + INSTANT)], (), NOW).drop
    assert ["old"] == upkeep([old, key("next", NOW - KEPT)], (), NOW).drop
    assert ["older", "old"] == upkeep([key("next", NOW - KEPT), old, key("older", NOW - 80 * DAY)], (), NOW).drop
    assert timedelta(hours=1) <= KEPT - MAX_ACCESS


def test_unreadable_keys() -> None:
    """A key that can not be read and signs now is followed at once, and stays; one that was to sign later goes; one
    that has signed is of no account.
    """
    current, later = key("current", NOW - DAY), key("later", NOW + DAY)
    assert Upkeep(make_for=NOW, drop=["later"]) == upkeep([current, later], {"current", "later"}, NOW)
    assert Upkeep(make_for=NOW, drop=[]) == upkeep([current], {"current"}, NOW)
    assert Upkeep(make_for=NOW, drop=[]) == upkeep([current, later], {"current"}, NOW)
    assert Upkeep(make_for=None, drop=["later"]) == upkeep([current, later], {"later"}, NOW)
    old = key("old", NOW - 40 * DAY)
    assert Upkeep(make_for=None, drop=[]) == upkeep([old, key("current", NOW - INSTANT)], {"old"}, NOW)


def test_private_halves_are_not_shown() -> None:
    """Neither what is published of a key nor how it is written for people holds the private half, be it encrypted."""
    shown = key("kid", NOW)
    assert {"kty": "EC", "crv": "P-256", "x": "x-kid", "y": "y-kid", "kid": "kid", "alg": "ES256", "use": "sig"} == jwk(
        shown
    )
    assert "sealed" not in repr(shown)
