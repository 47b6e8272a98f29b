"""CreateOrganization."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Any

import grpc
import pytest

from apikeys.v1 import organization_service_pb2 as pb
from support.keys import make_plan
from support.service import RunningService, bearer, call_error, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


def new_id() -> str:
    """Makes an id that is not taken."""
    return f"acme-{uuid.uuid4().hex}"


async def create(service: RunningService, **fields: Any) -> pb.Organization:
    """Calls CreateOrganization as root."""
    fields.setdefault("name", "Acme")
    answer: pb.CreateOrganizationResponse = await service.organizations.CreateOrganization(
        pb.CreateOrganizationRequest(**fields), metadata=service.root
    )
    return answer.organization


async def test_every_field_of_the_answer(shared: RunningService) -> None:
    """The new organization is as it was asked for, active and without keys."""
    organization_id, plan_id = new_id(), await make_plan(shared)
    scopes = [pb.ScopeDefinition(name="orders:read", description="Read orders."), pb.ScopeDefinition(name="a.b_c-d")]
    organization = await create(
        shared, organization_id=organization_id, name="Acme \N{SNOWMAN}", plan_id=plan_id, scopes=scopes
    )
    expected = pb.Organization(
        id=organization_id,
        name="Acme \N{SNOWMAN}",
        plan_id=plan_id,
        active=True,
        scopes=scopes,
        key_count=0,
        create_time=organization.create_time,
        update_time=organization.create_time,
    )
    assert expected == organization
    unset = {field.name for field in organization.DESCRIPTOR.fields} - {
        each.name for each, _ in organization.ListFields()
    }
    assert {"key_count"} == unset


async def test_defaults(shared: RunningService) -> None:
    """A name is all that must be given: the service makes an id and takes the default plan."""
    first, second = await create(shared), await create(shared)
    assert re.fullmatch(r"org_[0-9a-z]{26}", first.id)
    assert first.id != second.id
    assert ("default", True, []) == (first.plan_id, first.active, list(first.scopes))


async def test_new_organizations_keys_are_good(shared: RunningService) -> None:
    """Keys can be made for the organization, and by its own keys, as soon as it is there."""
    organization = await create(shared)
    admin = await shared.create_key(organization.id, permissions=["*"])
    made = await shared.create_key("", metadata=bearer(admin.token))
    assert organization.id == made.key.organization_id
    assert "VALID" == await shared.outcome(made.token)


async def test_id_that_is_taken(shared: RunningService) -> None:
    """With an id of the caller's choice a retry is safe: of any number of calls one makes it."""
    organization_id = new_id()
    answers = await asyncio.gather(
        *(create(shared, organization_id=organization_id, name=f"name {number}") for number in range(6)),
        return_exceptions=True,
    )
    errors = [call_error(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [(grpc.StatusCode.ALREADY_EXISTS, "ORGANIZATION_EXISTS")] * 5 == [
        (error.code, error.reason) for error in errors
    ]
    assert "ORGANIZATION_EXISTS" == (await refusal(create(shared, organization_id="org_root"))).reason


async def test_plan_that_does_not_exist(shared: RunningService) -> None:
    """An organization can not be given a plan that is not there."""
    organization_id = new_id()
    error = await refusal(create(shared, organization_id=organization_id, plan_id="no-such-plan"))
    assert (grpc.StatusCode.NOT_FOUND, "PLAN_NOT_FOUND") == (error.code, error.reason)
    assert organization_id == (await create(shared, organization_id=organization_id)).id


@pytest.mark.parametrize(
    ("taken", "refused", "field"),
    [
        ({"organization_id": "a" * 32}, {"organization_id": "ab"}, "organization_id"),
        ({"organization_id": "0-_"}, {"organization_id": "_ab"}, "organization_id"),
        ({"organization_id": "a" * 64}, {"organization_id": "a" * 65}, "organization_id"),
        ({"organization_id": "abc"}, {"organization_id": "Abc"}, "organization_id"),
        ({"organization_id": "a-b"}, {"organization_id": "a/b"}, "organization_id"),
        ({"name": "\N{SNOWMAN}" * 100}, {"name": "\N{SNOWMAN}" * 101}, "name"),
        ({"name": "x"}, {"name": ""}, "name"),
        ({"name": "x"}, {"name": "x\x00"}, "name"),
        ({"plan_id": "default"}, {"plan_id": "-"}, "plan_id"),
        (
            {"scopes": [pb.ScopeDefinition(name="a" * 100)]},
            {"scopes": [pb.ScopeDefinition(name="a" * 101)]},
            "scopes[0].name",
        ),
        ({"scopes": [pb.ScopeDefinition(name="a:b")]}, {"scopes": [pb.ScopeDefinition(name="a:*")]}, "scopes[0].name"),
        ({"scopes": []}, {"scopes": [pb.ScopeDefinition()]}, "scopes[0].name"),
        (
            {"scopes": [pb.ScopeDefinition(name="a", description="\N{SNOWMAN}" * 500)]},
            {"scopes": [pb.ScopeDefinition(name="a", description="\N{SNOWMAN}" * 501)]},
            "scopes[0].description",
        ),
        (
            {"scopes": [pb.ScopeDefinition(name=f"s{number}") for number in range(1000)]},
            {"scopes": [pb.ScopeDefinition(name=f"s{number}") for number in range(1001)]},
            "scopes",
        ),
        (
            {"scopes": [pb.ScopeDefinition(name="a"), pb.ScopeDefinition(name="b")]},
            {"scopes": [pb.ScopeDefinition(name="a"), pb.ScopeDefinition(name="a", description="again")]},
            "scopes",
        ),
    ],
)
async def test_limits(shared: RunningService, taken: dict[str, Any], refused: dict[str, Any], field: str) -> None:
    """Every field has its limit: what reaches it is taken, what goes beyond is refused by the field's name."""
    organization = await create(shared, **taken)
    for name, value in taken.items():
        assert value == getattr(organization, "id" if name == "organization_id" else name)
    error = await refusal(create(shared, **refused))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert [field] == list(error.violations)
