"""RevokeKey."""

from __future__ import annotations

import asyncio

import pytest

from support.keys import NOBODYS_KEY, Tenant, is_effective, state_of, with_fields, without_fields
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_end_of_a_key(acme: Tenant) -> None:
    """A revoked key is refused at once and for good, and says when and why it ended; the rest of it stays."""
    created = await acme.key(name="leaked", permissions=["read"], metadata={"a": "b"})
    revoked = await acme.revoke(created.key.id, reason="found in a public repository")
    assert ("REVOKED", True) == (state_of(revoked.key), is_effective(revoked.effect))
    assert "REVOKED" == await acme.service.outcome(created.token)
    expected = with_fields(created.key, state=revoked.key.state, revoke_reason="found in a public repository")
    changing = ("revoke_time", "update_time", "etag")
    assert without_fields(expected, *changing) == without_fields(revoked.key, *changing)
    assert revoked.key.HasField("revoke_time")
    assert revoked.key.update_time == revoked.key.revoke_time
    assert created.key.etag != revoked.key.etag
    assert revoked.key == await acme.get(created.key.id)


async def test_repeating(acme: Tenant) -> None:
    """A repeated call changes nothing: the first reason and time stay, and the effect is the first one's."""
    key_id = (await acme.key()).key.id
    first = await acme.revoke(key_id, reason="first")
    assert first == await acme.revoke(key_id, reason="second")
    assert first == await acme.revoke(key_id)


async def test_racing_revocations(acme: Tenant) -> None:
    """Of revocations at the same time one is made, and all answer with it."""
    key_id = (await acme.key()).key.id
    answers = await asyncio.gather(*(acme.revoke(key_id, reason=f"reason {number}") for number in range(8)))
    assert 1 == len({answer.SerializeToString(deterministic=True) for answer in answers})


async def test_without_a_reason(acme: Tenant) -> None:
    """A reason need not be given, and none can be added later."""
    key_id = (await acme.key()).key.id
    await acme.revoke(key_id)
    assert "" == (await acme.revoke(key_id, reason="late")).key.revoke_reason


@pytest.mark.parametrize("state", ["INACTIVE", "EXPIRED"])
async def test_keys_that_are_refused_already(acme: Tenant, state: str) -> None:
    """A key that is off or has expired can be revoked: neither can come back then."""
    created = await acme.key()
    if state == "INACTIVE":
        await acme.toggle(created.key.id, active=False)
    else:
        await acme.expire(created.key.id)
    assert "REVOKED" == state_of((await acme.revoke(created.key.id)).key)
    assert "REVOKED" == await acme.service.outcome(created.token)


async def test_deleted_key(acme: Tenant) -> None:
    """Revoking a deleted key makes its end final: it says when and why, stays deleted, and can not be brought back.
    When it is to be removed stays.
    """
    created = await acme.key()
    deleted = (await acme.delete(created.key.id)).key
    revoked = await acme.revoke(created.key.id, reason="leaked as well")
    assert ("DELETED", "leaked as well", True) == (
        state_of(revoked.key),
        revoked.key.revoke_reason,
        is_effective(revoked.effect),
    )
    assert deleted.revoke_time.ToDatetime() < revoked.key.revoke_time.ToDatetime()
    assert deleted.purge_time == revoked.key.purge_time
    assert revoked == await acme.revoke(created.key.id, reason="late")
    assert "KEY_REVOKED" == (await refusal(acme.undelete(created.key.id))).reason
    assert "REVOKED" == await acme.service.outcome(created.token)


async def test_reason_limits(acme: Tenant) -> None:
    """A reason has up to 500 characters."""
    key_id = (await acme.key()).key.id
    for reason in ("\N{SNOWMAN}" * 501, "a\x00b"):
        error = await refusal(acme.revoke(key_id, reason=reason))
        assert ("INVALID_FIELD", ["reason"]) == (error.reason, list(error.violations))
    longest = "\N{SNOWMAN}" * 499 + "\n"
    assert longest == (await acme.revoke(key_id, reason=longest)).key.revoke_reason


async def test_a_key_revokes_itself(acme: Tenant) -> None:
    """A key can end itself, and is refused as a caller from then on."""
    created = await acme.key(permissions=["keys:write"])
    caller = (("authorization", f"Bearer {created.token}"),)
    assert "REVOKED" == state_of((await acme.revoke(created.key.id, caller=caller)).key)
    error = await refusal(acme.revoke(created.key.id, caller=caller))
    assert ("CREDENTIALS_INVALID", {"outcome": "REVOKED"}) == (error.reason, error.metadata)


async def test_key_that_never_was(acme: Tenant) -> None:
    """An unknown id is NOT_FOUND."""
    assert "KEY_NOT_FOUND" == (await refusal(acme.revoke(NOBODYS_KEY))).reason
