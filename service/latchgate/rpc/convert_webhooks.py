"""Messages of webhooks to domain values and back: pure, and nothing but that."""

from __future__ import annotations

from typing import Final

from apikeys.v1 import webhook_service_pb2 as pb
from latchgate.domain.outbox import (
    Delivery,
    DeliveryError,
    DeliveryFilter,
    DeliveryState,
    DisableReason,
    Webhook,
)
from latchgate.domain.webhooks import WebhookChanges
from latchgate.rpc.convert import changed_fields, duration_message, timestamp_message

WEBHOOK_FIELDS: Final = ("url", "event_types", "enabled")

_REASON: Final = {
    DisableReason.CALLER: pb.WEBHOOK_DISABLE_REASON_CALLER,
    DisableReason.GONE: pb.WEBHOOK_DISABLE_REASON_GONE,
    DisableReason.FAILING: pb.WEBHOOK_DISABLE_REASON_FAILING,
}
_STATE: Final = {
    DeliveryState.PENDING: pb.WEBHOOK_DELIVERY_STATE_PENDING,
    DeliveryState.DELIVERED: pb.WEBHOOK_DELIVERY_STATE_DELIVERED,
    DeliveryState.DEAD: pb.WEBHOOK_DELIVERY_STATE_DEAD,
}
_ERROR: Final = {
    DeliveryError.HTTP_STATUS: pb.WEBHOOK_DELIVERY_ERROR_HTTP_STATUS,
    DeliveryError.TIMEOUT: pb.WEBHOOK_DELIVERY_ERROR_TIMEOUT,
    DeliveryError.NAME_NOT_RESOLVED: pb.WEBHOOK_DELIVERY_ERROR_NAME_NOT_RESOLVED,
    DeliveryError.ADDRESS_REFUSED: pb.WEBHOOK_DELIVERY_ERROR_ADDRESS_REFUSED,
    DeliveryError.CONNECTION_FAILED: pb.WEBHOOK_DELIVERY_ERROR_CONNECTION_FAILED,
    DeliveryError.TLS_FAILED: pb.WEBHOOK_DELIVERY_ERROR_TLS_FAILED,
    DeliveryError.ANSWER_UNREADABLE: pb.WEBHOOK_DELIVERY_ERROR_ANSWER_UNREADABLE,
    DeliveryError.WEBHOOK_DISABLED: pb.WEBHOOK_DELIVERY_ERROR_WEBHOOK_DISABLED,
}
_FROM_STATE: Final = {number: value for value, number in _STATE.items()}


def webhook_changes(request: pb.UpdateWebhookRequest) -> WebhookChanges:
    """Reads which fields of a webhook to change, and their new values."""
    webhook = request.webhook
    given = (descriptor.name for descriptor, _ in webhook.ListFields())
    fields = changed_fields(request.update_mask, WEBHOOK_FIELDS, given)
    changes: WebhookChanges = {}
    if "url" in fields:
        changes["url"] = webhook.url
    if "event_types" in fields:
        changes["event_types"] = tuple(webhook.event_types)
    if "enabled" in fields:
        changes["enabled"] = webhook.enabled
    return changes


def delivery_filter(request: pb.ListWebhookDeliveriesRequest) -> DeliveryFilter:
    """Reads which deliveries to list."""
    return DeliveryFilter(
        organization_id=request.organization_id,
        webhook_id=request.webhook_id,
        state=_FROM_STATE.get(request.state),
        event_type=request.event_type,
    )


def webhook_message(webhook: Webhook) -> pb.Webhook:
    """Writes a webhook."""
    reason = webhook.disable_reason
    return pb.Webhook(
        id=webhook.id,
        organization_id=webhook.organization_id,
        url=webhook.url,
        event_types=webhook.event_types,
        enabled=webhook.enabled,
        disable_reason=_REASON[reason] if reason else pb.WEBHOOK_DISABLE_REASON_UNSPECIFIED,
        disable_time=timestamp_message(webhook.disable_time),
        failing_since_time=timestamp_message(webhook.failing_since),
        old_secret_end_time=timestamp_message(webhook.old_secret_end_time),
        created_by=webhook.created_by,
        create_time=timestamp_message(webhook.create_time),
        update_time=timestamp_message(webhook.update_time),
        etag=webhook.etag,
    )


def delivery_message(delivery: Delivery) -> pb.WebhookDelivery:
    """Writes a delivery."""
    error, duration = delivery.last_error, delivery.last_duration
    return pb.WebhookDelivery(
        id=delivery.id,
        webhook_id=delivery.webhook_id,
        organization_id=delivery.organization_id,
        event_id=delivery.event_id,
        event_type=delivery.event_type,
        subject=delivery.subject,
        state=_STATE[delivery.state],
        attempts=delivery.attempts,
        create_time=timestamp_message(delivery.create_time),
        next_attempt_time=timestamp_message(delivery.next_time),
        last_attempt_time=timestamp_message(delivery.last_time),
        last_status=delivery.last_status,
        last_error=_ERROR[error] if error else pb.WEBHOOK_DELIVERY_ERROR_UNSPECIFIED,
        last_duration=duration_message(duration) if duration is not None else None,
        done_time=timestamp_message(delivery.done_time),
    )
