"""What Envoy asks of its authorization service, and what it is told, in the words of tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub

PEER = "192.0.2.10"


def check_request(
    headers: Mapping[str, str] | None = None,
    *,
    raw: Iterable[tuple[str, bytes]] = (),
    peer: str = PEER,
    extensions: Mapping[str, str] | None = None,
) -> pb.CheckRequest:
    """Makes a question as Envoy asks it: headers as a map, or `raw` ones one by one."""
    request = pb.CheckRequest()
    attributes = request.attributes
    attributes.source.address.socket_address.address = peer
    attributes.source.address.socket_address.port_value = 50000
    attributes.destination.address.socket_address.address = "192.0.2.1"
    attributes.request.time.GetCurrentTime()
    http = attributes.request.http
    http.id, http.method, http.path, http.host, http.protocol = "1", "GET", "/orders", "shop.example", "HTTP/1.1"
    if headers is not None:
        http.headers.update({":method": "GET", ":path": "/orders", "user-agent": "a client", **headers})
    for name, value in raw:
        http.header_map.headers.add(key=name, raw_value=value)
    attributes.context_extensions.update(extensions or {})
    return request


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckAnswer:
    """What a gateway is told. `http` is 0 for a request that is let through."""

    code: int
    http: int
    headers: dict[str, str]
    removed: tuple[str, ...]
    response_headers: dict[str, str]
    body: str
    metadata: dict[str, Any]

    @property
    def reason(self) -> str:
        """Why a request was refused."""
        return str(json.loads(self.body)["error"]["reason"])


def read_answer(answer: pb.CheckResponse) -> CheckAnswer:
    """Reads an answer."""
    kind = answer.WhichOneof("http_response")
    said = getattr(answer, kind)
    is_ok = kind == "ok_response"
    return CheckAnswer(
        code=answer.status.code,
        http=0 if is_ok else said.status.code,
        headers={option.header.key: option.header.value for option in said.headers},
        removed=tuple(said.headers_to_remove) if is_ok else (),
        response_headers=(
            {each.header.key: each.header.value for each in said.response_headers_to_add} if is_ok else {}
        ),
        body="" if is_ok else said.body,
        metadata=dict(answer.dynamic_metadata),
    )


async def check(channel: grpc.aio.Channel, request: pb.CheckRequest, **options: Any) -> CheckAnswer:
    """Asks."""
    return read_answer(await AuthorizationStub(channel).Check(request, **options))
