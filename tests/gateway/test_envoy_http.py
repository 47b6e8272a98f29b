"""The real Envoy asks over HTTP, as docs/gateways/envoy-http.md has it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from support.edge import Edge
from support.edge import edge as run_edge
from support.envoy import DEPLOY, needs_envoy
from support.keys import Tenant
from support.service import RunningService

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

PAGE: Final = Path(__file__).parents[2] / "docs" / "gateways" / "envoy-http.md"
ASKED_OVER_GRPC: Final = re.compile(r" +grpc_service:\n.*?(?= +# What can not be decided is refused)", re.DOTALL)
ROUTE: Final = re.compile(r" +- name: (upstream(?:-\w+)?)\n +match:.*?(?=\n +- name: |\n\n)", re.DOTALL)
NEEDS: Final = re.compile(r" +typed_per_filter_config:\n.*context_extensions: \{(.*?)\}", re.DOTALL)


def changes(http_listen: str) -> dict[str, str]:
    """Gives what the page says is to be changed, for a service at this address."""
    asks, removal, cluster, needs = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    configuration = (DEPLOY / "envoy.yaml").read_text()
    before = ASKED_OVER_GRPC.search(configuration)
    assert before is not None
    host, _, port = http_listen.rpartition(":")
    changed = {
        before[0]: asks,
        "  clusters:\n": "  clusters:\n"
        + cluster.replace("address: latchgate, port_value: 8081", f"address: {host}, port_value: {port}"),
    }
    for route in ROUTE.finditer(configuration[configuration.index("CHANGE: the services behind") :]):
        found = NEEDS.search(route[0])
        if found is None:
            changed[route[0] + "\n"] = f"{route[0]}\n{removal}"
        else:
            query = re.sub(r", *", "&", re.sub(r": *", "=", found[1]).replace('"', ""))
            needed = re.sub(r"/auth\?\S+", f"/auth?{query}", needs)
            changed[route[0]] = route[0].replace(found[0], removal + needed.rstrip("\n"))
    return changed


async def test_no_route_is_left_out() -> None:
    """Every route to a service is changed, and none keeps needs of which nothing comes over HTTP."""
    changed = changes("127.0.0.1:1")
    assert 5 == len(changed)
    configuration = (DEPLOY / "envoy.yaml").read_text()
    for before, after in changed.items():
        assert 1 == configuration.count(before)
        configuration = configuration.replace(before, after)
    assert "context_extensions" not in configuration
    assert 3 == configuration.count("request_headers_to_remove: [authorization, x-api-key]")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def asking(shared: RunningService, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    """Envoy that asks the shared service over HTTP."""
    folder = tmp_path_factory.mktemp("envoy-http")
    async with run_edge(folder, shared.address, changes=changes(shared.running.http_listen)) as running:
        yield running


@pytest.mark.parametrize("path", ["/orders", "/reports", "/orders?cost=0&required_permissions=none:such"])
async def test_valid(asking: Edge, acme: Tenant, path: str) -> None:
    """A good key gets through, charged as its route has it; behind it stands who called, and the token does not."""
    created = await acme.key(permissions=["read"], rate_limit_per_minute=20, user_id="u-1")
    claims = {"x-latchgate-key-id": "key_root", "x-latchgate-other": "1"}
    answer = await asking.call("GET", path, token=created.token, headers=claims)
    assert (200, True) == (answer.status, f";r={10 if path == '/reports' else 19};" in answer.headers["ratelimit"])
    got = asking.upstream.last
    assert (created.key.id, acme.id, "u-1", "live", "read") == tuple(
        got[f"x-latchgate-{name}"] for name in ("key-id", "organization-id", "user-id", "environment", "permissions")
    )
    assert not {"authorization", "x-latchgate-other", "x-latchgate-reason"} & set(got)


async def test_refusals(asking: Edge, acme: Tenant) -> None:
    """A refusal reaches the client as latchgate gave it, by each route."""
    good, lacking = await acme.key(permissions=["read"], rate_limit_per_minute=10), await acme.key()
    far = await acme.key(allowed_cidrs=["10.0.0.0/8"])
    before = len(asking.upstream.requests)
    answers = [
        await asking.call("GET", "/t/acme/api/v1/admin/users", token=good.token),
        await asking.call("GET", "/orders", token=""),
        await asking.call("GET", "/orders", token="lk_" + "x" * 40),
        await asking.call("GET", "/reports", token=lacking.token),
        await asking.call("GET", "/orders", token=far.token, headers={"x-forwarded-for": "10.0.0.1"}),
    ]
    assert before == len(asking.upstream.requests)
    await asking.call("GET", "/reports", token=good.token)
    answers.append(await asking.call("GET", "/reports", token=good.token))
    assert [
        (403, "PERMISSION_DENIED"),
        (401, "CREDENTIALS_MISSING"),
        (401, "NOT_FOUND"),
        (403, "PERMISSION_DENIED"),
        (403, "ADDRESS_DENIED"),
        (429, "RATE_LIMITED"),
    ] == [(answer.status, answer.json["error"]["reason"]) for answer in answers]
    assert 'Bearer realm="latchgate", error="invalid_token"' == answers[1].headers["www-authenticate"]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 62


async def test_revoked_at_once(asking: Edge, acme: Tenant) -> None:
    """A revoked key is refused by the very next request."""
    created = await acme.key()
    assert 200 == (await asking.call("GET", "/orders", token=created.token)).status
    await acme.revoke(created.key.id)
    assert 401 == (await asking.call("GET", "/orders", token=created.token)).status


async def test_the_api_keeps_its_tokens(asking: Edge, acme: Tenant) -> None:
    """The routes of latchgate's own API go on to know who calls."""
    token = acme.admin[0][1].removeprefix("Bearer ")
    assert 200 == (await asking.call("GET", "/v1/api-keys", token=token)).status
