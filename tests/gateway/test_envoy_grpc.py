"""gRPC and gRPC-web through the real Envoy."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from apikeys.v1 import import_service_pb2 as imports_pb
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.import_service_pb2_grpc import ImportServiceStub
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from support.edge import Edge
from support.envoy import needs_envoy
from support.imports import foreign_token, outcomes, row
from support.keys import NOBODYS_KEY, Tenant
from support.service import bearer, refusal
from support.transport import DEADLINE_S, GRPCURL, call_path

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

ORIGIN = "https://console.example.com"
VALIDATE = "/apikeys.v1.KeyService/Validate"


async def test_grpc(edge: Edge, acme: Tenant) -> None:
    """A client of gRPC finds the same service behind Envoy as without it, its errors with all their details."""
    created = await acme.key(permissions=["read"])
    async with edge.channel() as channel:
        stub: Any = KeyServiceStub(channel)
        judged = await stub.Validate(keys_pb.ValidateRequest(token=created.token))
        assert (keys_pb.OUTCOME_VALID, created.key.id) == (judged.outcome, judged.key_id)
        read = await stub.GetKey(keys_pb.GetKeyRequest(key_id=created.key.id), metadata=acme.admin)
        assert created.key.id == read.key.id
        error = await refusal(stub.GetKey(keys_pb.GetKeyRequest(key_id=NOBODYS_KEY), metadata=acme.admin))
        assert (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND") == (error.code, error.reason)
        error = await refusal(stub.ListKeys(keys_pb.ListKeysRequest(page_size=-1), metadata=acme.admin))
        assert {"page_size"} == set(error.violations)


async def test_grpcurl(edge: Edge, acme: Tenant) -> None:
    """Stock grpcurl needs the descriptor set that lies beside Envoy's configuration, and nothing else."""
    created = await acme.key()
    process = await asyncio.create_subprocess_exec(
        GRPCURL,
        *("-cacert", str(edge.envoy.ca_file), "-protoset", str(edge.envoy.folder / "apikeys.binpb")),
        *("-d", json.dumps({"api_key": created.token})),
        *(f"localhost:{edge.envoy.port}", "apikeys.v1.KeyService/Validate"),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_S):
        out, _ = await process.communicate()
    assert "OUTCOME_VALID" == json.loads(out)["outcome"]


async def test_import(edge: Edge, acme: Tenant) -> None:
    """A stream of requests goes through Envoy as it is: each is answered before the next is sent."""
    requests: asyncio.Queue[imports_pb.ImportKeysRequest | None] = asyncio.Queue()

    async def each() -> AsyncIterator[imports_pb.ImportKeysRequest]:
        while (request := await requests.get()) is not None:
            yield request

    async with edge.channel() as channel:
        stub: Any = ImportServiceStub(channel)
        responses = aiter(stub.ImportKeys(each(), metadata=acme.admin, timeout=DEADLINE_S))
        for _ in range(3):
            token = foreign_token()
            requests.put_nowait(imports_pb.ImportKeysRequest(keys=[row(1, token)]))
            assert ["CREATED"] == outcomes(await anext(responses))
            assert "VALID" == await acme.service.outcome(token)
        requests.put_nowait(None)
        assert [] == [response async for response in responses]


async def test_grpc_to_the_upstream(edge: Edge) -> None:
    """A client of gRPC without a key is told so in gRPC's words: its own status, and the reason in ErrorInfo."""
    async with edge.channel() as channel:
        error = await refusal(call_path(channel, "/shop.v1.Orders/List", b""))
        assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING") == (error.code, error.reason)
        error = await refusal(call_path(channel, "/shop.v1.Orders/List", b"", metadata=bearer("lk_nonsense")))
        assert (grpc.StatusCode.UNAUTHENTICATED, "NOT_FOUND") == (error.code, error.reason)
        assert "the token is not known" == error.message


async def test_ext_authz_is_not_served_to_clients(edge: Edge) -> None:
    """What only gateways may ask is not reached through one."""
    async with edge.channel() as channel:
        for path in ("/envoy.service.auth.v3.Authorization/Check", "/grpc.health.v1.Health/Check"):
            error = await refusal(call_path(channel, path, b""))
            assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING") == (error.code, error.reason)


def framed(message: bytes, flags: int = 0) -> bytes:
    """Writes a message as gRPC frames it."""
    return struct.pack(">BI", flags, len(message)) + message


def frames(raw: bytes) -> list[tuple[int, bytes]]:
    """Reads the frames of an answer of gRPC-web; 128 marks the trailers."""
    found = []
    while raw:
        flags, length = struct.unpack(">BI", raw[:5])
        found.append((flags, raw[5 : 5 + length]))
        raw = raw[5 + length :]
    return found


async def web_call(edge: Edge, path: str, message: Message, token: str = "") -> tuple[Any, list[tuple[int, bytes]]]:
    """Calls a method as a script in a browser does."""
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", "origin": ORIGIN}
    if token:
        headers["authorization"] = f"Bearer {token}"
    raw = framed(message.SerializeToString())
    async with edge.http.post(edge.envoy.url + path, data=raw, headers=headers) as answer:
        assert 200 == answer.status
        return answer.headers.copy(), frames(await answer.read())


async def test_grpc_web(edge: Edge, acme: Tenant) -> None:
    """A browser gets message and status in one body over HTTP/1.1, and may read them from an origin that is allowed."""
    created = await acme.key()
    headers, (message, trailers) = await web_call(edge, VALIDATE, keys_pb.ValidateRequest(token=created.token))
    assert ORIGIN == headers["access-control-allow-origin"]
    assert {"grpc-status", "grpc-message", "grpc-status-details-bin"} <= set(
        headers["access-control-expose-headers"].split(", ")
    )
    assert 0 == message[0]
    assert keys_pb.OUTCOME_VALID == keys_pb.ValidateResponse.FromString(message[1]).outcome
    assert 128 == trailers[0]
    assert b"grpc-status:0" in trailers[1]


async def test_grpc_web_errors(edge: Edge, acme: Tenant) -> None:
    """A browser is told of an error by its status and details, in headers that it may read."""
    token = acme.admin[0][1].removeprefix("Bearer ")
    request = keys_pb.GetKeyRequest(key_id=NOBODYS_KEY)
    headers, body = await web_call(edge, "/apikeys.v1.KeyService/GetKey", request, token)
    assert ("5", []) == (headers["grpc-status"], body)
    assert "grpc-status-details-bin" in headers


async def test_preflight(edge: Edge) -> None:
    """A browser may ask whether it may call: pages of an allowed origin may, without a key, and others may not."""
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-grpc-web",
    }
    for path in (VALIDATE, "/v1/api-keys", "/orders"):
        answer = await edge.call("OPTIONS", path, token="", headers={"origin": ORIGIN, **asked})
        assert (200, ORIGIN) == (answer.status, answer.headers["access-control-allow-origin"])
        assert {"authorization", "content-type", "x-grpc-web"} <= set(
            answer.headers["access-control-allow-headers"].split(", ")
        )
        foreign = await edge.call("OPTIONS", path, token="", headers={"origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in foreign.headers
    assert not [each for each in edge.upstream.requests if "access-control-request-method" in each]
