"""What a row of a file may hold, and how each of its values is read."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from apikeys.v1 import key_pb2
from apikeys.v1.import_service_pb2 import ImportedKey

# Names under which others export tokens in plain text. They are told apart from slips of the pen.
PLAINTEXT_FIELDS: Final = frozenset(
    {"token", "key", "api_key", "apikey", "secret", "secret_key", "plaintext", "plain", "raw_key", "value", "password"}
)
_ENVIRONMENTS: Final = {
    "live": key_pb2.ENVIRONMENT_LIVE,
    "test": key_pb2.ENVIRONMENT_TEST,
}
_TRUTHS: Final = {"true": True, "false": False}
_HEX_LENGTH: Final = 64
_BASE64_LENGTHS: Final = (43, 44)
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")
_INT32: Final = 2**31


class ValueRefusedError(Exception):
    """A value can not be read. The message says what it must be, and never what it is."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueRefusedError("must be text")
    return value


def _digest(value: Any) -> bytes:
    """Reads 64 hexadecimal digits, or the base64 of 32 bytes in either alphabet, padded or not."""
    text = _text(value)
    try:
        if len(text) == _HEX_LENGTH:
            return binascii.unhexlify(text)
        if len(text) in _BASE64_LENGTHS:
            standard = text.rstrip("=").replace("-", "+").replace("_", "/") + "="
            return base64.b64decode(standard, validate=True)
    except ValueError:
        pass
    raise ValueRefusedError("must be the SHA-256 of the token, as 64 hexadecimal digits or in base64")


def _environment(value: Any) -> key_pb2.Environment.ValueType:
    found = _ENVIRONMENTS.get(_text(value).lower())
    if found is None:
        raise ValueRefusedError("must be live or test")
    return found


def _number(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value, re.ASCII):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INT32:
        raise ValueRefusedError("must be a whole number of requests a minute, 0 for the plan's")
    return value


def _truth(value: Any) -> bool:
    found = value if isinstance(value, bool) else _TRUTHS.get(str(value).lower())
    if found is None:
        raise ValueRefusedError("must be true or false")
    return found


def _list(value: Any) -> list[str]:
    """Reads a list, or words that are separated by spaces."""
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueRefusedError("must be a list of texts")
    return value


def _time(value: Any) -> datetime:
    text = _text(value)
    try:
        # The service counts microseconds.
        if _TIME.fullmatch(text):
            return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text.upper())).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueRefusedError("must be a time such as 2027-01-31T23:59:59Z")


def _metadata(value: Any) -> dict[str, str]:
    """Reads an object, or the JSON of one."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueRefusedError('must be an object of texts, such as {"team": "payments"}')
    return value


READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "digest": _digest,
    "hint": _text,
    "name": _text,
    "environment": _environment,
    "permissions": _list,
    "rate_limit_per_minute": _number,
    "expire_time": _time,
    "user_id": _text,
    "user_email": _text,
    "metadata": _metadata,
    "allowed_cidrs": _list,
    "active": _truth,
}
"""How each field is read. Each gives what the message takes."""

REQUIRED: Final = ("digest", "name")


def read_fields(line: int, values: Mapping[str, Any]) -> ImportedKey | list[tuple[str, str]]:
    """Makes the message of a row whose fields are known; or says what is wrong, as pairs of field and advice.

    A value that is empty text or null is as if it were not there.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ""}
    faults = [(name, "must be given") for name in REQUIRED if name not in given]
    read: dict[str, Any] = {}
    for name, value in given.items():
        try:
            read[name] = READERS[name](value)
        except ValueRefusedError as error:
            faults.append((name, str(error)))
    if faults:
        return faults
    try:
        return ImportedKey(row=line, **read)
    except (ValueError, UnicodeError):
        # Halves of characters, which JSON can name and no text can hold.
        return [("", "must hold texts that can be written in UTF-8")]
