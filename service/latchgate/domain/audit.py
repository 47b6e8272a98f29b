"""The audit trail: what every management call leaves behind, and how the entries of an organization are chained.

Each event's hash covers the hash of the one before it: an event that is
changed, removed or put in between shows, unless all that follow are made anew. Whoever keeps a hash elsewhere sees
even that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from latchgate.domain.model import Caller, Key, Organization, Plan

# What stands for the hash of an event before the first.
GENESIS = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """What is to be recorded of one call or change, in the trail of the organization that it is about.

    `before` and `after` hold strings, numbers, booleans, lists and mappings of such; neither a token nor a digest.
    `code` is the gRPC status code's name, `reason` that of the refusal.
    """

    organization_id: str
    entity: str = ""
    entity_id: str = ""
    before: Mapping[str, object] | None = None
    after: Mapping[str, object] | None = None
    revision: int = 0
    code: str = "OK"
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """An entry in its place: who did it, from where, when, and as which event of its organization.

    Without an actor it is the service's own work. `actor_subject` is that of the caller's JWT, empty where it has shown
    a key. `certificate` is the subject of the client's certificate, empty where
    there was none. Sequences begin with 1 and have no gaps; times do not go back within an organization.
    """

    organization_id: str
    sequence: int
    event_time: datetime
    actor_key_id: str
    actor_organization_id: str
    certificate: str
    peer: str
    method: str
    request_id: str
    entity: str
    entity_id: str
    before: Mapping[str, object] | None
    after: Mapping[str, object] | None
    revision: int
    code: str
    reason: str
    actor_subject: str = ""

    @classmethod
    def of(cls, entry: AuditEntry, caller: Caller | None, *, sequence: int, event_time: datetime) -> AuditEvent:
        """Gives an entry its place. Without a caller it is the service's own work."""
        call = caller.call if caller else None
        return cls(
            organization_id=entry.organization_id,
            sequence=sequence,
            event_time=event_time,
            actor_key_id=caller.key_id if caller else "",
            actor_organization_id=caller.organization_id if caller else "",
            certificate=call.certificate if call else "",
            peer=call.peer if call else "",
            method=call.method if call else "",
            request_id=call.request_id if call else "",
            entity=entry.entity,
            entity_id=entry.entity_id,
            before=entry.before,
            after=entry.after,
            revision=entry.revision,
            code=entry.code,
            reason=entry.reason,
            actor_subject=caller.subject if caller else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which of an organization's events to list; what is empty matches all. `end_time` is not included."""

    organization_id: str
    actor_key_id: str = ""
    actor_subject: str = ""
    entity: str = ""
    entity_id: str = ""
    method: str = ""
    code: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainedEvent:
    """An event with the hash that it was stored with."""

    event: AuditEvent
    hash: bytes


def chain(previous: bytes, event: AuditEvent) -> bytes:
    """Gives an event's hash: SHA-256 of the one before it and of the event's canonical form."""
    return hashlib.sha256(previous + canonical(event)).digest()


def canonical(event: AuditEvent) -> bytes:
    """Writes an event as it is hashed: JSON in UTF-8, names sorted, without spaces, its time in UTC to the microsecond.

    Names are the fields' own; nothing is left out but an `actor_subject` that is empty, which the first events had not.
    """
    fields: dict[str, object] = {name: getattr(event, name) for name in AuditEvent.__slots__}
    if not event.actor_subject:
        del fields["actor_subject"]
    fields["event_time"] = event.event_time.isoformat(timespec="microseconds")
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def key_snapshot(key: Key) -> dict[str, object]:
    """Gives what the trail shows of a key: all of it that a change can alter, and of tokens the hints."""
    return {
        "name": key.name,
        "key_type": key.key_type.value,
        "environment": key.environment.value,
        "permissions": list(key.permissions),
        "rate_limit_per_minute": key.rate_limit_per_minute,
        "active": key.active,
        "user_id": key.user_id,
        "user_email": key.user_email,
        "metadata": dict(key.metadata),
        "allowed_cidrs": list(key.allowed_cidrs),
        "expire_time": _time(key.expire_time),
        "revoke_time": _time(key.revoke_time),
        "revoke_reason": key.revoke_reason,
        "delete_time": _time(key.delete_time),
        "version": key.version,
        "hints": [secret.hint for secret in key.secrets],
    }


def organization_snapshot(organization: Organization) -> dict[str, object]:
    """Gives what the trail shows of an organization."""
    return {
        "name": organization.name,
        "plan_id": organization.plan_id,
        "active": organization.active,
        "scopes": [{"name": scope.name, "description": scope.description} for scope in organization.scopes],
    }


def plan_snapshot(plan: Plan) -> dict[str, object]:
    """Gives what the trail shows of a plan."""
    return {"rate_limit_per_minute": plan.rate_limit_per_minute, "max_keys": plan.max_keys}


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="microseconds")
