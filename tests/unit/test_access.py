"""Who may call what."""
# ruff: noqa: SIM300 - tests compare expected == actual

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
from support.records import KEY, ROOT, caller

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
