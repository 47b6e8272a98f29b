"""What REST says when something is wrong, through the real Envoy."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.databases import fault_proxy
from support.edge import Answer, Edge
from support.edge import edge as run_edge
from support.envoy import needs_envoy
from support.keys import NOBODYS_KEY, Tenant, make_tenant
from support.service import RunningService, refusal, run_service
from support.transport import call_path
from support.upstream import free_port

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

VALIDATE = "/v1/api-keys/validate"


async def test_each_code(edge: Edge, acme: Tenant) -> None:
    """Each error of latchgate has its HTTP code, and says in JSON its gRPC code, a reason and a sentence."""
    created = await acme.key(permissions=["keys:read"])
    limited = (await acme.key(permissions=["keys:read"], rate_limit_per_minute=1)).token
    await edge.call("GET", "/v1/api-keys", token=limited)
    path = f"/v1/api-keys/{created.key.id}"
    request_id = str(uuid.uuid4())
    draft = {"organization_id": acme.id, "name": "a", "request_id": request_id}
    await edge.call("POST", "/v1/api-keys", draft)
    ahead = {"token": created.token, "min_revision": "999999999"}
    cases: list[tuple[Answer, int, int, str]] = [
        (await edge.call("POST", "/v1/api-keys", {"organization_id": acme.id}), 400, 3, "INVALID_FIELD"),
        (await edge.call("GET", path, token=""), 401, 16, "CREDENTIALS_MISSING"),
        (await edge.call("GET", path, token="lk_nonsense"), 401, 16, "CREDENTIALS_INVALID"),
        (await edge.call("DELETE", path, token=created.token), 403, 7, "PERMISSION_MISSING"),
        (await edge.call("GET", "/v1/organizations", token=created.token), 403, 7, "ROOT_REQUIRED"),
        (await edge.call("GET", f"/v1/api-keys/{NOBODYS_KEY}"), 404, 5, "KEY_NOT_FOUND"),
        (await edge.call("PATCH", path, {"name": "x"}, params={"etag": "v9"}), 409, 10, "ETAG_MISMATCH"),
        (await edge.call("POST", "/v1/api-keys", {**draft, "name": "b"}), 409, 6, "REQUEST_ID_REUSED"),
        (await edge.call("GET", "/v1/api-keys", token=limited), 429, 8, "CALLER_RATE_LIMITED"),
        (await edge.call("POST", VALIDATE, ahead), 400, 9, "REVISION_UNKNOWN"),
    ]
    for answer, status, code, reason in cases:
        assert (status, code, reason) == (answer.status, answer.json["code"], answer.reason)
        assert answer.json["message"]
        assert "latchgate" == answer.json["details"][0]["domain"]


async def test_fields_are_named(edge: Edge, acme: Tenant) -> None:
    """A broken rule names its field and says what it must be, as with gRPC."""
    answer = await edge.call(
        "POST", "/v1/api-keys", {"organization_id": acme.id, "name": "x", "allowed_cidrs": ["10.0.0.1/8"]}
    )
    violation = answer.json["details"][1]
    assert "type.googleapis.com/google.rpc.BadRequest" == violation["@type"]
    assert "allowed_cidrs[0]" == violation["field_violations"][0]["field"]
    assert "did you mean 10.0.0.0/8?" in violation["field_violations"][0]["description"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", VALIDATE, b'{"token"', 400, "Unexpected end of string"),
        ("POST", VALIDATE, b'{"token": 1e999}', 400, ""),
        ("POST", VALIDATE, b'{"token": "x", "cost": "many"}', 400, "cost"),
        ("POST", VALIDATE, b'{"token": "x", "min_revision": 1.5}', 400, "min_revision"),
        ("POST", VALIDATE, b"[]", 400, ""),
        ("POST", VALIDATE, b"\xff\xfe", 400, ""),
        ("POST", "/v1/api-keys", b'{"name": "x", "key_type": "secret"}', 400, "key_type"),
        ("POST", "/v1/api-keys", b'{"name": "x", "expire_time": "tomorrow"}', 400, "expire_time"),
        ("POST", "/v1/api-keys", b'{"name": "x", "metadata": {"a": {}}}', 400, ""),
        ("GET", "/v1/api-keys?nonsense=1", None, 400, "nonsense"),
        ("GET", "/v1/api-keys?page_size=many", None, 400, "page_size"),
        ("GET", "/v1/api-keys?key_type=SECRET", None, 400, "key_type"),
        ("GET", "/v1/api-keys/a/b/c", None, 404, "/v1/api-keys/a/b/c"),
        ("PUT", "/v1/api-keys", b"{}", 404, "/v1/api-keys"),
        ("POST", f"/v1/api-keys/{NOBODYS_KEY}/destroy", b"{}", 404, "destroy"),
    ],
)
async def test_what_is_no_request(
    edge: Edge, method: str, path: str, body: bytes | None, status: int, message: str
) -> None:
    """What can not be read as a request of a method is refused before it gets to latchgate, in the same form."""
    answer = await edge.call(method, path, body)
    assert (status, {400: 3, 404: 5}[status]) == (answer.status, answer.json["code"])
    assert message in answer.json["message"]


async def test_path_and_body_that_disagree(edge: Edge, acme: Tenant) -> None:
    """A body that names another key than the path is refused: neither is silently the right one."""
    created = await acme.key()
    answer = await edge.call("PATCH", f"/v1/api-keys/{created.key.id}", {"id": NOBODYS_KEY, "name": "x"})
    assert (400, 3) == (answer.status, answer.json["code"])
    assert "a key" == (await acme.get(created.key.id)).name


async def test_bodies_up_to_a_megabyte(edge: Edge) -> None:
    """A large token is told that it is none; what is larger than a megabyte is 413 and costs latchgate nothing."""
    large = await edge.call("POST", VALIDATE, {"token": "x" * 1_000_000}, token="")
    assert "OUTCOME_NOT_FOUND" == large.json["outcome"]
    larger = await edge.call("POST", VALIDATE, {"token": "x" * 2_000_000}, token="")
    assert (413, 3) == (larger.status, larger.json["code"])


async def test_tokens_that_are_no_text(edge: Edge) -> None:
    """A token of odd characters is a bad token, not a bad request."""
    for token in ("é", "\u0000", "lk_\n", "😀", "", " "):
        answer = await edge.call("POST", VALIDATE, {"token": token}, token="")
        assert (200, "OUTCOME_NOT_FOUND") == (answer.status, answer.json["outcome"])


async def test_database_away(database_url: str, tmp_path: Path) -> None:
    """What can not be decided is 503 with latchgate's reason, never an outcome and never 200."""
    async with (
        fault_proxy(database_url) as proxy,
        run_service(proxy.url, lease_seconds=1.0) as service,
        run_edge(tmp_path, service.address) as edge,
    ):
        tenant = await make_tenant(service, "acme")
        created = await tenant.key()
        proxy.refuse()
        codes: set[tuple[int, str]] = set()
        async with asyncio.timeout(20):
            while not any(status == 503 for status, _ in codes):
                codes.add(_code(await edge.call("POST", VALIDATE, {"token": created.token}, token="")))
        assert codes <= {(200, "OUTCOME_VALID"), (503, "STORAGE_UNAVAILABLE")}
        listed = await edge.call("GET", "/v1/api-keys", params={"organization_id": tenant.id})
        assert (503, 14, "STORAGE_UNAVAILABLE") == (listed.status, listed.json["code"], listed.reason)


async def test_latchgate_away(tmp_path: Path) -> None:
    """Where latchgate is not there nothing gets through; each client is told so in the form that it knows."""
    async with run_edge(tmp_path, f"127.0.0.1:{free_port()}") as edge, edge.channel() as channel:
        rest = await edge.call("POST", VALIDATE, {"token": "x"}, token="")
        assert (503, 14, "1") == (rest.status, rest.json["code"], rest.headers["retry-after"])
        behind = await edge.call("GET", "/orders", token="lk_any")
        assert (503, "UNAVAILABLE", "1") == (
            behind.status,
            behind.json["error"]["reason"],
            behind.headers["retry-after"],
        )
        for path in ("/apikeys.v1.KeyService/Validate", "/shop.v1.Orders/List"):
            error = await refusal(call_path(channel, path, b""))
            assert grpc.StatusCode.UNAVAILABLE == error.code
            assert "{" not in error.message
        assert [] == edge.upstream.requests


async def test_upstream_away(shared: RunningService, acme: Tenant, tmp_path: Path) -> None:
    """Where the service behind is not there, the holder of a good key is told so, and nothing of what is inside."""
    async with run_edge(tmp_path, shared.address, upstream=f"127.0.0.1:{free_port()}") as edge:
        answer = await edge.call("GET", "/orders", token=(await acme.key()).token)
        assert (503, 503) == (answer.status, answer.json["error"]["code"])
        assert "connect" not in answer.text


def _code(answer: Answer) -> tuple[int, Any]:
    return answer.status, answer.json["outcome"] if answer.status == 200 else answer.reason
