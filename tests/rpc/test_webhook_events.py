"""What receivers are told of."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from google.protobuf import json_format

from apikeys.v1 import key_pb2
from support.databases import until
from support.keys import hours_ahead
from support.webhooks import Hooks, Receiver, make_due

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_life_of_a_key(hooks: Hooks, listener: Receiver) -> None:
    """Each change of a key is told, in the order of the changes, signed with the webhook's secret: what happened, when,
    by whom, and the key as GetKey shows it.
    """
    created = await hooks.create(listener.url)
    tenant = hooks.tenant
    key = (await tenant.key(name="ci", permissions=["read"], metadata={"team": "ä"}, expire_time=hours_ahead(1))).key
    updated = (await tenant.update(key_pb2.Key(id=key.id, name="cd"))).key
    off = (await tenant.toggle(key.id, active=False)).key
    on = (await tenant.toggle(key.id)).key
    rotated = (await tenant.rotate(key.id, grace=timedelta(hours=1))).key
    revoked = (await tenant.revoke(key.id, reason="leaked")).key
    deleted = (await tenant.delete(key.id)).key
    await tenant.revoke(key.id)

    received = await listener.until(7)
    names = ("created", "updated", "deactivated", "activated", "rotated", "revoked", "deleted")
    assert [f"api_key.{name}" for name in names] == listener.types
    for each, expected in zip(received, (key, updated, off, on, rotated, revoked, deleted), strict=True):
        event = each.verified(created.secret)
        assert event["id"] == each.headers["webhook-id"]
        assert ["id", "type", "timestamp", "data"] == list(event)
        assert event["data"]["actor_key_id"] == tenant.admin_key_id
        assert expected == as_key(event["data"]["key"])
        assert {"application/json", "latchgate-webhooks"} == {each.headers["content-type"], each.headers["user-agent"]}
        assert not {"cookie", "authorization", "x-api-key"} & each.headers.keys()
    assert 7 == len({each.headers["webhook-id"] for each in received})


def as_key(shown: Any) -> key_pb2.Key:
    """Reads a key of an event as the contract has it: with all its fields known."""
    return json_format.ParseDict(shown, key_pb2.Key())


async def test_key_that_comes_back(hooks: Hooks, listener: Receiver) -> None:
    """A key that was deleted and is brought back is told of as such."""
    await hooks.create(listener.url)
    key = (await hooks.tenant.key()).key
    await hooks.tenant.delete(key.id)
    await hooks.tenant.undelete(key.id)
    *_, last = await listener.until(3)
    assert ["api_key.created", "api_key.deleted", "api_key.undeleted"] == listener.types
    assert "KEY_STATE_ACTIVE" == last.event["data"]["key"]["state"]


async def test_what_changes_nothing_is_not_told(hooks: Hooks, listener: Receiver) -> None:
    """Calls that are refused, that read, or that find nothing to change, are told to nobody."""
    tenant = hooks.tenant
    await hooks.create(listener.url)
    key = (await tenant.key()).key
    await tenant.get(key.id)
    await tenant.update(key_pb2.Key(id=key.id, name=key.name))
    await tenant.toggle(key.id, active=True)
    # What is told of a key comes in order.
    await tenant.revoke(key.id)
    await listener.until(2)
    assert ["api_key.created", "api_key.revoked"] == listener.types


async def test_request_that_is_repeated_is_told_once(hooks: Hooks, listener: Receiver) -> None:
    """A call that is repeated with its request_id made one key, and is told once."""
    await hooks.create(listener.url)
    tenant, request_id = hooks.tenant, "0b6f7b39-2f04-4c3c-9a9f-3c7a35a1f7b1"
    first = (await tenant.key(request_id=request_id)).key
    await tenant.key(request_id=request_id)
    last = (await tenant.key()).key
    told = [each.event["data"]["key"]["id"] for each in await listener.until(2)]
    assert {first.id, last.id} == set(told)


async def test_first_use(hooks: Hooks, listener: Receiver) -> None:
    """Some moments after a key was used for the first time that is told, with when; further uses are not."""
    await hooks.create(listener.url, "api_key.first_used", "api_key.revoked")
    tenant = hooks.tenant
    created = await tenant.key()
    for _ in range(2):
        await tenant.service.validate(created.token)
    (used,) = await listener.until(1)
    shown = as_key(used.event["data"]["key"])
    assert ("api_key.first_used", created.key.id, "") == (used.type, shown.id, used.event["data"]["actor_key_id"])
    assert shown.HasField("last_used_time")
    await tenant.service.validate(created.token)
    await tenant.revoke(created.key.id)
    await listener.until(2)
    assert ["api_key.first_used", "api_key.revoked"] == listener.types


async def test_expired(hooks: Hooks, listener: Receiver) -> None:
    """A key that expires is told of as expired."""
    await hooks.create(listener.url, "api_key.expired")
    key = (await hooks.tenant.key(expire_time=hours_ahead(1))).key
    await hooks.tenant.expire(key.id)
    (expired,) = await listener.until(1)
    assert (key.id, "KEY_STATE_EXPIRED") == tuple(expired.event["data"]["key"][name] for name in ("id", "state"))


async def test_no_token_is_told(hooks: Hooks, listener: Receiver) -> None:
    """What is sent holds hints, and nothing else of tokens."""
    await hooks.create(listener.url)
    created = await hooks.tenant.key()
    rotated = await hooks.tenant.rotate(created.key.id)
    for each in await listener.until(2):
        for token in (created.token, rotated.token):
            assert token[-20:] not in each.body + str(each.headers)
    assert rotated.key.prefix in listener.received[1].body


async def test_others_are_not_told(hooks: Hooks, others: Hooks, listener: Receiver) -> None:
    """What happens to one organization's keys is told to its own webhooks alone."""
    await hooks.create(listener.url)
    await others.tenant.key()
    mine = (await hooks.tenant.key()).key
    (only,) = await listener.until(1)
    assert (hooks.tenant.id, mine.id) == tuple(only.event["data"]["key"][name] for name in ("organization_id", "id"))


async def has_failed(hooks: Hooks, status: int) -> bool:
    """Says whether it was taken down that a delivery was answered so the last time."""
    return status in [each.last_status for each in await hooks.deliveries()]


async def test_order_holds_over_failures(hooks: Hooks, listener: Receiver) -> None:
    """While a key's event is not taken, those after it wait; each attempt has the same id and body."""
    created = await hooks.create(listener.url)
    listener.answers.extend([500, 429])
    key = (await hooks.tenant.key()).key
    await hooks.tenant.toggle(key.id)
    for status in (500, 429):
        await until(partial(has_failed, hooks, status))
        await make_due(hooks.tenant.service)
    first, second, third, last = await listener.until(4)
    assert ["api_key.created"] * 3 + ["api_key.deactivated"] == listener.types
    assert 1 == len({(each.headers["webhook-id"], each.body) for each in (first, second, third)})
    last.verified(created.secret)
