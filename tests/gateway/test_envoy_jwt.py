"""The real Envoy verifies access tokens by itself, with the configuration of deploy/envoy/jwt.yaml as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from apikeys.v1 import token_service_pb2 as pb
from support.databases import until
from support.edge import Edge
from support.edge import edge as run_edge
from support.envoy import check_configuration, needs_envoy
from support.keys import Tenant, cloned_database, make_tenant
from support.service import RunningService, bearer, refusal, run_service
from support.tokens import published, signed, verified

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

CLAIMED: Final = {"x-latchgate-key-id": "key_root", "x-latchgate-user-id": "root", "x-latchgate-other": "1"}


async def exchange(tenant: Tenant, token: str, **fields: Any) -> pb.ExchangeKeyResponse:
    """Exchanges a key."""
    answer: pb.ExchangeKeyResponse = await tenant.service.tokens.ExchangeKey(
        pb.ExchangeKeyRequest(**fields), metadata=bearer(token)
    )
    return answer


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def verifying(shared: RunningService, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    """Envoy that has fetched the keys of the shared service."""
    folder = tmp_path_factory.mktemp("envoy-jwt")
    async with run_edge(folder, shared.running.http_listen, file_name="jwt.yaml") as running:
        yield running


async def test_envoy_has_nothing_against_it(tmp_path: Path) -> None:
    """Envoy takes the configuration without a warning."""
    assert "" == await check_configuration(tmp_path, "jwt.yaml")


async def test_good_token(verifying: Edge, acme: Tenant) -> None:
    """A good token gets through. Behind the gateway stands whose it is, whatever the client claims, and no token."""
    created = await acme.key(permissions=["read"], user_id="u-1")
    token = (await exchange(acme, created.token)).access_token
    answer = await verifying.call("GET", "/orders", token=token, headers=CLAIMED)
    assert 200 == answer.status, answer.text
    got = {name: value for name, value in verifying.upstream.last.items() if name.startswith("x-latchgate-")}
    assert {
        "x-latchgate-key-id": created.key.id,
        "x-latchgate-organization-id": acme.id,
        "x-latchgate-user-id": "u-1",
        "x-latchgate-environment": "live",
        "x-latchgate-key-type": "secret",
        "x-latchgate-scope": "read",
    } == got
    assert token not in str(verifying.upstream.last)
    assert "authorization" not in verifying.upstream.last


async def test_what_a_token_has_not_is_not_claimed(verifying: Edge, acme: Tenant) -> None:
    """What a client claims that its token says nothing of is dropped all the same."""
    token = (await exchange(acme, (await acme.key(permissions=["read"])).token)).access_token
    assert 200 == (await verifying.call("GET", "/orders", token=token, headers=CLAIMED)).status
    assert not {"x-latchgate-user-id", "x-latchgate-other"} & set(verifying.upstream.last)


async def test_bad_tokens(verifying: Edge, acme: Tenant) -> None:
    """None, one that is expired, changed, for another audience, of another issuer or not signed, and a key's own token
    or a refresh token: each is 401 as JSON, and nothing of it gets to the upstream.
    """
    created = await acme.key(permissions=["read"])
    grant = await exchange(acme, created.token)
    said = await verified(acme.service, grant.access_token)
    past = int((datetime.now(UTC) - timedelta(minutes=1)).timestamp())
    head, body, mark = grant.access_token.split(".")
    other_head, other_body, _ = (await signed(acme.service, said | {"organization_id": "rival"})).split(".")
    bad = {
        "none": "",
        "expired": await signed(acme.service, said | {"exp": past, "iat": past - 300}),
        "body changed": f"{head}.{other_body}.{mark}",
        "mark changed": f"{head}.{body}.{'A' * len(mark)}",
        "not signed": f"eyJhbGciOiJub25lIn0.{body}.",
        "another audience": (await exchange(acme, created.token, audience="another")).access_token,
        "another issuer": await signed(acme.service, said | {"iss": "another"}),
        "the key": created.token,
        "the refresh token": grant.refresh_token,
    }
    assert head == other_head
    assert 200 == (await verifying.call("GET", "/orders", token=await signed(acme.service, said))).status
    before = len(verifying.upstream.requests)
    for name, token in bad.items():
        answer = await verifying.call("GET", "/orders", token=token)
        assert (401, "TOKEN_INVALID") == (answer.status, answer.json["error"]["reason"]), name
    assert before == len(verifying.upstream.requests)


@pytest.mark.parametrize(
    ("permissions", "status"),
    [(["write"], 200), (["read", "write"], 200), (["*"], 200), (["read"], 403), ([], 403), (["keys:write"], 403)],
)
async def test_scopes_of_routes(verifying: Edge, acme: Tenant, permissions: list[str], status: int) -> None:
    """A route that needs a permission lets tokens through that have it, and is 403 as JSON for all others."""
    token = (await exchange(acme, (await acme.key(permissions=permissions)).token)).access_token
    assert 200 == (await verifying.call("GET", "/orders", token=token)).status
    for path in ("/admin", "/admin/users", "//admin", "/x/../admin"):
        answer = await verifying.call("GET", path, token=token)
        assert status == answer.status, path
        if status == 403:
            assert "PERMISSION_DENIED" == answer.json["error"]["reason"]


async def test_revoked_keys_tokens_live_out_their_minutes(verifying: Edge, acme: Tenant) -> None:
    """What the docs say: a revoked key refreshes nothing any more, and its access token is let through still."""
    created = await acme.key(permissions=["read"])
    grant = await exchange(acme, created.token)
    assert 200 == (await verifying.call("GET", "/orders", token=grant.access_token)).status
    await acme.revoke(created.key.id)
    refused = await refusal(acme.service.tokens.RefreshToken(pb.RefreshTokenRequest(refresh_token=grant.refresh_token)))
    assert "REFRESH_TOKEN_INVALID" == refused.reason
    assert 200 == (await verifying.call("GET", "/orders", token=grant.access_token)).status
    said = await verified(acme.service, grant.access_token)
    assert 300 == said["exp"] - said["iat"]


async def test_nobody_is_asked(postgres_url: str, template_url: str, tmp_path: Path) -> None:
    """With latchgate gone, for longer than keys are kept, good tokens are let through and bad ones refused still."""
    changes = {"cache_duration: 300s": "cache_duration: 1s"}
    async with cloned_database(postgres_url, template_url) as url, AsyncExitStack() as stack:
        async with run_service(url, http_listen="127.0.0.1:0") as service:
            tenant = await make_tenant(service, "acme")
            token = (await exchange(tenant, (await tenant.key(permissions=["read"])).token)).access_token
            listen = service.running.http_listen
            running = await stack.enter_async_context(run_edge(tmp_path, listen, file_name="jwt.yaml", changes=changes))
            assert 200 == (await running.call("GET", "/orders", token=token)).status
        failed = "http.public.jwt_authn.jwks_fetch_failed"

        async def has_missed_it() -> bool:
            return (await running.envoy.stats(failed)).get(failed, 0) >= 3

        await until(has_missed_it)
        assert 200 == (await running.call("GET", "/orders", token=token)).status
        assert 401 == (await running.call("GET", "/orders", token=token[:-4] + "AAAA")).status


async def test_other_keys_are_picked_up(postgres_url: str, template_url: str, tmp_path: Path) -> None:
    """After all signing keys were replaced at once, tokens of the new one are let through as soon as Envoy has fetched
    the keys again, and those that were out are not.
    """
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, http_listen="127.0.0.1:0") as service,
        run_edge(
            tmp_path,
            service.running.http_listen,
            file_name="jwt.yaml",
            changes={"cache_duration: 300s": "cache_duration: 1s"},
        ) as running,
    ):
        tenant = await make_tenant(service, "acme")
        created = await tenant.key(permissions=["read"])
        before = (await exchange(tenant, created.token)).access_token

        async def passes(token: str) -> bool:
            return (await running.call("GET", "/orders", token=token)).status == 200

        await until(lambda: passes(before))
        await service.tokens.RotateSigningKeys(pb.RotateSigningKeysRequest(), metadata=service.root)
        assert 1 == len(await published(service))
        after = (await exchange(tenant, created.token)).access_token
        await until(lambda: passes(after))
        assert 401 == (await running.call("GET", "/orders", token=before)).status
