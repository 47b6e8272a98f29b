"""Callers with a JWT of the issuer, over REST through the real Envoy, and with stock grpcurl."""

from __future__ import annotations

import json
from pathlib import Path

from support.edge import edge as run_edge
from support.envoy import needs_envoy
from support.issuer import issuer, login_settings
from support.service import run_service
from support.transport import grpcurl


@needs_envoy
async def test_rest(database_url: str, tmp_path: Path) -> None:
    """Keys are managed over REST by the holder of a JWT; what is not accepted is 401 and says why."""
    async with (
        issuer() as login,
        run_service(database_url, **login_settings(login)) as service,
        run_edge(tmp_path, service.address) as edge,
    ):
        await service.create_organization("acme")
        token = login.token(scope="keys:read keys:write orders")
        created = await edge.call("POST", "/v1/api-keys", {"name": "ci"}, token=token)
        assert (200, f"{login.url}#alice") == (created.status, created.json["key"]["created_by"])
        listed = await edge.call("GET", "/v1/api-keys", token=token)
        assert [created.json["key"]["id"]] == [key["id"] for key in listed.json["keys"]]
        refused = await edge.call("GET", "/v1/api-keys", token=login.token(exp=1))
        assert (401, "CREDENTIALS_INVALID") == (refused.status, refused.reason)
        assert "has expired" in refused.json["message"]
        denied = await edge.call("GET", "/v1/audit-events", token=token)
        assert (403, "PERMISSION_MISSING") == (denied.status, denied.reason)


async def test_grpcurl(database_url: str) -> None:
    """Stock grpcurl needs nothing but the JWT."""
    async with issuer() as login, run_service(database_url, **login_settings(login)) as service:
        await service.create_organization("acme")
        header = f"authorization: Bearer {login.token()}"
        finished = await grpcurl(
            "-H", header, "-d", json.dumps({"name": "ci"}), service.address, "apikeys.v1.KeyService/CreateKey"
        )
        assert "" == finished.err
        assert f"{login.url}#alice" == json.loads(finished.out)["key"]["created_by"]
