"""GetOrganization."""

from __future__ import annotations

import grpc
import pytest

from apikeys.v1 import organization_service_pb2 as pb
from support.keys import Tenant, make_plan, make_tenant
from support.service import RunningService, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def get(service: RunningService, organization_id: str) -> pb.Organization:
    """Calls GetOrganization as root."""
    answer: pb.GetOrganizationResponse = await service.organizations.GetOrganization(
        pb.GetOrganizationRequest(organization_id=organization_id), metadata=service.root
    )
    return answer.organization


async def test_every_field_of_the_answer(shared: RunningService) -> None:
    """An organization is read as it was stored."""
    plan_id = await make_plan(shared)
    tenant = await make_tenant(shared, "acme", plan_id)
    await tenant.give_scopes("orders:read")
    organization = await get(shared, tenant.id)
    expected = pb.Organization(
        id=tenant.id,
        name=tenant.id.title(),
        plan_id=plan_id,
        active=True,
        scopes=[pb.ScopeDefinition(name="orders:read")],
        key_count=1,
        create_time=organization.create_time,
        update_time=organization.update_time,
    )
    assert expected == organization
    assert organization.create_time.ToDatetime() < organization.update_time.ToDatetime()


async def test_number_of_keys(acme: Tenant) -> None:
    """All keys that are neither revoked nor deleted count, and each counts once."""

    async def count() -> int:
        return (await get(acme.service, acme.id)).key_count

    first, second, third = await acme.key(), await acme.key(), await acme.key()
    assert 4 == await count()
    await acme.toggle(first.key.id)
    await acme.expire(second.key.id)
    await acme.rotate(third.key.id)
    assert 4 == await count()
    for _ in range(2):
        await acme.revoke(first.key.id)
        await acme.delete(first.key.id)
        await acme.delete(second.key.id)
    assert 2 == await count()


async def test_organizations_that_are_not_there(shared: RunningService) -> None:
    """An unknown id is NOT_FOUND; what can not be one is refused by the field's name."""
    error = await refusal(get(shared, "no-such-organization"))
    assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)
    error = await refusal(get(shared, ""))
    assert ("INVALID_FIELD", ["organization_id"]) == (error.reason, list(error.violations))
