"""Envoy's Check: the same answers as Validate, in Envoy's words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from envoy.service.auth.v3 import external_auth_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.checks import CheckAnswer, check, check_request, read_answer
from support.keys import Tenant, cloned_database, hours_ahead, make_tenant, outcome_of
from support.service import ROOT_TOKEN, RunningService, bearer, refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def ask(tenant: Tenant, token: str, *, peer: str = "192.0.2.10", **extensions: str) -> CheckAnswer:
    """Asks about a token, as a gateway does."""
    request = check_request({"authorization": f"Bearer {token}"}, peer=peer, extensions=extensions)
    return await check(tenant.service.channel, request)


async def test_valid(acme: Tenant) -> None:
    """A good key is let through from the moment that it was created, asked of the database or of memory."""
    created = await acme.key(permissions=["read"], user_id="u-1")
    answers = [await ask(acme, created.token, required_permissions="read") for _ in range(3)]
    assert [0, 0, 0] == [answer.code for answer in answers]
    assert answers[0] == answers[1] == answers[2]
    assert created.key.id == answers[0].headers["x-latchgate-key-id"] == answers[0].metadata["key_id"]
    assert acme.id == answers[0].headers["x-latchgate-organization-id"]
    assert ("u-1", "live", "read") == tuple(
        answers[0].headers[f"x-latchgate-{name}"] for name in ("user-id", "environment", "permissions")
    )
    assert "default" == answers[0].metadata["plan"]


async def test_table(acme: Tenant) -> None:
    """Each outcome comes as its code, its HTTP status and its reason."""
    good = await acme.key(permissions=["read"], allowed_cidrs=["10.0.0.0/8"], rate_limit_per_minute=1)
    revoked, expired, inactive = await acme.key(), await acme.key(expire_time=hours_ahead(1)), await acme.key()
    await acme.revoke(revoked.key.id)
    await acme.expire(expired.key.id)
    await acme.toggle(inactive.key.id, active=False)
    answers = [
        await ask(acme, "lk_" + "x" * 40),
        await ask(acme, revoked.token),
        await ask(acme, expired.token),
        await ask(acme, inactive.token),
        await ask(acme, good.token, peer="192.0.2.1"),
        await ask(acme, good.token, peer="10.0.0.1", required_permissions="write"),
        await ask(acme, good.token, peer="10.0.0.1", cost="2"),
    ]
    await acme.set_active(active=False)
    answers.append(await ask(acme, good.token, peer="10.0.0.1"))
    assert [
        (16, 401, "NOT_FOUND"),
        (16, 401, "REVOKED"),
        (16, 401, "EXPIRED"),
        (16, 401, "INACTIVE"),
        (7, 403, "ADDRESS_DENIED"),
        (7, 403, "PERMISSION_DENIED"),
        (8, 429, "RATE_LIMITED"),
        (7, 403, "ORGANIZATION_INACTIVE"),
    ] == [(answer.code, answer.http, answer.reason) for answer in answers]


async def test_revoked_at_once(acme: Tenant) -> None:
    """A revoked key is refused by the very next question, though it was in memory."""
    created = await acme.key()
    assert 0 == (await ask(acme, created.token)).code
    await acme.revoke(created.key.id)
    assert "REVOKED" == (await ask(acme, created.token)).reason


async def test_requests_without_a_token(acme: Tenant) -> None:
    """A request without a token, or with two, is not authenticated."""
    channel = acme.service.channel
    created = await acme.key()
    missing = await check(channel, check_request({}))
    conflict = await check(
        channel, check_request({"authorization": f"Bearer {created.token}", "x-api-key": ROOT_TOKEN})
    )
    assert (401, "CREDENTIALS_MISSING") == (missing.http, missing.reason)
    assert (401, "CREDENTIALS_CONFLICT") == (conflict.http, conflict.reason)


async def test_a_slip_of_the_pen_in_a_route(acme: Tenant) -> None:
    """What a route says and nobody knows is an error that names it: the gateway must not let anything through."""
    created = await acme.key()
    request = check_request({"x-api-key": created.token}, extensions={"required_permission": "read"})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(acme.service.channel, request)
    assert grpc.StatusCode.INVALID_ARGUMENT is caught.value.code()
    assert "required_permission" in str(caught.value.details())
    assert created.token not in str(caught.value)


async def test_no_question(acme: Tenant) -> None:
    """Bytes that are no question are refused as such, and a header that is no UTF-8 is a bad token."""
    method: Any = acme.service.channel.unary_unary("/envoy.service.auth.v3.Authorization/Check")
    assert "MALFORMED_REQUEST" == (await refusal(method(b"\x0a\x05abc"))).reason
    raw = check_request({"x-api-key": "?" * 40}).SerializeToString().replace(b"?" * 40, b"\xff" * 40)
    answer = external_auth_pb2.CheckResponse.FromString(await method(raw))
    assert "NOT_FOUND" == read_answer(answer).reason


NEEDS = st.fixed_dictionaries(
    {
        "permissions": st.lists(st.sampled_from(["read", "write", "*"]), max_size=2),
        "peer": st.sampled_from(["10.0.0.1", "192.0.2.1", "::ffff:10.0.0.1", "2001:db8::1", ""]),
        "kind": st.sampled_from(["open", "bound", "limited", "inactive", "revoked", "unknown"]),
    }
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tokens(shared: RunningService) -> dict[str, str]:
    """Tokens of keys of all kinds."""
    tenant = await make_tenant(shared, "kinds")
    keys = {
        "open": await tenant.key(permissions=["read"]),
        "bound": await tenant.key(permissions=["*"], allowed_cidrs=["10.0.0.0/8"]),
        "limited": await tenant.key(permissions=["read"], rate_limit_per_minute=20),
        "inactive": await tenant.key(permissions=["read"]),
        "revoked": await tenant.key(permissions=["read"]),
    }
    await tenant.toggle(keys["inactive"].key.id, active=False)
    await tenant.revoke(keys["revoked"].key.id)
    return {kind: created.token for kind, created in keys.items()} | {"unknown": "lk_" + "0" * 40}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(need=NEEDS)
async def test_same_as_validate(shared: RunningService, tokens: dict[str, str], need: dict[str, Any]) -> None:
    """For the same token and need, Check says what Validate says: outcome, key, and where the limit stands."""
    token = tokens[need["kind"]]
    validated = await shared.validate(token, required_permissions=need["permissions"], client_ip=need["peer"], cost=0)
    needed = {"required_permissions": ",".join(need["permissions"])} if need["permissions"] else {}
    extensions = {"cost": "0", **needed}
    request = check_request({"x-api-key": token}, peer=need["peer"], extensions=extensions)
    checked = await check(shared.channel, request)
    outcome = "VALID" if checked.code == 0 else checked.reason
    assert outcome_of(validated) == outcome
    assert validated.key_id == checked.metadata.get("key_id", "")
    if validated.HasField("rate_limit"):
        assert f";r={validated.rate_limit.remaining};" in checked.response_headers["ratelimit"]


async def test_limits_are_one(acme: Tenant) -> None:
    """Validate and Check draw on one limit; a route's cost is charged once, and what is refused otherwise is not."""
    created = await acme.key(permissions=["read"], rate_limit_per_minute=5)
    assert "PERMISSION_DENIED" == (await ask(acme, created.token, required_permissions="write", cost="5")).reason
    left = [(await ask(acme, created.token, cost="2")).response_headers["ratelimit"]]
    left.append(f";r={(await acme.service.validate(created.token)).rate_limit.remaining};")
    refused = await ask(acme, created.token, cost="3")
    left.append(refused.headers["ratelimit"])
    assert all(f";r={rest};" in text for rest, text in zip((3, 2, 2), left, strict=True)), left
    assert 0 < int(refused.headers["retry-after"]) <= 62


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that asks who its gateways are."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, validate_access="authenticated") as running,
    ):
        yield running


async def test_gateways_that_must_be_known(guarded: RunningService) -> None:
    """Where Validate asks who is calling, so does Check; a gateway of an organization is told of its own keys alone."""
    mine, theirs = await make_tenant(guarded, "mine"), await make_tenant(guarded, "theirs")
    gateway = bearer((await mine.key(permissions=["keys:validate"])).token)
    own, other = await mine.key(), await theirs.key()

    async def code(token: str, **options: Any) -> int:
        return (await check(guarded.channel, check_request({"x-api-key": token}), **options)).code

    assert [0, 16] == [await code(own.token, metadata=gateway), await code(other.token, metadata=gateway)]
    assert [0, 0] == [await code(each.token, metadata=guarded.root) for each in (own, other)]
    for metadata, refused in (
        (None, grpc.StatusCode.UNAUTHENTICATED),
        (bearer(own.token), grpc.StatusCode.PERMISSION_DENIED),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await code(own.token, metadata=metadata)
        assert refused is caught.value.code()


async def test_a_gateways_own_limit_is_none(guarded: RunningService) -> None:
    """What a gateway asks is not charged to its own key: its clients could use up its limit, and nobody got through."""
    tenant = await make_tenant(guarded, "limited")
    gateway = bearer((await tenant.key(permissions=["keys:validate"], rate_limit_per_minute=2)).token)
    created = await tenant.key()
    for _ in range(5):
        request = check_request({"x-api-key": created.token})
        assert 0 == (await check(guarded.channel, request, metadata=gateway)).code


async def test_counted(alone: RunningService) -> None:
    """Checks are counted as calls and as outcomes, from memory or not."""
    tenant = await make_tenant(alone, "acme")
    created = await tenant.key()
    value = alone.running.metrics.registry.get_sample_value
    before = value("latchgate_outcomes_total", {"outcome": "VALID"}) or 0
    await asyncio.gather(*(ask(tenant, created.token) for _ in range(20)))
    await ask(tenant, "lk_" + "x" * 40)
    for headers in ({}, {}, {"authorization": f"Bearer {created.token}", "x-api-key": "another"}):
        await check(alone.channel, check_request(headers))
    unjudged = [value("latchgate_unjudged_total", {"problem": problem}) for problem in ("missing", "conflict")]
    assert [2, 1] == unjudged
    assert 24 == value("latchgate_calls_total", {"method": "Authorization/Check", "code": "OK"})
    assert 20 == (value("latchgate_outcomes_total", {"outcome": "VALID"}) or 0) - before
    assert 1 == value("latchgate_outcomes_total", {"outcome": "NOT_FOUND"})
