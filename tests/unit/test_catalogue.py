"""Which permissions need a scope of the catalogue, and which match none any more; when a deleted key can come back."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from latchgate.domain.access import CORE_SCOPES, MANAGEMENT_SCOPES
from latchgate.domain.catalogue import missing
from latchgate.domain.errors import InvalidFieldError, KeyRevokedError, UndeleteExpiredError
from latchgate.domain.model import DELETED_KEPT, ROOT_ORGANIZATION_ID, HeldPermission, Scope
from latchgate.domain.permissions import orphaned
from latchgate.domain.rules import apart_from, check_scope_name, check_undeletable
from support.records import INSTANT, KEY, NOW


@pytest.mark.parametrize(
    ("permission", "removed", "left", "is_orphaned"),
    [
        ("orders:read", "orders:read", ["orders:write"], True),
        ("orders:read", "orders:write", ["orders:read"], False),
        ("orders:*", "orders:read", ["orders:write"], False),
        ("orders:*", "orders:read", ["orders"], True),
        ("orders:*", "orders:read", [], True),
        ("orders:*", "orders:read:all", ["ordersx:read"], True),
        ("*:read", "orders:read", ["stock:read"], False),
        ("*:read", "orders:read", ["stock:write"], True),
        ("*", "orders:read", [], False),
        # It matches nothing, and did so before: that is not for want of this scope.
        ("stock:*", "orders:read", [], False),
    ],
)
def test_what_needs_a_scope(permission: str, removed: str, left: list[str], *, is_orphaned: bool) -> None:
    """A permission needs a scope if it stands for that, and for no other of the catalogue."""
    assert ([permission] if is_orphaned else []) == orphaned([permission], removed, left)


def test_what_is_missing() -> None:
    """Permissions that match nothing in the catalogue of their keys are told, with how many keys hold each in all."""
    deployment = [Scope(name="orders:read")]
    own = (Scope(name="stock:read"),)
    held = [
        HeldPermission(permission="orders:ship", own_scopes=(), key_count=3),
        HeldPermission(permission="orders:*", own_scopes=(), key_count=5),
        HeldPermission(permission="stock:*", own_scopes=own, key_count=7),
        HeldPermission(permission="stock:*", own_scopes=(), key_count=11),
        HeldPermission(permission="stock:*", own_scopes=(Scope(name="x"),), key_count=2),
        HeldPermission(permission="*", own_scopes=(), key_count=13),
        *(HeldPermission(permission=scope.name, own_scopes=(), key_count=1) for scope in CORE_SCOPES),
    ]
    assert {"orders:ship": 3, "stock:*": 13} == missing(held, deployment)


@pytest.mark.parametrize("name", [*MANAGEMENT_SCOPES, "keys", "keys:a:b", "scopes:read", "audit:x"])
def test_names_that_are_kept(name: str) -> None:
    """No organization can have a scope that begins like those for management."""
    with pytest.raises(InvalidFieldError):
        check_scope_name(name)


@pytest.mark.parametrize("name", ["orders:read", "keysx:read", "my:keys", "read"])
def test_names_that_are_free(name: str) -> None:
    """All others are free."""
    check_scope_name(name)


@pytest.mark.parametrize("age", [timedelta(0), DELETED_KEPT - INSTANT])
def test_deleted_in_error(age: timedelta) -> None:
    """A key that was deleted and nothing else can be brought back until its purge_time, which is 30 days later."""
    key = replace(KEY, revoke_time=NOW - age, delete_time=NOW - age)
    assert key.is_deleted_alone
    assert key.purge_time == NOW - age + timedelta(days=30)
    check_undeletable(key)


def test_deleted_too_long_ago() -> None:
    """From its purge_time on it can not, whether it is removed yet or not; a root key no longer either."""
    key = replace(KEY, revoke_time=NOW - DELETED_KEPT, delete_time=NOW - DELETED_KEPT)
    for each in (key, replace(key, organization_id=ROOT_ORGANIZATION_ID)):
        with pytest.raises(UndeleteExpiredError):
            check_undeletable(each)
    assert replace(key, organization_id=ROOT_ORGANIZATION_ID).purge_time is None


@pytest.mark.parametrize("delete_time", [None, NOW, NOW - timedelta(hours=1), NOW - INSTANT])
def test_revoked(delete_time: datetime | None) -> None:
    """A key that was revoked before, after or without its deletion can not be brought back."""
    key = replace(KEY, revoke_time=NOW - 2 * INSTANT, delete_time=delete_time)
    assert not key.is_deleted_alone
    with pytest.raises(KeyRevokedError):
        check_undeletable(key)


def test_not_deleted() -> None:
    """A key that is neither deleted nor revoked needs nothing: it can be asked for, and is not to be removed."""
    check_undeletable(KEY)
    assert KEY.purge_time is None


def test_two_ends_are_told_apart() -> None:
    """A revocation and a deletion in the same instant do not look like a deletion alone."""
    assert NOW + INSTANT == apart_from(NOW, NOW)
    assert [NOW] * 3 == [apart_from(other, NOW) for other in (None, NOW - INSTANT, NOW + INSTANT)]
