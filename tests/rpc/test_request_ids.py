"""Retries of CreateKey and RotateKey: a request_id is carried out once."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import (
    Tenant,
    execute,
    hours_ahead,
    ids,
    is_effective,
    make_plan,
    make_tenant,
    state_of,
    update_plan,
)
from support.service import Metadata, RunningService, bearer, call_error, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


def new_id() -> str:
    """Makes a request_id."""
    return str(uuid.uuid4())


async def age_requests(service: RunningService, age: timedelta) -> None:
    """Moves all answered requests into the past."""
    await execute(service, "UPDATE request SET create_time = create_time - $1::interval", age)


async def test_repeated_create_gives_the_same_key_and_token(acme: Tenant) -> None:
    """A client that did not hear the answer repeats its call, and has one key, and its token."""
    request_id = new_id()
    first = await acme.key(name="once", request_id=request_id)
    assert first == await acme.key(name="once", request_id=request_id)
    assert first == await acme.key(name="once", request_id=request_id.upper())
    assert [first.key.id, acme.admin_key_id] == ids((await acme.list()).keys)
    assert "VALID" == await acme.service.outcome(first.token)


async def test_repeated_rotate_gives_the_same_token(acme: Tenant) -> None:
    """A client that did not hear the answer repeats its call, and the token it is given is the one that works."""
    key_id, request_id = (await acme.key()).key.id, new_id()
    first = await acme.rotate(key_id, request_id=request_id)
    assert first == await acme.rotate(key_id, request_id=request_id)
    assert is_effective(first.effect)
    assert 2 == len(first.key.secrets)
    assert "VALID" == await acme.service.outcome(first.token)


async def test_racing_creates_make_one_key(acme: Tenant) -> None:
    """However many identical calls are under way at once, one key and one token come of them."""
    request_id = new_id()
    answers = await asyncio.gather(*(acme.key(name="once", request_id=request_id) for _ in range(16)))
    assert 1 == len({answer.key.id for answer in answers}) == len({answer.token for answer in answers})
    assert [answers[0].key.id, acme.admin_key_id] == ids((await acme.list()).keys)


async def test_racing_rotates_make_one_token(acme: Tenant) -> None:
    """However many identical calls are under way at once, the token changes once."""
    key_id, request_id = (await acme.key()).key.id, new_id()
    grace = timedelta(hours=1)
    answers = await asyncio.gather(*(acme.rotate(key_id, grace=grace, request_id=request_id) for _ in range(16)))
    assert 1 == len({answer.token for answer in answers}) == len({answer.effect.revision for answer in answers})
    secrets = (await acme.get(key_id)).secrets
    assert [False, True] == [secret.HasField("expire_time") for secret in secrets]


async def test_racing_bodies(acme: Tenant) -> None:
    """Of two different calls with one request_id that are under way at once, one is carried out."""
    request_id = new_id()
    answers = await asyncio.gather(
        *(acme.key(name=f"name {number % 2}", request_id=request_id) for number in range(10)), return_exceptions=True
    )
    errors = [call_error(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert ({"REQUEST_ID_REUSED"}, 5) == ({error.reason for error in errors}, len(errors))
    assert 2 == len((await acme.list()).keys)


OTHER_BODIES: dict[str, Any] = {
    "name": "other",
    "permissions": ["read"],
    "rate_limit_per_minute": 1,
    "expire_time": hours_ahead(24),
    "key_type": key_pb2.KEY_TYPE_PUBLISHABLE,
    "environment": key_pb2.ENVIRONMENT_TEST,
    "user_id": "u-2",
    "user_email": "other@example.com",
    "metadata": {"a": "b"},
    "allowed_cidrs": ["10.0.0.0/8"],
}


@pytest.mark.parametrize("field", OTHER_BODIES)
async def test_create_with_another_body(acme: Tenant, field: str) -> None:
    """A request_id with any other field changed is a mistake of the client, which learns what key it belongs to."""
    request_id = new_id()
    first = await acme.key(name="once", request_id=request_id)
    error = await refusal(acme.key(**{"name": "once", "request_id": request_id, field: OTHER_BODIES[field]}))
    assert (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED") == (error.code, error.reason)
    assert {"key_id": first.key.id} == error.metadata
    assert 2 == len((await acme.list()).keys)


async def test_other_bodies_are_complete() -> None:
    """The table above changes every field that a body has; the two tests around it see to the other two."""
    fields = {field.name for field in keys_pb.CreateKeyRequest.DESCRIPTOR.fields}
    assert fields - {"organization_id", "request_id"} == OTHER_BODIES.keys()


async def test_create_for_another_organization(acme: Tenant, rival: Tenant) -> None:
    """Root's request_id for one organization does not stand for a key of another."""
    request_id = new_id()
    await acme.service.create_key(acme.id, request_id=request_id)
    error = await refusal(acme.service.create_key(rival.id, request_id=request_id))
    assert "REQUEST_ID_REUSED" == error.reason


async def test_rotate_with_another_body(acme: Tenant) -> None:
    """A request_id with another key or another grace period is a mistake of the client."""
    first, second = (await acme.key()).key.id, (await acme.key()).key.id
    request_id = new_id()
    await acme.rotate(first, request_id=request_id)
    for other in (
        acme.rotate(second, request_id=request_id),
        acme.rotate(first, grace=timedelta(seconds=1), request_id=request_id),
    ):
        error = await refusal(other)
        assert ("REQUEST_ID_REUSED", {"key_id": first}) == (error.reason, error.metadata)
    assert 1 == len((await acme.get(second)).secrets)


async def test_another_callers_request_id(acme: Tenant, rival: Tenant) -> None:
    """A request_id belongs to its caller: another's, also of the same organization, gets a key of its own and no token
    of the first.
    """
    request_id = new_id()
    colleague = await acme.caller("keys:write")
    first = await acme.key(name="once", request_id=request_id)
    request = keys_pb.CreateKeyRequest(name="once", request_id=request_id)
    second, third = await acme.create(request, colleague), await rival.create(request)
    assert 3 == len({first.key.id, second.key.id, third.key.id}) == len({first.token, second.token, third.token})


async def test_another_callers_rotation(acme: Tenant, rival: Tenant) -> None:
    """Knowing the key and the request_id of another organization's rotation does not get its token."""
    key_id, request_id = (await acme.key()).key.id, new_id()
    await acme.rotate(key_id, request_id=request_id)
    assert "KEY_NOT_FOUND" == (await refusal(rival.rotate(key_id, request_id=request_id))).reason


async def test_create_and_rotate_do_not_share_request_ids(acme: Tenant) -> None:
    """One request_id may stand for a creation and for a rotation."""
    request_id = new_id()
    created = await acme.key(request_id=request_id)
    rotated = await acme.rotate(created.key.id, request_id=request_id)
    assert created.token != rotated.token


@pytest.mark.parametrize(("age", "is_kept"), [(timedelta(minutes=9, seconds=30), True), (timedelta(minutes=10), False)])
async def test_tokens_are_kept_for_ten_minutes(acme: Tenant, age: timedelta, *, is_kept: bool) -> None:
    """For 10 minutes a token can be had again; later the client is told which key to rotate."""
    request_id = new_id()
    created = await acme.key(name="once", request_id=request_id)
    rotated = await acme.rotate(created.key.id, request_id=request_id)
    await age_requests(acme.service, age)

    calls = (acme.key(name="once", request_id=request_id), acme.rotate(created.key.id, request_id=request_id))
    if is_kept:
        assert [created.token, rotated.token] == [answer.token for answer in await asyncio.gather(*calls)]
        return
    for call in calls:
        error = await refusal(call)
        assert (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_EXPIRED") == (error.code, error.reason)
        assert {"key_id": created.key.id} == error.metadata
    assert "VALID" == await acme.service.outcome(rotated.token)
    assert 2 == len((await acme.get(created.key.id)).secrets)


async def test_another_body_after_ten_minutes(acme: Tenant) -> None:
    """That a body is another one is told before that its request is too old."""
    request_id = new_id()
    await acme.key(name="once", request_id=request_id)
    await age_requests(acme.service, timedelta(minutes=11))
    assert "REQUEST_ID_REUSED" == (await refusal(acme.key(name="other", request_id=request_id))).reason


async def test_a_refused_call_uses_no_request_id_up(shared: RunningService) -> None:
    """A call that failed can be repeated with its request_id once the reason is gone."""
    plan_id = await make_plan(shared, max_keys=1)
    tenant = await make_tenant(shared, "small", plan_id)
    request_id = new_id()
    assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key(request_id=request_id))).reason
    await update_plan(shared, organizations_pb.Plan(id=plan_id, max_keys=2), "max_keys")
    assert "ACTIVE" == state_of((await tenant.key(request_id=request_id)).key)


async def test_repeated_create_shows_the_key_as_it_is(acme: Tenant) -> None:
    """A retry tells what has become of the key meanwhile; it brings nothing back to life."""
    request_id = new_id()
    created = await acme.key(request_id=request_id)
    await acme.revoke(created.key.id)
    again = await acme.key(request_id=request_id)
    assert (created.token, "REVOKED") == (again.token, state_of(again.key))
    assert "REVOKED" == await acme.service.outcome(created.token)


async def test_full_organization_still_answers_retries(shared: RunningService) -> None:
    """A retry is answered though the key that it made has taken the last place."""
    tenant = await make_tenant(shared, "small", await make_plan(shared, max_keys=2))
    request_id = new_id()
    first = await tenant.key(request_id=request_id)
    assert first == await tenant.key(request_id=request_id)


async def test_no_token_beyond_the_callers_permissions(acme: Tenant) -> None:
    """A caller that has lost a permission is not handed a token with it again."""
    caller_key = await acme.key(permissions=["keys:write", "read"])
    caller: Metadata = bearer(caller_key.token)
    request_id = new_id()
    request = keys_pb.CreateKeyRequest(name="reader", permissions=["read"], request_id=request_id)
    created = await acme.create(request, caller)
    await acme.rotate(created.key.id, request_id=request_id, caller=caller)
    await acme.update(key_pb2.Key(id=caller_key.key.id, permissions=["keys:write"]), "permissions")
    for call in (
        acme.create(request, caller),
        acme.rotate(created.key.id, request_id=request_id, caller=caller),
    ):
        error = await refusal(call)
        assert ("PERMISSION_NOT_HELD", {"permission": "read"}) == (error.reason, error.metadata)
