"""Callers with a JWT of the issuer: what is accepted, what its claims make of them, and what they leave behind."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc
import jwt
import pytest
import pytest_asyncio

from apikeys.v1 import audit_service_pb2 as audit_pb
from apikeys.v1 import import_service_pb2 as import_pb
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1 import token_service_pb2 as tokens_pb
from apikeys.v1 import webhook_service_pb2 as webhooks_pb
from apikeys.v1.token_service_pb2_grpc import TokenServiceStub
from latchgate.oidc.reader import ALGORITHMS
from support.databases import until
from support.imports import import_requests, new_rows
from support.issuer import AUDIENCE, JWKS, Issuer, issuer, login_settings, make_key
from support.keys import Tenant, cloned_database, database_of, ids, make_tenant
from support.service import CallError, Metadata, RunningService, bearer, refusal, run_service
from support.upstream import free_port

pytestmark = pytest.mark.asyncio(loop_scope="session")

SKEW_S = 30
SUBJECTS = ("alice", "auth0|5f7c8ec7c33c6c004bbafe82", "CN=a b, O=c#d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A service with an issuer."""

    service: RunningService
    login: Issuer


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def site(postgres_url: str, template_url: str) -> AsyncIterator[Site]:
    """A service that lets callers in with the JWTs of one issuer, which has a key for each algorithm."""
    async with issuer() as login, cloned_database(postgres_url, template_url) as url:
        for algorithm in sorted(ALGORITHMS):
            # PyJWT knows this algorithm by its old name alone.
            login.add_key(algorithm, "EdDSA" if algorithm == "Ed25519" else algorithm)
        async with run_service(url, usage_flush_seconds=0.05, **login_settings(login)) as running:
            yield Site(service=running, login=login)


@pytest_asyncio.fixture(loop_scope="session")
async def acme(site: Site) -> Tenant:
    """A tenant of the test's own."""
    return await make_tenant(site.service, "acme")


@pytest_asyncio.fixture(loop_scope="session")
async def rival(site: Site) -> Tenant:
    """Another tenant of the test's own."""
    return await make_tenant(site.service, "rival")


def alice(site: Site, tenant: Tenant, **claims: Any) -> Metadata:
    """Gives the metadata of a call of somebody of a tenant."""
    return site.login.caller(**({"organization_id": tenant.id} | claims))


def make(
    site: Site, caller: Metadata, *permissions: str, **fields: Any
) -> Coroutine[Any, Any, keys_pb.CreateKeyResponse]:
    """Makes a key in the caller's organization."""
    return site.service.create_key("", metadata=caller, permissions=permissions, **fields)


async def told(site: Site, caller: Metadata) -> CallError:
    """Makes a call that must be refused for its caller, and gives what it is told."""
    error = await refusal(site.service.keys.ListKeys(keys_pb.ListKeysRequest(), metadata=caller))
    assert caller[0][1].removeprefix("Bearer ") not in error.message
    return error


async def assert_invalid(site: Site, caller: Metadata, hint: str) -> None:
    """Demands that a caller is not accepted, and is told why."""
    error = await told(site, caller)
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID", {}) == (error.code, error.reason, error.metadata)
    assert hint in error.message, error.message


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS - {"Ed25519"}))
async def test_algorithms(site: Site, acme: Tenant, algorithm: str) -> None:
    """JWTs are read that are signed in any of the usual ways."""
    caller = site.login.caller(algorithm, organization_id=acme.id)
    assert [acme.admin_key_id] == ids((await acme.list(caller)).keys)


async def test_headers_of_other_uses(site: Site, acme: Tenant) -> None:
    """What a JWT's header says besides, and its type, does not matter: some issuers put certificates there."""
    headers = {"typ": "at+jwt", "nonce": "x" * 40, "x5t": "abc", "x5c": ["y" * 2000]}
    await acme.list(bearer(site.login.token(headers=headers, organization_id=acme.id)))


async def test_what_a_caller_may(site: Site, acme: Tenant) -> None:
    """A caller may do what the permissions say, in the organization that the JWT names, and nothing else."""
    reader, nobody = alice(site, acme, scope="openid keys:read"), alice(site, acme, scope=None)
    assert [acme.admin_key_id] == ids((await acme.list(reader)).keys)
    for caller, permission in ((reader, "keys:write"), (nobody, "keys:write")):
        error = await refusal(make(site, caller))
        assert ("PERMISSION_MISSING", {"permission": permission}) == (error.reason, error.metadata)
    error = await refusal(make(site, alice(site, acme), "write"))
    assert "PERMISSION_NOT_HELD" == error.reason
    created = await make(site, alice(site, acme, scope=["keys:write", "write"]), "write")
    assert "VALID" == await site.service.outcome(created.token)


@pytest.mark.parametrize("subject", SUBJECTS)
async def test_who_made_a_key(site: Site, acme: Tenant, subject: str) -> None:
    """A key that was made with a JWT says whose; so do webhooks."""
    caller = alice(site, acme, sub=subject, scope="keys:write keys:read webhooks:write")
    identity = f"{site.login.url}#{subject}"
    created = await make(site, caller)
    assert identity == created.key.created_by
    request = webhooks_pb.CreateWebhookRequest(url="https://example.com/hook", event_types=["api_key.created"])
    made = await site.service.webhooks.CreateWebhook(request, metadata=caller)
    assert identity == made.webhook.created_by


async def test_the_trail_names_the_subject(site: Site, acme: Tenant) -> None:
    """Changes, refusals and reads with a JWT stand in the trail under its subject, and can be asked for by it."""
    caller, identity = alice(site, acme), f"{site.login.url}#alice"
    created = await make(site, caller)
    await acme.list(caller)
    await refusal(make(site, caller, "write"))
    await acme.key()
    request = audit_pb.ListAuditEventsRequest(actor_subject=identity, organization_id=acme.id)
    answer = await site.service.audit.ListAuditEvents(request, metadata=site.service.root)
    assert [
        ("KeyService/CreateKey", "PERMISSION_DENIED", ""),
        ("KeyService/ListKeys", "OK", ""),
        ("KeyService/CreateKey", "OK", created.key.id),
    ] == [(event.method, event.code, event.entity_id) for event in answer.events]
    for event in answer.events:
        assert (identity, "", acme.id) == (event.actor_subject, event.actor_key_id, event.actor_organization_id)


async def test_every_kind_of_call(site: Site, acme: Tenant) -> None:
    """Calls of one request, streams, and changes that are safe to repeat are open to a JWT."""
    caller = alice(site, acme, scope="keys:*")
    request_id = str(uuid4())
    first = await make(site, caller, request_id=request_id)
    assert first.token == (await make(site, caller, request_id=request_id)).token
    other = alice(site, acme, scope="keys:*", sub="bob")
    assert first.token != (await make(site, other, request_id=request_id)).token
    await acme.revoke(first.key.id, caller=caller)
    assert "REVOKED" == await site.service.outcome(first.token)

    responses = await import_requests(site.service, [import_pb.ImportKeysRequest(keys=new_rows(1))], caller)
    key_id = responses[0].results[0].key_id
    assert f"{site.login.url}#alice" == (await site.service.get_key(key_id)).created_by


async def test_events_name_the_subject(site: Site, acme: Tenant) -> None:
    """Events say with whose JWT a change was made, or with which key."""
    request = webhooks_pb.CreateWebhookRequest(url="https://example.com/hook", event_types=["api_key.created"])
    await site.service.webhooks.CreateWebhook(request, metadata=acme.admin)
    made = [await make(site, alice(site, acme)), await make(site, acme.admin)]
    async with database_of(site.service) as connection:
        bodies = [
            json.loads(await connection.fetchval("SELECT body FROM event WHERE subject = $1", each.key.id))["data"]
            for each in made
        ]
    assert [("", f"{site.login.url}#alice"), (acme.admin_key_id, "")] == [
        (body["actor_key_id"], body["actor_subject"]) for body in bodies
    ]


async def test_jwts_are_not_exchanged(site: Site, acme: Tenant) -> None:
    """Tokens are given out for keys: a JWT is not exchanged for one that outlives it."""
    stub: Any = TokenServiceStub(site.service.channel)
    call = stub.ExchangeKey(tokens_pb.ExchangeKeyRequest(), metadata=alice(site, acme, scope="*"))
    error = await refusal(call)
    assert (grpc.StatusCode.PERMISSION_DENIED, "KEY_REQUIRED") == (error.code, error.reason)


async def test_tenants_apart(site: Site, acme: Tenant, rival: Tenant) -> None:
    """A JWT that names one organization neither sees nor changes another's."""
    caller = alice(site, acme, scope="* keys:read keys:write audit:read")
    theirs = rival.admin_key_id
    for call in (
        site.service.keys.GetKey(keys_pb.GetKeyRequest(key_id=theirs), metadata=caller),
        acme.revoke(theirs, caller=caller),
        acme.rotate(theirs, caller=caller),
    ):
        assert "KEY_NOT_FOUND" == (await refusal(call)).reason
    request = keys_pb.ListKeysRequest(organization_id=rival.id)
    assert "ORGANIZATION_NOT_FOUND" == (await refusal(site.service.keys.ListKeys(request, metadata=caller))).reason


async def test_nobody_is_root(site: Site, acme: Tenant) -> None:
    """No JWT has root's powers, whatever it says."""
    error = await told(site, site.login.caller(organization_id="org_root", scope="*"))
    assert "CREDENTIALS_INVALID" == error.reason
    request = organizations_pb.CreateOrganizationRequest(organization_id="another", name="Another")
    call = site.service.organizations.CreateOrganization(request, metadata=alice(site, acme, scope="*"))
    assert "ROOT_REQUIRED" == (await refusal(call)).reason


async def test_organization(site: Site, acme: Tenant) -> None:
    """A JWT must name one organization that there is and that is active."""
    assert [acme.admin_key_id] == ids((await acme.list(alice(site, acme, organization_id=[acme.id]))).keys)
    for value in (None, "", 7, [], [acme.id, acme.id], {"a": 1}, "Not-An-Id", "x' OR true --"):
        await assert_invalid(site, alice(site, acme, organization_id=value), "organization_id")
    await assert_invalid(site, alice(site, acme, organization_id="nobody"), "names no organization that there is")
    await acme.set_active(active=False)
    error = await told(site, alice(site, acme))
    assert (grpc.StatusCode.PERMISSION_DENIED, "ORGANIZATION_INACTIVE") == (error.code, error.reason)
    await acme.set_active(active=True)
    await acme.list(alice(site, acme))


async def test_times(site: Site, acme: Tenant) -> None:
    """A JWT is good from its beginning to its end, give or take what clocks may be apart."""
    now = int(time.time())
    for claims in ({"exp": now - SKEW_S + 10}, {"nbf": now + SKEW_S - 10}, {"iat": now + SKEW_S - 10}, {"iat": None}):
        await acme.list(alice(site, acme, **claims))
    await assert_invalid(site, alice(site, acme, exp=now - SKEW_S - 1), "has expired")
    await assert_invalid(site, alice(site, acme, nbf=now + SKEW_S + 10), "nbf")
    await assert_invalid(site, alice(site, acme, iat=now + SKEW_S + 10), "iat")
    await assert_invalid(site, alice(site, acme, exp=None), "lacks a claim: exp")
    for value in ("soon", str(now + 300), True, [now + 300], -1, 0):
        error = await told(site, forged(site, {"exp": value, "organization_id": acme.id}))
        assert "CREDENTIALS_INVALID" == error.reason


def forged(site: Site, claims: dict[str, Any]) -> Metadata:
    """Signs claims that PyJWT would refuse to write."""
    key, algorithm = site.login.private["first"]
    said = {"iss": site.login.url, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 300} | claims
    return bearer(jwt.PyJWS().encode(json.dumps(said).encode(), key, algorithm, headers={"kid": "first"}))


async def test_audience(site: Site, acme: Tenant) -> None:
    """A JWT that was made for somebody else lets nobody in."""
    await acme.list(alice(site, acme, aud=["another", AUDIENCE]))
    for audience in ("another", ["another"], [], "", f"{AUDIENCE}2", AUDIENCE.upper()):
        await assert_invalid(site, alice(site, acme, aud=audience), "aud")
    await assert_invalid(site, alice(site, acme, aud=None), "lacks a claim: aud")


async def test_subject(site: Site, acme: Tenant) -> None:
    """A JWT says whom it is about, in no more than the standard allows."""
    await acme.list(alice(site, acme, sub="x" * 255))
    for subject in ("x" * 256, "a\nb", "\u0430lice", ""):
        await assert_invalid(site, forged(site, {"sub": subject, "organization_id": acme.id}), "sub")
    await assert_invalid(site, alice(site, acme, sub=None), "lacks a claim: sub")


async def test_another_issuer(site: Site, acme: Tenant) -> None:
    """What another issuer says counts nothing: it is no key's token either."""
    for other in ("https://elsewhere.example.com", f"{site.login.url}/", site.login.url.upper()):
        error = await told(site, alice(site, acme, iss=other))
        assert ("CREDENTIALS_INVALID", {"outcome": "NOT_FOUND"}) == (error.reason, error.metadata)


async def test_signatures(site: Site, acme: Tenant) -> None:
    """What the issuer has not signed as it stands there counts nothing."""
    token = site.login.token(organization_id=acme.id)
    head, body, signature = token.split(".")
    richer = json.loads(base64.urlsafe_b64decode(body + "==")) | {"scope": "*"}
    changed = base64.urlsafe_b64encode(json.dumps(richer).encode()).decode().rstrip("=")
    flipped = signature[:20] + ("A" if signature[20] != "A" else "B") + signature[21:]
    for forgery in (
        f"{head}.{changed}.{signature}",
        f"{head}.{body}.{flipped}",
        f"{head}.{body}.",
        f"{head}.{body}.{signature[:-8]}",
        f"{head}.{body}.!!!!",
    ):
        await assert_invalid(site, bearer(forgery), "not as its issuer has signed it")
    stranger = jwt.encode(
        json.loads(base64.urlsafe_b64decode(body + "==")), make_key("RS256"), "RS256", {"kid": "first"}
    )
    await assert_invalid(site, bearer(stranger), "not as its issuer has signed it")


def signed_oddly(site: Site, acme: Tenant, header: dict[str, Any], signature: str = "") -> Metadata:
    """Writes a JWT whose header is any."""
    now = int(time.time())
    claims = {"iss": site.login.url, "aud": AUDIENCE, "sub": "a", "exp": now + 300, "organization_id": acme.id}
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims))
    return bearer(".".join([*parts, signature]))


async def test_algorithms_that_are_none(site: Site, acme: Tenant) -> None:
    """No JWT chooses how it is verified: unsigned ones, and such that take a public key for a secret, are refused."""
    first = next(key for key in site.login.keys if key["kid"] == "first")
    secret = base64.b64encode(json.dumps(first).encode())
    claims = jwt.decode(site.login.token(organization_id=acme.id), options={"verify_signature": False})
    await assert_invalid(site, bearer(jwt.encode(claims, secret, "HS256", {"kid": "first"})), "not accepted")
    for algorithm in ("none", "None", "", "HS256", "RS1", None, 7, ["RS256"], {"RS256": 1}):
        caller = signed_oddly(site, acme, {"alg": algorithm, "kid": "first"})
        await assert_invalid(site, caller, "in a way that is not accepted")
    await assert_invalid(site, signed_oddly(site, acme, {"kid": "first"}), "in a way that is not accepted")
    # The algorithm fits neither what the key is published for, nor the key.
    for algorithm in ("RS512", "PS256", "ES256", "EdDSA"):
        caller = signed_oddly(site, acme, {"alg": algorithm, "kid": "first"}, "AAAA")
        await assert_invalid(site, caller, "not as its issuer has signed it")
    # What must be understood and is not.
    token = site.login.token(headers={"crit": ["must"], "must": 1}, organization_id=acme.id)
    await assert_invalid(site, bearer(token), "not as its issuer has signed it")
    key_ids: tuple[Any, ...] = (7, [], {"first": 1}, True)
    for key_id in key_ids:
        caller = signed_oddly(site, acme, {"alg": "RS256", "kid": key_id}, "AAAA")
        await assert_invalid(site, caller, "that its issuer does not publish")


async def test_what_is_no_jwt(site: Site, acme: Tenant) -> None:
    """What only looks like a JWT is judged as a key's token, and is none."""
    del acme
    body = base64.urlsafe_b64encode(json.dumps({"iss": site.login.url}).encode()).decode()
    for token in (
        "eyJ",
        "eyJ..",
        "eyJhbGciOiJSUzI1NiJ9.e30.AAAA",
        f"{body}.{body}",
        f"e30.{body}.x",
        "eyJ.W10.x",
        "eyJ.!.x",
    ):
        error = await told(site, bearer(token))
        assert ("CREDENTIALS_INVALID", {"outcome": "NOT_FOUND"}) == (error.reason, error.metadata), token


async def test_validate_knows_keys_alone(site: Site, acme: Tenant) -> None:
    """A JWT is no key: Validate does not find it, whoever has signed it."""
    assert "NOT_FOUND" == await site.service.outcome(site.login.token(organization_id=acme.id))


async def test_validate_is_for_keys_alone(postgres_url: str, template_url: str) -> None:
    """Where Validate wants to know who asks, it wants a key: the hot path asks nobody about an organization."""
    async with (
        issuer() as login,
        cloned_database(postgres_url, template_url) as url,
        run_service(url, validate_access="authenticated", **login_settings(login)) as service,
    ):
        await service.create_organization("acme")
        caller = login.caller(scope="keys:validate keys:read")
        await service.keys.ListKeys(keys_pb.ListKeysRequest(), metadata=caller)
        error = await refusal(service.keys.Validate(keys_pb.ValidateRequest(token="x"), metadata=caller))
        assert ("CREDENTIALS_INVALID", {"outcome": "NOT_FOUND"}) == (error.reason, error.metadata)


async def test_keys_go_on(acme: Tenant) -> None:
    """Keys are callers as before."""
    assert [acme.admin_key_id] == ids((await acme.list()).keys)


async def test_forgeries_are_suspicious(site: Site, acme: Tenant) -> None:
    """JWTs that nobody has signed are counted as tokens that nobody has; those that have expired are not."""
    request = audit_pb.ListSuspiciousUseRequest()

    async def counted() -> int:
        answer = await site.service.audit.ListSuspiciousUse(request, metadata=site.service.root)
        return sum(use.count for use in answer.uses if not use.key_id)

    before = await counted()
    for _ in range(3):
        await told(site, alice(site, acme, exp=1))
    await told(site, signed_oddly(site, acme, {"alg": "RS256", "kid": "first"}, "AAAA"))
    await until(lambda: _is(counted, before + 1))


async def _is(counted: Callable[[], Awaitable[int]], wanted: int) -> bool:
    return wanted == await counted()


async def test_rotation(site: Site, acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that the issuer begins to sign with is good at once, without the service being told."""
    monkeypatch.setattr("latchgate.oidc.keys.COOLING_S", 0.0)
    site.login.add_key("second", "ES256")
    assert [acme.admin_key_id] == ids((await acme.list(site.login.caller("second", organization_id=acme.id))).keys)
    asked = site.login.asked[JWKS]
    await acme.list(site.login.caller("second", organization_id=acme.id))
    assert asked == site.login.asked[JWKS]


async def test_issuer_away(postgres_url: str, template_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose issuer is away starts and serves keys; JWTs are told to try again, and good once it is there."""
    monkeypatch.setattr("latchgate.oidc.keys.COOLING_S", 0.0)
    away = Issuer(port=free_port())
    away.add_key("first")
    async with cloned_database(postgres_url, template_url) as url, run_service(url, **login_settings(away)) as service:
        acme = await make_tenant(service, "acme")
        assert [acme.admin_key_id] == ids((await acme.list()).keys)
        error = await refusal(acme.list(away.caller(organization_id=acme.id)))
        assert (grpc.StatusCode.UNAVAILABLE, "ISSUER_UNAVAILABLE") == (error.code, error.reason)
        async with issuer(port=away.port) as login:
            assert [acme.admin_key_id] == ids((await acme.list(login.caller(organization_id=acme.id))).keys)


async def test_unknown_issuer_key(site: Site, acme: Tenant) -> None:
    """A JWT by a key that the issuer does not publish is refused, and makes nobody ask the issuer each time."""
    site.login.add_key("hidden")
    site.login.remove_key("hidden")
    asked = site.login.asked[JWKS]
    answers = [told(site, site.login.caller("hidden", organization_id=acme.id)) for _ in range(20)]
    for error in await asyncio.gather(*answers):
        assert "that its issuer does not publish" in error.message
    assert site.login.asked[JWKS] <= asked + 1
