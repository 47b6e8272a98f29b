"""Permissions: wildcards stand for whole segments."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latchgate.domain.permissions import Grants, covers, is_known


def strings(segments: str, longest: int) -> tuple[str, ...]:
    """Gives every permission of up to `longest` of these one-letter segments."""
    return tuple(":".join(each) for length in range(1, longest + 1) for each in product(segments, repeat=length))


LONGEST = 4
PATTERNS = strings("ab*", LONGEST)
# One segment longer than any pattern, so that the difference between `a:*` and `a:b` and the like shows.
CONCRETE = strings("ab", LONGEST + 1)


def meaning(pattern: str) -> frozenset[str]:
    """Gives all permissions without wildcards that a pattern stands for, by way of a regular expression."""
    *inner, last = ("[ab]" if segment == "*" else segment for segment in pattern.split(":"))
    if pattern.endswith("*"):
        last = "[ab](:[ab])*"
    expression = re.compile(":".join([*inner, last]))
    return frozenset(each for each in CONCRETE if expression.fullmatch(each))


segments = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,5}", fullmatch=True) | st.just("*")
permissions = st.lists(segments, min_size=1, max_size=4).map(":".join)
patterns = st.sampled_from(PATTERNS)


@pytest.mark.parametrize(
    ("grant", "needed"),
    [
        ("orders:read", "orders:read"),
        ("orders:*", "orders:read"),
        ("orders:*", "orders:read:all"),
        ("orders:*", "orders:*"),
        ("orders:*", "orders:read:*"),
        ("orders:*", "orders:*:all"),
        ("*", "orders"),
        ("*", "orders:read"),
        ("*", "orders:read:all"),
        ("*", "*"),
        ("*", "*:*"),
        ("*:*", "orders:read"),
        ("*:*", "orders:read:all"),
        ("orders:*:all", "orders:read:all"),
        ("orders:*:all", "orders:*:all"),
        ("*:read", "orders:read"),
        ("orders:*:*", "orders:read:all"),
    ],
)
def test_covered(grant: str, needed: str) -> None:
    """A wildcard stands for one whole segment, and at the end for one or more."""
    assert covers(grant, needed)


@pytest.mark.parametrize(
    ("grant", "needed"),
    [
        ("orders:*", "orders"),
        ("orders:*", "ordersx:read"),
        ("orders:*", "order:read"),
        ("orders:*", "*"),
        ("orders", "orders:read"),
        ("orders:read", "orders"),
        ("orders:read", "orders:*"),
        ("orders:read", "orders:read:all"),
        ("orders:read", "orders:Read"),
        ("orders:re*", "orders:read"),
        ("*:*", "orders"),
        ("*:*", "*"),
        ("*:read", "read"),
        ("*:read", "orders:write"),
        ("*:read", "orders:read:all"),
        ("*:read", "*"),
        ("orders:*:all", "orders:all"),
        ("orders:*:all", "orders:read:own"),
        ("orders:*:all", "orders:read:own:all"),
        ("orders:*:all", "orders:*"),
        ("orders:*:*", "orders:read"),
        ("orders:*:*", "orders:*"),
    ],
)
def test_not_covered(grant: str, needed: str) -> None:
    """A wildcard stands neither for a part of a segment, nor for none, nor in the middle for several."""
    assert not covers(grant, needed)


def test_covers_agrees_with_what_patterns_stand_for() -> None:
    """One pattern covers another exactly if it stands for every permission that the other stands for."""
    meanings = {pattern: meaning(pattern) for pattern in PATTERNS}
    wrong = [
        (grant, needed)
        for grant, needed in product(PATTERNS, repeat=2)
        if covers(grant, needed) != (meanings[needed] <= meanings[grant])
    ]
    assert [] == wrong


@given(permission=permissions)
def test_covers_is_reflexive(permission: str) -> None:
    """Whoever holds a permission, with or without wildcards, can be asked for the same, and hand it on."""
    assert covers(permission, permission)


def test_covers_is_transitive() -> None:
    """What is handed on from key to key never grows."""
    covered = {grant: {needed for needed in PATTERNS if covers(grant, needed)} for grant in PATTERNS}
    grown = [(one, other) for one in PATTERNS for other in covered[one] if not covered[other] <= covered[one]]
    assert [] == grown


@given(permission=permissions)
def test_star_covers_everything(permission: str) -> None:
    """`*` alone is every permission there can be."""
    assert covers("*", permission)
    assert covers(permission, "*") is (permission == "*")


@given(granted=st.lists(patterns | permissions, max_size=5), needed=patterns | permissions)
def test_grants_agree_with_covers(granted: list[str], needed: str) -> None:
    """The prepared grants of a key cover what one of its permissions covers, and nothing else."""
    assert any(covers(each, needed) for each in granted) is Grants(granted).cover(needed)


@given(granted=st.lists(patterns, max_size=4), needed=st.lists(patterns, max_size=4))
def test_lacking_names_the_first_that_is_not_granted(granted: list[str], needed: list[str]) -> None:
    """All of several permissions are needed, and the first that is missing is named."""
    missing = [each for each in needed if not any(covers(grant, each) for grant in granted)]
    assert (missing[0] if missing else None) == Grants(granted).lacking(needed)


def test_grants_of_nothing_cover_nothing() -> None:
    """A key without permissions is only recognised."""
    assert "orders:read" == Grants(()).lacking(["orders:read"])
    assert Grants(()).lacking([]) is None


@pytest.mark.parametrize("permission", ["orders:read", "orders:*", "*:read", "*:*", "*"])
def test_known(permission: str) -> None:
    """Permissions that match at least one scope of the catalogue can be given."""
    assert is_known(permission, ["invoices:write", "orders:read"])


@pytest.mark.parametrize("permission", ["orders", "orders:write", "order:*", "orders:read:*", "*:delete", "*:*:*"])
def test_unknown(permission: str) -> None:
    """Permissions that match no scope, misspelt ones above all, can not be given."""
    assert not is_known(permission, ["invoices:write", "orders:read"])


def test_star_is_known_to_an_empty_catalogue() -> None:
    """`*` can be given even where no scope is."""
    assert is_known("*", [])
    assert not is_known("orders:*", [])
