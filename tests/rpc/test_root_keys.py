"""Root keys: there is always one left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import Tenant, hours_ahead, ids, state_of, update_organization
from support.service import RunningService, bearer, call_error, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROOT = "org_root"


async def as_root(service: RunningService) -> Tenant:
    """Gives the service's own organization, with the key that the settings made."""
    listed: keys_pb.ListKeysResponse = await service.keys.ListKeys(
        keys_pb.ListKeysRequest(organization_id=ROOT), metadata=service.root
    )
    (key,) = listed.keys
    return Tenant(service=service, id=ROOT, admin=service.root, admin_key_id=key.id)


async def another(root: Tenant, **fields: Any) -> keys_pb.CreateKeyResponse:
    """Makes a further root key."""
    return await root.key(organization_id=ROOT, **fields)


ENDS: dict[str, Callable[[Tenant, str], Awaitable[Any]]] = {
    "revoke": lambda root, key_id: root.revoke(key_id),
    "delete": lambda root, key_id: root.delete(key_id),
    "rotate": lambda root, key_id: root.rotate(key_id),
    "rotate with a grace period": lambda root, key_id: root.rotate(key_id, grace=timedelta(days=1)),
    "switch off": lambda root, key_id: root.toggle(key_id, active=False),
    "flip": lambda root, key_id: root.toggle(key_id),
    "expire": lambda root, key_id: root.update(key_pb2.Key(id=key_id, expire_time=hours_ahead(24))),
}


async def test_last_root_key(alone: RunningService) -> None:
    """The last root key can be brought to no end, or nobody could manage organizations any more. A key that is off or
    will expire is not another one.
    """
    root = await as_root(alone)
    off = await another(root, name="off")
    await root.toggle(off.key.id, active=False)
    expiring = await another(root, expire_time=hours_ahead(24))
    before = await root.get(root.admin_key_id)
    for end in ENDS.values():
        for caller in (alone.root, bearer(expiring.token)):
            error = await refusal(end(replace(root, admin=caller), root.admin_key_id))
            assert (grpc.StatusCode.FAILED_PRECONDITION, "LAST_ROOT_KEY") == (error.code, error.reason)
    assert before == await root.get(root.admin_key_id)


async def test_a_further_root_key(alone: RunningService) -> None:
    """A root key can be brought to every end while another is left that is on and does not expire."""
    root = await as_root(alone)
    for end in ENDS.values():
        await end(root, (await another(root)).key.id)
    second = await another(root, name="second")
    for end in (ENDS["rotate"], ENDS["revoke"]):
        await end(replace(root, admin=bearer(second.token)), root.admin_key_id)
    assert "CREDENTIALS_INVALID" == (await refusal(root.get(second.key.id))).reason


async def test_harmless_changes_of_the_last_root_key(alone: RunningService) -> None:
    """The last root key can be renamed, and switched on though it is on."""
    root = await as_root(alone)
    assert "renamed" == (await root.update(key_pb2.Key(id=root.admin_key_id, name="renamed"))).key.name
    assert "ACTIVE" == state_of((await root.toggle(root.admin_key_id, active=True)).key)
    update = key_pb2.Key(id=root.admin_key_id, name="again", permissions=["*"])
    assert "again" == (await root.update(update, "*")).key.name


@pytest.mark.parametrize("end", ["revoke", "switch off"])
async def test_two_root_keys_end_each_other(alone: RunningService, end: str) -> None:
    """Of two calls at the same time, each of which would leave the other's key, one is refused."""
    root = await as_root(alone)
    second = await another(root, name="second")
    others = Tenant(service=alone, id=ROOT, admin=bearer(second.token), admin_key_id=second.key.id)
    answers = await asyncio.gather(
        ENDS[end](root, second.key.id), ENDS[end](others, root.admin_key_id), return_exceptions=True
    )
    errors = [call_error(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert 1 == len(errors)
    # The slower caller may find its own key at its end already.
    assert errors[0].reason in {"LAST_ROOT_KEY", "CREDENTIALS_INVALID"}
    left = others if isinstance(answers[0], BaseException) else root
    good = [key for key in (await left.list(organization_id=ROOT)).keys if _lasts(key)]
    assert [left.admin_key_id] == ids(good)


def _lasts(key: key_pb2.Key) -> bool:
    return state_of(key) == "ACTIVE" and not key.HasField("expire_time")


async def test_concurrent_revocations_leave_one(alone: RunningService) -> None:
    """However many callers revoke root keys at the same time, one root key is left."""
    root = await as_root(alone)
    made = [await another(root, name=f"root {number}") for number in range(3)]
    caller = bearer((await another(root, expire_time=hours_ahead(24))).token)
    victims = [root.admin_key_id, *[each.key.id for each in made]]
    answers = await asyncio.gather(*(root.revoke(key_id, caller=caller) for key_id in victims), return_exceptions=True)
    errors = [call_error(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert ["LAST_ROOT_KEY"] == [error.reason for error in errors]
    assert 1 == len([key for key in (await root.list(caller, organization_id=ROOT)).keys if _lasts(key)])


async def test_a_root_key_is_root(alone: RunningService) -> None:
    """A further root key may do everything, though its permissions need not be named; it is a secret one."""
    root = await as_root(alone)
    for permissions in ([], ["*"]):
        created = await another(root, permissions=permissions)
        assert (ROOT, ["*"]) == (created.key.organization_id, list(created.key.permissions))
        caller = bearer(created.token)
        await alone.organizations.ListPlans(organizations_pb.ListPlansRequest(), metadata=caller)
    for fields, field in (
        ({"permissions": ["keys:read"]}, "permissions"),
        ({"permissions": ["*", "keys:read"]}, "permissions"),
        ({"key_type": key_pb2.KEY_TYPE_PUBLISHABLE}, "key_type"),
    ):
        error = await refusal(another(root, **fields))
        assert ("INVALID_FIELD", [field]) == (error.reason, list(error.violations))


async def test_permissions_of_root_keys_are_fixed(alone: RunningService) -> None:
    """A root key can not be made less than root: it would stay able to name organizations."""
    root = await as_root(alone)
    key_id = (await another(root)).key.id
    for permissions in ([], ["keys:read"]):
        error = await refusal(root.update(key_pb2.Key(id=key_id, permissions=permissions), "permissions"))
        assert (grpc.StatusCode.FAILED_PRECONDITION, "ROOT_ORGANIZATION") == (error.code, error.reason)


@pytest.mark.parametrize("path", ["active", "plan_id", "scopes"])
async def test_root_organization_is_fixed(alone: RunningService, path: str) -> None:
    """The service's own organization can be renamed, but not be switched off, nor be given another plan or scopes."""
    changed = organizations_pb.Organization(
        id=ROOT, name="Ours", plan_id="default", scopes=[organizations_pb.ScopeDefinition(name="a:b")]
    )
    error = await refusal(update_organization(alone, changed, "name", path))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "ROOT_ORGANIZATION") == (error.code, error.reason)
    assert "Ours" == (await update_organization(alone, changed, "name")).organization.name
