"""UndeleteKey."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import grpc
import pytest

from apikeys.v1 import key_pb2
from support.keys import (
    NOBODYS_KEY,
    Tenant,
    hours_ahead,
    ids,
    is_effective,
    make_plan,
    make_tenant,
    state_of,
    without_fields,
)
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEPT = timedelta(days=30)
CHANGING = ("update_time", "etag", "last_used_time", "secrets")


async def test_as_it_was(acme: Tenant) -> None:
    """A key that was deleted in error is brought back as it was, is accepted when the call has returned, and stands in
    lists again.
    """
    created = await acme.key(
        name="missed", permissions=["read"], metadata={"a": "b"}, user_id="u-1", rate_limit_per_minute=60
    )
    assert "VALID" == await acme.service.outcome(created.token)
    deleted = (await acme.delete(created.key.id)).key
    assert "REVOKED" == await acme.service.outcome(created.token)
    undeleted = await acme.undelete(created.key.id)
    assert "VALID" == await acme.service.outcome(created.token, required_permissions=["read"])
    assert ("ACTIVE", True) == (state_of(undeleted.key), is_effective(undeleted.effect))
    assert without_fields(created.key, *CHANGING) == without_fields(undeleted.key, *CHANGING)
    assert 3 == len({created.key.etag, deleted.etag, undeleted.key.etag})
    assert created.key.id in ids((await acme.list()).keys)


@pytest.mark.parametrize("state", ["INACTIVE", "EXPIRED"])
async def test_keys_that_were_refused_before(acme: Tenant, state: str) -> None:
    """A key that was off, or had expired, when it was deleted is so still."""
    created = await acme.key(expire_time=hours_ahead(1))
    if state == "INACTIVE":
        await acme.toggle(created.key.id, active=False)
    else:
        await acme.expire(created.key.id)
    await acme.delete(created.key.id)
    assert state == state_of((await acme.undelete(created.key.id)).key)
    assert state == await acme.service.outcome(created.token)


async def test_tokens_that_a_rotation_has_ended(acme: Tenant) -> None:
    """The newest token is good again, and one in its grace until that ends; one that was ended stays so."""
    first = await acme.key()
    second = await acme.rotate(first.key.id)
    third = await acme.rotate(first.key.id, grace=timedelta(hours=1))
    await acme.delete(first.key.id)
    await acme.undelete(first.key.id)
    tokens = (first.token, second.token, third.token)
    assert ["REVOKED", "VALID", "VALID"] == [await acme.service.outcome(token) for token in tokens]
    await acme.end_grace(first.key.id)
    assert ["REVOKED", "REVOKED", "VALID"] == [await acme.service.outcome(token) for token in tokens]


async def test_publishable_key(acme: Tenant) -> None:
    """A publishable key can be fetched again."""
    created = await acme.key(key_type=key_pb2.KEY_TYPE_PUBLISHABLE)
    await acme.delete(created.key.id)
    assert "KEY_NOT_FOUND" == (await refusal(acme.publishable())).reason
    await acme.undelete(created.key.id)
    assert created.token == (await acme.publishable()).token


async def test_repeating(acme: Tenant) -> None:
    """A repeated call changes nothing and answers alike; so does one for a key that never was deleted."""
    key = (await acme.key()).key
    assert key == (await acme.undelete(key.id)).key
    await acme.delete(key.id)
    first = await acme.undelete(key.id)
    assert first == await acme.undelete(key.id)


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_revoked_key(acme: Tenant, *, is_deleted: bool) -> None:
    """A key that was revoked stays so, whether it was deleted after that or not."""
    created = await acme.key()
    await acme.revoke(created.key.id, reason="leaked")
    if is_deleted:
        await acme.delete(created.key.id)
    before = await acme.get(created.key.id)
    error = await refusal(acme.undelete(created.key.id))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "KEY_REVOKED") == (error.code, error.reason)
    assert before == await acme.get(created.key.id)
    assert "REVOKED" == await acme.service.outcome(created.token)


async def test_revocation_is_final_whatever_comes_with_it(acme: Tenant) -> None:
    """A key that is deleted, revoked and undeleted at once is revoked afterwards, in whatever order that came."""
    for _ in range(8):
        created = await acme.key()
        await acme.delete(created.key.id)
        await asyncio.gather(
            acme.undelete(created.key.id),
            acme.revoke(created.key.id),
            acme.delete(created.key.id),
            return_exceptions=True,
        )
        assert "REVOKED" == await acme.service.outcome(created.token)
        assert "KEY_REVOKED" == (await refusal(acme.undelete(created.key.id))).reason


async def test_permissions_that_it_takes(acme: Tenant) -> None:
    """Bringing a key back demands all that it may do, as giving it out does."""
    created = await acme.key(permissions=["read", "write"])
    await acme.delete(created.key.id)
    error = await refusal(acme.undelete(created.key.id, caller=await acme.caller("keys:write", "read")))
    assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_NOT_HELD") == (error.code, error.reason)
    assert {"permission": "write"} == error.metadata
    assert "REVOKED" == await acme.service.outcome(created.token)
    await acme.undelete(created.key.id, caller=await acme.caller("keys:write", "read", "write"))
    assert "VALID" == await acme.service.outcome(created.token)


async def test_maximum_of_the_plan(acme: Tenant) -> None:
    """A key that is brought back counts again: there must be room for it."""
    service = acme.service
    tenant = await make_tenant(service, "full", await make_plan(service, max_keys=2))
    deleted = (await tenant.key()).key.id
    await tenant.delete(deleted)
    other = (await tenant.key()).key.id
    error = await refusal(tenant.undelete(deleted))
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_LIMIT_REACHED") == (error.code, error.reason)
    await tenant.delete(other)
    answers = await asyncio.gather(tenant.undelete(deleted), tenant.undelete(other), return_exceptions=True)
    assert [False, True] == sorted(isinstance(answer, Exception) for answer in answers)
    assert 2 == len((await tenant.list()).keys)
    assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key())).reason


async def test_scopes_that_are_gone(acme: Tenant) -> None:
    """While it was deleted a key kept no scope in the catalogue; the scope must be there again to bring it back."""
    await acme.create_scope("orders:read")
    created = await acme.key(permissions=["orders:*"])
    await acme.delete(created.key.id)
    await acme.delete_scope("orders:read")
    error = await refusal(acme.undelete(created.key.id))
    assert ("SCOPE_UNKNOWN", {"permission": "orders:*"}) == (error.reason, error.metadata)
    await acme.create_scope("orders:write")
    assert "ACTIVE" == state_of((await acme.undelete(created.key.id)).key)


async def test_too_late(acme: Tenant) -> None:
    """Within 30 days by the database's clock, and no later, a key can be brought back."""
    early, late = [(await acme.key()).key.id for _ in range(2)]
    for key_id, age in ((early, KEPT - timedelta(minutes=1)), (late, KEPT)):
        await acme.delete(key_id)
        await acme.age_deletion(key_id, age)
    assert "ACTIVE" == state_of((await acme.undelete(early)).key)
    error = await refusal(acme.undelete(late))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "UNDELETE_EXPIRED") == (error.code, error.reason)
    assert "DELETED" == state_of(await acme.get(late))


async def test_root_key(acme: Tenant) -> None:
    """A root key can be brought back as well, and is never to be removed: it has no purge_time."""
    root = acme.service.root
    created = await acme.service.create_key("org_root", permissions=())
    deleted = (await acme.delete(created.key.id, caller=root)).key
    assert ("DELETED", False) == (state_of(deleted), deleted.HasField("purge_time"))
    assert "ACTIVE" == state_of((await acme.undelete(created.key.id, caller=root)).key)
    assert "VALID" == await acme.service.outcome(created.token)
    await acme.revoke(created.key.id, caller=root)


async def test_key_that_never_was(acme: Tenant) -> None:
    """An unknown id is NOT_FOUND."""
    assert "KEY_NOT_FOUND" == (await refusal(acme.undelete(NOBODYS_KEY))).reason
