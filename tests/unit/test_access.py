"""Who may call what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latchgate.domain import access
from latchgate.domain.errors import (
    InvalidFieldError,
    KeyNotFoundError,
    OrganizationNotFoundError,
    PermissionMissingError,
    PermissionNotHeldError,
    RootRequiredError,
)
from latchgate.domain.model import Key
from support.records import INSTANT, KEY, NOW, ROOT, caller

WRITER = caller("keys:write", "orders:*")


def test_require() -> None:
    """A method's permission is demanded, and the missing one named."""
    access.require(WRITER, access.WRITE_KEYS)
    access.require(caller("keys:*"), access.READ_KEYS)
    with pytest.raises(PermissionMissingError) as caught:
        access.require(WRITER, access.READ_KEYS)
    assert {"permission": "keys:read"} == caught.value.details


def test_require_root() -> None:
    """Root is an organization, not a permission: `*` elsewhere is not enough."""
    access.require_root(ROOT)
    with pytest.raises(RootRequiredError):
        access.require_root(caller("*"))


def test_require_held() -> None:
    """Nobody hands out more than it holds, by no wildcard either."""
    access.require_held(WRITER, ["orders:read", "orders:*", "keys:write"])
    for wider in ("keys:*", "*", "invoices:read"):
        with pytest.raises(PermissionNotHeldError) as caught:
            access.require_held(WRITER, ["orders:read", wider])
        assert {"permission": wider} == caught.value.details


# Keys that a token does not, or not everywhere and for ever, open; and what opens them further.
IDLE = replace(KEY, permissions=("orders:read",), active=False)
ENDING = replace(KEY, permissions=("orders:read",), expire_time=NOW)
BOUND = replace(KEY, permissions=("orders:read",), allowed_cidrs=("192.0.2.0/24",))


@pytest.mark.parametrize(
    ("key", "updated"),
    [
        (IDLE, replace(IDLE, active=True)),
        (ENDING, replace(ENDING, expire_time=NOW + INSTANT)),
        (ENDING, replace(ENDING, expire_time=None)),
        (BOUND, replace(BOUND, allowed_cidrs=())),
        (BOUND, replace(BOUND, allowed_cidrs=("192.0.2.0/24", "198.51.100.0/24"))),
        (BOUND, replace(BOUND, allowed_cidrs=("198.51.100.0/24",))),
        (BOUND, replace(BOUND, allowed_cidrs=(), permissions=())),
    ],
    ids=["on", "later", "never", "anywhere", "further", "elsewhere", "with less"],
)
def test_widening_needs_what_the_key_has(key: Key, updated: Key) -> None:
    """Whoever has kept an old token can not bring it back to do what its own key may not."""
    access.require_held_to_widen(WRITER, key, updated)
    with pytest.raises(PermissionNotHeldError) as caught:
        access.require_held_to_widen(caller("keys:write"), key, updated)
    assert {"permission": "orders:read"} == caught.value.details


@pytest.mark.parametrize(
    ("key", "updated"),
    [
        (BOUND, replace(BOUND, active=False)),
        (IDLE, IDLE),
        (ENDING, replace(ENDING, expire_time=NOW - INSTANT)),
        (BOUND, replace(BOUND, expire_time=NOW)),
        (IDLE, replace(IDLE, allowed_cidrs=("192.0.2.0/24",))),
        (BOUND, replace(BOUND, name="shipping", metadata={}, rate_limit_per_minute=1)),
    ],
    ids=["off", "the same", "sooner", "some time", "bound", "label"],
)
def test_narrowing_needs_nothing_more(key: Key, updated: Key) -> None:
    """A key can be shut by whoever may change keys, also by one that may do less."""
    access.require_held_to_widen(caller("keys:write"), key, updated)


def test_organization_of_a_caller() -> None:
    """A call is about the caller's own organization, named or not."""
    assert "acme" == access.organization_for(WRITER, "")
    assert "acme" == access.organization_for(WRITER, "acme")


@pytest.mark.parametrize("requested", ["other", "org_root", "ACME"])
def test_other_organizations_are_not_there(requested: str) -> None:
    """Whether another organization exists is not to be learnt, whatever the caller's permissions are."""
    with pytest.raises(OrganizationNotFoundError):
        access.organization_for(caller("*"), requested)


def test_root_names_the_organization() -> None:
    """Root acts on the organization that it names, and has to name one: its own is never meant by accident."""
    assert "acme" == access.organization_for(ROOT, "acme")
    with pytest.raises(InvalidFieldError) as caught:
        access.organization_for(ROOT, "")
    assert ["organization_id"] == [field for field, _ in caught.value.violations]


def test_visible_keys() -> None:
    """A caller sees the keys of its organization, and root those of all."""
    other = replace(KEY, organization_id="other")
    assert KEY is access.visible(WRITER, KEY, KEY.id)
    assert other is access.visible(ROOT, other, other.id)


def test_hidden_keys_are_like_none() -> None:
    """Another organization's key can not be told from one that does not exist."""
    with pytest.raises(KeyNotFoundError) as hidden:
        access.visible(caller("*"), replace(KEY, organization_id="other"), KEY.id)
    with pytest.raises(KeyNotFoundError) as missing:
        access.visible(caller("*"), None, KEY.id)
    assert (str(missing.value), missing.value.details) == (str(hidden.value), hidden.value.details)
