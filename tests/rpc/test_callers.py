"""Who is calling: how callers of management methods make themselves known."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant, ids, make_plan, make_tenant, retry_delay_s
from support.service import CallError, Metadata, RunningService, bearer, call_error, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def told(tenant: Tenant, caller: Metadata) -> CallError:
    """Makes a call that must be refused for its caller, and gives what it is told."""
    return await refusal(tenant.service.keys.ListKeys(keys_pb.ListKeysRequest(), metadata=caller))


async def test_no_credentials(acme: Tenant) -> None:
    """A call without a token is told which metadata it needs."""
    for caller in ((), (("x-api-key", "lk_0"),), (("authorisation", "Bearer x"),)):
        error = await told(acme, caller)
        assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING") == (error.code, error.reason)


async def test_malformed_credentials(acme: Tenant) -> None:
    """What is no bearer token is refused, though a good token may stand in it; and nothing of it is repeated."""
    token = acme.admin[0][1].removeprefix("Bearer ")
    for value in (token, "", "Bearer", "Bearer ", f"Basic {token}", f"Bearer{token}", f"Token {token}"):
        error = await told(acme, (("authorization", value),))
        assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (error.code, error.reason), value
        assert {} == error.metadata
        assert token not in error.message
    for value in (f"Bearer {token} {token}", f"Bearer {token},", f"Bearer x{token}", "Bearer nonsense"):
        error = await told(acme, (("authorization", value),))
        assert ("CREDENTIALS_INVALID", {"outcome": "NOT_FOUND"}) == (error.reason, error.metadata), value


async def test_two_credentials(acme: Tenant, rival: Tenant) -> None:
    """A call with two tokens is refused, also with the same one twice: a proxy may have read the other."""
    for second in (rival.admin, acme.admin):
        error = await told(acme, (*acme.admin, *second))
        assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (error.code, error.reason)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
async def test_scheme_in_any_case(acme: Tenant, scheme: str) -> None:
    """The scheme is read in any case, as RFC 9110 has it, and spaces around the token do not matter."""
    token = acme.admin[0][1].removeprefix("Bearer ")
    for value in (f"{scheme} {token}", f"{scheme}   {token}"):
        assert [acme.admin_key_id] == ids((await acme.list((("authorization", value),))).keys)


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("revoke", "REVOKED"),
        ("delete", "REVOKED"),
        ("rotate", "REVOKED"),
        ("expire", "EXPIRED"),
        ("toggle", "INACTIVE"),
    ],
)
async def test_keys_that_are_not_accepted(acme: Tenant, end: str, outcome: str) -> None:
    """A key that Validate refuses manages nothing from then on, and its holder is told why."""
    created = await acme.key(permissions=["*"])
    caller = bearer(created.token)
    await acme.list(caller)
    await getattr(acme, end)(created.key.id)
    error = await told(acme, caller)
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (error.code, error.reason)
    assert {"outcome": outcome} == error.metadata


async def test_callers_address(acme: Tenant) -> None:
    """A key that is bound to networks manages from within them alone: the peer's address counts, and no header's."""
    near = await acme.caller("keys:read", allowed_cidrs=["127.0.0.0/8"])
    far = await acme.caller("keys:read", allowed_cidrs=["203.0.113.0/24"])
    assert 3 == len((await acme.list(near)).keys)
    for caller in (far, (*far, ("x-forwarded-for", "203.0.113.1"), ("x-real-ip", "203.0.113.1"))):
        error = await told(acme, caller)
        assert (grpc.StatusCode.PERMISSION_DENIED, "ADDRESS_DENIED") == (error.code, error.reason)


async def test_callers_rate_limit(acme: Tenant) -> None:
    """A caller's calls count for its own key's limit; beyond it, it is told when to try again."""
    created = await acme.key(permissions=["keys:read"], rate_limit_per_minute=2)
    caller = bearer(created.token)
    await acme.list(caller)
    assert "PERMISSION_MISSING" == (await refusal(acme.revoke(created.key.id, caller=caller))).reason
    error = await told(acme, caller)
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALLER_RATE_LIMITED") == (error.code, error.reason)
    assert 0 < await retry_delay_s(acme.list(caller)) <= 62
    assert "RATE_LIMITED" == await acme.service.outcome(created.token)
    assert 2 == len((await acme.list()).keys)


async def test_racing_calls_keep_to_the_limit(shared: RunningService) -> None:
    """Of calls at the same time no more are served than the limit allows."""
    tenant = await make_tenant(shared, "acme", await make_plan(shared, rate_limit_per_minute=5))
    answers = await asyncio.gather(*(tenant.list() for _ in range(20)), return_exceptions=True)
    errors = [call_error(answer).reason for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert ["CALLER_RATE_LIMITED"] * 15 == errors


async def test_publishable_keys_manage_nothing(acme: Tenant) -> None:
    """A publishable token, which anyone may hold, is a caller without any right to manage."""
    created = await acme.key(key_type=2, permissions=["read", "write"])
    error = await told(acme, bearer(created.token))
    assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING") == (error.code, error.reason)


async def test_callers_come_before_their_requests(acme: Tenant) -> None:
    """Who is not known is not told what would be wrong with its request either."""
    request = keys_pb.CreateKeyRequest(name="")
    assert "CREDENTIALS_MISSING" == (await refusal(acme.service.keys.CreateKey(request))).reason


async def test_caller_that_is_ended_meanwhile_changes_nothing(alone: RunningService) -> None:
    """When RevokeKey has returned, no call of the revoked key takes effect, not even one that began before."""
    await alone.create_organization("acme")
    second = await alone.create_key("org_root", permissions=())
    holder = await asyncpg.connect(alone.database_url)
    try:
        async with holder.transaction():
            await holder.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
            creating = asyncio.ensure_future(alone.create_key("acme", metadata=bearer(second.token)))
            while not await holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                assert not creating.done()
                await asyncio.sleep(0.01)
            await alone.keys.RevokeKey(keys_pb.RevokeKeyRequest(key_id=second.key.id), metadata=alone.root)
        error = await refusal(creating)
    finally:
        await holder.close()

    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (error.code, error.reason)
    listed = await alone.keys.ListKeys(keys_pb.ListKeysRequest(organization_id="acme"), metadata=alone.root)
    assert [] == list(listed.keys)
