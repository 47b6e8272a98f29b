"""ListUnusedKeys."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import usage_service_pb2 as usage_pb
from latchgate.domain import usage as usage_module
from support.keys import Tenant, database_of, execute, ids
from support.service import Metadata, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def ask(tenant: Tenant, caller: Metadata | None = None, **fields: Any) -> usage_pb.ListUnusedKeysResponse:
    """Calls ListUnusedKeys; for 30 days unless told otherwise."""
    fields.setdefault("unused_days", 30)
    answer: usage_pb.ListUnusedKeysResponse = await tenant.service.usage.ListUnusedKeys(
        usage_pb.ListUnusedKeysRequest(**fields), metadata=caller or tenant.admin
    )
    return answer


async def old_key(tenant: Tenant, *, made: str, used: str | None = None, **fields: Any) -> str:
    """Makes a key as if so long ago, and last used so long ago; gives its id."""
    created = await tenant.key(**fields)
    key_id: str = created.key.id
    await execute(tenant.service, "UPDATE key SET create_time = now() - $2::text::interval WHERE id = $1", key_id, made)
    if used is not None:
        await execute(
            tenant.service,
            "UPDATE last_used SET used_time = now() - $2::text::interval FROM secret s"
            " WHERE s.id = secret_id AND s.key_id = $1",
            key_id,
            used,
        )
    return key_id


async def test_what_is_unused(acme: Tenant) -> None:
    """Keys are listed, oldest first, that were made and last used before the time that is asked for, or never used."""
    never = await old_key(acme, made="31 days")
    before = await old_key(acme, made="90 days", used="30 days 1 minute")
    await old_key(acme, made="90 days", used="29 days 23 hours 59 minutes")
    await old_key(acme, made="29 days 23 hours 59 minutes")
    answer = await ask(acme)
    assert [never, before] == ids(answer.keys)
    assert "" == answer.next_page_token
    assert [before] == ids((await ask(acme, unused_days=30, page_token="")).keys[1:])
    assert [] == ids((await ask(acme, unused_days=40)).keys)
    async with database_of(acme.service) as connection:
        distance_s = await connection.fetchval(
            "SELECT extract(epoch FROM now() - interval '30 days')::float8 - $1", answer.unused_since_time.seconds
        )
    assert 0 <= distance_s < 60
    assert answer.keys[1].HasField("last_used_time")


async def test_only_keys_that_could_be_used(acme: Tenant) -> None:
    """What is revoked or deleted is not listed; what is switched off or has expired still is, with its state."""
    off = await old_key(acme, made="90 days")
    await acme.toggle(off, active=False)
    expired = await old_key(acme, made="90 days")
    await acme.expire(expired)
    await acme.revoke(await old_key(acme, made="90 days"))
    await acme.delete(await old_key(acme, made="90 days"))
    keys = (await ask(acme)).keys
    assert [(off, key_pb2.KEY_STATE_INACTIVE), (expired, key_pb2.KEY_STATE_EXPIRED)] == [
        (key.id, key.state) for key in keys
    ]


async def test_any_token_of_a_key_uses_it(acme: Tenant) -> None:
    """A key is used by all its tokens: one that was used with its former token is not unused, nor by its rotation."""
    used = await old_key(acme, made="90 days", used="1 day")
    unused = await old_key(acme, made="90 days", used="60 days")
    for key_id in (used, unused):
        for _ in range(3):
            await acme.rotate(key_id)
    assert [unused] == ids((await ask(acme)).keys)


@pytest.mark.parametrize("examined", [1, 2, 3, 20_000])
async def test_pages(acme: Tenant, monkeypatch: pytest.MonkeyPatch, examined: int) -> None:
    """Page by page every unused key comes up just once, in order, also where whole pages of used ones lie between."""
    monkeypatch.setattr(usage_module, "MAX_EXAMINED", examined)
    expected = []
    for number in range(12):
        is_used = number % 4 > 1
        key_id = await old_key(acme, made="90 days", used="1 day" if is_used else None)
        if not is_used:
            expected.append(key_id)
    found: list[str] = []
    token = ""
    for _ in range(20):
        page = await ask(acme, page_size=2, page_token=token)
        assert len(page.keys) <= 2
        found += ids(page.keys)
        token = page.next_page_token
        if not token:
            break
    assert expected == found
    assert "" == token


async def test_pages_while_keys_are_ended(acme: Tenant) -> None:
    """Whoever revokes what a page lists, and goes on, misses none."""
    keys = [await old_key(acme, made="90 days") for _ in range(4)]
    first = await ask(acme, page_size=2)
    assert first.next_page_token
    for key in first.keys:
        await acme.revoke(key.id)
    second = await ask(acme, page_size=2, page_token=first.next_page_token)
    assert keys == ids([*first.keys, *second.keys])


async def test_page_tokens_belong_to_their_list(acme: Tenant, rival: Tenant) -> None:
    """A page token is good for the same caller's organization and days alone."""
    for tenant in (acme, rival):
        for _ in range(2):
            await old_key(tenant, made="90 days")
    token = (await ask(acme, page_size=1)).next_page_token
    assert token
    for error in (
        await refusal(ask(rival, page_token=token)),
        await refusal(ask(acme, page_token=token, unused_days=31)),
        await refusal(ask(acme, page_token="made up")),
    ):
        assert (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") == (error.code, error.reason)
    assert 1 == len((await ask(acme, page_token=token, organization_id=acme.id)).keys)


async def test_lists_hold_own_keys_alone(acme: Tenant, rival: Tenant) -> None:
    """Another organization's unused keys are never listed; it is answered like one that never was."""
    await old_key(rival, made="90 days")
    mine = await old_key(acme, made="90 days")
    await old_key(rival, made="90 days")
    assert [mine] == ids((await ask(acme)).keys)
    assert [mine] == ids((await ask(acme, acme.service.root, organization_id=acme.id)).keys)
    for organization_id in (rival.id, "org_root", "nobody"):
        error = await refusal(ask(acme, organization_id=organization_id))
        assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)
        assert f"organization {organization_id} does not exist" == error.message
    assert "ORGANIZATION_NOT_FOUND" == (await refusal(ask(acme, acme.service.root, organization_id="nobody"))).reason


async def test_who_may_ask(acme: Tenant) -> None:
    """It takes `keys:read`, and a number of days."""
    assert "PERMISSION_MISSING" == (await refusal(ask(acme, await acme.caller("read")))).reason
    assert ["unused_days"] == list((await refusal(ask(acme, unused_days=0))).violations)
    assert ["organization_id"] == list((await refusal(ask(acme, acme.service.root))).violations)
