"""The real nginx in front of a service, with the configuration of deploy/nginx."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import ClientSession
from yarl import URL

from support.databases import until
from support.keys import Tenant
from support.nginx import nginx
from support.service import RunningService
from support.upstream import Upstream, free_port, sample_upstream

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """nginx, and what stands behind it."""

    url: str
    folder: Path
    upstream: Upstream
    http: ClientSession

    async def get(self, path: str = "/", headers: Any = None) -> tuple[int, str, Mapping[str, str]]:
        """Sends a request; gives the code, the reason of a refusal, and the headers of the answer."""
        async with self.http.get(self.url + path, headers=headers) as answer:
            refused = answer.content_type == "application/json"
            reason = (await answer.json())["error"]["reason"] if refused else ""
            return answer.status, reason, answer.headers.copy()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(shared: RunningService, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Nginx in front of the shared service."""
    folder = tmp_path_factory.mktemp("nginx")
    async with (
        sample_upstream() as upstream,
        nginx(folder, latchgate=shared.running.http_listen, upstream=f"127.0.0.1:{upstream.port}") as url,
        ClientSession() as http,
    ):
        yield Gateway(url=url, folder=folder, upstream=upstream, http=http)


async def test_valid(gateway: Gateway, acme: Tenant) -> None:
    """A good key gets through; behind nginx it is known who called, whatever the client said, and the token is gone."""
    created = await acme.key(permissions=["read"], rate_limit_per_minute=9)
    for header in ("Authorization", "x-ApI-kEy"):
        token = created.token if header != "Authorization" else f"bEARER  {created.token}"
        spoofed = {"X-Latchgate-Key-Id": "key_root", "X-Latchgate-User-Id": "root", "X-Latchgate-Permissions": "*"}
        status, _, headers = await gateway.get("/", {header: token, "X-Keep": "1", **spoofed})
        assert 200 == status
        assert '"minute";q=9;w=60' == headers["ratelimit-policy"]
        sent = gateway.upstream.last
        assert (created.key.id, acme.id, "live", "read", "1") == tuple(
            sent[name]
            for name in (
                "x-latchgate-key-id",
                "x-latchgate-organization-id",
                "x-latchgate-environment",
                "x-latchgate-permissions",
                "x-keep",
            )
        )
        assert not {"x-latchgate-user-id", "authorization", "x-api-key"} & set(sent)


async def test_refusals(gateway: Gateway, acme: Tenant) -> None:
    """Each refusal reaches the client with its code, its reason and its headers, and nothing gets through."""
    good, far = (
        await acme.key(permissions=["read"], rate_limit_per_minute=1),
        await acme.key(allowed_cidrs=["10.0.0.0/8"]),
    )
    revoked = await acme.key()
    before = len(gateway.upstream.requests)
    await acme.revoke(revoked.key.id)
    missing = await gateway.get()
    unknown = await gateway.get("/", {"X-API-Key": "lk_" + "x" * 40})
    ended = await gateway.get("/", {"X-API-Key": revoked.token})
    lacking = await gateway.get("/orders", {"X-API-Key": good.token})
    away = await gateway.get("/", {"X-API-Key": far.token, "X-Forwarded-For": "10.0.0.1"})
    twice = await gateway.get("/", [("X-API-Key", good.token), ("X-API-Key", good.token)])
    assert before == len(gateway.upstream.requests)
    assert 200 == (await gateway.get("/", {"X-API-Key": good.token}))[0]
    over = await gateway.get("/", {"X-API-Key": good.token})
    assert [
        (401, "CREDENTIALS_MISSING"),
        (401, "NOT_FOUND"),
        (401, "REVOKED"),
        (403, "PERMISSION_DENIED"),
        (403, "ADDRESS_DENIED"),
        (401, "CREDENTIALS_CONFLICT"),
        (429, "RATE_LIMITED"),
    ] == [answer[:2] for answer in (missing, unknown, ended, lacking, away, twice, over)]
    assert 'Bearer realm="latchgate", error="invalid_token"' == missing[2]["www-authenticate"]
    assert 0 < int(over[2]["retry-after"]) <= 62
    assert '"minute";r=0;' in over[2]["ratelimit"]
    assert "retry-after" not in missing[2]
    assert "www-authenticate" not in lacking[2]


@pytest.mark.parametrize(
    "path",
    [
        "/orders/../1",
        "/orders//../1",
        "/orders/..",
        "/orders/.",
        "/orders/..%2fx",
        "/orders/%2e%2e/1",
        "/orders/%2E./1",
        "/orders%2f..%2f1",
        "/orders/1%23/../../x",
        "/x/..%5corders",
        "/x\\..\\orders",
        "//orders/1",
        "http://localhost//orders/../1",
    ],
)
async def test_paths_mean_one_thing(gateway: Gateway, acme: Tenant, path: str) -> None:
    """A path that nginx and the service behind could read in two ways leads around no permission: it is refused."""
    token, before = (await acme.key()).token, len(gateway.upstream.requests)
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: l\r\nX-API-Key: {token}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert b"400" == answer.split()[1]
    assert before == len(gateway.upstream.requests)


@pytest.mark.parametrize("path", ["/.well-known/x", "/a.b/c..d", "/x?next=//y/../z%2f", "/v1...", "/%20x"])
async def test_usual_paths_get_through(gateway: Gateway, acme: Tenant, path: str) -> None:
    """Dots and slashes that mean nothing else are let be, and a query may hold anything."""
    created = await acme.key()
    async with gateway.http.get(URL(gateway.url + path, encoded=True), headers={"X-API-Key": created.token}) as answer:
        assert 200 == answer.status


async def test_a_header_that_can_not_be_read(gateway: Gateway, acme: Tenant) -> None:
    """A credential with control characters is the client's mistake, and does not look like a service that is away."""
    token = (await acme.key()).token
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET / HTTP/1.1\r\nHost: l\r\nX-API-Key: {token}\x01\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert b"400" == answer.split()[1]
    assert token.encode() not in answer


async def test_revoked_at_once(gateway: Gateway, acme: Tenant) -> None:
    """A revoked key is refused by the very next request."""
    created = await acme.key()
    for _ in range(3):
        assert 200 == (await gateway.get("/", {"X-API-Key": created.token}))[0]
    await acme.revoke(created.key.id)
    assert (401, "REVOKED") == (await gateway.get("/", {"X-API-Key": created.token}))[:2]


async def test_bodies_and_large_headers(gateway: Gateway, acme: Tenant) -> None:
    """A body gets through, though the question is asked without it, and so do large headers."""
    created = await acme.key()
    headers = {"X-API-Key": created.token, **{f"x-{number}": "v" * 14_000 for number in range(4)}}
    async with gateway.http.post(gateway.url + "/", headers=headers, data=b"b" * 100_000) as answer:
        assert 200 == answer.status
    assert "100000" == gateway.upstream.last["content-length"]


async def test_the_log_knows_the_key(gateway: Gateway, acme: Tenant) -> None:
    """Nginx's access log names the key, and never the token."""
    created = await acme.key()
    await gateway.get("/named", {"X-API-Key": created.token})
    log = gateway.folder / "access.log"

    async def is_written() -> bool:
        return '"GET /named" 200' in log.read_text()

    await until(is_written)
    assert created.key.id in log.read_text()
    assert created.token not in log.read_text()


async def test_closed_without_an_answer(tmp_path: Path) -> None:
    """Where latchgate is not there, nothing gets through: 503, not 500, and not the service behind."""
    async with (
        sample_upstream() as upstream,
        nginx(tmp_path, latchgate=f"127.0.0.1:{free_port()}", upstream=f"127.0.0.1:{upstream.port}") as url,
        ClientSession() as http,
        http.get(url, headers={"X-API-Key": "lk_" + "x" * 40}) as answer,
    ):
        assert (503, "UNAVAILABLE") == (answer.status, (await answer.json())["error"]["reason"])
        assert [] == upstream.requests
