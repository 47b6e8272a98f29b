"""The gRPC server: its limits, its services, health and reflection."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc
from envoy.service.auth.v3 import external_auth_pb2
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from apikeys.v1 import (
    audit_service_pb2,
    import_service_pb2,
    key_service_pb2,
    organization_service_pb2,
    token_service_pb2,
    usage_service_pb2,
    webhook_service_pb2,
)
from latchgate.rpc import ext_authz
from latchgate.rpc.audit_service import AuditService
from latchgate.rpc.ext_authz import ExtAuthz
from latchgate.rpc.health import Health
from latchgate.rpc.import_service import ImportService
from latchgate.rpc.key_service import KeyService
from latchgate.rpc.organization_service import OrganizationService
from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.token_service import TokenService
from latchgate.rpc.usage_service import UsageService
from latchgate.rpc.webhook_service import WebhookService

KEY_SERVICE: Final = key_service_pb2.DESCRIPTOR.services_by_name["KeyService"]
ORGANIZATION_SERVICE: Final = organization_service_pb2.DESCRIPTOR.services_by_name["OrganizationService"]
AUDIT_SERVICE: Final = audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"]
WEBHOOK_SERVICE: Final = webhook_service_pb2.DESCRIPTOR.services_by_name["WebhookService"]
TOKEN_SERVICE: Final = token_service_pb2.DESCRIPTOR.services_by_name["TokenService"]
USAGE_SERVICE: Final = usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]
IMPORT_SERVICE: Final = import_service_pb2.DESCRIPTOR.services_by_name["ImportService"]
EXT_AUTHZ_SERVICE: Final[ServiceDescriptor] = external_auth_pb2.DESCRIPTOR.services_by_name["Authorization"]
SERVICES: Final = (
    KEY_SERVICE,
    ORGANIZATION_SERVICE,
    AUDIT_SERVICE,
    USAGE_SERVICE,
    IMPORT_SERVICE,
    WEBHOOK_SERVICE,
    TOKEN_SERVICE,
    EXT_AUTHZ_SERVICE,
)

VALIDATE: Final = KEY_SERVICE.methods_by_name["Validate"]
CHECK: Final = EXT_AUTHZ_SERVICE.methods_by_name["Check"]
# Those that judge tokens, and of them those that are answered from memory, with bytes.
_HOT_METHODS: Final = frozenset({VALIDATE, CHECK, KEY_SERVICE.methods_by_name["BatchValidate"]})
_RECALLED_METHODS: Final = frozenset({VALIDATE, CHECK})
# Those whose callers are not known by the metadata: by the request itself, or not at all.
_VISITED_METHODS: Final = frozenset(
    TOKEN_SERVICE.methods_by_name[name] for name in ("RefreshToken", "RevokeToken", "GetJwks")
)
# How errors are told where a protocol has words of its own for them.
_REFUSALS: Final = {CHECK: ext_authz.refuse}

# A request of 100 tokens of any sane length fits; a token of 1 MB fits too, and is told that it is none.
MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
MAX_RESPONSE_BYTES: Final = 16 * 1024 * 1024
MAX_STREAMS: Final = 10_000

_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    # Headers up to 16 KiB are always taken, beyond 64 KiB never.
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 64 * 1024),
    # More than a client has under way that means well. At the limit even such a one is refused calls: grpc counts those
    # that end a moment longer than the client does. Calls that no handler has taken up yet have the same bound; beyond
    # grpc's own of 1000 some would be cancelled at random.
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.server.max_pending_requests", MAX_STREAMS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_STREAMS),
    # For calls that are under way when their connection is of age: an import may take so long.
    ("grpc.max_connection_age_grace_ms", 600_000),
    # Find clients that are gone.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Let clients ping as often as grpc-go (10 s) and Envoy (as configured) may, with nothing under way too.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # No pings to find out how much a connection can hold: requests are small, and each ping costs what a call does.
    ("grpc.http2.bdp_probe", 0),
)


def options(connection_age_s: float) -> Sequence[tuple[str, int]]:
    """Gives grpc's options for the server.

    Clients are told to connect anew when their connection has that age, a tenth more or less (grpc draws it), so that
    they spread over new workers and leave old ones; what they send before they have done so is answered.
    """
    return (*_OPTIONS, ("grpc.max_connection_age_ms", round(connection_age_s * 1000)))


SERVERS: Final = 8
"""How many of grpc's servers share a worker's port.

One takes up calls one by one, and for each the loop has to wait for grpc's poller thread: two switches of threads a
call. Of several each takes one up in a turn. `make bench-settings` shows what that saves.
"""


class ListenError(Exception):
    """The address can not be listened on. The message names it."""


@dataclass(slots=True, kw_only=True)
class RpcServer:
    """Servers of grpc's that share a port, with their health servicer. `port` is 0 until they listen."""

    servers: Sequence[grpc.aio.Server]
    health: Health
    port: int = 0

    async def listen(self, address: str, credentials: Callable[[], grpc.ServerCredentials] | None) -> None:
        """Takes calls on an address, from now on. Raises ListenError.

        Each server has credentials of its own.
        """
        try:
            for each in self.servers:
                add = each.add_insecure_port
                self.port = each.add_secure_port(address, credentials()) if credentials else add(address)
                # The others get the port that the first has found, if it was to find one.
                address = f"{address.rpartition(':')[0]}:{self.port}"
        except RuntimeError:
            raise ListenError(
                f"{address} can not be listened on: it is in use, or is no address of this machine"
            ) from None
        for each in self.servers:
            await each.start()

    async def set_serving(self, *, is_serving: bool) -> None:
        """Tells health checks whether the service can answer."""
        self.health.set_serving(is_serving=is_serving)

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING for good, takes no new calls, and gives those under way `grace_s` seconds to finish."""
        self.health.stop()
        await asyncio.gather(*(each.stop(grace_s) for each in self.servers))


class _ReflectionPool:
    """The default pool, which finds methods as well: `grpcurl describe SERVICE.METHOD` asks for their file by name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 - named by protobuf
        """Finds the file of a symbol. Raises KeyError."""
        pool = descriptor_pool.Default()
        try:
            return pool.FindFileContainingSymbol(symbol)
        except KeyError:
            # The C pool knows all symbols but methods.
            return pool.FindMethodByName(symbol).containing_service.file


class _Unregistered:
    """A server whose methods are found by their names alone, though generated code would register them as well.

    For each method that is registered grpc.aio asks for a call of its own, and at every call, of whichever method, it
    waits for all of these anew (`asyncio.wait`).
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, _service: str, _handlers: Mapping[str, object]) -> None:
        """Does nothing: they are among the generic ones too."""


def make_server(*, pipeline: Pipeline, connection_age_s: float, shares_port: bool = False) -> RpcServer:
    """Makes a server that does not listen yet; its health is NOT_SERVING.

    Unless it `shares_port`, no other can have the same one: two must not do so by accident. Then it is a single one of
    grpc's.
    """
    handlers = (
        _bind(KEY_SERVICE, KeyService, pipeline),
        _bind(ORGANIZATION_SERVICE, OrganizationService, pipeline),
        _bind(AUDIT_SERVICE, AuditService, pipeline),
        _bind(USAGE_SERVICE, UsageService, pipeline),
        _bind(IMPORT_SERVICE, ImportService, pipeline),
        _bind(WEBHOOK_SERVICE, WebhookService, pipeline),
        _bind(TOKEN_SERVICE, TokenService, pipeline),
        _bind(EXT_AUTHZ_SERVICE, ExtAuthz, pipeline),
    )
    served = [service.full_name for service in SERVICES]
    health_servicer = Health(served)
    # Not by enable_server_reflection, which gives any other server than grpc's own one that needs threads.
    reflection_servicer = reflection.aio.ReflectionServicer(
        [*served, health.SERVICE_NAME, reflection.SERVICE_NAME],
        pool=cast("descriptor_pool.DescriptorPool", _ReflectionPool()),
    )
    servers = []
    for _ in range(SERVERS if shares_port else 1):
        server = grpc.aio.server(options=[*options(connection_age_s), ("grpc.so_reuseport", int(shares_port))])
        server.add_generic_rpc_handlers(handlers)
        unregistered = cast("grpc.aio.Server", _Unregistered(server))
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, unregistered)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]  # has no stubs
            reflection_servicer, unregistered
        )
        servers.append(server)
    return RpcServer(servers=servers, health=health_servicer)


def _bind(
    service: ServiceDescriptor,
    implementation: type[object],
    pipeline: Pipeline,
) -> grpc.GenericRpcHandler:
    """Binds every method of a service; one that is not implemented fails here, at the start."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        handler = getattr(implementation, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method.name).lower())
        if method.client_streaming:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(
                pipeline.streaming(method, handler),
                request_deserializer=None,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            continue
        recalled = method in _RECALLED_METHODS
        if method in _HOT_METHODS:
            hot = pipeline.validation(method, handler, _REFUSALS.get(method))
            behave = pipeline.recalling(method, hot) if recalled else hot.behave
        elif method in _VISITED_METHODS:
            behave = pipeline.visited(method, handler)
        else:
            behave = pipeline.management(method, handler)
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            behave,
            # Requests are parsed within the behaviour, so that unreadable ones are answered like all other errors.
            request_deserializer=None,
            response_serializer=None if recalled else GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
