"""ToggleKey."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from support.keys import NOBODYS_KEY, Tenant, is_effective, state_of, without_fields
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_off_and_on(acme: Tenant) -> None:
    """A key that is switched off is refused at once, and good again when it is switched on; nothing else changes."""
    created = await acme.key(permissions=["read"], metadata={"a": "b"})
    off = await acme.toggle(created.key.id, active=False)
    assert ("INACTIVE", True) == (state_of(off.key), is_effective(off.effect))
    assert "INACTIVE" == await acme.service.outcome(created.token)
    on = await acme.toggle(created.key.id, active=True)
    assert ("ACTIVE", True) == (state_of(on.key), is_effective(on.effect))
    assert "VALID" == await acme.service.outcome(created.token)
    for answer in (off, on):
        changing = ("state", "etag", "update_time")
        assert without_fields(created.key, *changing) == without_fields(answer.key, *changing)
    assert created.key.update_time.ToDatetime() < off.key.update_time.ToDatetime() < on.key.update_time.ToDatetime()


@pytest.mark.parametrize("active", [False, True])
async def test_repeating_with_active(acme: Tenant, *, active: bool) -> None:
    """With `active`, a repeated call changes nothing and answers alike."""
    key_id = (await acme.key()).key.id
    await acme.toggle(key_id, active=not active)
    first = await acme.toggle(key_id, active=active)
    assert first == await acme.toggle(key_id, active=active)


async def test_flipping(acme: Tenant) -> None:
    """Without `active`, each call turns the key to what it was not."""
    key_id = (await acme.key()).key.id
    states = [state_of((await acme.toggle(key_id)).key) for _ in range(4)]
    assert ["INACTIVE", "ACTIVE", "INACTIVE", "ACTIVE"] == states


async def test_racing_flips(acme: Tenant) -> None:
    """Of flips at the same time none is lost: an odd number of them turns the key once."""
    key_id = (await acme.key()).key.id
    answers = await asyncio.gather(*(acme.toggle(key_id) for _ in range(9)))
    assert 9 == len({answer.effect.revision for answer in answers})
    assert "INACTIVE" == state_of(await acme.get(key_id))


async def test_expired_key(acme: Tenant) -> None:
    """An expired key can be switched; it stays expired."""
    created = await acme.key()
    await acme.expire(created.key.id)
    assert "EXPIRED" == state_of((await acme.toggle(created.key.id, active=False)).key)
    assert "EXPIRED" == await acme.service.outcome(created.token)


@pytest.mark.parametrize(("end", "reason"), [("revoke", "KEY_REVOKED"), ("delete", "KEY_DELETED")])
@pytest.mark.parametrize("active", [False, True, None])
async def test_keys_that_have_ended(acme: Tenant, end: str, reason: str, *, active: bool | None) -> None:
    """A key that is revoked or deleted can not be switched, neither on nor off."""
    created = await acme.key()
    await getattr(acme, end)(created.key.id)
    error = await refusal(acme.toggle(created.key.id, active=active))
    assert (grpc.StatusCode.FAILED_PRECONDITION, reason) == (error.code, error.reason)
    assert "REVOKED" == await acme.service.outcome(created.token)


async def test_key_that_never_was(acme: Tenant) -> None:
    """An unknown id is NOT_FOUND."""
    assert "KEY_NOT_FOUND" == (await refusal(acme.toggle(NOBODYS_KEY))).reason
