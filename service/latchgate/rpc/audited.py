"""What the audit trail says of a call that has changed nothing: who called, and what the call was about."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from latchgate.domain.audit import AuditEntry
from latchgate.domain.model import Call, Caller
from latchgate.rpc.peers import peer_address
from latchgate.rpc.status import told

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID_HEADER: Final = "x-request-id"
# What comes from outside is recorded up to this length.
MAX_LENGTH: Final = 128
_ID: Final = re.compile(r"(?!.*[0-9a-z]{40})[a-z0-9][a-z0-9_-]{0,63}")
# Fields of requests that name what they are about, by what that is; the first that is set counts. What is no id is not
# recorded: it may be a token that somebody has put into the wrong place.
_SUBJECTS: Final = (
    ("key_id", "key"),
    ("key.id", "key"),
    ("webhook_id", "webhook"),
    ("webhook.id", "webhook"),
    ("organization_id", "organization"),
    ("organization.id", "organization"),
    ("plan.id", "plan"),
)


def call_of(method: str, context: Context) -> Call:
    """Says how a call has come. Its id is the caller's `x-request-id`, or else one that is made for it."""
    headers = dict(context.invocation_metadata() or ())
    given = _shown(str(headers.get(REQUEST_ID_HEADER, "")))
    return Call(
        method=method,
        peer=peer_address(context.peer()),
        certificate=_certificate(context.auth_context() or {}),
        request_id=given or str(uuid.uuid4()),
    )


def _certificate(properties: Mapping[str, Iterable[bytes]]) -> str:
    """Gives the subject of the client's certificate, or its common name."""
    for name in ("x509_subject", "x509_common_name"):
        for value in properties.get(name, ()):
            return _shown(value.decode(errors="replace"))
    return ""


def entry_of(
    caller: Caller, request: Message | None, answer: Message | None = None, code: str = "OK", reason: str = ""
) -> AuditEntry:
    """Makes the entry of a call that read something, or was refused.

    It belongs to the organization that the call read, and to the caller's own where it was refused: nobody can write
    into another's trail by asking for what is another's.
    """
    entity, entity_id = _subject(request)
    return AuditEntry(
        organization_id=_owner(caller, request, answer) or caller.organization_id,
        entity=entity,
        entity_id=entity_id,
        code=code,
        reason=reason,
    )


def _owner(caller: Caller, request: Message | None, answer: Message | None) -> str:
    if answer is None or not caller.is_root:
        return ""
    return (
        _field(answer, "key.organization_id")
        or _field(answer, "webhook.organization_id")
        or _field(request, "organization_id")
        or _field(answer, "organization.id")
    )


def _subject(request: Message | None) -> tuple[str, str]:
    for path, entity in _SUBJECTS:
        value = _field(request, path)
        if _ID.fullmatch(value):
            return entity, value
    return "", ""


def _field(message: Message | None, path: str) -> str:
    """Gives a text in a message, empty where the message has no such field."""
    name, _, rest = path.partition(".")
    value = getattr(message, name, "")
    if rest:
        return _field(value, rest) if isinstance(value, Message) else ""
    return value if isinstance(value, str) else ""


def _shown(text: str) -> str:
    """Gives a text as it may be stored and shown: printable, without tokens, and not long."""
    return told("".join(character for character in text if character.isprintable()), MAX_LENGTH)
