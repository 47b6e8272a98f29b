"""ListScopes."""

from __future__ import annotations

from pathlib import Path

import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import Tenant, make_tenant, update_organization
from support.service import refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")

CORE = [
    "audit:read", "keys:read", "keys:validate", "keys:write", "read", "scopes:write", "webhooks:read", "webhooks:write",
    "write",
]  # fmt: skip


async def test_core_scopes(acme: Tenant) -> None:
    """Without any of its own, an organization has the scopes of the service, by name and described."""
    for fields in ({}, {"organization_id": acme.id}):
        scopes = (await acme.scopes(await acme.caller("keys:read"), **fields)).scopes
        assert CORE == [scope.name for scope in scopes]
        assert {keys_pb.SCOPE_SOURCE_CORE} == {scope.source for scope in scopes}
        assert all(scope.description for scope in scopes)


async def test_own_scopes(acme: Tenant, rival: Tenant) -> None:
    """An organization's own scopes stand among the service's, are its alone, and can be given to keys."""
    own = organizations_pb.ScopeDefinition(name="orders:read", description="Read orders.")
    await update_organization(acme.service, organizations_pb.Organization(id=acme.id, scopes=[own]))
    scopes = (await acme.scopes()).scopes
    assert sorted([*CORE, "orders:read"]) == [scope.name for scope in scopes]
    expected = keys_pb.Scope(name="orders:read", description="Read orders.", source=keys_pb.SCOPE_SOURCE_ORGANIZATION)
    assert expected in scopes
    assert CORE == [scope.name for scope in (await rival.scopes()).scopes]
    await acme.key(permissions=["orders:read"])
    assert "SCOPE_UNKNOWN" == (await refusal(rival.key(permissions=["orders:read"]))).reason


async def test_deployment_scopes(database_url: str, tmp_path: Path) -> None:
    """The deployment's scopes are every organization's. Of one name, the service's own comes first, then the
    deployment's: no organization can describe away what a scope means.
    """
    file = tmp_path / "scopes.toml"
    file.write_text('[scopes]\n"orders:read" = "Read all orders."\n"keys:read" = "Something else."\n')
    async with run_service(database_url, scopes_file=file) as service:
        tenant = await make_tenant(service, "acme")
        await tenant.give_scopes("orders:read", "keys:write", "orders:ship")
        scopes = {scope.name: scope for scope in (await tenant.scopes()).scopes}
        await tenant.key(permissions=["orders:read", "orders:ship"])
        taken = await refusal(tenant.create_scope("orders:read"))
        # Its own of that name gave it nothing; without it the catalogue is the same.
        left = await tenant.delete_scope("orders:read")
        not_own = await refusal(tenant.delete_scope("orders:read"))
    assert sorted([*CORE, "orders:read", "orders:ship"]) == list(scopes)
    assert ("SCOPE_EXISTS", {"source": "deployment"}) == (taken.reason, taken.metadata)
    assert ("SCOPE_NOT_OWN", {"source": "deployment"}) == (not_own.reason, not_own.metadata)
    assert list(scopes) == left
    assert "Read all orders." == scopes["orders:read"].description
    assert {
        "orders:read": keys_pb.SCOPE_SOURCE_DEPLOYMENT,
        "orders:ship": keys_pb.SCOPE_SOURCE_ORGANIZATION,
        "keys:read": keys_pb.SCOPE_SOURCE_CORE,
        "keys:write": keys_pb.SCOPE_SOURCE_CORE,
    } == {name: scopes[name].source for name in ("orders:read", "orders:ship", "keys:read", "keys:write")}


async def test_root(acme: Tenant) -> None:
    """Root names the organization, and is told when there is no such one."""
    root = acme.service.root
    await acme.give_scopes("orders:read")
    assert "orders:read" in [scope.name for scope in (await acme.scopes(root, organization_id=acme.id)).scopes]
    assert "INVALID_FIELD" == (await refusal(acme.scopes(root))).reason
    error = await refusal(acme.scopes(root, organization_id="no-such-organization"))
    assert "ORGANIZATION_NOT_FOUND" == error.reason
