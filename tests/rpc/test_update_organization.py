"""UpdateOrganization."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import organization_service_pb2 as pb
from support.keys import Tenant, is_effective, make_plan, make_tenant, update_organization
from support.service import RunningService, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def organization_of(tenant: Tenant) -> pb.Organization:
    """Reads a tenant's organization as root."""
    answer: pb.GetOrganizationResponse = await tenant.service.organizations.GetOrganization(
        pb.GetOrganizationRequest(organization_id=tenant.id), metadata=tenant.service.root
    )
    return answer.organization


def changed(organization: pb.Organization, **fields: Any) -> pb.Organization:
    """Gives a copy with other fields, and without the time of the last change."""
    copy = pb.Organization()
    copy.CopyFrom(organization)
    copy.ClearField("update_time")
    for field, value in fields.items():
        if isinstance(value, list):
            copy.ClearField("scopes")
            copy.scopes.extend(value)
        else:
            setattr(copy, field, value)
    return copy


async def after(shared: RunningService) -> dict[str, Any]:
    """Gives new values of all fields that can be changed."""
    plan_id = await make_plan(shared)
    return {"name": "After", "plan_id": plan_id, "active": False, "scopes": [pb.ScopeDefinition(name="a:b")]}


@pytest.mark.parametrize("path", ["name", "plan_id", "active", "scopes"])
async def test_each_field_by_itself(acme: Tenant, path: str) -> None:
    """A mask with one path changes that field and no other, whatever else the request holds."""
    before, values = await organization_of(acme), await after(acme.service)
    answer = await update_organization(acme.service, pb.Organization(id=acme.id, **values), path)
    assert changed(before, **{path: values[path]}) == changed(answer.organization)
    assert before.update_time.ToDatetime() < answer.organization.update_time.ToDatetime()
    assert is_effective(answer.effect)
    assert answer.organization == await organization_of(acme)


async def test_fields_that_are_set(acme: Tenant) -> None:
    """Without a mask, the fields that are set are changed; `active` is set to false by naming it alone."""
    before, values = await organization_of(acme), await after(acme.service)
    del values["scopes"]
    answer = await update_organization(acme.service, pb.Organization(id=acme.id, **values))
    expected = changed(before, name="After", plan_id=values["plan_id"])
    assert (expected, True) == (changed(answer.organization), answer.organization.active)


async def test_star_is_all_fields(acme: Tenant) -> None:
    """`*` names every field that can be changed."""
    before, values = await organization_of(acme), await after(acme.service)
    answer = await update_organization(acme.service, pb.Organization(id=acme.id, **values), "*")
    assert changed(before, **values) == changed(answer.organization)


async def test_clearing_scopes(acme: Tenant) -> None:
    """Scopes can be taken out of the catalogue if no key needs them; else nothing is changed, and keys are named."""
    await acme.give_scopes("orders:read", "orders:write", "stock:read")
    exact = (await acme.key(permissions=["orders:read"])).key.id
    wild = (await acme.key(permissions=["stock:*"])).key.id
    before = await organization_of(acme)
    for scopes, scope, key_id in ([], "orders:read", exact), (["orders:read"], "stock:read", wild):
        error = await refusal(acme.give_scopes(*scopes))
        assert (grpc.StatusCode.FAILED_PRECONDITION, "SCOPE_IN_USE") == (error.code, error.reason)
        assert {"scope": scope, "key_count": "1", "key_ids": key_id} == error.metadata
    assert before == await organization_of(acme)
    await acme.give_scopes("stock:write", "orders:read")
    await acme.revoke(exact)
    await acme.update(key_pb2.Key(id=wild, permissions=["read"]))
    answer = await update_organization(acme.service, pb.Organization(id=acme.id), "scopes")
    assert [] == list(answer.organization.scopes)
    assert "SCOPE_UNKNOWN" == (await refusal(acme.key(permissions=["orders:read"]))).reason


@pytest.mark.parametrize(
    ("paths", "field"),
    [
        (["id"], "update_mask"),
        (["key_count"], "update_mask"),
        (["create_time"], "update_mask"),
        (["update_time"], "update_mask"),
        (["name", "scopes.name"], "update_mask"),
        ([], "update_mask"),
        (["name"], "organization.name"),
        (["plan_id"], "organization.plan_id"),
        (["*"], "organization.name"),
    ],
)
async def test_masks_that_make_no_sense(acme: Tenant, paths: list[str], field: str) -> None:
    """Fields that are fixed can not be named, name and plan not be cleared, and something must be changed."""
    before = await organization_of(acme)
    error = await refusal(update_organization(acme.service, pb.Organization(id=acme.id), *paths))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert [field] == list(error.violations)
    assert before == await organization_of(acme)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "x" * 101}, "organization.name"),
        ({"plan_id": "-"}, "organization.plan_id"),
        ({"scopes": [pb.ScopeDefinition(name="A")]}, "organization.scopes[0].name"),
        ({"scopes": [pb.ScopeDefinition(name="a")] * 2}, "organization.scopes"),
        ({"scopes": [pb.ScopeDefinition(name=f"s{number}") for number in range(1001)]}, "organization.scopes"),
    ],
)
async def test_limits(acme: Tenant, fields: dict[str, Any], field: str) -> None:
    """What an organization can not be made with it can not be changed to, and the field is named as in the request."""
    error = await refusal(update_organization(acme.service, pb.Organization(id=acme.id, **fields)))
    assert ("INVALID_FIELD", [field]) == (error.reason, list(error.violations))


async def test_what_does_not_exist(acme: Tenant) -> None:
    """An organization or a plan that is not there is NOT_FOUND, and nothing is changed."""
    before = await organization_of(acme)
    error = await refusal(
        update_organization(acme.service, pb.Organization(id=acme.id, name="After", plan_id="no-such-plan"))
    )
    assert (grpc.StatusCode.NOT_FOUND, "PLAN_NOT_FOUND") == (error.code, error.reason)
    assert before == await organization_of(acme)
    error = await refusal(update_organization(acme.service, pb.Organization(id="no-such-organization", name="After")))
    assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)
    for organization in (pb.Organization(), pb.Organization(name="After")):
        error = await refusal(update_organization(acme.service, organization))
        assert ("INVALID_FIELD", True) == (error.reason, next(iter(error.violations)).startswith("organization"))


async def test_smaller_plan(shared: RunningService) -> None:
    """Keys beyond a smaller plan's maximum stay good; no further one can be made until there is room."""
    tenant = await make_tenant(shared, "acme")
    made = [await tenant.key() for _ in range(3)]
    plan_id = await make_plan(shared, max_keys=2)
    await update_organization(shared, pb.Organization(id=tenant.id, plan_id=plan_id))
    assert ["VALID"] * 3 == [await shared.outcome(created.token) for created in made]
    for created in made:
        assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key())).reason
        await tenant.revoke(created.key.id)
    await tenant.key()
    assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key())).reason


async def test_inactive_organization_keeps_its_keys(acme: Tenant) -> None:
    """Root can manage the keys of an inactive organization, and what it changed holds when it is active again."""
    first, second = await acme.key(), await acme.key()
    await acme.set_active(active=False)
    await acme.revoke(first.key.id, caller=acme.service.root)
    third = await acme.service.create_key(acme.id)
    outcomes = [await acme.service.outcome(created.token) for created in (first, second, third)]
    assert ["REVOKED", "ORGANIZATION_INACTIVE", "ORGANIZATION_INACTIVE"] == outcomes
    await acme.set_active(active=True)
    outcomes = [await acme.service.outcome(created.token) for created in (first, second, third)]
    assert ["REVOKED", "VALID", "VALID"] == outcomes
