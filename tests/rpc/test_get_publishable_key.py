"""GetPublishableKey."""

from __future__ import annotations

from datetime import timedelta

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

PUBLISHABLE = key_pb2.KEY_TYPE_PUBLISHABLE
TEST = key_pb2.ENVIRONMENT_TEST


async def public_key(tenant: Tenant, **fields: object) -> keys_pb.CreateKeyResponse:
    """Makes a publishable key."""
    return await tenant.key(key_type=PUBLISHABLE, **fields)


async def assert_there_is_none(tenant: Tenant, **fields: object) -> None:
    """Demands that no publishable key is found."""
    error = await refusal(tenant.publishable(None, **fields))
    assert (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND") == (error.code, error.reason)


async def test_answers_with_the_token(acme: Tenant) -> None:
    """A publishable token can be had again by whoever may read keys, for live or for test traffic."""
    live, test = await public_key(acme, permissions=["read"]), await public_key(acme, environment=TEST)
    caller = await acme.caller("keys:read")
    for created, fields in (
        (live, {}),
        (live, {"environment": key_pb2.ENVIRONMENT_LIVE}),
        (live, {"organization_id": acme.id}),
        (test, {"environment": TEST}),
    ):
        found = await acme.publishable(caller, **fields)
        assert (created.key, created.token) == (found.key, found.token)
        assert "VALID" == await acme.service.outcome(found.token)


async def test_newest_one(acme: Tenant) -> None:
    """Of several, the newest that is in use is answered with."""
    made = [await public_key(acme) for _ in range(3)]
    made.sort(key=lambda created: created.key.id)
    for created in reversed(made):
        assert created.token == (await acme.publishable()).token
        await acme.toggle(created.key.id, active=False)
    await assert_there_is_none(acme)


@pytest.mark.parametrize("end", ["revoke", "delete", "expire", "toggle"])
async def test_only_keys_in_use(acme: Tenant, end: str) -> None:
    """A key that is revoked, deleted, expired or off is not handed out."""
    created = await public_key(acme)
    await getattr(acme, end)(created.key.id)
    await assert_there_is_none(acme)


async def test_never_a_secret_token(acme: Tenant) -> None:
    """However many secret keys an organization has, none of their tokens can be had again."""
    await acme.key()
    await acme.key(environment=TEST)
    await assert_there_is_none(acme)
    await assert_there_is_none(acme, environment=TEST)


async def test_after_a_rotation(acme: Tenant) -> None:
    """After a rotation the new token is answered with, also while the old one still works."""
    created = await public_key(acme)
    rotated = await acme.rotate(created.key.id, grace=timedelta(hours=1))
    found = await acme.publishable()
    assert (rotated.token, rotated.key) == (found.token, found.key)
    assert (await acme.rotate(created.key.id)).token == (await acme.publishable()).token


async def test_environments_are_apart(acme: Tenant) -> None:
    """A test key is not handed out for live traffic."""
    await public_key(acme, environment=TEST)
    await assert_there_is_none(acme)
    error = await refusal(acme.publishable(None, environment=9))
    assert ("INVALID_FIELD", ["environment"]) == (error.reason, list(error.violations))


@pytest.mark.parametrize(
    "permission", ["keys:read", "keys:write", "keys:validate", "audit:read", "keys:*", "*:read", "*"]
)
async def test_can_not_manage(acme: Tenant, permission: str) -> None:
    """A token that anyone may hold can not be permitted to manage keys: not at first, and not later."""
    refused = ["read", permission]
    error = await refusal(public_key(acme, permissions=refused))
    assert ("INVALID_FIELD", ["permissions"]) == (error.reason, list(error.violations))
    created = await public_key(acme, permissions=["read"])
    error = await refusal(acme.update(key_pb2.Key(id=created.key.id, permissions=refused)))
    assert ("INVALID_FIELD", ["key.permissions"]) == (error.reason, list(error.violations))
    assert created.key == await acme.get(created.key.id)


async def test_other_permissions(acme: Tenant) -> None:
    """A publishable key can have permissions of the application's own."""
    await acme.give_scopes("orders:read")
    created = await public_key(acme, permissions=["orders:*", "read"])
    assert "VALID" == await acme.service.outcome(created.token, required_permissions=["orders:read", "read"])


async def test_root(acme: Tenant, rival: Tenant) -> None:
    """Root names the organization, and is told when there is no such one."""
    root = acme.service.root
    created = await public_key(acme)
    assert created.token == (await acme.publishable(root, organization_id=acme.id)).token
    for fields, reason in (
        ({}, "INVALID_FIELD"),
        ({"organization_id": rival.id}, "KEY_NOT_FOUND"),
        ({"organization_id": "no-such-organization"}, "ORGANIZATION_NOT_FOUND"),
    ):
        assert reason == (await refusal(acme.publishable(root, **fields))).reason
