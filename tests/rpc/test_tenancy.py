"""Tenants are apart: whatever another organization has is to a caller as if it had never been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import NOBODYS_KEY, Tenant, hours_ahead, ids
from support.service import Metadata, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

NO_ORGANIZATION = "no-such-organization"
REQUEST_ID = "0b6f7b39-2f04-4c3c-9a9f-3c7a35a1f7b1"

ABOUT_A_KEY: dict[str, Callable[[str], Any]] = {
    "GetKey": lambda key_id: keys_pb.GetKeyRequest(key_id=key_id),
    "UpdateKey": lambda key_id: keys_pb.UpdateKeyRequest(
        key=key_pb2.Key(id=key_id, name="taken", expire_time=hours_ahead(1)), etag="v1"
    ),
    "ToggleKey": lambda key_id: keys_pb.ToggleKeyRequest(key_id=key_id),
    "RotateKey": lambda key_id: keys_pb.RotateKeyRequest(key_id=key_id, request_id=REQUEST_ID),
    "RevokeKey": lambda key_id: keys_pb.RevokeKeyRequest(key_id=key_id, reason="taken"),
    "DeleteKey": lambda key_id: keys_pb.DeleteKeyRequest(key_id=key_id),
    "UndeleteKey": lambda key_id: keys_pb.UndeleteKeyRequest(key_id=key_id),
}
ABOUT_AN_ORGANIZATION: dict[str, Callable[[str], Any]] = {
    "CreateKey": lambda organization_id: keys_pb.CreateKeyRequest(
        organization_id=organization_id, name="planted", permissions=["no:such:scope"], request_id=REQUEST_ID
    ),
    "ListKeys": lambda organization_id: keys_pb.ListKeysRequest(organization_id=organization_id, show_deleted=True),
    "GetPublishableKey": lambda organization_id: keys_pb.GetPublishableKeyRequest(organization_id=organization_id),
    "ListScopes": lambda organization_id: keys_pb.ListScopesRequest(organization_id=organization_id),
    "CreateScope": lambda organization_id: keys_pb.CreateScopeRequest(
        organization_id=organization_id, name="orders:planted"
    ),
    "DeleteScope": lambda organization_id: keys_pb.DeleteScopeRequest(
        organization_id=organization_id, name="orders:theirs"
    ),
}
ROOT_ONLY: dict[str, Callable[[str], Any]] = {
    "CreateOrganization": lambda organization_id: organizations_pb.CreateOrganizationRequest(
        organization_id=organization_id, name="taken"
    ),
    "GetOrganization": lambda organization_id: organizations_pb.GetOrganizationRequest(organization_id=organization_id),
    "ListOrganizations": lambda _: organizations_pb.ListOrganizationsRequest(),
    "UpdateOrganization": lambda organization_id: organizations_pb.UpdateOrganizationRequest(
        organization=organizations_pb.Organization(id=organization_id, name="taken")
    ),
    "CreatePlan": lambda _: organizations_pb.CreatePlanRequest(plan=organizations_pb.Plan(id="taken")),
    "ListPlans": lambda _: organizations_pb.ListPlansRequest(),
    "UpdatePlan": lambda _: organizations_pb.UpdatePlanRequest(plan=organizations_pb.Plan(id="default", max_keys=1)),
}


def _names_a(resource: str, method: MethodDescriptor) -> bool:
    """Says whether a method's request names a resource, by its id or as a whole."""
    fields = method.input_type.fields
    return any(
        field.name == f"{resource}_id" or (field.message_type and field.message_type.name == resource.title())
        for field in fields
    )


async def test_tables_are_complete() -> None:
    """Every method that takes the id of a key or an organization is in the tables of this module."""
    methods = keys_pb.DESCRIPTOR.services_by_name["KeyService"].methods
    assert {method.name for method in methods if _names_a("key", method)} == ABOUT_A_KEY.keys()
    assert {method.name for method in methods if _names_a("organization", method)} == ABOUT_AN_ORGANIZATION.keys()
    others = {method.name for method in methods} - ABOUT_A_KEY.keys() - ABOUT_AN_ORGANIZATION.keys()
    assert {"Validate", "BatchValidate"} == others
    root_only = organizations_pb.DESCRIPTOR.services_by_name["OrganizationService"].methods
    assert {method.name for method in root_only} == ROOT_ONLY.keys()


async def _told(service: object, method: str, request: object, caller: Metadata, named: str) -> tuple[object, ...]:
    """Gives all that a refused call is told, but for the id that it named."""
    error = await refusal(getattr(service, method)(request, metadata=caller))
    return error.code, error.reason, error.message.replace(named, "<id>"), error.metadata, error.violations


@pytest.mark.parametrize("method", ABOUT_A_KEY)
@pytest.mark.parametrize("end", ["", "revoke", "delete", "expire", "toggle"])
async def test_keys_of_others(acme: Tenant, rival: Tenant, method: str, end: str) -> None:
    """Another organization's key, in whatever state, is answered like an id that never was, and stays as it is."""
    key = (await rival.key(name="theirs", permissions=["read"])).key
    if end:
        await getattr(rival, end)(key.id)
    key = await rival.get(key.id)
    make, service = ABOUT_A_KEY[method], acme.service.keys
    theirs = await _told(service, method, make(key.id), acme.admin, key.id)
    nobodys = await _told(service, method, make(NOBODYS_KEY), acme.admin, NOBODYS_KEY)
    assert (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", "key <id> does not exist", {}, {}) == theirs == nobodys
    assert key == await rival.get(key.id)


@pytest.mark.parametrize("method", ABOUT_A_KEY)
async def test_root_keys_are_others(acme: Tenant, method: str) -> None:
    """A root key is to all others as if it had never been: `*` in an organization is not root."""
    root_key = (await acme.list(acme.service.root, organization_id="org_root")).keys[0]
    told = await _told(acme.service.keys, method, ABOUT_A_KEY[method](root_key.id), acme.admin, root_key.id)
    assert (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", "key <id> does not exist", {}, {}) == told


@pytest.mark.parametrize("method", ABOUT_AN_ORGANIZATION)
async def test_other_organizations(acme: Tenant, rival: Tenant, method: str) -> None:
    """Another organization, the service's own included, is answered like one that never was."""
    await rival.key(key_type=key_pb2.KEY_TYPE_PUBLISHABLE)
    await rival.give_scopes("orders:theirs")
    scopes = await rival.scopes()
    make, service = ABOUT_AN_ORGANIZATION[method], acme.service.keys
    for organization_id in (rival.id, "org_root", NO_ORGANIZATION):
        told = await _told(service, method, make(organization_id), acme.admin, organization_id)
        expected = "organization <id> does not exist"
        assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND", expected, {}, {}) == told
    assert 2 == len((await rival.list()).keys)
    assert scopes == await rival.scopes()


@pytest.mark.parametrize("method", ABOUT_AN_ORGANIZATION)
async def test_callers_without_the_permission(acme: Tenant, rival: Tenant, method: str) -> None:
    """A caller that lacks the method's permission is told so, whichever organization it names."""
    caller = await acme.caller("read")
    told = {
        await _told_reason(acme, method, organization_id, caller)
        for organization_id in ("", acme.id, rival.id, NO_ORGANIZATION)
    }
    assert {"PERMISSION_MISSING"} == told


async def _told_reason(tenant: Tenant, method: str, organization_id: str, caller: Metadata) -> str:
    request = ABOUT_AN_ORGANIZATION[method](organization_id)
    return (await refusal(getattr(tenant.service.keys, method)(request, metadata=caller))).reason


@pytest.mark.parametrize("method", ROOT_ONLY)
async def test_organizations_are_roots(acme: Tenant, rival: Tenant, method: str) -> None:
    """Organizations and plans are managed by root alone; all others are told no more than that."""
    service = acme.service.organizations
    before = await _organization(rival)
    for organization_id in (acme.id, rival.id, "org_root", NO_ORGANIZATION):
        told = await _told(service, method, ROOT_ONLY[method](organization_id), acme.admin, organization_id)
        expected = "only a root key may do this"
        assert (grpc.StatusCode.PERMISSION_DENIED, "ROOT_REQUIRED", expected, {}, {}) == told
    assert before == await _organization(rival)


async def _organization(tenant: Tenant) -> organizations_pb.Organization:
    answer: organizations_pb.GetOrganizationResponse = await tenant.service.organizations.GetOrganization(
        organizations_pb.GetOrganizationRequest(organization_id=tenant.id), metadata=tenant.service.root
    )
    return answer.organization


async def test_lists_hold_own_keys_alone(acme: Tenant, rival: Tenant) -> None:
    """No filter and no page brings up another organization's keys."""
    await rival.key(user_id="ann", key_type=key_pb2.KEY_TYPE_PUBLISHABLE)
    mine = (await acme.key(user_id="ann")).key.id
    for fields in ({"user_id": "ann"}, {"user_id": "ann", "show_deleted": True}, {"page_size": 1}):
        assert [mine] == ids((await acme.list(None, **fields)).keys)
    assert "KEY_NOT_FOUND" == (await refusal(acme.publishable())).reason


async def test_full_organizations_do_not_hinder_others(acme: Tenant, rival: Tenant) -> None:
    """What one organization does with a request_id says nothing to another that uses the same."""
    request = keys_pb.CreateKeyRequest(name="same", request_id=REQUEST_ID)
    mine = await acme.create(request)
    assert mine.key.id != (await rival.create(request)).key.id
    theirs = await refusal(rival.create(keys_pb.CreateKeyRequest(name="other", request_id=REQUEST_ID)))
    assert mine.key.id not in theirs.message + str(theirs.metadata)


async def test_moved_keys_do_not_exist(acme: Tenant, rival: Tenant) -> None:
    """A key can not be carried into another organization by an update."""
    key = (await acme.key()).key
    request = key_pb2.Key(id=key.id, organization_id=rival.id, name="moved")
    assert acme.id == (await acme.update(request)).key.organization_id
    assert ["update_mask"] == list((await refusal(acme.update(request, "organization_id"))).violations)


async def test_inactive_organizations_callers(acme: Tenant, rival: Tenant) -> None:
    """The keys of an inactive organization manage nothing; those of others are not affected."""
    await acme.set_active(active=False)
    error = await refusal(acme.list())
    assert (grpc.StatusCode.PERMISSION_DENIED, "ORGANIZATION_INACTIVE") == (error.code, error.reason)
    assert [rival.admin_key_id] == ids((await rival.list()).keys)
    assert [acme.admin_key_id] == ids((await acme.list(acme.service.root, organization_id=acme.id)).keys)
    await acme.set_active(active=True)
    assert [acme.admin_key_id] == ids((await acme.list()).keys)
