"""TLS between the real Envoy and latchgate, as the comments of deploy/envoy say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from support.edge import edge as run_edge
from support.envoy import needs_envoy
from support.keys import make_tenant
from support.service import run_service

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]


def tls_settings(authority: trustme.CA, folder: Path, name: str) -> dict[str, Any]:
    """Makes a certificate for latchgate under a name, and gives the settings that name its files."""
    issued = authority.issue_cert(name)
    files = {"tls_cert": folder / "latchgate.crt", "tls_key": folder / "latchgate.key"}
    issued.cert_chain_pems[0].write_to_path(files["tls_cert"])
    issued.private_key_pem.write_to_path(files["tls_key"])
    return files


async def test_latchgate_over_tls(database_url: str, tmp_path: Path) -> None:
    """With the lines for it taken out of their comments all goes to latchgate over TLS: health, API and ext_authz."""
    authority, folder = trustme.CA(), tmp_path / "envoy"
    folder.mkdir()
    async with (
        run_service(database_url) as plain,
        run_service(database_url, **tls_settings(authority, tmp_path, "latchgate")) as service,
        run_edge(folder, service.address, latchgate_ca=authority) as edge,
    ):
        created = await (await make_tenant(plain, "acme")).key()
        validated = await edge.call("POST", "/v1/api-keys/validate", {"token": created.token}, token="")
        assert "OUTCOME_VALID" == validated.json["outcome"]
        assert 200 == (await edge.call("GET", "/orders", token=created.token)).status
        assert 1 == (await edge.envoy.stats("cluster.latchgate."))["cluster.latchgate.membership_healthy"]


async def test_who_only_says_it_is_latchgate(database_url: str, tmp_path: Path) -> None:
    """A server with another name in its certificate, or one of another authority, is not asked: 503."""
    for number, (authority, name) in enumerate(((trustme.CA(), "other"), (None, "latchgate"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        shown = authority or trustme.CA()
        async with (
            run_service(database_url, **tls_settings(shown, tmp_path, name)) as service,
            run_edge(folder, service.address, latchgate_ca=authority or trustme.CA()) as edge,
        ):
            assert 503 == (await edge.call("GET", "/orders", token="lk_any")).status
