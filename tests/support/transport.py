"""The wire as seen from outside: bytes instead of messages, frames instead of calls, and stock programs."""

from __future__ import annotations

import asyncio
import ssl
import struct
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from apikeys.v1 import audit_service_pb2 as audit_pb
from apikeys.v1 import import_service_pb2 as imports_pb
from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1 import token_service_pb2 as tokens_pb
from apikeys.v1 import usage_service_pb2 as usage_pb
from apikeys.v1 import webhook_service_pb2 as webhooks_pb
from support.folders import cloning
from support.service import Metadata, RunningService, bearer
from support.tokens import next_refresh_token
from support.webhooks import PLANTED, next_deletable

SERVICES: Final = (
    keys_pb.DESCRIPTOR.services_by_name["KeyService"],
    organizations_pb.DESCRIPTOR.services_by_name["OrganizationService"],
    audit_pb.DESCRIPTOR.services_by_name["AuditService"],
    usage_pb.DESCRIPTOR.services_by_name["UsageService"],
    imports_pb.DESCRIPTOR.services_by_name["ImportService"],
    webhooks_pb.DESCRIPTOR.services_by_name["WebhookService"],
    tokens_pb.DESCRIPTOR.services_by_name["TokenService"],
)
METHODS: Final[Mapping[str, MethodDescriptor]] = {
    method.name: method for service in SERVICES for method in service.methods if not method.client_streaming
}
"""Every method of the contract by its name, but those that take a stream; tests/rpc/test_import_calls.py has these."""

OPEN_METHODS: Final = ("Validate", "BatchValidate")
RULED_METHODS: Final = tuple(name for name in METHODS if name not in OPEN_METHODS)
"""Those whose requests keep the contract's rules by themselves."""
NOT_FOR_ROOT: Final = ("ExchangeKey", "RefreshToken", "RevokeToken", "GetJwks")
"""Those whose callers are not root: the key that is exchanged, whoever has a refresh token, or anyone."""
MANAGEMENT_METHODS: Final = tuple(name for name in RULED_METHODS if name not in NOT_FOR_ROOT)
GRPCURL: Final = Path(sys.executable).parent / "grpcurl"
DEADLINE_S: Final = 20.0
"""How long a test waits for what must come; far longer than it takes."""


def path_of(method: str) -> str:
    """Gives the path by which gRPC calls a method of the contract."""
    descriptor = METHODS[method]
    return f"/{descriptor.containing_service.full_name}/{descriptor.name}"


def label_of(method: str) -> str:
    """Gives the name under which a method is logged and counted."""
    return f"{METHODS[method].containing_service.name}/{method}"


def calls(service: RunningService, method: str, code: str) -> float:
    """Says how many calls of a method ended with a code."""
    return sample(service, "latchgate_calls_total", method=label_of(method), code=code)


def request_class(method: str) -> type[Message]:
    """Gives the class of a method's requests."""
    return GetMessageClass(METHODS[method].input_type)


def call_path(channel: grpc.aio.Channel, path: str, raw: bytes, **options: Any) -> Any:
    """Starts a call of any path with bytes as its request."""
    start: Any = channel.unary_unary(path)
    return start(raw, **options)


def call_raw(
    channel: grpc.aio.Channel,
    method: str,
    raw: bytes,
    *,
    metadata: Metadata | None = None,
    timeout_s: float | None = None,
) -> Any:
    """Starts a call of a method of the contract with bytes as its request."""
    return call_path(channel, path_of(method), raw, metadata=metadata, timeout=timeout_s)


async def call(service: RunningService, method: str, request: Message, *, metadata: Metadata | None = None) -> Any:
    """Calls a method by its name; as root unless told otherwise, or as a new key where root may not call."""
    stubs = {
        "KeyService": service.keys,
        "OrganizationService": service.organizations,
        "AuditService": service.audit,
        "UsageService": service.usage,
        "WebhookService": service.webhooks,
        "TokenService": service.tokens,
    }
    stub = stubs[METHODS[method].containing_service.name]
    if method == "ExchangeKey" and metadata is None:
        metadata = bearer((await service.create_key("acme")).token)
    return await getattr(stub, method)(request, metadata=service.root if metadata is None else metadata)


def length_delimited(number: int, content: bytes) -> bytes:
    """Writes a field of a protobuf message by hand: a string, bytes or a message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])


def sample(service: RunningService, name: str, **labels: str) -> float:
    """Reads a metric of a service; 0 if it has not been counted yet."""
    return service.running.metrics.registry.get_sample_value(name, labels) or 0.0


def lookups(service: RunningService) -> float:
    """Says how many digests the database was asked for."""
    return sum(sample(service, "latchgate_lookups_total", result=result) for result in ("answered", "error"))


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Waits for something that can only be looked at."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < deadline_s, "what was waited for did not come"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def fresh_database(postgres_url: str, template_url: str) -> AsyncIterator[str]:
    """Makes a migrated database for as long as the block lasts."""
    name = f"transport_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(cloning(name, template_url))
        try:
            yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a program has said."""

    status: int
    out: str
    err: str


async def grpcurl(*arguments: str) -> Finished:
    """Runs stock grpcurl, without any proto file."""
    process = await asyncio.create_subprocess_exec(
        GRPCURL, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    return Finished(status=process.returncode or 0, out=out.decode(), err=err.decode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame of HTTP/2 (RFC 9113, section 4)."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Http2:
    """A client that speaks HTTP/2 by hand, to send what no gRPC library lets through."""

    DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
    ACK = END_STREAM = 1
    END_HEADERS = 4
    MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE = 3, 4, 6
    ENHANCE_YOUR_CALM = 11

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes an open connection."""
        self._reader = reader
        self._writer = writer
        self._next_stream = 1

    @classmethod
    @asynccontextmanager
    async def connected(
        cls, port: int, settings: Mapping[int, int] | None = None, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[Http2]:
        """Connects, over TLS to the name `localhost` if told so, and sends the preface with these settings."""
        name = "localhost" if tls else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name)
        client = cls(reader, writer)
        try:
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            payload = b"".join(struct.pack(">HI", *setting) for setting in (settings or {}).items())
            await client.send(cls.SETTINGS, 0, 0, payload)
            yield client
        finally:
            # The server does not answer the end of TLS, for which a close would wait.
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    @property
    def certificate(self) -> bytes:
        """The server's certificate (DER)."""
        found: bytes = self._writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return found

    async def ping(self) -> None:
        """Sends a PING and waits for its answer."""
        await self.send(self.PING, 0, 0, b"latchgat")
        while (frame := await self.frame(self.PING)).payload != b"latchgat" or not frame.flags & self.ACK:
            pass

    async def send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Sends a frame."""
        self._writer.write(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)
        await self._writer.drain()

    async def start_call(self, path: str, message: bytes = b"", headers: Iterable[tuple[bytes, bytes]] = ()) -> int:
        """Sends a whole unary call, and gives its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fixed = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", b"latchgate"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
        # Each pair is preceded by a zero byte: a literal that is not to be indexed (RFC 7541, section 6.2.2).
        block = b"".join(b"\0" + _literal(name) + _literal(value) for name, value in (*fixed, *headers))
        await self.send(self.HEADERS, self.END_HEADERS, stream, block)
        await self.send(self.DATA, self.END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message)
        return stream

    async def frame(self, kind: int, stream: int | None = None) -> Frame:
        """Waits for a frame of a kind; all others before it are answered, if they must be, and let pass."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                frame = Frame(
                    kind=head[3], flags=head[4], stream=int.from_bytes(head[5:], "big") & 0x7FFFFFFF, payload=payload
                )
                if frame.kind in (self.SETTINGS, self.PING) and not frame.flags & self.ACK:
                    answer = frame.payload if frame.kind == self.PING else b""
                    await self.send(frame.kind, self.ACK, 0, answer)
                if frame.kind == kind and stream in (None, frame.stream):
                    return frame

    async def settings(self) -> dict[int, int]:
        """Waits for what the server announces."""
        frame = await self.frame(self.SETTINGS)
        return dict(struct.iter_unpack(">HI", frame.payload))


def _literal(text: bytes) -> bytes:
    """Writes a string without Huffman coding (RFC 7541, section 5.2)."""
    length = len(text)
    return (bytes([length]) if length < 0x7F else b"\x7f" + _varint(length - 0x7F)) + text


def good_request(method: str, *, key_id: str, organization_id: str = "acme", token: str = "") -> Message:
    """Makes a request that keeps all rules of a method. The names of new things are never used twice."""
    unique = uuid.uuid4().hex
    make: dict[str, Callable[[], Message]] = {
        "CreateKey": lambda: keys_pb.CreateKeyRequest(
            organization_id=organization_id,
            name="a key",
            permissions=["read"],
            metadata={"team": "payments"},
            allowed_cidrs=["192.0.2.0/24"],
            request_id=str(uuid.uuid4()),
        ),
        "GetKey": lambda: keys_pb.GetKeyRequest(key_id=key_id),
        "ListKeys": lambda: keys_pb.ListKeysRequest(organization_id=organization_id),
        "UpdateKey": lambda: keys_pb.UpdateKeyRequest(key=key_pb2.Key(id=key_id, name=unique)),
        "ToggleKey": lambda: keys_pb.ToggleKeyRequest(key_id=key_id),
        "RotateKey": lambda: keys_pb.RotateKeyRequest(key_id=key_id, request_id=str(uuid.uuid4())),
        "RevokeKey": lambda: keys_pb.RevokeKeyRequest(key_id=key_id, reason="not needed any more"),
        "DeleteKey": lambda: keys_pb.DeleteKeyRequest(key_id=key_id),
        "UndeleteKey": lambda: keys_pb.UndeleteKeyRequest(key_id=key_id),
        "GetPublishableKey": lambda: keys_pb.GetPublishableKeyRequest(organization_id=organization_id),
        "ListScopes": lambda: keys_pb.ListScopesRequest(organization_id=organization_id),
        "CreateScope": lambda: keys_pb.CreateScopeRequest(
            organization_id=organization_id, name=f"s-{unique}:read", description="Read some."
        ),
        "DeleteScope": lambda: keys_pb.DeleteScopeRequest(organization_id=organization_id, name="orders:gone"),
        "Validate": lambda: keys_pb.ValidateRequest(token=token),
        "BatchValidate": lambda: keys_pb.BatchValidateRequest(requests=[keys_pb.ValidateRequest(token=token)]),
        "GetUsage": lambda: usage_pb.GetUsageRequest(
            organization_id=organization_id, key_id=key_id, step=usage_pb.USAGE_STEP_DAY
        ),
        "ListUnusedKeys": lambda: usage_pb.ListUnusedKeysRequest(organization_id=organization_id, unused_days=30),
        "CreateOrganization": lambda: organizations_pb.CreateOrganizationRequest(
            organization_id=f"o-{unique}",
            name="an organization",
            scopes=[organizations_pb.ScopeDefinition(name="orders:read", description="Read orders.")],
        ),
        "GetOrganization": lambda: organizations_pb.GetOrganizationRequest(organization_id=organization_id),
        "ListOrganizations": organizations_pb.ListOrganizationsRequest,
        "UpdateOrganization": lambda: organizations_pb.UpdateOrganizationRequest(
            organization=organizations_pb.Organization(
                id=organization_id,
                name="another name",
                scopes=[organizations_pb.ScopeDefinition(name="orders:read", description="Read orders.")],
            )
        ),
        "CreatePlan": lambda: organizations_pb.CreatePlanRequest(
            plan=organizations_pb.Plan(id=f"p-{unique}", max_keys=10)
        ),
        "ListPlans": organizations_pb.ListPlansRequest,
        "UpdatePlan": lambda: organizations_pb.UpdatePlanRequest(
            plan=organizations_pb.Plan(id="default", rate_limit_per_minute=6000)
        ),
        "ListSuspiciousUse": lambda: audit_pb.ListSuspiciousUseRequest(organization_id=organization_id),
        "ListAuditEvents": lambda: audit_pb.ListAuditEventsRequest(organization_id=organization_id),
        "CreateWebhook": lambda: webhooks_pb.CreateWebhookRequest(
            organization_id=organization_id, url="https://hooks.invalid/", event_types=["webhook.disabled"]
        ),
        "GetWebhook": lambda: webhooks_pb.GetWebhookRequest(webhook_id=PLANTED),
        "ListWebhooks": lambda: webhooks_pb.ListWebhooksRequest(organization_id="org_root"),
        "UpdateWebhook": lambda: webhooks_pb.UpdateWebhookRequest(
            webhook=webhooks_pb.Webhook(
                id=PLANTED, url=f"https://hooks.invalid/{unique}", event_types=["webhook.disabled"]
            )
        ),
        "DeleteWebhook": lambda: webhooks_pb.DeleteWebhookRequest(webhook_id=next_deletable()),
        "RotateWebhookSecret": lambda: webhooks_pb.RotateWebhookSecretRequest(webhook_id=PLANTED),
        "ListWebhookDeliveries": lambda: webhooks_pb.ListWebhookDeliveriesRequest(webhook_id=PLANTED),
        "RedeliverWebhook": lambda: webhooks_pb.RedeliverWebhookRequest(webhook_id=PLANTED),
        "SendTestEvent": lambda: webhooks_pb.SendTestEventRequest(webhook_id=PLANTED),
        "ExchangeKey": lambda: tokens_pb.ExchangeKeyRequest(permissions=["read"], audience="orders"),
        "RefreshToken": lambda: tokens_pb.RefreshTokenRequest(
            refresh_token=next_refresh_token(), request_id=str(uuid.uuid4())
        ),
        "RevokeToken": lambda: tokens_pb.RevokeTokenRequest(refresh_token=next_refresh_token()),
        "GetJwks": tokens_pb.GetJwksRequest,
        "RotateSigningKeys": tokens_pb.RotateSigningKeysRequest,
    }
    return make[method]()
