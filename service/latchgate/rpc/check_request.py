"""Reads what Envoy asks of its authorization service: the credential, and what the route needs of it.

Read by messages of our own that are the same on the wire as Envoy's (envoy.service.auth.v3.CheckRequest), but have only
the fields that matter and take any bytes as the value of a header: a client that sends what is no UTF-8 sends a bad
token, and must not be able to make the question unreadable, and so to choose what its gateway does without an answer.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from typing import Any, Final, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from latchgate.domain.errors import InvalidFieldError, MalformedRequestError
from latchgate.domain.validation import MAX_COST, Need

AUTHORIZATION: Final = "authorization"
API_KEY: Final = "x-api-key"
FORWARDED_FOR: Final = "x-forwarded-for"
CONTENT_TYPE: Final = "content-type"

IDENTITY_PREFIX: Final = "x-latchgate-"
"""Headers that begin so are the service's own: what a client sends under such a name never gets further."""

PERMISSIONS: Final = "required_permissions"
COST: Final = "cost"
_EXTENSIONS: Final = frozenset((PERMISSIONS, COST))

MAX_NEEDS: Final = 8192
"""Of how many routes, and clients of theirs, it is remembered what they need."""

_BEARER: Final = b"bearer"
_SPACE: Final = b" \t"
_GRPC: Final = re.compile(rb"application/grpc(?:[+;]|$)", re.IGNORECASE)
_PORT: Final = re.compile(r"^(?:\[(.*)\]|([^:]*))(?::\d+)?$")


class Carrier(IntEnum):
    """In which headers the token came."""

    NONE = 0
    BEARER = 1
    KEY = 2
    BOTH = 3


class Problem(Enum):
    """Why there is no token to judge."""

    MISSING = "missing"
    CONFLICT = "conflict"


class Check(NamedTuple):
    """What is asked. `problem` is None where there is a token.

    `spoofed` names headers of the request that only the service itself may set, but for those that it always sets.
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
        """Takes how many proxies before the gateway are trusted to have appended to x-forwarded-for whom they saw."""
        self._trusted_hops = trusted_hops
        # By what routes say, and from where their clients come.
        self._needs: dict[tuple[bytes | None, bytes | None, bytes], Need] = {}

    def read(self, raw: bytes) -> Check:
        """Reads a question. Raises MalformedRequestError, and InvalidFieldError for what a route says."""
        try:
            attributes = _CheckRequest.FromString(raw).attributes
        except DecodeError:
            raise MalformedRequestError("the request is no envoy.service.auth.v3.CheckRequest") from None
        http = attributes.request.http
        headers = http.headers or _headers(http.header_map)
        token, carrier, problem = _credential(headers.get(AUTHORIZATION), headers.get(API_KEY))
        content_type = headers.get(CONTENT_TYPE)
        return Check(
            token,
            carrier,
            problem,
            self._need(attributes, headers),
            content_type is not None and bool(_GRPC.match(content_type)),
            _spoofed(headers) if _IDENTITY in raw else (),
        )

    def _need(self, attributes: Any, headers: Mapping[str, bytes]) -> Need:
        extensions = attributes.context_extensions
        permissions, cost = extensions.get(PERMISSIONS), extensions.get(COST)
        address = attributes.source.address.socket_address.address
        if self._trusted_hops:
            address = _forwarded(headers.get(FORWARDED_FOR, b""), self._trusted_hops) or address
        if len(extensions) != (permissions is not None) + (cost is not None):
            unknown = min(set(extensions) - _EXTENSIONS)
            # A slip of the pen must not open what it was to protect.
            raise _route_error(unknown, f"is not known; there are {' and '.join(sorted(_EXTENSIONS))}")
        said = permissions, cost, address
        need = self._needs.get(said)
        if need is None:
            need = _need(permissions or b"", cost or b"1", address)
            if len(self._needs) >= MAX_NEEDS:
                self._needs.clear()
            self._needs[said] = need
        return need


def _need(permissions: bytes, cost: bytes, address: bytes) -> Need:
    """Reads what a route needs. Raises InvalidFieldError."""
    try:
        names = re.split(r"[\s,]+", permissions.decode())
    except UnicodeDecodeError:
        raise _route_error(PERMISSIONS, "must be permissions, such as orders:read,orders:write") from None
    if not cost.isdigit() or len(cost) > len(str(MAX_COST)):
        raise _route_error(COST, f"must be a whole number up to {MAX_COST}")
    return Need.of([name for name in names if name], _client_ip(address), int(cost), 0)


def _route_error(name: str, advice: str) -> InvalidFieldError:
    return InvalidFieldError([(f"attributes.context_extensions[{name}]", advice)])


def _credential(authorization: bytes | None, key: bytes | None) -> tuple[bytes, Carrier, Problem | None]:
    """Finds the token: of `Authorization: Bearer` (RFC 6750), else of X-API-Key.

    A header that was sent twice is there once, with both values and a comma between them, which no token has.
    """
    token, carrier = b"", Carrier.NONE
    if authorization is not None:
        scheme, _, rest = authorization.strip(_SPACE).replace(b"\t", b" ").partition(b" ")
        if scheme.lower() == _BEARER:
            token, carrier = rest.strip(b" "), Carrier.BEARER
    if key is not None:
        key = key.strip(_SPACE)
        if key:
            if token and token != key:
                return b"", Carrier.BOTH, Problem.CONFLICT
            token, carrier = key, Carrier.BOTH if carrier is Carrier.BEARER else Carrier.KEY
    if not token:
        return b"", carrier, Problem.MISSING
    return (b"", carrier, Problem.CONFLICT) if b"," in token else (token, carrier, None)


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


def _forwarded(value: bytes, hops: int) -> bytes:
    """Gives the address that the first of the trusted proxies saw; nothing if they are not all in the list.

    The gateway itself has appended whom it saw, which is the last of the trusted ones.
    """
    addresses = value.split(b",")
    return addresses[-hops - 1].strip() if len(addresses) > hops else b""


def _client_ip(address: bytes) -> str:
    """Gives an address as the rules take it; nothing for what is none, such as the path of a socket."""
    match = _PORT.match(address.decode(errors="replace"))
    text = (match[1] or match[2] or "") if match else address.decode(errors="replace")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return ""
    return text


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
_IDENTITY: Final = IDENTITY_PREFIX.encode()
_CheckRequest: Final[Any] = _message_class()
