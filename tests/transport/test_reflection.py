"""Server reflection: stock grpcurl gets by without proto files."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final, cast

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.service import RunningService
from support.transport import DEADLINE_S, METHODS, SERVICES, grpcurl

MAX_THREADS: Final = 32
"""Of asyncio's own, on any machine."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_list_names_every_service(shared_service: RunningService) -> None:
    """`grpcurl list` shows all that is served, and nothing else."""
    listed = await grpcurl(shared_service.address, "list")

    assert [
        "apikeys.v1.AuditService",
        "apikeys.v1.ImportService",
        "apikeys.v1.KeyService",
        "apikeys.v1.OrganizationService",
        "apikeys.v1.TokenService",
        "apikeys.v1.UsageService",
        "apikeys.v1.WebhookService",
        "envoy.service.auth.v3.Authorization",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ] == listed.out.split()


@pytest.mark.parametrize("service", [service.full_name for service in SERVICES])
async def test_list_names_every_method(shared_service: RunningService, service: str) -> None:
    """`grpcurl list SERVICE` shows the methods of the contract."""
    listed = await grpcurl(shared_service.address, "list", service)

    expected = sorted(method.full_name for each in SERVICES if each.full_name == service for method in each.methods)
    assert expected == listed.out.split()


@pytest.mark.parametrize("method", ["apikeys.v1.KeyService.Validate", "apikeys.v1.OrganizationService.UpdatePlan"])
async def test_describe_knows_methods(shared_service: RunningService, method: str) -> None:
    """`grpcurl describe SERVICE.METHOD` works, although the pool of descriptors does not know methods by name."""
    described = await grpcurl(shared_service.address, "describe", method)

    assert ("", 0) == (described.err, described.status)
    assert described.out.startswith(f"{method} is a method:\nrpc {method.rpartition('.')[2]} (")


async def test_every_symbol_of_the_contract_is_found(shared_service: RunningService) -> None:
    """Reflection gives a file for every service, method, message, field and enum of the contract."""
    symbols = [service.full_name for service in SERVICES] + [method.full_name for method in METHODS.values()]
    for file in {service.file for service in SERVICES}:
        symbols += [each.full_name for each in file.enum_types_by_name.values()]
        for message in file.message_types_by_name.values():
            symbols += [message.full_name, *(field.full_name for field in message.fields)]
    assert len(symbols) > 100

    # The published types know of channels that are not aio's alone.
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", shared_service.channel))
    asked = iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol) for symbol in symbols])
    not_found = [
        answer.original_request.file_containing_symbol
        async for answer in stub.ServerReflectionInfo(asked)
        if not answer.file_descriptor_response.file_descriptor_proto
    ]
    assert [] == not_found


@pytest.mark.parametrize(
    ("symbol", "kind"),
    [
        ("apikeys.v1.KeyService", "a service"),
        ("apikeys.v1.ValidateRequest", "a message"),
        ("apikeys.v1.ValidateRequest.token", "a field"),
        ("apikeys.v1.Key.MetadataEntry", "the entry type for a map field"),
        ("apikeys.v1.Outcome", "an enum"),
        ("apikeys.v1.ErrorReason", "an enum"),
        ("google.protobuf.Timestamp", "a message"),
        ("google.protobuf.FieldMask", "a message"),
        ("buf.validate.field", "an extension"),
        ("google.api.http", "an extension"),
        ("grpc.health.v1.Health", "a service"),
        ("grpc.health.v1.Health.Check", "a method"),
    ],
)
async def test_describe_knows_all_that_is_asked_for(shared_service: RunningService, symbol: str, kind: str) -> None:
    """Services, messages, the types of their fields, and the options on them can be described."""
    described = await grpcurl(shared_service.address, "describe", symbol)

    assert described.out.startswith(f"{symbol} is {kind}:"), described


@pytest.mark.parametrize(
    "symbol", ["apikeys.v1.KeyService.Nothing", "apikeys.v1.Nothing", "nothing.at.All", "nothing", "apikeys.v1"]
)
async def test_describe_does_not_make_things_up(shared_service: RunningService, symbol: str) -> None:
    """A symbol that is not there is not found, also when what encloses it is there."""
    described = await grpcurl(shared_service.address, "describe", symbol)

    assert described.status != 0
    assert f"Symbol not found: {symbol}" in described.err


async def test_call_without_proto_files(shared_service: RunningService) -> None:
    """`grpcurl -d JSON` calls a method of which it knows nothing but what reflection tells."""
    called = await grpcurl(
        "-d", json.dumps({"token": "no token"}), shared_service.address, "apikeys.v1.KeyService/Validate"
    )

    assert "OUTCOME_NOT_FOUND" == json.loads(called.out)["outcome"]


async def test_refusal_is_shown_with_its_details(shared_service: RunningService) -> None:
    """What grpcurl prints of a refusal holds ErrorInfo and BadRequest, whose types it knows from reflection."""
    called = await grpcurl(
        "-H",
        f"authorization: {shared_service.root[0][1]}",
        "-d",
        json.dumps({"key_id": "no key"}),
        shared_service.address,
        "apikeys.v1.KeyService/GetKey",
    )

    assert called.status != 0
    assert "Code: InvalidArgument" in called.err
    assert '"reason":"INVALID_FIELD"' in called.err.replace(" ", "")
    assert '"field":"key_id"' in called.err.replace(" ", "")


async def test_open_streams_take_no_threads(shared_service: RunningService) -> None:
    """Whoever asks, and stays, keeps nobody else from asking: no stream takes one of the threads, which are few."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", shared_service.channel))
    streams = [stub.ServerReflectionInfo() for _ in range(2 * MAX_THREADS)]
    for stream in streams:
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    async with asyncio.timeout(DEADLINE_S):
        answers = [await stream.read() for stream in streams]
    assert all(answer.list_services_response.service for answer in answers)
    for stream in streams:
        stream.cancel()
