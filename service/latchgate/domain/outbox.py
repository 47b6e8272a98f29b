"""The values of what is sent out: events, the webhooks that are told of them, and deliveries between the two."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum


class EventType(Enum):
    """What has happened. The value is what is sent."""

    CREATED = "api_key.created"
    UPDATED = "api_key.updated"
    ROTATED = "api_key.rotated"
    ACTIVATED = "api_key.activated"
    DEACTIVATED = "api_key.deactivated"
    REVOKED = "api_key.revoked"
    DELETED = "api_key.deleted"
    UNDELETED = "api_key.undeleted"
    EXPIRING = "api_key.expiring"
    EXPIRED = "api_key.expired"
    FIRST_USED = "api_key.first_used"
    WEBHOOK_DISABLED = "webhook.disabled"
    WEBHOOK_TEST = "webhook.test"


# Sent to the one webhook that is tested, whatever it has asked for; so nobody asks for it.
SUBSCRIBABLE = tuple(each for each in EventType if each is not EventType.WEBHOOK_TEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened, with the body that is sent of it: JSON, the same each time that it is sent.

    `subject` is the id of what it is about: events of one subject are sent in their order. `mail_to` is who
    is told of it by mail, empty for nobody.
    """

    id: str
    type: EventType
    organization_id: str
    subject: str
    body: str
    mail_to: str = ""


class DeliveryState(Enum):
    """What has become of a delivery."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class DeliveryError(Enum):
    """Why an attempt failed."""

    HTTP_STATUS = "http_status"
    TIMEOUT = "timeout"
    NAME_NOT_RESOLVED = "name_not_resolved"
    ADDRESS_REFUSED = "address_refused"
    CONNECTION_FAILED = "connection_failed"
    TLS_FAILED = "tls_failed"
    ANSWER_UNREADABLE = "answer_unreadable"
    WEBHOOK_DISABLED = "webhook_disabled"


class DisableReason(Enum):
    """Why a webhook gets nothing."""

    CALLER = "caller"
    GONE = "gone"
    FAILING = "failing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One event on its way to one webhook.

    `last_status` is the HTTP status that was answered last, 0 for none; `last_error` is None where the last attempt did
    well or there was none. `next_time` is there while it is pending.
    """

    id: str
    webhook_id: str
    organization_id: str
    event_id: str
    event_type: str
    subject: str
    state: DeliveryState
    attempts: int
    create_time: datetime
    next_time: datetime | None
    last_time: datetime | None
    last_status: int
    last_error: DeliveryError | None
    last_duration: timedelta | None
    done_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A delivery that is this worker's to send, for a while. `number` counts from 1, and tells it from earlier ones.

    `tries` counts this one and those before it since the delivery was last made pending, of which `first_time` is the
    first. `sealed_secrets` are those that it is signed with, the newest first.
    """

    delivery_id: str
    webhook_id: str
    organization_id: str
    event_id: str
    event_type: EventType
    url: str
    body: str
    sealed_secrets: tuple[bytes, ...]
    number: int
    tries: int
    first_time: datetime
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of sending: an HTTP status, or an error. `retry_after_s` is what the receiver asked for."""

    status: int = 0
    error: DeliveryError | None = None
    retry_after_s: float = 0.0
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where an organization wants to be told of events. No event types mean all.

    `failing_since` is when an attempt first failed after the last one that did well. `old_secret_end_time` is until
    when what is sent is signed with the secret before this one as well.
    """

    id: str
    organization_id: str
    url: str
    event_types: tuple[str, ...]
    enabled: bool
    disable_time: datetime | None
    disable_reason: DisableReason | None
    failing_since: datetime | None
    old_secret_end_time: datetime | None
    created_by: str
    create_time: datetime
    update_time: datetime
    version: int

    @property
    def etag(self) -> str:
        """Changes with every change that a caller makes."""
        return f"v{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWebhook:
    """A webhook that is about to be stored."""

    id: str
    organization_id: str
    url: str
    event_types: tuple[str, ...]
    created_by: str
    sealed_secret: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFilter:
    """Which of an organization's deliveries to list; what is None or empty matches all."""

    organization_id: str
    webhook_id: str = ""
    state: DeliveryState | None = None
    event_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxDue:
    """Whether there is something to be done now: events to hand on, deliveries and mail to send."""

    events: bool
    deliveries: bool
    mails: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxFigures:
    """What waits to be sent, in all workers together. `oldest_s` is how long the oldest delivery has waited."""

    deliveries: int
    mails: int
    oldest_s: float
    disabled: int
