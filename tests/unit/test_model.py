"""What keys say about themselves."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import product

import pytest

from latchgate.domain.model import KeyState
from support.records import INSTANT, KEY, NOW, ROOT, caller


@pytest.mark.parametrize(("deleted", "revoked", "expired", "active"), [*product([True, False], repeat=4)])
def test_state_precedence(deleted: bool, revoked: bool, expired: bool, active: bool) -> None:
    """A key's state is the first that holds of deleted, revoked, expired and inactive."""
    key = replace(
        KEY,
        delete_time=NOW if deleted else None,
        revoke_time=NOW if revoked else None,
        expire_time=NOW if expired else NOW + timedelta(days=1),
        active=active,
    )
    holds = [
        (deleted, KeyState.DELETED),
        (revoked, KeyState.REVOKED),
        (expired, KeyState.EXPIRED),
        (not active, KeyState.INACTIVE),
        (True, KeyState.ACTIVE),
    ]
    assert next(state for holding, state in holds if holding) is key.state


@pytest.mark.parametrize(
    ("ahead", "state"),
    [(-INSTANT, KeyState.EXPIRED), (timedelta(0), KeyState.EXPIRED), (INSTANT, KeyState.ACTIVE)],
)
def test_expiry_boundary(ahead: timedelta, state: KeyState) -> None:
    """A key is expired from the very instant of its expiry on, by the database's clock."""
    key = replace(KEY, expire_time=NOW + ahead)
    assert state is key.state
    assert (state is KeyState.EXPIRED) is key.is_expired


def test_keys_without_expiry_do_not_expire() -> None:
    """A key that was given no expiry stays good."""
    key = replace(KEY, expire_time=None)
    assert not key.is_expired
    assert KeyState.ACTIVE is key.state


def test_etag_follows_the_version() -> None:
    """Every change of a key changes its etag; reading it again, or using it, does not."""
    assert KEY.etag != replace(KEY, version=KEY.version + 1).etag
    assert KEY.etag == replace(KEY, read_time=NOW + timedelta(hours=1), last_used_time=NOW).etag


def test_root() -> None:
    """Root are the keys, and the callers, of the service's own organization, whatever permissions others have."""
    assert replace(KEY, organization_id="org_root").is_root
    assert not KEY.is_root
    assert ROOT.is_root
    assert not caller("*").is_root
