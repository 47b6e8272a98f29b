"""A service of real processes, and an issuer over HTTPS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from support.fleets import OWN_CONNECTION, fleet, value
from support.issuer import AUDIENCE, DISCOVERY, issuer
from support.service import ROOT_TOKEN, Metadata, bearer

CONNECTIONS = 40


async def list_keys(address: str, caller: Metadata) -> None:
    """Lists keys, on a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        stub: Any = KeyServiceStub(channel)
        await stub.ListKeys(keys_pb.ListKeysRequest(), metadata=caller, wait_for_ready=True, timeout=30)


async def test_every_worker_reads_the_keys(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker lets in who has a JWT of an issuer whose certificate the machine trusts, and tells how old its keys
    are.
    """
    authority = trustme.CA()
    trusted, server = tmp_path / "ca.pem", ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.cert_pem.write_to_path(str(trusted))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    authority.issue_cert("127.0.0.1").configure_cert(server)
    async with (
        issuer(tls=server) as login,
        fleet(
            database_url,
            tmp_path,
            OIDC_ISSUER=login.url,
            OIDC_AUDIENCE=AUDIENCE,
            OIDC_ORGANIZATION_CLAIM="https://example.com/tenant",
            OIDC_PERMISSIONS_CLAIM="realm_access.roles",
        ) as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        organizations: Any = OrganizationServiceStub(channel)
        request = organizations_pb.CreateOrganizationRequest(organization_id="acme", name="Acme")
        await organizations.CreateOrganization(request, metadata=bearer(ROOT_TOKEN))
        claims: dict[str, Any] = {
            "https://example.com/tenant": "acme",
            "realm_access": {"roles": ["keys:read"]},
            "organization_id": None,
        }
        caller = login.caller(**claims)
        await asyncio.gather(*(list_keys(service.address, caller) for _ in range(CONNECTIONS)))
        assert 2 == login.asked[DISCOVERY]
        metrics = await service.metrics()
        assert all(0 <= value(metrics, "latchgate_issuer_keys_age_seconds", worker=str(each)) < 300 for each in (1, 2))
        await service.stop()
        assert login.token(**claims) not in service.process.text
