"""Clients of other systems, whose requests are the same but for the host, through the real Envoy."""

from __future__ import annotations

import pytest

from support.edge import Edge
from support.envoy import needs_envoy
from support.keys import Tenant

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

JSON = {"Content-Type": "application/json"}


async def test_validate_by_api_key(edge: Edge, acme: Tenant) -> None:
    """A token may be called `api_key`, by this path and by latchgate's own; nothing else is needed to ask."""
    created = await acme.key(user_id="u42", user_email="u42@example.com", name="build")
    for path in (
        "/api/v2/external/auth/api-keys/validate",
        "/auth/api-keys/validate",
        "/api/api-keys/validate",
        "/v1/api-keys/validate",
    ):
        answer = await edge.call("POST", path, {"api_key": created.token}, token="")
        assert (200, "OUTCOME_VALID", "u42", "u42@example.com", "build") == (
            answer.status,
            *(answer.json[name] for name in ("outcome", "user_id", "user_email", "key_name")),
        )
        assert answer.json["create_time"]
        refused = await edge.call("POST", path, {"api_key": "lk_..."}, token="")
        assert (200, "OUTCOME_NOT_FOUND", "") == (refused.status, refused.json["outcome"], refused.json["user_id"])


async def test_content_type_of_a_form(edge: Edge, acme: Tenant) -> None:
    """JSON that curl sends as a form, as it does unless told otherwise, is read as JSON."""
    created = await acme.key()
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = await edge.call("POST", "/auth/api-keys/validate", {"api_key": created.token}, token="", headers=headers)
    assert "OUTCOME_VALID" == answer.json["outcome"]


@pytest.mark.parametrize("base", ["/api/v2/external/auth/api-keys", "/auth/api-keys", "/api/api-keys"])
async def test_a_life_by_their_paths(edge: Edge, acme: Tenant, base: str) -> None:
    """List, create, switch, revoke and scopes by the paths of others, with a slash at the end and without."""
    admin = acme.admin[0][1].removeprefix("Bearer ")
    draft = {
        "name": 'Production "expires_at": API',
        "permissions": ["read", "write"],
        "rate_limit_per_minute": 60,
        "expires_at": "2999-12-31T23:59:59Z",
    }
    created = (await edge.call("POST", f"{base}/", draft, token=admin)).json
    key = created["key"]
    assert 40 == len(created["token"].removeprefix("lk_"))
    assert (draft["name"], "2999-12-31T23:59:59Z", 60) == (
        key["name"],
        key["expire_time"],
        key["rate_limit_per_minute"],
    )
    for end in ("", "/"):
        listed = (await edge.call("GET", base + end, token=admin, params={"page_size": "1"})).json
        assert [key["id"]] == [each["id"] for each in listed["keys"]]
    assert "read" in [scope["name"] for scope in (await edge.call("GET", f"{base}/scopes", token=admin)).json["scopes"]]
    for state in ("INACTIVE", "ACTIVE"):
        toggled = await edge.call("PATCH", f"{base}/{key['id']}/toggle", token=admin)
        assert f"KEY_STATE_{state}" == toggled.json["key"]["state"]
    assert 200 == (await edge.call("DELETE", f"{base}/{key['id']}", token=admin)).status
    answer = await edge.call("POST", f"{base}/validate", {"api_key": created["token"]}, token="")
    assert "OUTCOME_REVOKED" == answer.json["outcome"]


async def test_requests_that_a_key_opens(edge: Edge, acme: Tenant) -> None:
    """A key opens what stands behind the gateway, as a Bearer token and as X-API-Key; another does not."""
    created = await acme.key(permissions=["write"])
    bearer, api_key = {"Authorization": f"Bearer {created.token}"}, {"X-API-Key": created.token}
    for path, headers in (
        ("/api/v2/external/billing/credits", bearer),
        ("/t/acme/api/v1/admin/users", bearer),
        ("/t/acme/api/v1/admin/users", api_key),
    ):
        answer = await edge.call("GET", path, token="", headers=headers)
        assert (200, path) == (answer.status, answer.text)
        assert created.key.id == edge.upstream.last["x-latchgate-key-id"]
        await acme.toggle(created.key.id, active=False)
        assert 401 == (await edge.call("GET", path, token="", headers=headers)).status
        await acme.toggle(created.key.id, active=True)


async def test_paths_that_only_look_like_theirs(edge: Edge, acme: Tenant) -> None:
    """A path that merely begins or ends like one of theirs is one of the upstream's, and needs a key."""
    token = (await acme.key()).token
    for path in ("/auth/api-keys2", "/x/auth/api-keys", "/api/api-keysx/validate", "/v1/api-keys2", "/v1"):
        assert 401 == (await edge.call("POST", path, {"api_key": "x"}, token="")).status
        answer = await edge.call("POST", path, {"api_key": "x"}, token=token)
        assert (200, path) == (answer.status, answer.text)
