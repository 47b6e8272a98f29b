"""A whole service within the test's process, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.audit_service_pb2_grpc import AuditServiceStub
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from apikeys.v1.token_service_pb2_grpc import TokenServiceStub
from apikeys.v1.usage_service_pb2_grpc import UsageServiceStub
from apikeys.v1.webhook_service_pb2_grpc import WebhookServiceStub
from latchgate import config
from latchgate.app import Running, serving
from latchgate.listening import Role

ROOT_TOKEN = "root-token-of-the-tests-0123456789abcdef"
TAG_KEY = "tag-key-of-the-tests-0123456789abcdef"

Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    """The metadata by which a caller makes itself known."""
    return (("authorization", f"Bearer {token}"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallError:
    """What a refused call was told."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    violations: dict[str, str]


def call_error(error: grpc.aio.AioRpcError) -> CallError:
    """Reads code, ErrorInfo and BadRequest of a refused call."""
    reason, metadata, violations = "", {}, {}
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an AioRpcError has what it reads of a Call
    for detail in status.details if status else ():
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
            assert "latchgate" == info.domain
        elif detail.Unpack(bad_request):
            violations = {each.field: each.description for each in bad_request.field_violations}
    return CallError(
        code=error.code(), reason=reason, message=error.details() or "", metadata=metadata, violations=violations
    )


async def refusal(call: Any) -> CallError:
    """Awaits a call that must be refused, and gives what it was told."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return call_error(caught.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """A service that listens, with stubs on one channel. The root token is ROOT_TOKEN."""

    address: str
    database_url: str
    running: Running
    channel: grpc.aio.Channel
    keys: Any
    organizations: Any
    audit: Any
    usage: Any
    webhooks: Any
    tokens: Any
    root: Metadata

    async def create_organization(self, organization_id: str = "acme", plan_id: str = "") -> str:
        """Makes an organization, and gives its id."""
        await self.organizations.CreateOrganization(
            organizations_pb.CreateOrganizationRequest(
                organization_id=organization_id, name=organization_id.title(), plan_id=plan_id
            ),
            metadata=self.root,
        )
        return organization_id

    async def create_key(
        self,
        organization_id: str = "acme",
        *,
        metadata: Metadata | None = None,
        permissions: Sequence[str] = ("read",),
        **fields: Any,
    ) -> keys_pb.CreateKeyResponse:
        """Makes a key as root, or as whom the metadata says."""
        fields.setdefault("name", "a key")
        created: keys_pb.CreateKeyResponse = await self.keys.CreateKey(
            keys_pb.CreateKeyRequest(organization_id=organization_id, permissions=permissions, **fields),
            metadata=metadata or self.root,
        )
        return created

    async def get_key(self, key_id: str) -> key_pb2.Key:
        """Reads a key as root."""
        answer: keys_pb.GetKeyResponse = await self.keys.GetKey(
            keys_pb.GetKeyRequest(key_id=key_id), metadata=self.root
        )
        return answer.key

    async def validate(self, token: str, **fields: Any) -> keys_pb.ValidateResponse:
        """Asks Validate."""
        answer: keys_pb.ValidateResponse = await self.keys.Validate(keys_pb.ValidateRequest(token=token, **fields))
        return answer

    async def outcome(self, token: str, **fields: Any) -> str:
        """Asks Validate, and gives the outcome's name: `VALID`, `REVOKED` ..."""
        answer = await self.validate(token, **fields)
        return keys_pb.Outcome.Name(answer.outcome).removeprefix("OUTCOME_")


def make_settings(database_url: str, **overrides: Any) -> config.Settings:
    """Settings for a service of a test's own: free ports, the tests' root token and tag key, quick to stop."""
    values: dict[str, Any] = {
        "database_url": database_url,
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "root_token": ROOT_TOKEN,
        "tag_key": TAG_KEY,
        "drain_seconds": 5.0,
    }
    return config.load(**(values | overrides))


@asynccontextmanager
async def run_service(database_url: str, role: Role = Role.ALONE, **overrides: Any) -> AsyncIterator[RunningService]:
    """Runs a whole service until the block ends."""
    async with serving(make_settings(database_url, **overrides), role) as running:
        await running.ready
        address = f"127.0.0.1:{running.server.port}"
        async with grpc.aio.insecure_channel(address) as channel:
            yield RunningService(
                address=address,
                database_url=database_url,
                running=running,
                channel=channel,
                keys=KeyServiceStub(channel),
                organizations=OrganizationServiceStub(channel),
                audit=AuditServiceStub(channel),
                usage=UsageServiceStub(channel),
                webhooks=WebhookServiceStub(channel),
                tokens=TokenServiceStub(channel),
                root=bearer(ROOT_TOKEN),
            )
