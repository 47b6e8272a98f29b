"""Reads what Envoy asks of its authorization service: the credential, and what the route needs of it.

Read by messages of our own that are the same on the wire as Envoy's (envoy.service.auth.v3.CheckRequest), but have only
the fields that matter and take any bytes as the value of a header: a client that sends what is no UTF-8 sends a bad
token, and must not be able to make the question unreadable, and so to choose what its gateway does without an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from latchgate.domain.errors import MalformedRequestError
from latchgate.domain.validation import Need
from latchgate.gateway.credentials import (
    API_KEY,
    AUTHORIZATION,
    FORWARDED_FOR,
    IDENTITY_PREFIX,
    Carrier,
    Needs,
    Problem,
    find_token,
)

CONTENT_TYPE: Final = "content-type"

_GRPC: Final = re.compile(rb"application/grpc(?:[+;]|$)", re.IGNORECASE)
_IDENTITY: Final = IDENTITY_PREFIX.encode()


class Check(NamedTuple):
    """What is asked. `problem` is None where there is a token.

    `spoofed` names headers of the request that only the service itself may set.
    """

    token: bytes
    carrier: Carrier
    problem: Problem | None
    need: Need
    is_grpc: bool
    spoofed: tuple[str, ...]


class CheckReader:
    """Reads questions."""

    def __init__(self, trusted_hops: int = 0) -> None:
        """Takes how many proxies before the gateway are trusted; see Needs."""
        self._needs = Needs("attributes.context_extensions", trusted_hops)

    def read(self, raw: bytes) -> Check:
        """Reads a question. Raises MalformedRequestError, and InvalidFieldError for what a route says."""
        attributes, headers = _parse(raw)
        token, carrier, problem = find_token(headers.get(AUTHORIZATION), headers.get(API_KEY))
        peer = attributes.source.address.socket_address.address
        need = self._needs.read(attributes.context_extensions, peer, headers.get(FORWARDED_FOR))
        spoofed = _spoofed(headers) if _IDENTITY in raw else ()
        return Check(token, carrier, problem, need, _is_grpc(headers), spoofed)


def is_from_grpc(raw: bytes) -> bool:
    """Says whether a question is about a call of a gRPC client, if that can be read."""
    try:
        return _is_grpc(_parse(raw)[1])
    except MalformedRequestError:
        return False


def _parse(raw: bytes) -> tuple[Any, Mapping[str, bytes]]:
    """Gives the attributes of a request, and its headers. Raises MalformedRequestError."""
    try:
        attributes = _CheckRequest.FromString(raw).attributes
    except DecodeError:
        raise MalformedRequestError("the request is no envoy.service.auth.v3.CheckRequest") from None
    http = attributes.request.http
    return attributes, http.headers or _headers(http.header_map)


def _is_grpc(headers: Mapping[str, bytes]) -> bool:
    content_type = headers.get(CONTENT_TYPE)
    return content_type is not None and bool(_GRPC.match(content_type))


def _headers(raw: Any) -> dict[str, bytes]:
    """Reads headers as they were sent (`encode_raw_headers`), and joins those of one name as Envoy else does."""
    headers: dict[str, bytes] = {}
    for header in raw.headers:
        value = header.raw_value or header.value
        before = headers.get(header.key)
        headers[header.key] = value if before is None else before + b"," + value
    return headers


def _spoofed(headers: Mapping[str, bytes]) -> tuple[str, ...]:
    return tuple(sorted(name for name in headers if name.startswith(IDENTITY_PREFIX)))


def _message_class() -> type[Message]:
    """Makes the class of the questions from the table of fields. Maps are from text to bytes."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="latchgate/check.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number, type=kinds.TYPE_MESSAGE)
            field.label = kinds.LABEL_REPEATED if kind in ("map", "HeaderValue") else kinds.LABEL_OPTIONAL
            if kind in ("string", "bytes"):
                field.type = kinds.TYPE_STRING if kind == "string" else kinds.TYPE_BYTES
                continue
            field.type_name = f".{_PACKAGE}.{kind}"
            if kind == "map":
                entry = message.nested_type.add(name=field_name.title().replace("_", "") + "Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
                entry.field.add(name="value", number=2, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_BYTES)
                field.type_name = f".{_PACKAGE}.{name}.{entry.name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.CheckRequest"))


_PACKAGE: Final = "latchgate.check"
# Names, numbers and types of what is read. A test holds them to Envoy's.
_FIELDS: Final[Mapping[str, Sequence[tuple[str, int, str]]]] = {
    "CheckRequest": [("attributes", 1, "Attributes")],
    "Attributes": [("source", 1, "Peer"), ("request", 4, "Request"), ("context_extensions", 10, "map")],
    "Peer": [("address", 1, "Address")],
    "Address": [("socket_address", 1, "SocketAddress")],
    "SocketAddress": [("address", 2, "bytes")],
    "Request": [("http", 2, "Http")],
    "Http": [("headers", 3, "map"), ("header_map", 13, "HeaderMap")],
    "HeaderMap": [("headers", 1, "HeaderValue")],
    "HeaderValue": [("key", 1, "string"), ("value", 2, "bytes"), ("raw_value", 3, "bytes")],
}
_CheckRequest: Final[Any] = _message_class()
