"""ExchangeKey: a key for an access token and a refresh token."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import grpc
import pytest
from joserfc.jws import extract_compact

from apikeys.v1 import key_pb2
from apikeys.v1 import token_service_pb2 as pb
from latchgate.domain.families import MAX_ACCESS
from support.databases import until_waiting
from support.keys import Tenant, database_of, hours_ahead, make_tenant
from support.service import bearer, refusal, run_service
from support.tokens import exchange, published, refresh, refused_refresh, verified

pytestmark = pytest.mark.asyncio(loop_scope="session")

CLAIMS = {
    "iss", "sub", "aud", "client_id", "iat", "exp", "jti", "scope", "organization_id", "environment", "key_type",
}  # fmt: skip


async def test_what_a_key_is_exchanged_for(acme: Tenant) -> None:
    """The access token says whose it is, for whom, for how long and what it may do, in the form of RFC 9068, and is
    signed by a key that is published; of the key's name, mail, metadata and token it says nothing.
    """
    created = await acme.key(
        name="ci", permissions=["read", "write"], user_id="u-1", user_email="u@example.com", metadata={"team": "x"}
    )
    grant = await exchange(acme.service, created.token)
    said = await verified(acme.service, grant.access_token)
    assert {*CLAIMS, "user_id"} == said.keys()
    assert ("latchgate", "latchgate", created.key.id, created.key.id, "u-1") == tuple(
        said[name] for name in ("iss", "aud", "sub", "client_id", "user_id")
    )
    assert ("read write", acme.id, "live", "secret") == tuple(
        said[name] for name in ("scope", "organization_id", "environment", "key_type")
    )
    assert (300, said["exp"]) == (said["exp"] - said["iat"], grant.expire_time.seconds)
    assert ("Bearer", 0) == (grant.token_type, grant.expire_time.nanos)
    (key,) = await published(acme.service)
    header = extract_compact(grant.access_token.encode()).headers()
    assert {"alg": "ES256", "typ": "at+jwt", "kid": key["kid"]} == header
    assert re.fullmatch(r"lk_rt_[0-9A-Za-z]{40}", grant.refresh_token)
    lasts = grant.refresh_expire_time.ToDatetime() - grant.expire_time.ToDatetime()
    # An access token ends on a whole second.
    assert timedelta(days=30) <= lasts + timedelta(minutes=5) < timedelta(days=30, seconds=1)


async def test_each_is_its_own(acme: Tenant) -> None:
    """A key can be exchanged again and again; what comes of one exchange has nothing to do with another."""
    token = (await acme.key()).token
    first, second = await exchange(acme.service, token), await exchange(acme.service, token)
    said = [await verified(acme.service, each.access_token) for each in (first, second)]
    assert 2 == len({each["jti"] for each in said})
    assert first.refresh_token[:20] != second.refresh_token[:20]
    assert "user_id" not in said[0]
    await refresh(acme.service, first.refresh_token)
    assert "REFRESH_TOKEN_REUSED" == await refused_refresh(acme.service, first.refresh_token)
    await refresh(acme.service, second.refresh_token)


async def test_publishable_and_test_keys(acme: Tenant) -> None:
    """A token says of what type its key is, and for which traffic."""
    created = await acme.key(key_type=key_pb2.KEY_TYPE_PUBLISHABLE, environment=key_pb2.ENVIRONMENT_TEST)
    said = await verified(acme.service, (await exchange(acme.service, created.token)).access_token)
    assert ("publishable", "test") == (said["key_type"], said["environment"])


async def test_some_of_the_permissions(acme: Tenant) -> None:
    """What is asked for is what the token says, be it by a wildcard of the key; what the key lacks is refused."""
    await acme.give_scopes("orders:read", "orders:write")
    token = (await acme.key(permissions=["orders:*", "read"])).token
    for asked, said in (([], "orders:* read"), (["orders:read"], "orders:read"), (["read"], "read")):
        grant = await exchange(acme.service, token, permissions=asked)
        assert said == (await verified(acme.service, grant.access_token))["scope"]
    for asked in (["write"], ["*"], ["read", "orders"], ["*:read"]):
        error = await refusal(exchange(acme.service, token, permissions=asked))
        assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_NOT_HELD") == (error.code, error.reason)
        assert {"permission": asked[-1]} == error.metadata


async def test_audience(acme: Tenant) -> None:
    """A caller says for whom a token is, and all that follow are for the same."""
    grant = await exchange(acme.service, (await acme.key()).token, audience="https://orders.example.com")
    following = await refresh(acme.service, grant.refresh_token)
    for token in (grant.access_token, following.access_token):
        assert "https://orders.example.com" == (await verified(acme.service, token))["aud"]


async def test_root_is_not_exchanged(acme: Tenant) -> None:
    """No token carries what a root key may do out of the service."""
    error = await refusal(acme.service.tokens.ExchangeKey(pb.ExchangeKeyRequest(), metadata=acme.service.root))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "ROOT_ORGANIZATION") == (error.code, error.reason)
    async with database_of(acme.service) as connection:
        assert 0 == await connection.fetchval(
            "SELECT count(*) FROM token_family f JOIN key k ON k.id = f.key_id WHERE k.organization_id = 'org_root'"
        )


@pytest.mark.parametrize("end", ["revoke", "delete", "expire", "toggle", "rotate"])
async def test_keys_that_are_not_good(acme: Tenant, end: str) -> None:
    """A key that is ended, expired, off or replaced is exchanged no more."""
    created = await acme.key()
    await getattr(acme, end)(created.key.id)
    error = await refusal(exchange(acme.service, created.token))
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (error.code, error.reason)


async def test_tokens_are_not_exchanged(acme: Tenant) -> None:
    """Neither a refresh token nor an access token is a key: not to exchange it, not to manage, not for Validate."""
    grant = await exchange(acme.service, (await acme.key(permissions=["keys:read"])).token)
    for token in (grant.refresh_token, grant.access_token):
        assert "NOT_FOUND" == await acme.service.outcome(token)
        assert "CREDENTIALS_INVALID" == (await refusal(exchange(acme.service, token))).reason
        assert "CREDENTIALS_INVALID" == (await refusal(acme.list(bearer(token)))).reason


async def test_refresh_tokens_cost_no_lookup(acme: Tenant) -> None:
    """A refresh token is told from a key's token without asking the database."""
    registry = acme.service.running.metrics.registry
    grant = await exchange(acme.service, (await acme.key()).token)
    before = registry.get_sample_value("latchgate_lookups_total", {"result": "answered"})
    assert "NOT_FOUND" == await acme.service.outcome(grant.refresh_token)
    assert before == registry.get_sample_value("latchgate_lookups_total", {"result": "answered"})


async def test_never_longer_than_its_key(acme: Tenant) -> None:
    """An access token ends with its key, if that is sooner, or with the grace of the token that was exchanged."""
    soon = hours_ahead(0.05)
    expiring = await acme.key(expire_time=soon)
    assert soon == (await exchange(acme.service, expiring.token)).expire_time
    rotated = await acme.key()
    answer = await acme.rotate(rotated.key.id, grace=timedelta(minutes=2))
    old, new = await exchange(acme.service, rotated.token), await exchange(acme.service, answer.token)
    (_, ends) = answer.key.secrets
    assert (ends.expire_time.seconds, 0) == (old.expire_time.seconds, old.expire_time.nanos)
    assert new.expire_time.seconds - old.expire_time.seconds > 170


async def test_settings(database_url: str) -> None:
    """Issuer, audience, lifetimes and the prefix are the deployment's."""
    settings: dict[str, Any] = {
        "token_issuer": "https://keys.example.com",
        "token_audience": "https://api.example.com",
        "access_token_seconds": int(MAX_ACCESS.total_seconds()),
        "refresh_token_days": 1,
        "prefix_refresh": "acme_rt_",
    }
    async with run_service(database_url, **settings) as service:
        tenant = await make_tenant(service, "acme")
        grant = await exchange(service, (await tenant.key()).token)
        said = await verified(service, grant.access_token)
        assert ("https://keys.example.com", "https://api.example.com") == (said["iss"], said["aud"])
        assert 3600 == said["exp"] - said["iat"]
        assert timedelta(hours=22) < grant.refresh_expire_time.ToDatetime() - grant.expire_time.ToDatetime()
        assert timedelta(hours=24) > grant.refresh_expire_time.ToDatetime() - grant.expire_time.ToDatetime()
        assert grant.refresh_token.startswith("acme_rt_")
    async with run_service(database_url) as service:
        # With another prefix the tokens that are out go on; and the claims are those of now.
        following = await refresh(service, grant.refresh_token)
        assert following.refresh_token.startswith("lk_rt_")
        assert "latchgate" == (await verified(service, following.access_token))["iss"]


async def test_a_key_has_so_many_families(acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the number that a key can have, the oldest ends; those of other keys stay."""
    monkeypatch.setattr("latchgate.domain.tokens.MAX_FAMILIES", 3)
    one, other = (await acme.key()).token, (await acme.key()).token
    kept = await exchange(acme.service, other)
    grants = [await exchange(acme.service, one) for _ in range(5)]
    assert ["REFRESH_TOKEN_INVALID"] * 2 == [
        await refused_refresh(acme.service, each.refresh_token) for each in grants[:2]
    ]
    for each in (*grants[2:], kept):
        await refresh(acme.service, each.refresh_token)


async def test_ended_while_it_waits(acme: Tenant) -> None:
    """An exchange that waits for a change of its key is carried out after it, or refused."""
    created = await acme.key()
    async with database_of(acme.service) as connection, database_of(acme.service) as observer:
        async with connection.transaction():
            await connection.execute("UPDATE organization SET name = name WHERE id = $1", acme.id)
            await connection.execute("UPDATE key SET revoke_time = now() WHERE id = $1", created.key.id)
            waiting = acme.service.tokens.ExchangeKey(pb.ExchangeKeyRequest(), metadata=bearer(created.token))
            await until_waiting(observer)
        error = await refusal(waiting)
    assert "CREDENTIALS_INVALID" == error.reason
