"""CreateScope."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_adds_a_scope(acme: Tenant, rival: Tenant) -> None:
    """Who holds `scopes:write` adds scopes to its organization's catalogue, without root; keys can be given them."""
    caller = await acme.caller("scopes:write")
    made = await acme.create_scope("orders:read", caller, description="Read orders.")
    expected = keys_pb.Scope(name="orders:read", description="Read orders.", source=keys_pb.SCOPE_SOURCE_ORGANIZATION)
    assert expected == made
    assert made in (await acme.scopes()).scopes
    assert "orders:read" not in await rival.scope_names()
    created = await acme.key(permissions=["orders:read"])
    assert "VALID" == await acme.service.outcome(created.token, required_permissions=["orders:read"])


async def test_gives_nobody_anything(acme: Tenant) -> None:
    """Who has made a scope does not hold it by that, and can not give it to a key."""
    caller = await acme.caller("scopes:write", "keys:write")
    await acme.create_scope("orders:read", caller)
    request = keys_pb.CreateKeyRequest(name="own", permissions=["orders:read"])
    error = await refusal(acme.create(request, caller))
    assert ("PERMISSION_NOT_HELD", {"permission": "orders:read"}) == (error.reason, error.metadata)


@pytest.mark.parametrize(
    ("name", "source"), [("read", "core"), ("keys:write", "core"), ("orders:read", "organization")]
)
async def test_names_that_are_taken(acme: Tenant, name: str, source: str) -> None:
    """A scope that is in the catalogue is ALREADY_EXISTS, whoever put it there, and stays as it is."""
    await acme.create_scope("orders:read", description="Read orders.")
    before = await acme.scopes()
    error = await refusal(acme.create_scope(name, description="Something else."))
    assert (grpc.StatusCode.ALREADY_EXISTS, "SCOPE_EXISTS") == (error.code, error.reason)
    assert {"source": source} == error.metadata
    assert before == await acme.scopes()


@pytest.mark.parametrize("name", ["keys", "keys:export", "scopes:read", "audit:write", "audit:read:all"])
async def test_names_that_are_kept_for_the_service(acme: Tenant, name: str) -> None:
    """What begins like a permission for management can not be an organization's own: it may come to be one."""
    error = await refusal(acme.create_scope(name))
    assert ("INVALID_FIELD", ["name"]) == (error.reason, list(error.violations))
    assert name not in await acme.scope_names()
    await acme.create_scope("keysx:read")


async def test_as_many_as_there_can_be(acme: Tenant) -> None:
    """An organization has at most 1000 scopes of its own; root can give it no more either."""
    await acme.give_scopes(*(f"s{number}" for number in range(1000)))
    error = await refusal(acme.create_scope("one-more"))
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "SCOPE_LIMIT_REACHED") == (error.code, error.reason)
    assert {"max_scopes": "1000"} == error.metadata
    await acme.delete_scope("s0")
    await acme.create_scope("one-more")


async def test_many_at_once(acme: Tenant) -> None:
    """Of scopes that are made at the same time none is lost; of the same name one is made."""
    names = [f"orders:s{number}" for number in range(8)]
    await asyncio.gather(*(acme.create_scope(name) for name in names))
    assert set(names) <= set(await acme.scope_names())
    answers = await asyncio.gather(*(acme.create_scope("same") for _ in range(6)), return_exceptions=True)
    assert 1 == len([answer for answer in answers if not isinstance(answer, Exception)])


async def test_root(acme: Tenant) -> None:
    """Root names the organization; its own has no scopes."""
    root = acme.service.root
    await acme.create_scope("orders:read", root, organization_id=acme.id)
    assert "orders:read" in await acme.scope_names()
    assert "INVALID_FIELD" == (await refusal(acme.create_scope("orders:write", root))).reason
    error = await refusal(acme.create_scope("orders:write", root, organization_id="org_root"))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "ROOT_ORGANIZATION") == (error.code, error.reason)


async def test_publishable_keys(acme: Tenant) -> None:
    """A token that anyone may hold can not be one that changes the catalogue."""
    for permission in ("scopes:write", "scopes:*"):
        error = await refusal(acme.key(key_type=key_pb2.KEY_TYPE_PUBLISHABLE, permissions=[permission]))
        assert ("INVALID_FIELD", ["permissions"]) == (error.reason, list(error.violations))
