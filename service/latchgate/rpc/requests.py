"""From bytes to a request that keeps the contract's rules."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final, TypeVar

import protovalidate
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from apikeys.v1 import key_service_pb2
from latchgate.domain.errors import InvalidFieldError, MalformedRequestError

Request = TypeVar("Request", bound=Message)

# As many as a batch may hold.
MAX_REPAIRED: Final = 100

# What the contract's patterns mean, for people. A test keeps it complete.
PATTERN_ADVICE: Final = {
    r"^[^\x00-\x1f\x7f]*$": "must not hold control characters",
    r"^[^\x00-\x1f\x7f]+$": "must not hold control characters",
    r"^[!-~]+$": "must be a token: printable ASCII characters",
    r"^[^\x00]*$": "must not hold the character U+0000",
    r"^key_[0-9a-z]{26}$": "must be the id of a key: key_ and 26 lower-case letters and digits",
    r"^whk_[0-9a-z]{26}$": "must be the id of a webhook: whk_ and 26 lower-case letters and digits",
    r"^dlv_[0-9a-z]{26}$": "must be the id of a delivery: dlv_ and 26 lower-case letters and digits",
    r"^[a-z0-9][a-z0-9_-]{2,63}$": "must be 3 to 64 lower-case letters, digits, `_` or `-`, the first no sign",
    r"^[a-z0-9][a-z0-9_-]{0,63}$": "must be 1 to 64 lower-case letters, digits, `_` or `-`, the first no sign",
    r"^([a-z0-9][a-z0-9_.-]*|\*)(:([a-z0-9][a-z0-9_.-]*|\*))*$": (
        "must be segments of lower-case letters, digits, `_`, `.` and `-`, or `*`, joined by `:`, such as orders:read"
    ),
    r"^[a-z0-9][a-z0-9_.-]*(:[a-z0-9][a-z0-9_.-]*)*$": (
        "must be segments of lower-case letters, digits, `_`, `.` and `-`, joined by `:`, such as orders:read"
    ),
}


def parse(request_type: type[Request], raw: bytes) -> Request:
    """Reads a request. Raises MalformedRequestError.

    A token that is not UTF-8 makes a whole ValidateRequest unreadable, but is a bad token and no bad request: who sends
    it must not be able to choose the gateway's failure policy. It is read as an empty one.
    """
    try:
        return request_type.FromString(raw)
    except DecodeError:
        repaired = _without_unreadable_tokens(request_type, raw)
        if repaired is None:
            raise MalformedRequestError(
                f"the request is no {request_type.DESCRIPTOR.full_name}; check the client's proto files"
            ) from None
        return request_type.FromString(repaired)


def _without_unreadable_tokens(request_type: type[Message], raw: bytes) -> bytes | None:
    """Drops tokens that are not UTF-8 from a validation request; None if the rest is not readable either."""
    if request_type not in (key_service_pb2.ValidateRequest, key_service_pb2.BatchValidateRequest):
        return None
    try:
        lenient: Any = _lenient(request_type.DESCRIPTOR.name).FromString(raw)
        requests = getattr(lenient, "requests", (lenient,))
        if len(requests) > MAX_REPAIRED:
            # To be refused anyway, and not worth a look at what may be a million of them.
            return None
        for request in requests:
            if not _is_utf8(request.token):
                request.token = b""
        repaired: bytes = lenient.SerializeToString()
        request_type.FromString(repaired)
    except DecodeError:
        return None
    return repaired


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _lenient(name: str) -> type[Message]:
    """Makes a twin of a validation request whose token is bytes: the same on the wire, any bytes allowed."""
    file = descriptor_pb2.FileDescriptorProto(name="lenient.proto", package="latchgate.lenient", syntax="proto3")
    for twin in (key_service_pb2.ValidateRequest, key_service_pb2.BatchValidateRequest):
        message = file.message_type.add()
        twin.DESCRIPTOR.CopyToProto(message)
        for field in message.field:
            field.ClearField("options")
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(".apikeys.v1.", ".latchgate.lenient.")
            if field.name == "token":
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"latchgate.lenient.{name}"))


def check_rules(request: Message) -> None:
    """Demands that a request keeps the contract's rules. Raises InvalidFieldError, naming every field."""
    violations = protovalidate.collect_violations(request)
    if violations:
        raise InvalidFieldError([(_path(violation), _advice(violation)) for violation in violations])


def row_violations(row: Message) -> list[tuple[str, str]]:
    """Gives the rules that a row of a request breaks, as check_rules would; names of metadata are left out of paths."""
    violations = protovalidate.collect_violations(row)
    return [(_path(violation).partition('["')[0], _advice(violation)) for violation in violations]


def _advice(violation: protovalidate.Violation) -> str:
    """Says what a field must be."""
    if violation.proto.rule_id == "string.pattern":
        return PATTERN_ADVICE.get(violation.rule_value, violation.proto.message)
    return violation.proto.message


def _path(violation: protovalidate.Violation) -> str:
    """Writes the path of a field as clients write it, such as `key.permissions[2]`."""
    path = violation.proto.field
    if path is None:
        return ""
    parts = []
    for element in path.elements:
        subscript = element.subscript
        parts.append(element.field_name + (f"[{json.dumps(subscript.value)}]" if subscript else ""))
    return ".".join(parts)
