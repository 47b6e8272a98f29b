"""Events: what has happened, as it is told to the outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from latchgate.domain.mail import recipient_of
from latchgate.domain.model import Caller, Key, Secret
from latchgate.domain.outbox import Event, EventType, Webhook
from latchgate.domain.ports import IdMaker


def key_event(make_id: IdMaker, event_type: EventType, key: Key, actor: Caller | None = None) -> Event:
    """Makes an event about a key as it is now; without an actor it was time that has made the change."""
    event_id = make_id("evt_")
    data = {
        "key": key_view(key),
        "actor_key_id": actor.key_id if actor else "",
        "actor_subject": actor.subject if actor else "",
    }
    return Event(
        id=event_id,
        type=event_type,
        organization_id=key.organization_id,
        subject=key.id,
        body=event_body(event_id, event_type, key.read_time, data),
        mail_to=recipient_of(event_type, key, actor.id if actor else ""),
    )


def disabled_event(make_id: IdMaker, webhook: Webhook, now: datetime) -> Event:
    """Makes the event that tells an organization's other webhooks of one that is disabled."""
    event_id = make_id("evt_")
    reason = webhook.disable_reason.value if webhook.disable_reason else ""
    data = {"webhook": {"id": webhook.id, "url": webhook.url, "disable_reason": reason, "disable_time": written(now)}}
    return Event(
        id=event_id,
        type=EventType.WEBHOOK_DISABLED,
        organization_id=webhook.organization_id,
        subject=webhook.id,
        body=event_body(event_id, EventType.WEBHOOK_DISABLED, now, data),
    )


def event_body(event_id: str, event_type: EventType, time: datetime, data: Mapping[str, Any]) -> str:
    """Writes what is sent of an event."""
    body = {"id": event_id, "type": event_type.value, "timestamp": written(time), "data": data}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def key_view(key: Key) -> dict[str, Any]:
    """Shows a key as GetKey does over REST: no secret but hints, and no field that is absent."""
    times = {
        "create_time": key.create_time,
        "update_time": key.update_time,
        "expire_time": key.expire_time,
        "revoke_time": key.revoke_time,
        "last_used_time": key.last_used_time,
        "purge_time": key.purge_time,
    }
    return {
        "id": key.id,
        "organization_id": key.organization_id,
        "name": key.name,
        "prefix": key.secrets[0].hint,
        "key_type": f"KEY_TYPE_{key.key_type.name}",
        "environment": f"ENVIRONMENT_{key.environment.name}",
        "permissions": list(key.permissions),
        "rate_limit_per_minute": key.rate_limit_per_minute,
        "state": f"KEY_STATE_{key.state.name}",
        "user_id": key.user_id,
        "user_email": key.user_email,
        "metadata": dict(key.metadata),
        "allowed_cidrs": list(key.allowed_cidrs),
        **_written_times(times),
        "etag": key.etag,
        "created_by": key.created_by,
        "revoke_reason": key.revoke_reason,
        "secrets": [_secret_view(secret) for secret in key.secrets],
    }


def _secret_view(secret: Secret) -> dict[str, Any]:
    times = {
        "create_time": secret.create_time,
        "expire_time": secret.end_time,
        "last_used_time": secret.last_used_time,
    }
    return {"prefix": secret.hint, **_written_times(times)}


def _written_times(times: Mapping[str, datetime | None]) -> dict[str, str]:
    return {name: written(time) for name, time in times.items() if time is not None}


def written(time: datetime) -> str:
    """Writes a time as RFC 3339 has it, in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
