"""Mail to the person whom a key belongs to: about what, to whom, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any, Final

from latchgate.domain.model import Key
from latchgate.domain.outbox import DeliveryState, EventType
from latchgate.domain.retries import RetryTerms

# One address and nothing else; what a mail program could take for several is none.
_ADDRESS: Final = re.compile(r"[^\s@,;:<>()\[\]\\\"]+@[^\s@,;:<>()\[\]\\\"]+")

_SUBJECTS: Final[Mapping[EventType, str]] = {
    EventType.CREATED: "API key “{name}” was created",
    EventType.ROTATED: "API key “{name}” has a new token",
    EventType.REVOKED: "API key “{name}” was revoked",
    EventType.DELETED: "API key “{name}” was revoked and deleted",
    EventType.EXPIRING: "API key “{name}” expires on {expire_time}",
}
_TEXTS: Final[Mapping[EventType, str]] = {
    EventType.CREATED: "An API key was created in your name.",
    EventType.ROTATED: "An API key of yours was given a new token. The one before stops working, at once or after a "
    "grace period.",
    EventType.REVOKED: "An API key of yours was revoked by somebody else. Its tokens do not work any more.",
    EventType.DELETED: "An API key of yours was deleted by somebody else. Its tokens do not work any more.",
    EventType.EXPIRING: "An API key of yours is about to expire. Set a later expiry, or replace it in time.",
}
_ENDING: Final = "If you did not expect this, ask whoever runs the service."
# What is shown of the key: the field's name in the event, and for people.
_SHOWN: Final = (
    ("name", "Name"),
    ("id", "Key"),
    ("prefix", "Token begins with"),
    ("organization_id", "Organization"),
    ("expire_time", "Expires"),
    ("revoke_reason", "Reason"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """What is sent. `message_id` is the same each time that it is sent."""

    message_id: str
    recipient: str
    subject: str
    text: str
    html: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MailAttempt:
    """A mail that is this worker's to send, for a while. `number` counts from 1, and tells it from earlier ones."""

    mail_id: str
    event_id: str
    event_type: EventType
    body: str
    recipient: str
    number: int
    first_time: datetime
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MailReply:
    """What came of sending: no error, or a short one; one that is final is not worth another try."""

    error: str = ""
    is_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MailJudgement:
    """What follows from an attempt: the mail's state, and when to try again."""

    state: DeliveryState
    error: str | None
    next_time: datetime | None = None


def recipient_of(event_type: EventType, key: Key, actor_id: str) -> str:
    """Gives whom an event about a key is to be told to by mail; empty if nobody.

    Who ends a key of its own making, or a key by its own token, needs not be told.
    """
    if event_type not in _TEXTS:
        return ""
    is_ended = event_type in (EventType.REVOKED, EventType.DELETED)
    if is_ended and actor_id in (key.id, key.created_by):
        return ""
    return key.user_email if _ADDRESS.fullmatch(key.user_email) else ""


def compose(attempt: MailAttempt) -> Mail:
    """Writes a mail, as plain text and as HTML. It holds no token: only the hint of one."""
    key: Mapping[str, Any] = json.loads(attempt.body)["data"]["key"]
    shown = [(label, str(key[name])) for name, label in _SHOWN if key.get(name)]
    text = _TEXTS[attempt.event_type]
    lines = "\n".join(f"{label}: {_plain(value)}" for label, value in shown)
    rows = "".join(f"<tr><th align=left>{label}</th><td>{escape(value)}</td></tr>" for label, value in shown)
    subject = _SUBJECTS[attempt.event_type].format(name=key["name"], expire_time=key.get("expire_time", "")[:10])
    return Mail(
        message_id=f"{attempt.event_id}.{attempt.mail_id}",
        recipient=attempt.recipient,
        subject=_plain(subject),
        text=f"{text}\n\n{lines}\n\n{_ENDING}\n",
        html=f"<!DOCTYPE html>\n<p>{text}</p>\n<table>{rows}</table>\n<p>{_ENDING}</p>\n",
    )


def _plain(text: str) -> str:
    """Gives a text as one line."""
    return " ".join(text.split())


def judge_mail(attempt: MailAttempt, reply: MailReply, terms: RetryTerms, random: Callable[[], float]) -> MailJudgement:
    """Says what follows."""
    if not reply.error:
        return MailJudgement(state=DeliveryState.DELIVERED, error=None)
    later = terms.next_time(attempt.number, attempt.first_time, attempt.now, random)
    if reply.is_final or later is None:
        return MailJudgement(state=DeliveryState.DEAD, error=reply.error)
    return MailJudgement(state=DeliveryState.PENDING, error=reply.error, next_time=later)
