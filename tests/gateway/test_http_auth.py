"""The endpoint for gateways that ask over HTTP: the same answers as Validate, in headers and codes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import pytest
import pytest_asyncio
from aiohttp import ClientSession

from latchgate.app import serving
from support.keys import Tenant, hours_ahead, make_tenant
from support.service import RunningService, make_settings, run_service
from support.upstream import free_port

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def http() -> AsyncIterator[ClientSession]:
    """An HTTP client."""
    async with ClientSession() as session:
        yield session


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a gateway is told. The reason is empty where the request is good."""

    status: int
    reason: str
    headers: Mapping[str, str]


async def ask(
    http: ClientSession, service: RunningService, query: str = "", *headers: tuple[str, str], path: str = "/auth"
) -> Answer:
    """Asks as a gateway does."""
    async with http.get(f"http://{service.running.http_listen}{path}{query}", headers=list(headers)) as answer:
        is_json = answer.content_type == "application/json"
        reason = (await answer.json())["error"]["reason"] if is_json else ""
        assert reason == answer.headers.get("x-latchgate-reason", "")
        assert "latchgate" == answer.headers["server"]
        return Answer(status=answer.status, reason=reason, headers=answer.headers.copy())


def seen(address: str) -> tuple[str, str]:
    """The header in which a gateway names whom it saw, after what its client made up."""
    return ("X-Forwarded-For", f"203.0.113.9, {address}")


async def test_valid(http: ClientSession, acme: Tenant) -> None:
    """A good key is answered with who it is, by either header, asked of the database or of memory."""
    created = await acme.key(permissions=["read"], user_id="u-1", rate_limit_per_minute=10)
    for header in (("Authorization", f"Bearer {created.token}"), ("X-API-Key", created.token)):
        answer = await ask(http, acme.service, "?required_permissions=read&cost=2", header)
        assert (200, "") == (answer.status, answer.reason)
        assert (created.key.id, acme.id, "u-1", "live", "read") == tuple(
            answer.headers[f"x-latchgate-{name}"]
            for name in ("key-id", "organization-id", "user-id", "environment", "permissions")
        )
        assert '"minute";q=10;w=60' == answer.headers["ratelimit-policy"]
    assert '"minute";r=6;' in answer.headers["ratelimit"]


async def test_table(http: ClientSession, acme: Tenant) -> None:
    """Each outcome comes as its code and its reason, with the headers that go with it."""
    good = await acme.key(permissions=["read"], allowed_cidrs=["10.0.0.0/8"], rate_limit_per_minute=1)
    revoked, expired, inactive = await acme.key(), await acme.key(expire_time=hours_ahead(1)), await acme.key()
    await acme.revoke(revoked.key.id)
    await acme.expire(expired.key.id)
    await acme.toggle(inactive.key.id, active=False)
    service = acme.service
    near, two = seen("10.0.0.1"), "?required_permissions=read&required_permissions=write"
    answers = [
        await ask(http, service),
        await ask(http, service, "", ("X-API-Key", "lk_" + "x" * 40)),
        await ask(http, service, "", ("X-API-Key", "ü" * 40)),
        await ask(http, service, "", ("X-API-Key", revoked.token)),
        await ask(http, service, "", ("X-API-Key", expired.token)),
        await ask(http, service, "", ("X-API-Key", inactive.token)),
        await ask(http, service, "", ("X-API-Key", good.token), ("X-API-Key", good.token)),
        await ask(http, service, "", ("X-API-Key", good.token), seen("192.0.2.1")),
        await ask(http, service, "", ("X-API-Key", good.token)),
        await ask(http, service, two, ("X-API-Key", good.token), near),
        await ask(http, service, "?cost=2", ("X-API-Key", good.token), near),
    ]
    await acme.set_active(active=False)
    answers.append(await ask(http, service, "", ("X-API-Key", good.token), near))
    assert [
        (401, "CREDENTIALS_MISSING"),
        (401, "NOT_FOUND"),
        (401, "NOT_FOUND"),
        (401, "REVOKED"),
        (401, "EXPIRED"),
        (401, "INACTIVE"),
        (401, "CREDENTIALS_CONFLICT"),
        (403, "ADDRESS_DENIED"),
        (403, "ADDRESS_DENIED"),
        (403, "PERMISSION_DENIED"),
        (429, "RATE_LIMITED"),
        (403, "ORGANIZATION_INACTIVE"),
    ] == [(answer.status, answer.reason) for answer in answers]
    for answer in answers:
        assert (answer.status == 401) is ("www-authenticate" in answer.headers)
        assert (answer.status == 429) is ("retry-after" in answer.headers)
        assert "x-latchgate-key-id" not in answer.headers


async def test_slips_of_the_pen(http: ClientSession, acme: Tenant) -> None:
    """What a gateway's configuration asks and nobody knows is an error, and lets nothing through."""
    created = await acme.key()
    for query in ("?required_permission=read", "?cost=much", "?cost=1&cost=1"):
        answer = await ask(http, acme.service, query, ("X-API-Key", created.token))
        assert (500, "INVALID_FIELD") == (answer.status, answer.reason)


async def test_many_headers(http: ClientSession, acme: Tenant) -> None:
    """What a gateway lets through of its client's headers, up to 96 KB, is read."""
    created = await acme.key()
    many = [(f"x-{number}", "v" * 200) for number in range(300)]
    assert 200 == (await ask(http, acme.service, "", ("X-API-Key", created.token), *many)).status
    large = ("cookie", "v" * 95_000)
    assert 200 == (await ask(http, acme.service, "", ("X-API-Key", created.token), large)).status


async def test_what_can_not_be_read(acme: Tenant) -> None:
    """A request that is none is refused in our own words, which repeat nothing of it, and is no line in the log."""
    token = (await acme.key()).token
    host, _, port = acme.service.running.http_listen.partition(":")
    for request in (f"GET /auth HTTP/1.1\r\nX-API-Key: {token}\x01\r\n\r\n", f"{token}\r\n\r\n"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        answer = (await reader.read()).decode()
        writer.close()
        assert "400" == answer.split()[1]
        assert "MALFORMED_REQUEST" in answer
        assert token not in answer
        assert "aiohttp" not in answer


async def test_other_paths(http: ClientSession, acme: Tenant) -> None:
    """There is a health check; every other path is not there."""
    assert 200 == (await ask(http, acme.service, path="/healthz")).status
    assert 404 == (await ask(http, acme.service, path="/")).status


async def test_before_there_is_a_database(http: ClientSession) -> None:
    """A service that waits for its database can not decide, and says when to come back."""
    away = f"postgresql://latchgate@127.0.0.1:{free_port()}/latchgate"
    async with serving(make_settings(away, http_listen="127.0.0.1:0")) as running:
        async with http.get(f"http://{running.http_listen}/auth", headers={"X-API-Key": "lk_" + "x" * 40}) as answer:
            assert (503, "1") == (answer.status, answer.headers["retry-after"])
        async with http.get(f"http://{running.http_listen}/healthz") as answer:
            assert 503 == answer.status


async def test_counted(http: ClientSession, database_url: str) -> None:
    """What gateways ask over HTTP is counted as calls and as outcomes."""
    async with run_service(database_url, http_listen="127.0.0.1:0") as service:
        tenant = await make_tenant(service, "acme")
        created = await tenant.key()
        await ask(http, service, "", ("X-API-Key", created.token))
        await ask(http, service, "", ("X-API-Key", "lk_" + "x" * 40))
        await ask(http, service, "")
        for _ in range(2):
            await ask(http, service, "", ("Authorization", f"Bearer {created.token}"), ("X-API-Key", "another"))
        value = service.running.metrics.registry.get_sample_value
        unjudged = [value("latchgate_unjudged_total", {"problem": problem}) for problem in ("missing", "conflict")]
        assert [1, 2] == unjudged
        assert 5 == value("latchgate_calls_total", {"method": "HTTP/auth", "code": "OK"})
        assert 1 == value("latchgate_outcomes_total", {"outcome": "NOT_FOUND"})
