"""What a JWT's claims make of its holder."""

from __future__ import annotations

from typing import Any

import pytest

from latchgate.domain.errors import CredentialsInvalidError
from latchgate.domain.logins import claim, organization_of, permissions_of, subject_of

CLAIMS: dict[str, Any] = {
    "tenant": "acme",
    "https://example.com/tenant": "by-address",
    "realm_access": {"roles": ["keys:read", "keys:write"], "deep": {"er": 1}},
    "a.b": "by name",
    "a": {"b": "by way"},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant", "acme"),
        ("https://example.com/tenant", "by-address"),
        ("realm_access.roles", ["keys:read", "keys:write"]),
        ("realm_access.deep.er", 1),
        # What is there by its whole name is meant by it.
        ("a.b", "by name"),
        ("realm_access.none", None),
        ("tenant.roles", None),
        ("realm_access.roles.0", None),
        ("realm_access.", None),
        ("", None),
        (".", None),
        ("nothing", None),
    ],
)
def test_claim(name: str, value: object) -> None:
    """A claim is found by its name, or by the names that lead to it."""
    assert value == claim(CLAIMS, name)


@pytest.mark.parametrize(
    ("value", "permissions"),
    [
        ("keys:read", ["keys:read"]),
        ("openid  keys:read\tkeys:*", ["openid", "keys:read", "keys:*"]),
        (["keys:read", "orders:read"], ["keys:read", "orders:read"]),
        # What can be no permission.
        ("https://www.googleapis.com/auth/drive Keys:Read keys: :read keys::read *:* k*", ["*:*"]),
        (["keys:read keys:write", 7, None, ["keys:read"], {"a": 1}, "", "keys:read\n"], []),
        ("", []),
        (None, []),
        (7, []),
        (True, []),
        ({"keys:read": True}, []),
    ],
)
def test_permissions(value: object, permissions: list[str]) -> None:
    """Permissions come as a list or in one text; what can be none gives nothing."""
    assert permissions == permissions_of({"scope": value}, "scope")
    assert [] == permissions_of({}, "scope")


@pytest.mark.parametrize("value", ["acme", ["acme"]])
def test_organization(value: object) -> None:
    """An organization comes as a text, or as a list of one."""
    assert "acme" == organization_of({"org": value}, "org")


@pytest.mark.parametrize(
    "value",
    ["org_root", ["org_root"], None, "", " acme", "acme\n", "ACME", "a", "a" * 65, 7, True, [], ["a1b", "c2d"], {}],
)
def test_no_organization(value: object) -> None:
    """Nothing else names one, and root's is named by none."""
    with pytest.raises(CredentialsInvalidError):
        organization_of({"org": value}, "org")


def test_subjects_of_issuers_are_apart() -> None:
    """Who has the same name at another issuer is somebody else."""
    names = {subject_of({"iss": issuer, "sub": "alice"}) for issuer in ("https://a.example", "https://b.example")}
    assert {"https://a.example#alice", "https://b.example#alice"} == names
