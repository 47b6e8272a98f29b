"""Every rule that the protos state, and every text field of management, tried out; the tables are made from the protos.

A field or rule that is added to the protos is in these tables at once; a kind of rule that they do not know fails here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from buf.validate import validate_pb2
from latchgate.rpc.requests import PATTERN_ADVICE
from support.service import RunningService, call_error, refusal
from support.transport import METHODS, RULED_METHODS, call, good_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOME_KEY: Final = "key_" + "0" * 26
CONTROL_CHARACTERS: Final = ("\0", "\x01", "\n", "\r", "\x1b", "\x7f", "\x85", "\u2028")
TEXTS: Final = (
    "a\0b",
    "\0",
    "abc\n",
    f"{SOME_KEY}\n",
    "orders:read\n",
    "a\x1fb",
    "a\x7fb",
    "ABC",
    "a b c",
    "\u0430bc",
    "-abc",
    ":",
    "a::b",
    "*a",
    "a" * 64 + "\n",
)
"""Texts of which each pattern of the contract forbids some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a request, wherever it stands: how to name it, and how to set it."""

    method: str
    path: str
    descriptor: FieldDescriptor
    put: Callable[[Message, Any], None]

    def __str__(self) -> str:
        return f"{self.method}-{self.path}"

    @property
    def rules(self) -> validate_pb2.FieldRules:
        """What the protos demand of it."""
        rules: validate_pb2.FieldRules = self.descriptor.GetOptions().Extensions[validate_pb2.field]
        return rules

    @property
    def is_output(self) -> bool:
        """Whether the service sets it, and lets pass what a caller puts there."""
        behaviour = self.descriptor.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        return field_behavior_pb2.OUTPUT_ONLY in behaviour


def message_class(field: Field) -> type[Message]:
    """Gives the class of the messages that a field holds."""
    descriptor = field.descriptor.message_type
    assert descriptor is not None
    return GetMessageClass(descriptor)


def _fields_within(method: str, message: Descriptor, path: str, reach: Callable[[Message], Message]) -> Iterator[Field]:
    for descriptor in message.fields:
        name = descriptor.name
        field = Field(method=method, path=path + name, descriptor=descriptor, put=_putter(descriptor, reach))
        yield field
        inner = descriptor.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name.startswith("google."):
            continue
        if field.is_output:
            continue
        if descriptor.is_repeated:
            yield from _fields_within(method, inner, f"{path}{name}[0].", _first_of(name, reach))
        else:
            yield from _fields_within(method, inner, f"{path}{name}.", _one_of(name, reach))


def _first_of(name: str, reach: Callable[[Message], Message]) -> Callable[[Message], Message]:
    return lambda request: getattr(reach(request), name)[0]


def _one_of(name: str, reach: Callable[[Message], Message]) -> Callable[[Message], Message]:
    return lambda request: getattr(reach(request), name)


def _putter(descriptor: FieldDescriptor, reach: Callable[[Message], Message]) -> Callable[[Message, Any], None]:
    """Makes the function that gives a field a value: of lists and maps the whole, and messages a copy."""

    def put(request: Message, value: Any) -> None:
        holder = reach(request)
        holder.ClearField(descriptor.name)
        if isinstance(value, dict):
            getattr(holder, descriptor.name).update(value)
        elif isinstance(value, list):
            getattr(holder, descriptor.name).extend(value)
        elif isinstance(value, Message):
            getattr(holder, descriptor.name).CopyFrom(value)
        elif value is not None:
            setattr(holder, descriptor.name, value)

    return put


FIELDS: Final = [
    field
    for method in RULED_METHODS
    for field in _fields_within(method, METHODS[method].input_type, "", lambda request: request)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """A value that breaks one rule, the path that must be named, and what must be said if that is known."""

    field: Field
    rule: str
    value: Any
    path: str
    advice: str = ""

    def request(self) -> Message:
        """Makes a request that breaks this rule alone."""
        request = good_request(self.field.method, key_id=SOME_KEY)
        self.field.put(request, self.value)
        return request


def _text_breaches(  # noqa: C901 - one case for each rule
    rules: validate_pb2.StringRules, *, is_optional: bool
) -> Iterator[tuple[str, str, str]]:
    """Gives texts that break rules: the rule's name, the text, and what must be said of it."""
    for descriptor, value in rules.ListFields():
        match descriptor.name:
            case "min_len":
                yield "min_len", "", ""
            case "max_len":
                yield "max_len", "a" * (value + 1), ""
            case "pattern":
                whole = re.compile(value.removesuffix("$") + r"\Z")
                for index, text in enumerate(text for text in (*TEXTS, "") if not whole.match(text)):
                    if (text or not is_optional) and len(text) <= (rules.max_len or len(text)):
                        yield f"pattern{index}", text, PATTERN_ADVICE[value]
            case "email":
                for index, text in enumerate(("no address", "a@", "a@b c", "a\0@example.com", "a@example.com\n")):
                    yield f"email{index}", text, ""
            case "uuid":
                for index, text in enumerate(("no uuid", "0f0e0d0c-0b0a-4908-8706-05040302010\n", "\0" * 36)):
                    yield f"uuid{index}", text, ""
            case unknown:
                pytest.fail(f"this table does not know the rule string.{unknown}")


def _number_breaches(rules: Any) -> Iterator[tuple[str, int]]:
    for descriptor, value in rules.ListFields():
        match descriptor.name:
            case "gte":
                yield "gte", value - 1
                yield "gte, least", -(2**31)
            case "lte":
                yield "lte", value + 1
                yield "lte, most", 2**31 - 1
            case unknown:
                pytest.fail(f"this table does not know the rule int32.{unknown}")


def _breaches(field: Field) -> Iterator[Breach]:  # noqa: C901, PLR0912 - one case for each kind of rule
    for descriptor, rules in field.rules.ListFields():
        match descriptor.name:
            case "ignore":
                pass
            case "required":
                yield Breach(field=field, rule="required", value=None, path=field.path)
            case "string":
                is_optional = field.rules.ignore == validate_pb2.IGNORE_IF_ZERO_VALUE
                for rule, text, advice in _text_breaches(rules, is_optional=is_optional):
                    yield Breach(field=field, rule=rule, value=text, path=field.path, advice=advice)
            case "int32":
                for rule, number in _number_breaches(rules):
                    yield Breach(field=field, rule=rule, value=number, path=field.path)
            case "enum":
                for number in (-1, 99):
                    yield Breach(field=field, rule=f"enum {number}", value=number, path=field.path)
            case "duration":
                yield from _duration_breaches(field)
            case "repeated":
                yield from _list_breaches(field, rules)
            case "map":
                yield from _map_breaches(field, rules)
            case unknown:
                pytest.fail(f"this table does not know rules for {unknown}")


def _duration_breaches(field: Field) -> Iterator[Breach]:
    make: Any = message_class(field)
    for rule, seconds, nanos in (
        ("negative", -1, 0),
        ("negative nanos", 0, -1),
        ("a moment too long", 7_776_000, 1),
        ("the longest there is", 315_576_000_000, 0),
        ("beyond the longest there is", 2**63 - 1, 999_999_999),
        ("beyond the shortest there is", -(2**63), 0),
    ):
        yield Breach(field=field, rule=rule, value=make(seconds=seconds, nanos=nanos), path=field.path)


def _list_breaches(field: Field, rules: validate_pb2.RepeatedRules) -> Iterator[Breach]:
    for descriptor, value in rules.ListFields():
        match descriptor.name:
            case "max_items" if field.descriptor.message_type is None:
                items = [f"a{index}" for index in range(value + 1)]
                yield Breach(field=field, rule="max_items", value=items, path=field.path)
            case "max_items":
                message: Any = message_class(field)
                items = [message(name=f"a{index}") for index in range(value + 1)]
                yield Breach(field=field, rule="max_items", value=items, path=field.path)
            case "unique":
                yield Breach(field=field, rule="unique", value=["read", "write", "read"], path=field.path)
            case "items":
                for rule, text, advice in _text_breaches(value.string, is_optional=False):
                    yield Breach(
                        field=field, rule=f"items.{rule}", value=["read", text], path=f"{field.path}[1]", advice=advice
                    )
            case unknown:
                pytest.fail(f"this table does not know the rule repeated.{unknown}")


def _map_breaches(field: Field, rules: validate_pb2.MapRules) -> Iterator[Breach]:
    for descriptor, value in rules.ListFields():
        match descriptor.name:
            case "max_pairs":
                pairs = {f"a{index}": "" for index in range(value + 1)}
                yield Breach(field=field, rule="max_pairs", value=pairs, path=field.path)
            case "keys":
                for rule, text, advice in _text_breaches(value.string, is_optional=False):
                    path = f"{field.path}[{_quoted(text)}]"
                    yield Breach(field=field, rule=f"keys.{rule}", value={text: "a"}, path=path, advice=advice)
            case "values":
                for rule, text, advice in _text_breaches(value.string, is_optional=False):
                    path = f'{field.path}["a"]'
                    yield Breach(field=field, rule=f"values.{rule}", value={"a": text}, path=path, advice=advice)
            case unknown:
                pytest.fail(f"this table does not know the rule map.{unknown}")


def _quoted(text: str) -> str:
    escaped = (character if " " <= character <= "~" else f"\\u{ord(character):04x}" for character in text)
    return '"' + "".join(escaped).replace("\\u000a", "\\n") + '"'


BREACHES: Final = {field: breaches for field in FIELDS if (breaches := list(_breaches(field)))}


@pytest.mark.parametrize("field", BREACHES, ids=str)
async def test_breach_is_named(shared_service: RunningService, field: Field) -> None:
    """A value that breaks a rule of the contract is INVALID_ARGUMENT, with the path of just that field, and words that
    say what it must be.
    """
    for breach in BREACHES[field]:
        refused = await refusal(call(shared_service, field.method, breach.request()))

        assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (refused.code, refused.reason), breach
        assert [breach.path] == list(refused.violations), breach
        said = refused.violations[breach.path]
        assert said if not breach.advice else breach.advice == said, breach
        assert f"{breach.path}: " in refused.message, breach


@pytest.mark.parametrize("method", RULED_METHODS)
async def test_good_request_breaks_no_rule(shared_service: RunningService, method: str) -> None:
    """The requests from which the tables start are good: what the tests above see is the breach alone."""
    created = await shared_service.create_key("acme")
    if method == "GetPublishableKey":
        await shared_service.create_key("acme", key_type=2, permissions=["read"])

    await call(shared_service, method, good_request(method, key_id=created.key.id))


async def test_table_covers_the_contract() -> None:
    """Every field of management that states a rule is in the table of breaches."""
    assert [field for field in FIELDS if field.rules.ListFields()] == list(BREACHES)


async def test_every_pattern_has_words_for_people() -> None:
    """Nobody is answered with a regular expression: each pattern of the contract has advice, and none is left over."""
    patterns = set()

    def gather(message: Message) -> None:
        for descriptor, value in message.ListFields():
            if descriptor.name == "pattern":
                patterns.add(value)
            elif isinstance(value, Message):
                gather(value)

    for field in FIELDS:
        gather(field.rules)
    assert patterns == set(PATTERN_ADVICE)


def _texts(field: Field, character: str) -> Iterator[tuple[str, Any]]:
    """Gives the ways of putting a character into a field, for all fields that hold text."""
    text = f"a{character}b"
    message = field.descriptor.message_type
    if message is not None and message.full_name == "google.protobuf.FieldMask":
        make: Any = message_class(field)
        yield "paths", make(paths=[text])
    elif message is not None and message.GetOptions().map_entry:
        yield "name", {text: "a"}
        yield "value", {"a": text}
    elif field.descriptor.type == FieldDescriptor.TYPE_STRING:
        yield "text", [text] if field.descriptor.is_repeated else text


TEXT_FIELDS: Final = [field for field in FIELDS if list(_texts(field, ""))]


@pytest.mark.parametrize("field", TEXT_FIELDS, ids=str)
async def test_control_character_is_no_fault(shared_service: RunningService, field: Field) -> None:
    """A control character in any text of any management call is refused or kept, but never a fault of the service; and
    U+0000, which the database can not hold, is refused in every field that is read.
    """
    for character in CONTROL_CHARACTERS:
        for kind, value in _texts(field, character):
            created = await shared_service.create_key("acme")
            request = good_request(field.method, key_id=created.key.id)
            field.put(request, value)

            code = await _code(shared_service, field.method, request)

            expected = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
            if field.path == "etag":
                # Like any other that is not the key's.
                expected = {grpc.StatusCode.ABORTED}
            elif character == "\0" and not field.is_output:
                expected = {grpc.StatusCode.INVALID_ARGUMENT}
            assert code in expected, (kind, character)


async def _code(service: RunningService, method: str, request: Message) -> grpc.StatusCode:
    """Gives the code of an answer; of a refusal that the service meant, which has a reason."""
    try:
        await call(service, method, request)
    except grpc.aio.AioRpcError as error:
        return error.code() if call_error(error).reason else grpc.StatusCode.UNKNOWN
    return grpc.StatusCode.OK
