"""Every method of the contract as JSON over HTTP, through the real Envoy."""

from __future__ import annotations

import re
from typing import Any

import pytest
from google.api import annotations_pb2
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from support.edge import Edge
from support.envoy import needs_envoy
from support.keys import NOBODYS_KEY, Tenant
from support.transport import METHODS, good_request

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]


def as_http(method: str, request: Message) -> tuple[str, str, dict[str, str], Any]:
    """Spells a request as its method's `google.api.http` says: verb, path, query, body."""
    rule = METHODS[method].GetOptions().Extensions[annotations_pb2.http]
    verb = str(rule.WhichOneof("pattern"))
    fields: Any = json_format.MessageToDict(request, preserving_proto_field_name=True)

    def bind(match: re.Match[str]) -> str:
        holder = fields
        *outer, name = match[1].split(".")
        for each in outer:
            holder = holder[each]
        return str(holder.pop(name))

    path = re.sub(r"\{([a-z_.]+)\}", bind, getattr(rule, verb))
    if rule.body == "*":
        return verb.upper(), path, {}, fields
    body = fields.pop(rule.body) if rule.body else None
    return verb.upper(), path, {name: str(value) for name, value in fields.items()}, body


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_has_its_path(edge: Edge, acme: Tenant, method: str) -> None:
    """A good request to the path of each method gives an answer of its type, in snake case, with every field known."""
    created = await acme.key(permissions=["read"])
    await acme.key(key_type="KEY_TYPE_PUBLISHABLE")
    request = good_request(method, key_id=created.key.id, organization_id=acme.id, token=created.token)

    verb, path, query, body = as_http(method, request)
    # Root's key is not exchanged.
    caller = {"token": created.token} if method == "ExchangeKey" else {}
    answer = await edge.call(verb, path, body, params=query, **caller)

    assert 200 == answer.status, answer.text
    response = GetMessageClass(METHODS[method].output_type)()
    json_format.ParseDict(answer.json, response)
    assert answer.json or not METHODS[method].output_type.fields
    assert set(answer.json) <= {field.name for field in METHODS[method].output_type.fields}
    assert not [name for name in answer.headers if name.lower().startswith(("grpc-", "x-envoy-"))]


async def test_life_of_a_key(edge: Edge, acme: Tenant) -> None:
    """Create, read, change, switch, rotate, revoke and delete do what they say; each is seen through validate."""
    created = await edge.call(
        "POST",
        "/v1/api-keys",
        {
            "organization_id": acme.id,
            "name": "ci",
            "permissions": ["read"],
            "rate_limit_per_minute": 600,
            "expire_time": "2999-01-01T00:00:00Z",
            "environment": "ENVIRONMENT_TEST",
            "user_id": "u42",
            "user_email": "u42@example.com",
            "metadata": {"team": "payments"},
        },
    )
    key, token = created.json["key"], created.json["token"]
    assert token.startswith("lk_test_")
    assert ("KEY_TYPE_SECRET", "ENVIRONMENT_TEST", "KEY_STATE_ACTIVE") == (
        key["key_type"],
        key["environment"],
        key["state"],
    )
    path = f"/v1/api-keys/{key['id']}"

    async def outcome(of: str = token) -> str:
        answer = await edge.call("POST", "/v1/api-keys/validate", {"token": of, "cost": 0}, token="")
        return str(answer.json["outcome"]).removeprefix("OUTCOME_")

    validated = await edge.call("POST", "/v1/api-keys/validate", {"token": token}, token="")
    judged = validated.json
    assert ("OUTCOME_VALID", "u42", "u42@example.com", "ci", key["create_time"], "2999-01-01T00:00:00Z") == tuple(
        judged[name] for name in ("outcome", "user_id", "user_email", "key_name", "create_time", "expire_time")
    )
    assert {"limit": "600", "remaining": "599"} == {name: judged["rate_limit"][name] for name in ("limit", "remaining")}

    read = (await edge.call("GET", path)).json["key"]
    assert (key["id"], key["etag"], [], False) == (
        read["id"],
        read["etag"],
        read["allowed_cidrs"],
        "revoke_time" in read,
    )
    changed = await edge.call(
        "PATCH", path, {"name": "cd", "user_id": "left alone"}, params={"update_mask": "name", "etag": read["etag"]}
    )
    assert ("cd", "u42", "EFFECT_STATE_EFFECTIVE") == (
        changed.json["key"]["name"],
        changed.json["key"]["user_id"],
        changed.json["effect"]["state"],
    )
    assert changed.json["effect"]["revision"].isdigit()

    await edge.call("PATCH", f"{path}/toggle", {"active": False})
    assert "INACTIVE" == await outcome()
    await edge.call("PATCH", f"{path}/toggle", {})
    assert "VALID" == await outcome()
    rotated = (await edge.call("POST", f"{path}/rotate", {"grace_period": "60s"})).json
    assert ["VALID", "VALID"] == [await outcome(), await outcome(rotated["token"])]
    await edge.call("POST", f"{path}/revoke", {"reason": "leaked"})
    assert ["REVOKED", "REVOKED"] == [await outcome(), await outcome(rotated["token"])]
    deleted = await edge.call("DELETE", path)
    assert "KEY_STATE_DELETED" == deleted.json["key"]["state"]


async def test_batch(edge: Edge, acme: Tenant) -> None:
    """A batch is answered in its order, and a refused request of it is one answer among others."""
    created = await acme.key(permissions=["read"])
    requests = [
        {"token": created.token},
        {"api_key": created.token, "required_permissions": ["write"]},
        {"token": "no token"},
    ]
    answer = await edge.call("POST", "/v1/api-keys/validate:batch", {"requests": requests}, token="")
    assert ["OUTCOME_VALID", "OUTCOME_PERMISSION_DENIED", "OUTCOME_NOT_FOUND"] == [
        each["outcome"] for each in answer.json["responses"]
    ]


async def test_lists_in_pages(edge: Edge, acme: Tenant) -> None:
    """Filters and paging are query parameters; an empty list is there, and is empty."""
    made = [(await acme.key(user_id=user)).key.id for user in ("a b", "a b", "c")]
    found, token = [], ""
    while True:
        query = {"organization_id": acme.id, "user_id": "a b", "page_size": "1", "page_token": token}
        page = (await edge.call("GET", "/v1/api-keys", params=query)).json
        found += [key["id"] for key in page["keys"]]
        token = page["next_page_token"]
        if not token:
            break
    assert made[1::-1] == found
    query = {"organization_id": acme.id, "state": "KEY_STATE_REVOKED"}
    assert {"keys": [], "next_page_token": ""} == (await edge.call("GET", "/v1/api-keys", params=query)).json


async def test_callers_are_known_by_their_token(edge: Edge, acme: Tenant) -> None:
    """Latchgate itself judges who calls: a key of an organization sees its own, and no other."""
    reader = (await acme.key(permissions=["keys:read"])).token
    assert acme.admin_key_id in [
        key["id"] for key in (await edge.call("GET", "/v1/api-keys", token=reader)).json["keys"]
    ]
    assert (403, "PERMISSION_MISSING") == _told(await edge.call("POST", "/v1/api-keys", {"name": "x"}, token=reader))
    assert (404, "KEY_NOT_FOUND") == _told(await edge.call("GET", f"/v1/api-keys/{NOBODYS_KEY}", token=reader))


async def test_large_page(edge: Edge, acme: Tenant) -> None:
    """An answer larger than what a connection may hold gets through whole."""
    metadata = {f"k{number}": "v" * 250 for number in range(15)}
    for _ in range(20):
        await acme.key(metadata=metadata)
    page = (await edge.call("GET", "/v1/api-keys", params={"organization_id": acme.id, "page_size": "1000"})).json
    assert 21 == len(page["keys"])


def _told(answer: Any) -> tuple[int, str]:
    return answer.status, answer.reason


async def test_names_of_scopes_in_paths(edge: Edge, acme: Tenant) -> None:
    """A scope's name stands in a path as it is, or with `%3A` for its colons: where its last segment is also the verb
    of a path, such as `batch`, only so.
    """
    query = {"organization_id": acme.id}
    for name, written in (
        ("orders:read", "orders:read"),
        ("orders:read.all", "orders%3Aread.all"),
        ("orders:batch", "orders%3Abatch"),
    ):
        await acme.create_scope(name)
        removed = await edge.call("DELETE", f"/v1/api-keys/scopes/{written}", params=query)
        assert (200, False) == (removed.status, name in await acme.scope_names()), removed.text
    assert 404 == (await edge.call("DELETE", "/v1/api-keys/scopes/orders:batch", params=query)).status
