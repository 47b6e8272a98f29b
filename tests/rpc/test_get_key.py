"""GetKey."""

from __future__ import annotations

import grpc
import pytest

from support.keys import NOBODYS_KEY, Tenant, state_of
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_reads_the_key(acme: Tenant) -> None:
    """A key is read as the call that changed it last answered with it."""
    created = await acme.key(name="reader", permissions=["read"], metadata={"a": "b"}, user_id="u-1")
    assert created.key == await acme.get(created.key.id)
    switched = await acme.toggle(created.key.id, active=False)
    assert switched.key == await acme.get(created.key.id, await acme.caller("keys:read"))


async def test_reads_deleted_keys(acme: Tenant) -> None:
    """A deleted key is kept until it is removed for good, with all that it was."""
    key = (await acme.key(name="gone", metadata={"a": "b"})).key
    deleted = (await acme.delete(key.id)).key
    found = await acme.get(key.id)
    assert (deleted, "DELETED") == (found, state_of(found))
    assert ("gone", {"a": "b"}) == (found.name, dict(found.metadata))


async def test_root_reads_all(acme: Tenant, rival: Tenant) -> None:
    """A root key reads the keys of every organization."""
    for tenant in (acme, rival):
        key = (await tenant.key()).key
        assert key == await tenant.get(key.id, tenant.service.root)


async def test_key_that_never_was(acme: Tenant) -> None:
    """An unknown id is NOT_FOUND, also for root."""
    for caller in (acme.admin, acme.service.root):
        error = await refusal(acme.get(NOBODYS_KEY, caller))
        assert (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND") == (error.code, error.reason)
        assert f"key {NOBODYS_KEY} does not exist" == error.message


@pytest.mark.parametrize(
    "key_id", ["", "key_", "KEY_00000000000000000000000000", NOBODYS_KEY + "0", NOBODYS_KEY + "\n"]
)
async def test_what_is_no_id(acme: Tenant, key_id: str) -> None:
    """What can not be an id is refused by the field's name."""
    error = await refusal(acme.get(key_id))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert ["key_id"] == list(error.violations)
