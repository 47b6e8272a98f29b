"""DeleteScope."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from apikeys.v1 import key_pb2
from support.keys import Tenant, hours_ahead
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_removes_a_scope(acme: Tenant) -> None:
    """A scope that no key needs is out of the catalogue when the call returns, and can be given to none."""
    caller = await acme.caller("scopes:write")
    await acme.create_scope("orders:read")
    await acme.create_scope("orders:write")
    left = await acme.delete_scope("orders:read", caller)
    assert ("orders:read" in left, "orders:write" in left) == (False, True)
    assert left == await acme.scope_names()
    assert "SCOPE_UNKNOWN" == (await refusal(acme.key(permissions=["orders:read"]))).reason


async def test_repeating(acme: Tenant) -> None:
    """A repeated call answers alike; what was never there is not missed either."""
    await acme.create_scope("orders:read")
    left = await acme.delete_scope("orders:read")
    assert left == await acme.delete_scope("orders:read") == await acme.delete_scope("orders:never")


async def test_scope_that_keys_need(acme: Tenant, rival: Tenant) -> None:
    """A scope that keys need stays, and the first ten keys are named, the oldest first, with how many there are."""
    for tenant in (acme, rival):
        await tenant.create_scope("orders:read")
    holders = [(await acme.key(permissions=["read", "orders:read"])).key.id for _ in range(12)]
    await rival.key(permissions=["orders:read"])
    error = await refusal(acme.delete_scope("orders:read"))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "SCOPE_IN_USE") == (error.code, error.reason)
    expected = {"scope": "orders:read", "key_count": "12", "key_ids": ",".join(sorted(holders)[:10])}
    assert expected == error.metadata
    assert "2 more" in error.message
    assert all(key_id in error.message for key_id in sorted(holders)[:10])
    assert "orders:read" in await acme.scope_names()


@pytest.mark.parametrize(
    ("permission", "first", "last"),
    [
        ("orders:*", "orders:read:all", "orders:write:all"),
        ("orders:*:all", "orders:write:all", "orders:read:all"),
        ("*:read:all", "orders:read:all", "stock:read:all"),
    ],
)
async def test_wildcards(acme: Tenant, permission: str, first: str, last: str) -> None:
    """A wildcard needs the last scope that it stands for, and none before that; `*` needs none."""
    for name in ("orders:read:all", "orders:write:all", "stock:read:all"):
        await acme.create_scope(name)
    holder = (await acme.key(permissions=[permission])).key.id
    await acme.delete_scope(first)
    error = await refusal(acme.delete_scope(last))
    assert {"scope": last, "key_count": "1", "key_ids": holder} == error.metadata
    await acme.update(key_pb2.Key(id=holder), "permissions")
    await acme.delete_scope(last)


async def test_keys_that_count(acme: Tenant) -> None:
    """Keys that can be used again need their scopes: those that are off and those that have expired. Those that were
    revoked or deleted do not.
    """
    await acme.create_scope("orders:read")
    made = [(await acme.key(permissions=["orders:read"], expire_time=hours_ahead(1))).key.id for _ in range(4)]
    off, expired, revoked, deleted = made
    await acme.toggle(off, active=False)
    await acme.expire(expired)
    await acme.revoke(revoked)
    await acme.delete(deleted)
    assert ",".join(sorted([off, expired])) == (await refusal(acme.delete_scope("orders:read"))).metadata["key_ids"]
    await acme.revoke(off)
    await acme.revoke(expired)
    assert "orders:read" not in await acme.delete_scope("orders:read")


async def test_no_key_is_given_it_meanwhile(acme: Tenant) -> None:
    """Whatever is asked for at the same time: a scope that is gone is held by no key that could be used."""
    plain = (await acme.key()).key.id
    for number in range(8):
        name = f"orders:s{number}"
        await acme.create_scope(name)
        deleted = (await acme.key(permissions=[name])).key.id
        await acme.delete(deleted)
        await asyncio.gather(
            acme.key(permissions=[name]),
            acme.delete_scope(name),
            acme.update(key_pb2.Key(id=plain, permissions=["read", name])),
            acme.undelete(deleted),
            return_exceptions=True,
        )
        holders = [key.id for key in (await acme.list()).keys if name in key.permissions]
        assert bool(holders) == (name in await acme.scope_names())
        await acme.update(key_pb2.Key(id=plain, permissions=["read"]))


async def test_scopes_of_the_service(acme: Tenant) -> None:
    """A scope of the service can not be removed by an organization, which is told whose it is."""
    error = await refusal(acme.delete_scope("keys:read"))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "SCOPE_NOT_OWN") == (error.code, error.reason)
    assert {"source": "core"} == error.metadata


async def test_root(acme: Tenant) -> None:
    """Root names the organization."""
    root = acme.service.root
    await acme.create_scope("orders:read")
    assert "INVALID_FIELD" == (await refusal(acme.delete_scope("orders:read", root))).reason
    assert "orders:read" not in await acme.delete_scope("orders:read", root, organization_id=acme.id)
