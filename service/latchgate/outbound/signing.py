"""Signatures of what is sent to webhooks, by the Standard Webhooks specification."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook


def signed_headers(secrets: Sequence[str], event_id: str, now: datetime, body: str) -> dict[str, str]:
    """Gives the headers that tell a receiver what is sent, when, and that it comes from here.

    With several secrets there is a signature for each: the receiver needs to know one of them.
    """
    now = now.astimezone(UTC)
    signatures = [Webhook(secret).sign(event_id, now, body) for secret in secrets]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
