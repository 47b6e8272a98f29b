"""DeleteKey."""

from __future__ import annotations

from datetime import timedelta

import pytest

from support.keys import NOBODYS_KEY, Tenant, ids, is_effective, state_of, with_fields, without_fields
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_revokes_and_hides(acme: Tenant) -> None:
    """A deleted key is refused at once and left out of lists; it is kept, and says when it ended, and that it will be
    removed 30 days later.
    """
    created = await acme.key(name="gone", permissions=["read"], user_id="u-1")
    deleted = await acme.delete(created.key.id)
    assert ("DELETED", True) == (state_of(deleted.key), is_effective(deleted.effect))
    assert "REVOKED" == await acme.service.outcome(created.token)
    changing = ("revoke_time", "update_time", "etag", "purge_time")
    expected = with_fields(created.key, state=deleted.key.state)
    assert without_fields(expected, *changing) == without_fields(deleted.key, *changing)
    assert deleted.key.update_time == deleted.key.revoke_time
    assert timedelta(days=30) == deleted.key.purge_time.ToDatetime() - deleted.key.revoke_time.ToDatetime()
    assert deleted.key == await acme.get(created.key.id)
    assert [acme.admin_key_id] == ids((await acme.list()).keys)
    assert deleted.key in (await acme.list(show_deleted=True)).keys


async def test_repeating(acme: Tenant) -> None:
    """A repeated call changes nothing and answers alike."""
    key_id = (await acme.key()).key.id
    first = await acme.delete(key_id)
    assert first == await acme.delete(key_id)


async def test_revoked_key(acme: Tenant) -> None:
    """A revoked key can be deleted; when and why it was revoked stays. It is removed 30 days after its deletion."""
    key_id = (await acme.key()).key.id
    revoked = (await acme.revoke(key_id, reason="leaked")).key
    deleted = (await acme.delete(key_id)).key
    assert (revoked.revoke_time, "leaked", "DELETED") == (
        deleted.revoke_time,
        deleted.revoke_reason,
        state_of(deleted),
    )
    assert timedelta(days=30) == deleted.purge_time.ToDatetime() - deleted.update_time.ToDatetime()
    assert not revoked.HasField("purge_time")


async def test_key_that_never_was(acme: Tenant) -> None:
    """An unknown id is NOT_FOUND."""
    assert "KEY_NOT_FOUND" == (await refusal(acme.delete(NOBODYS_KEY))).reason
