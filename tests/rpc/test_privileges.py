"""No caller gains by a call what its own key lacks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant, hours_ahead, state_of
from support.service import CallError, bearer, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

NEEDED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "CreateKey": ("keys:write", lambda _: keys_pb.CreateKeyRequest(name="a key")),
    "GetKey": ("keys:read", lambda key_id: keys_pb.GetKeyRequest(key_id=key_id)),
    "ListKeys": ("keys:read", lambda _: keys_pb.ListKeysRequest()),
    "UpdateKey": ("keys:write", lambda key_id: keys_pb.UpdateKeyRequest(key=key_pb2.Key(id=key_id, name="b"))),
    "ToggleKey": ("keys:write", lambda key_id: keys_pb.ToggleKeyRequest(key_id=key_id)),
    "RotateKey": ("keys:write", lambda key_id: keys_pb.RotateKeyRequest(key_id=key_id)),
    "RevokeKey": ("keys:write", lambda key_id: keys_pb.RevokeKeyRequest(key_id=key_id)),
    "DeleteKey": ("keys:write", lambda key_id: keys_pb.DeleteKeyRequest(key_id=key_id)),
    "UndeleteKey": ("keys:write", lambda key_id: keys_pb.UndeleteKeyRequest(key_id=key_id)),
    "GetPublishableKey": ("keys:read", lambda _: keys_pb.GetPublishableKeyRequest()),
    "ListScopes": ("keys:read", lambda _: keys_pb.ListScopesRequest()),
    "CreateScope": ("scopes:write", lambda _: keys_pb.CreateScopeRequest(name="orders:read")),
    "DeleteScope": ("scopes:write", lambda _: keys_pb.DeleteScopeRequest(name="orders:read")),
}


async def test_table_is_complete() -> None:
    """Every method that a key of an organization can manage keys with is in the table above."""
    methods = {method.name for method in keys_pb.DESCRIPTOR.services_by_name["KeyService"].methods}
    assert methods - {"Validate", "BatchValidate"} == NEEDED.keys()


@pytest.mark.parametrize("method", NEEDED)
async def test_the_permission_that_a_method_needs(acme: Tenant, method: str) -> None:
    """A method can be called with its own permission alone, and not with all others together."""
    needed, make = NEEDED[method]
    request = make((await acme.key(key_type=key_pb2.KEY_TYPE_PUBLISHABLE)).key.id)
    others = {"keys:read", "keys:write", "keys:validate", "audit:read", "webhooks:read", "webhooks:write", "read"}
    others = (others | {"write", "scopes:write"}) - {needed}
    error = await refusal(getattr(acme.service.keys, method)(request, metadata=await acme.caller(*others)))
    assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING") == (error.code, error.reason)
    assert {"permission": needed} == error.metadata
    await getattr(acme.service.keys, method)(request, metadata=await acme.caller(needed))


def assert_not_held(error: CallError, permission: str) -> None:
    """Demands that a call was refused because its caller lacks a permission."""
    assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_NOT_HELD") == (error.code, error.reason)
    assert {"permission": permission} == error.metadata


GIVEN = [
    ("orders:read", "orders:read", True),
    ("orders:*", "orders:read", True),
    ("orders:*", "orders:*", True),
    ("orders:*", "orders:read:all", True),
    ("orders:*:all", "orders:read:all", True),
    ("*", "*", True),
    ("*", "keys:write", True),
    ("orders:read", "orders:write", False),
    ("orders:read", "orders:*", False),
    ("orders:read", "orders:read:all", False),
    ("orders:read", "*", False),
    ("orders:*", "ordersx:read", False),
    ("orders:*", "*", False),
    ("orders:*", "*:read", False),
    ("orders:*", "*:*", False),
    ("orders:*:all", "orders:*", False),
    ("*:read", "orders:*", False),
]


@pytest.mark.parametrize(("held", "given", "is_held"), GIVEN)
async def test_only_what_is_held_can_be_given(acme: Tenant, held: str, given: str, *, is_held: bool) -> None:
    """A caller gives permissions that its own cover, at creation as by an update, and no others."""
    await acme.give_scopes("orders:read", "orders:write", "orders:read:all", "ordersx:read")
    caller = await acme.caller("keys:write", held)
    request = keys_pb.CreateKeyRequest(name="given", permissions=[given])
    plain = (await acme.key(permissions=["keys:write"])).key
    update = key_pb2.Key(id=plain.id, permissions=["keys:write", given] if given != "keys:write" else [given])
    if is_held:
        assert [given] == list((await acme.create(request, caller)).key.permissions)
        assert given in (await acme.update(update, caller=caller)).key.permissions
        return
    assert_not_held(await refusal(acme.create(request, caller)), given)
    assert_not_held(await refusal(acme.update(update, caller=caller)), given)
    assert plain == await acme.get(plain.id)


async def test_key_writers_can_not_make_themselves_stronger(acme: Tenant) -> None:
    """Who holds `keys:write` alone can not give its own key anything more."""
    own = await acme.key(permissions=["keys:write"])
    caller = bearer(own.token)
    for permission in ("keys:read", "read", "*", "keys:*", "*:write"):
        error = await refusal(acme.update(key_pb2.Key(id=own.key.id, permissions=[permission]), caller=caller))
        assert_not_held(error, permission)
    assert own.key == await acme.get(own.key.id)


async def test_stronger_keys_can_not_be_rotated(acme: Tenant) -> None:
    """Rotating a key hands out its token, and so needs all that it may do, with and without a grace period."""
    await acme.give_scopes("orders:read")
    stronger = await acme.key(permissions=["keys:write", "orders:read"])
    caller = await acme.caller("keys:write")
    for grace in (timedelta(0), timedelta(days=1)):
        error = await refusal(acme.rotate(stronger.key.id, grace=grace, caller=caller))
        assert_not_held(error, "orders:read")
    assert stronger.key == await acme.get(stronger.key.id)
    assert "VALID" == await acme.service.outcome(stronger.token)


async def test_stronger_keys_can_be_weakened(acme: Tenant) -> None:
    """To take permissions away, and to end or switch off a key, one needs not hold what it may do."""
    caller = await acme.caller("keys:write")
    stronger = (await acme.key(permissions=["read", "write"])).key
    assert ["read"] == list(
        (await acme.update(key_pb2.Key(id=stronger.id, permissions=["read"]), caller=caller)).key.permissions
    )
    sooner = key_pb2.Key(id=stronger.id, expire_time=hours_ahead(2), allowed_cidrs=["10.0.0.0/8"])
    assert sooner.expire_time == (await acme.update(sooner, caller=caller)).key.expire_time
    sooner = key_pb2.Key(id=stronger.id, expire_time=hours_ahead(1))
    assert sooner.expire_time == (await acme.update(sooner, caller=caller)).key.expire_time
    assert "INACTIVE" == state_of((await acme.toggle(stronger.id, active=False, caller=caller)).key)
    assert "REVOKED" == state_of((await acme.revoke(stronger.id, caller=caller)).key)


async def test_stronger_tokens_can_not_be_brought_back(acme: Tenant) -> None:
    """Who has kept a stronger token that is off, expired, bound to a network or deleted can not make it good again."""
    caller = await acme.caller("keys:write")
    off = (await acme.key(permissions=["read"])).key.id
    await acme.toggle(off, active=False)
    expired = (await acme.key(permissions=["read"])).key.id
    await acme.expire(expired)
    expiring = (await acme.key(permissions=["read"], expire_time=hours_ahead(1))).key.id
    bound = (await acme.key(permissions=["read"], allowed_cidrs=["10.0.0.0/8"])).key.id
    deleted = (await acme.key(permissions=["read"])).key.id
    await acme.delete(deleted)
    before = [await acme.get(key_id) for key_id in (off, expired, expiring, bound, deleted)]
    for call in (
        acme.toggle(off, active=True, caller=caller),
        acme.toggle(off, caller=caller),
        acme.update(key_pb2.Key(id=expired, expire_time=hours_ahead(1)), caller=caller),
        acme.update(key_pb2.Key(id=expired), "expire_time", caller=caller),
        acme.update(key_pb2.Key(id=expiring, expire_time=hours_ahead(2)), caller=caller),
        acme.update(key_pb2.Key(id=bound, name="x"), "name", "allowed_cidrs", caller=caller),
        acme.update(key_pb2.Key(id=bound, allowed_cidrs=["0.0.0.0/0"]), caller=caller),
        acme.undelete(deleted, caller=caller),
    ):
        assert_not_held(await refusal(call), "read")
    assert before == [await acme.get(key_id) for key_id in (off, expired, expiring, bound, deleted)]


async def test_own_kind_of_keys_can_be_brought_back(acme: Tenant) -> None:
    """Who holds all that a key may do can switch it on again, let it live longer and move it."""
    caller = await acme.caller("keys:write", "read")
    key_id = (await acme.key(permissions=["read"], allowed_cidrs=["10.0.0.0/8"])).key.id
    await acme.toggle(key_id, active=False)
    await acme.expire(key_id)
    await acme.toggle(key_id, active=True, caller=caller)
    updated = (await acme.update(key_pb2.Key(id=key_id), "expire_time", "allowed_cidrs", caller=caller)).key
    assert ("ACTIVE", []) == (state_of(updated), list(updated.allowed_cidrs))


async def test_all_permissions_are_not_root(acme: Tenant) -> None:
    """`*` is all that there is within an organization, and no more."""
    for organization_id in ("org_root", "default"):
        request = keys_pb.CreateKeyRequest(organization_id=organization_id, name="root", permissions=["*"])
        assert "ORGANIZATION_NOT_FOUND" == (await refusal(acme.create(request))).reason


@pytest.mark.parametrize(
    ("held", "needed", "outcome"),
    [
        ("orders:*", "orders:read", "VALID"),
        ("orders:*", "orders:read:all", "VALID"),
        ("orders:*", "orders", "PERMISSION_DENIED"),
        ("orders:*", "ordersx:read", "PERMISSION_DENIED"),
        ("orders:read", "orders:read:all", "PERMISSION_DENIED"),
        ("orders:read", "orders:rea", "PERMISSION_DENIED"),
        ("orders:*:all", "orders:read:all", "VALID"),
        ("orders:*:all", "orders:read", "PERMISSION_DENIED"),
        ("orders:*:all", "orders:read:own", "PERMISSION_DENIED"),
        ("orders:read", "orders:*", "PERMISSION_DENIED"),
        ("orders:*", "*", "PERMISSION_DENIED"),
        ("*", "anything at all", "VALID"),
        ("*", "*", "VALID"),
    ],
)
async def test_wildcards_match_whole_segments(acme: Tenant, held: str, needed: str, outcome: str) -> None:
    """A wildcard stands for whole segments: `orders:*` does not reach what merely begins alike."""
    await acme.give_scopes("orders:read", "orders:read:all")
    token = (await acme.key(permissions=[held])).token
    assert outcome == await acme.service.outcome(token, required_permissions=[needed])
