"""The real Envoy asks about every request: what gets through, what clients are told, and what without an answer."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from latchgate.app import serving
from support.databases import until
from support.edge import Answer, Edge
from support.edge import edge as run_edge
from support.envoy import needs_envoy
from support.fleets import Fleet, fleet
from support.keys import Tenant, hours_ahead
from support.recorder import recorder
from support.service import ROOT_TOKEN, bearer, call_error, make_settings
from support.transport import call_path
from support.upstream import free_port

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

OPEN = {"failure_mode_allow: false": "failure_mode_allow: true"}
TOLD_IN_FULL = {
    "                envoy_grpc: {cluster_name: latchgate}\n": (
        "                envoy_grpc: {cluster_name: latchgate}\n"
        '                initial_metadata: [{key: x-latchgate-error-response, value: "true"}]\n'
    )
}
VERSION = "              transport_api_version: V3\n"
SENT_RAW = {VERSION: f"{VERSION}              encode_raw_headers: true\n"}
# Envoy's own limit of two requests for all keys of a plan, by what latchgate has told it of the key.
LIMITED_BY_ENVOY = {
    "          - name: envoy.filters.http.router\n            typed_config:\n"
    '              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router\n'
    "              # How long": """\
          - name: envoy.filters.http.local_ratelimit
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
              stat_prefix: plans
              token_bucket: {max_tokens: 1000, tokens_per_fill: 1000, fill_interval: 60s}
              filter_enabled: {default_value: {numerator: 100}}
              filter_enforced: {default_value: {numerator: 100}}
              rate_limits:
              - actions:
                - metadata:
                    descriptor_key: plan
                    metadata_key: {key: envoy.filters.http.ext_authz, path: [{key: plan}]}
              descriptors:
              - entries: [{key: plan, value: default}]
                token_bucket: {max_tokens: 2, tokens_per_fill: 2, fill_interval: 60s}
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              # How long"""
}
SPEAKS_GRPC = {
    "  - name: upstream\n    type: STRICT_DNS\n": (
        "  - name: upstream\n    type: STRICT_DNS\n"
        "    typed_extension_protocol_options:\n"
        "      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n"
        '        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n'
        "        explicit_http_config: {http2_protocol_options: {}}\n"
    ),
    "http_health_check: {path: /health}": "grpc_health_check: {}",
}


def reason(answer: Answer) -> tuple[int, str]:
    """Gives the code and the reason of a refusal."""
    return answer.status, answer.json["error"]["reason"]


async def get(edge: Edge, token: str, path: str = "/orders", **headers: str) -> Answer:
    """Sends a request with a token in X-API-Key."""
    return await edge.call("GET", path, token="", headers={"x-api-key": token, **headers})


async def test_table(edge: Edge, acme: Tenant) -> None:
    """Each outcome reaches the client as its code, its reason and its headers, and but one nothing gets behind."""
    good = await acme.key(permissions=["read"], rate_limit_per_minute=10)
    far = await acme.key(allowed_cidrs=["10.0.0.0/8"])
    revoked, expired, inactive = await acme.key(), await acme.key(expire_time=hours_ahead(1)), await acme.key()
    await acme.revoke(revoked.key.id)
    await acme.expire(expired.key.id)
    await acme.toggle(inactive.key.id, active=False)
    before = len(edge.upstream.requests)
    answers = [
        await edge.call("GET", "/orders", token=""),
        await get(edge, "lk_" + "x" * 40),
        await get(edge, revoked.token),
        await get(edge, expired.token),
        await get(edge, inactive.token),
        await get(edge, far.token, **{"x-forwarded-for": "10.0.0.1"}),
        await get(edge, good.token, "/t/acme/api/v1/admin/users"),
    ]
    assert before == len(edge.upstream.requests)
    # One that costs as much as the limit, and the next.
    through, over = await get(edge, good.token, "/reports"), await get(edge, good.token)
    assert (200, before + 1) == (through.status, len(edge.upstream.requests))
    await acme.set_active(active=False)
    answers += [over, await get(edge, good.token)]
    assert [
        (401, "CREDENTIALS_MISSING"),
        (401, "NOT_FOUND"),
        (401, "REVOKED"),
        (401, "EXPIRED"),
        (401, "INACTIVE"),
        (403, "ADDRESS_DENIED"),
        (403, "PERMISSION_DENIED"),
        (429, "RATE_LIMITED"),
        (403, "ORGANIZATION_INACTIVE"),
    ] == [reason(answer) for answer in answers]
    for answer in answers:
        challenge = 'Bearer realm="latchgate", error="invalid_token"' if answer.status == 401 else None
        assert challenge == answer.headers.get("www-authenticate")
        assert (answer.status == 429) is ("retry-after" in answer.headers)
    assert '"minute";r=0;' in through.headers["ratelimit"]
    assert '"minute";q=10;w=60' == over.headers["ratelimit-policy"]
    assert 0 < int(over.headers["retry-after"]) <= 62


@pytest.mark.parametrize(
    "headers",
    [
        {"AUTHORIZATION": "Bearer {}"},
        {"authorization": "bEaReR {}"},
        {"Authorization": "Bearer   {}"},
        {"x-ApI-kEy": "{}"},
        {"X-API-Key": "{}", "Authorization": "Bearer {}"},
        {"X-API-Key": "{}", "Authorization": "Basic dTpw"},
    ],
)
async def test_odd_credentials(edge: Edge, acme: Tenant, headers: Mapping[str, str]) -> None:
    """Names and scheme may be in any case; the token is judged, and goes no further, and what is none of it does."""
    created = await acme.key()
    sent = {name: value.format(created.token) for name, value in headers.items()}
    assert 200 == (await edge.call("GET", "/orders", token="", headers=sent)).status
    got = edge.upstream.last
    assert created.key.id == got["x-latchgate-key-id"]
    assert created.token not in str(got)
    assert ("Basic dTpw" in sent.values()) is ("authorization" in got)


async def test_repeated_headers(edge: Edge, acme: Tenant) -> None:
    """A credential that is sent twice, or two that differ, are refused; nobody has to guess which one counts."""
    created, other = await acme.key(), await acme.key()
    before = len(edge.upstream.requests)
    for headers in (
        [("x-api-key", created.token), ("x-api-key", created.token)],
        [("authorization", f"Bearer {created.token}"), ("authorization", f"Bearer {other.token}")],
        [("authorization", f"Bearer {created.token}"), ("x-api-key", other.token)],
    ):
        async with edge.http.get(edge.envoy.url + "/orders", headers=headers) as answer:
            assert 401 == answer.status
            assert "CREDENTIALS_CONFLICT" == (await answer.json())["error"]["reason"]
    assert before == len(edge.upstream.requests)


async def test_raw_headers(acme: Tenant, tmp_path: Path) -> None:
    """A gateway that sends headers as they came, one by one, is told the same: also of repeated and odd ones."""
    created = await acme.key()
    async with run_edge(tmp_path, acme.service.address, changes=SENT_RAW) as edge:
        assert 200 == (await get(edge, created.token)).status
        assert created.key.id == edge.upstream.last["x-latchgate-key-id"]
        assert "x-api-key" not in edge.upstream.last
        for values, told in (
            ([created.token, created.token], "CREDENTIALS_CONFLICT"),
            ([], "CREDENTIALS_MISSING"),
            (["ü" * 40], "NOT_FOUND"),
        ):
            headers = [("x-api-key", value) for value in values]
            async with edge.http.get(edge.envoy.url + "/orders", headers=headers) as answer:
                assert (401, told) == (answer.status, (await answer.json())["error"]["reason"])


async def test_envoys_own_limits(acme: Tenant, tmp_path: Path) -> None:
    """Envoy's own rate limiter can tell keys apart by what latchgate says of them, such as their plan."""
    created = await acme.key()
    async with run_edge(tmp_path, acme.service.address, threads=1, changes=LIMITED_BY_ENVOY) as edge:
        assert [200, 200, 429] == [(await get(edge, created.token)).status for _ in range(3)]
        assert 2 == len(edge.upstream.requests)


async def test_revoked_at_once(edge: Edge, acme: Tenant) -> None:
    """A revoked key is refused by the very next request, on every one of many connections."""
    created = await acme.key()
    assert {200} == {answer.status for answer in await asyncio.gather(*(get(edge, created.token) for _ in range(20)))}
    await acme.revoke(created.key.id)
    after = await asyncio.gather(*(get(edge, created.token) for _ in range(20)))
    assert {(401, "REVOKED")} == {reason(answer) for answer in after}


async def test_grpc_services(acme: Tenant, tmp_path: Path) -> None:
    """Clients of a gRPC service, over HTTP/2, get through with a good key, and else are told in gRPC's own words."""
    good, lacking = await acme.key(permissions=["read"], rate_limit_per_minute=1), await acme.key()
    async with (
        recorder() as (service, address),
        run_edge(tmp_path, acme.service.address, upstream=address, changes=SPEAKS_GRPC) as edge,
        edge.channel() as channel,
    ):
        await call_path(channel, "/shop.v1.Orders/List", b"", metadata=bearer(good.token))
        assert good.key.id == service.calls[-1]["x-latchgate-key-id"]
        assert "authorization" not in service.calls[-1]
        told = []
        for path, token in (
            ("/shop.v1.Orders/List", good.token),
            ("/shop.v1.Orders/List", "lk_" + "x" * 40),
            ("/t/acme/api/v1/admin/x", lacking.token),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_path(channel, path, b"", metadata=bearer(token))
            error = call_error(caught.value)
            told.append((error.code, error.reason))
        assert [
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
            (grpc.StatusCode.UNAUTHENTICATED, "NOT_FOUND"),
            (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
        ] == told
        assert 1 == len(service.calls)


async def test_nobody_answers(tmp_path: Path) -> None:
    """Without latchgate nothing gets through, and the client hears when to come back; over gRPC it is UNAVAILABLE."""
    async with run_edge(tmp_path, f"127.0.0.1:{free_port()}") as edge:
        answer = await get(edge, "lk_" + "x" * 40)
        assert ((503, "UNAVAILABLE"), "1") == (reason(answer), answer.headers["retry-after"])
        async with edge.channel() as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_path(channel, "/shop.v1.Orders/List", b"", metadata=bearer("lk_" + "x" * 40))
            assert grpc.StatusCode.UNAVAILABLE is caught.value.code()
        assert [] == edge.upstream.requests


async def test_open_without_an_answer(tmp_path: Path) -> None:
    """Where the gateway is set to be open, requests get through without an answer, and behind it nobody is anybody."""
    async with run_edge(tmp_path, f"127.0.0.1:{free_port()}", changes=OPEN) as edge:
        spoofed = {"x-latchgate-key-id": "key_root"}
        assert 200 == (await get(edge, "lk_" + "x" * 40, **spoofed)).status
        assert not [name for name in edge.upstream.last if "latchgate" in name]


@pytest.mark.parametrize("changes", [TOLD_IN_FULL, TOLD_IN_FULL | OPEN])
async def test_error_response(tmp_path: Path, changes: Mapping[str, str]) -> None:
    """An Envoy that knows error_response has it from latchgate itself, and still does as it is set: closed or open."""
    away = f"postgresql://latchgate@127.0.0.1:{free_port()}/latchgate"
    async with starting(away, tmp_path) as address, run_edge(tmp_path, address, changes=changes) as edge:
        answer = await get(edge, "lk_" + "x" * 40)
        if OPEN.keys() <= changes.keys():
            assert 200 == answer.status
        else:
            assert ((503, "UNAVAILABLE"), "1") == (reason(answer), answer.headers["retry-after"])
            assert [] == edge.upstream.requests


@asynccontextmanager
async def starting(database_url: str, folder: Path) -> AsyncIterator[str]:
    """Starts a service that waits for its database, and gives its address."""
    async with serving(make_settings(database_url, data_dir=folder)) as running:
        yield running.listen


async def make_key(service: Fleet) -> str:
    """Makes a key in a service of several processes, and gives its token."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        organizations: Any = OrganizationServiceStub(channel)
        keys: Any = KeyServiceStub(channel)
        request = organizations_pb.CreateOrganizationRequest(organization_id="acme", name="Acme")
        await organizations.CreateOrganization(request, metadata=bearer(ROOT_TOKEN), wait_for_ready=True)
        created = await keys.CreateKey(
            keys_pb.CreateKeyRequest(organization_id="acme", name="a key"), metadata=bearer(ROOT_TOKEN)
        )
        return str(created.token)


class Load:
    """Clients of a gateway that ask again as soon as they are answered."""

    def __init__(self, edge: Edge, token: str, clients: int = 8) -> None:
        self._edge = edge
        self._token = token
        self.codes: Counter[int] = Counter()
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(clients)]

    async def _ask(self) -> None:
        while True:
            self.codes[(await get(self._edge, self._token)).status] += 1

    async def until(self, code: int, more: int = 50) -> None:
        """Waits until there were so many more answers of this code."""
        wanted = self.codes[code] + more

        async def is_there() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return self.codes[code] >= wanted

        await until(is_there, 60)

    async def stop(self) -> None:
        """Ends it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_renewal_fails_nobody(database_url: str, tmp_path: Path) -> None:
    """While all workers are replaced under load, every request with a good key gets through."""
    async with (
        fleet(database_url, tmp_path, LOG_LEVEL="info") as service,
        run_edge(tmp_path, service.address) as edge,
    ):
        load = Load(edge, await make_key(service))
        await load.until(200)
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_renewed")
        await load.until(200)
        await load.stop()
        assert {200} == set(load.codes)


@pytest.mark.parametrize("changes", [{}, OPEN])
async def test_killed_and_started_again(database_url: str, tmp_path: Path, changes: Mapping[str, str]) -> None:
    """Killed under load, nothing gets through, or all where the gateway is set to be open; then it is as before."""
    listen = f"127.0.0.1:{free_port()}"
    without = 200 if changes else 503
    async with fleet(database_url, tmp_path, LOG_LEVEL="info", LISTEN=listen) as service:
        token = await make_key(service)
        async with run_edge(tmp_path, listen, changes=changes) as edge:
            load = Load(edge, token)
            await load.until(200)
            await service.process.kill()
            await gone(listen)
            before = len(edge.upstream.requests)
            await load.until(without)
            unjudged = [sent for sent in edge.upstream.requests[before + 8 :] if "x-latchgate-key-id" not in sent]
            assert bool(changes) is bool(unjudged)
            async with fleet(database_url, tmp_path, LOG_LEVEL="info", LISTEN=listen):
                await judged_again(edge, len(edge.upstream.requests))
                await load.until(200)
                await load.stop()
            assert set(load.codes) <= {200, 503}


async def gone(listen: str) -> None:
    """Waits until nobody listens on an address any more."""
    host, _, port = listen.rpartition(":")

    async def is_gone() -> bool:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return True
        writer.close()
        return False

    await until(is_gone, 60)


async def judged_again(edge: Edge, before: int) -> None:
    """Waits until a request has got through with a key that was judged."""

    async def is_judged() -> bool:
        return any("x-latchgate-key-id" in sent for sent in edge.upstream.requests[before:])

    await until(is_judged, 60)
