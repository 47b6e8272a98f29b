"""Writes the API reference from the compiled contract: the comments of the protos are the manual, set in Markdown here.

What is written follows from the descriptor set alone, in the order of the protos, and so is the same on every machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from google.api import annotations_pb2, field_behavior_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PACKAGE = "apikeys.v1"
ERRORS = "ErrorReason"
REASON_PREFIX = "ERROR_REASON_"
HEAD = f"""\
<!-- Made from protos/ by `make generate`. Do not edit. -->

# API reference: `{PACKAGE}`

Every method that names a verb and a path can also be called as JSON over HTTP, through a gateway that transcodes; what
is in neither the path nor the body of a request is a query parameter then. Beside each field stand the rules that it
must keep, in the words of `buf.validate`; `or empty` means that the other rules hold only when the field is set.
"""

_Field = descriptor_pb2.FieldDescriptorProto
_File = descriptor_pb2.FileDescriptorProto


def _comments(file: _File) -> Iterator[tuple[str, str]]:
    """Gives each item's name and the comment above it. Items are found by path: field numbers of descriptor.proto."""
    for location in file.source_code_info.location:
        match list(location.path):
            case [4, i]:
                name = file.message_type[i].name
            case [4, i, 2, j]:
                name = f"{file.message_type[i].name}.{file.message_type[i].field[j].name}"
            case [5, i]:
                name = file.enum_type[i].name
            case [5, i, 2, j]:
                name = f"{file.enum_type[i].name}.{file.enum_type[i].value[j].name}"
            case [6, i]:
                name = file.service[i].name
            case [6, i, 2, j]:
                name = f"{file.service[i].name}.{file.service[i].method[j].name}"
            case _:
                continue
        yield name, "\n".join(line.strip() for line in location.leading_comments.strip().splitlines())


def _flat(rules: Any, path: str = "") -> Iterator[str]:
    """Spells out the rules that are set; the level that only repeats the field's type is left out."""
    for rule, value in rules.ListFields():
        name = f"{path}{rule.name}"
        if rule.name == "ignore":
            # Within a list it is said of the items, which are then checked by hand.
            if not path:
                yield "or empty"
        elif value is True:
            yield name
        elif rule.message_type is None:
            yield f"{name} `{value}`"
        elif rule.message_type.full_name == "google.protobuf.Duration":
            yield f"{name} `{value.seconds}s`"
        else:
            yield from _flat(value, path if rule.containing_oneof else f"{name}.")


def _http(rule: http_pb2.HttpRule) -> str:
    verb = str(rule.WhichOneof("pattern"))
    bodies = {"": "", "*": ", body: all fields that are not in the path"}
    return f"`{verb.upper()} {getattr(rule, verb)}`" + bodies.get(rule.body, f", body: `{rule.body}`")


def _local(type_name: str) -> str:
    return type_name.removeprefix(f".{PACKAGE}.")


def _table(head: str, rows: Iterable[list[str]]) -> str:
    lines = [head, "|" + " --- |" * (head.count("|") - 1)]
    for row in rows:
        cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class _Reference:
    """The contract's items by name, and how each is set."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        own = [file for file in files.file if file.package == PACKAGE]
        self._comments = dict(pair for file in own for pair in _comments(file))
        self._messages = {message.name: message for file in own for message in file.message_type}
        self._enums = {enum.name: enum for file in own for enum in file.enum_type}
        self._services = [service for file in own for service in file.service]
        self._methods = [method for service in self._services for method in service.method]
        # buf.validate is no module before the stubs are made: its options are read by the set's own descriptors.
        pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            pool.Add(file)
        classes = message_factory.GetMessageClassesForFiles([file.name for file in files.file], pool)
        self._options: Any = classes["google.protobuf.FieldOptions"]
        self._rules_option = pool.FindExtensionByName("buf.validate.field")

    def document(self) -> str:
        """Sets all of it: what is asked and answered stands with its method, what several share behind the services."""
        exchanged = {_local(name) for method in self._methods for name in (method.input_type, method.output_type)}
        shared = [name for name in self._messages if name not in exchanged]
        enums = [name for name in self._enums if name != ERRORS]
        parts = [HEAD, self._contents(), *(self._service(service) for service in self._services)]
        parts += ["## Shared messages", *(self._message(name, "###") for name in shared)]
        parts += ["## Enums", *(self._enum(name) for name in enums), self._errors()]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _contents(self) -> str:
        lines = []
        for service in self._services:
            names = ", ".join(self._link(method.name) for method in service.method)
            lines.append(f"- {self._link(service.name)}: {names}")
        lines += ["- [Shared messages](#shared-messages)", "- [Enums](#enums)", f"- [Errors](#{ERRORS.lower()})"]
        return "\n".join(lines)

    def _service(self, service: descriptor_pb2.ServiceDescriptorProto) -> str:
        parts = [f"## {service.name}", self._text(service.name)]
        for method in service.method:
            rule: http_pb2.HttpRule = method.options.Extensions[annotations_pb2.http]
            bindings = [rule, *rule.additional_bindings] if rule.WhichOneof("pattern") else []
            kind = ["A stream of requests, answered by a stream of responses."] if method.client_streaming else []
            parts += [f"### {method.name}", *map(_http, bindings), *kind, self._text(f"{service.name}.{method.name}")]
            parts += [self._message(_local(name), "####") for name in (method.input_type, method.output_type)]
        return "\n\n".join(parts)

    def _message(self, name: str, level: str) -> str:
        message = self._messages[name]
        entries = {f".{PACKAGE}.{name}.{nested.name}": nested for nested in message.nested_type}
        rows = []
        for field in message.field:
            rules = ", ".join(self._rules(field))
            rows.append([f"`{field.name}`", self._type(field, entries), rules, self._text(f"{name}.{field.name}")])
        if any(rules for _, _, rules, _ in rows):
            table = _table("| Field | Type | Rules | Meaning |", rows)
        else:
            table = _table("| Field | Type | Meaning |", ([field, kind, text] for field, kind, _, text in rows))
        return f"{level} {name}\n\n{self._text(name)}\n\n{table if rows else 'No fields.'}"

    def _type(self, field: _Field, entries: dict[str, descriptor_pb2.DescriptorProto]) -> str:
        if field.type_name in entries:
            key, value = entries[field.type_name].field
            return f"map of {self._type(key, {})} to {self._type(value, {})}"
        plain = _Field.Type.Name(field.type).removeprefix("TYPE_").lower()
        name = self._link(_local(field.type_name)) if field.type_name else plain
        return f"repeated {name}" if field.label == _Field.LABEL_REPEATED else name

    def _rules(self, field: _Field) -> Iterator[str]:
        behaviors: Iterable[int] = field.options.Extensions[field_behavior_pb2.field_behavior]
        yield from (field_behavior_pb2.FieldBehavior.Name(one).lower().replace("_", " ") for one in behaviors)
        if field.proto3_optional:
            yield "optional"
        options = self._options.FromString(field.options.SerializeToString())
        yield from (rule for rule in _flat(options.Extensions[self._rules_option]) if rule != "required")

    def _enum(self, name: str) -> str:
        rows = [[f"`{v.name}`", str(v.number), self._text(f"{name}.{v.name}")] for v in self._enums[name].value]
        return f"### {name}\n\n{self._text(name)}\n\n{_table('| Value | Number | Meaning |', rows)}"

    def _errors(self) -> str:
        """Sets the reasons of errors; the comment of each begins with the status code that it comes with."""
        rows = []
        for value in self._enums[ERRORS].value[1:]:
            code, _, meaning = self._text(f"{ERRORS}.{value.name}").partition(". ")
            rows.append([f"`{value.name.removeprefix(REASON_PREFIX)}`", f"`{code}`", meaning])
        return f"## {ERRORS}\n\n{self._text(ERRORS)}\n\n{_table('| Reason | Status | Meaning |', rows)}"

    def _text(self, name: str) -> str:
        """The comment of an item, with the types and methods that it names made links; code in it stays as it is."""
        parts = re.split(r"(`[^`]*`)", self._comments[name])
        return "".join(part if part.startswith("`") else re.sub(r"\w+(\.\w+)*", self._mention, part) for part in parts)

    def _mention(self, match: re.Match[str]) -> str:
        """Links what is surely meant as a name: a method, `Type.field`, or a name of several words such as KeyState."""
        word = match[0]
        owner, _, field = word.partition(".")
        methods = {method.name for method in self._methods}
        known = {*self._messages, *self._enums, *methods, *(service.name for service in self._services)}
        sure = field or re.search("[a-z][A-Z]", owner) or owner in methods
        return self._link(owner, word) if owner in known and sure else word

    def _link(self, name: str, text: str = "") -> str:
        if "." in name:
            return f"`{name.removeprefix('.')}`"
        return f"[{text or name}](#{name.lower()})"


def write_reference(image: Path, target: Path) -> None:
    """Writes the reference of the package in a descriptor set.

    Args:
        image: A FileDescriptorSet with the imports and the comments (source info).
        target: The Markdown file to write.
    """
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    target.write_text(_Reference(files).document(), encoding="utf-8")
