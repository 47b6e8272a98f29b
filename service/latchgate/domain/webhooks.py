"""Management of webhooks: one use case a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, TypedDict

from latchgate.domain import access
from latchgate.domain.addresses import AddressGuard
from latchgate.domain.audit import AuditEntry
from latchgate.domain.errors import (
    DeliveryNotFoundError,
    EtagMismatchError,
    InvalidFieldError,
    WebhookDisabledError,
    WebhookLimitReachedError,
    WebhookNotFoundError,
)
from latchgate.domain.events import event_body, written
from latchgate.domain.model import Caller
from latchgate.domain.outbox import (
    SUBSCRIBABLE,
    Delivery,
    DeliveryFilter,
    DisableReason,
    Event,
    EventType,
    NewWebhook,
    Webhook,
)
from latchgate.domain.ports import IdMaker
from latchgate.domain.webhook_ports import WebhookSealer, WebhookStore, WebhookTransaction

MAX_WEBHOOKS: Final = 100
SECRET_OVERLAP: Final = timedelta(hours=24)

_SUBSCRIBABLE: Final = frozenset(each.value for each in SUBSCRIBABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookPage:
    """One page of a list; `more` says whether another follows."""

    webhooks: Sequence[Webhook]
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryPage:
    """One page of a list; `more` says whether another follows."""

    deliveries: Sequence[Delivery]
    more: bool


class WebhookChanges(TypedDict, total=False):
    """The fields of a webhook to change, with their new values."""

    url: str
    event_types: tuple[str, ...]
    enabled: bool


class WebhookManager:
    """Creates, reads, changes and ends webhooks, and has deliveries made again."""

    def __init__(self, *, store: WebhookStore, sealer: WebhookSealer, guard: AddressGuard, make_id: IdMaker) -> None:
        """Takes where webhooks are kept, how their secrets are made and sealed, and where may be sent to."""
        self._store = store
        self._sealer = sealer
        self._guard = guard
        self._make_id = make_id

    async def create(
        self, caller: Caller, organization_id: str, url: str, event_types: Sequence[str]
    ) -> tuple[Webhook, str]:
        """Creates a webhook; gives it and its secret, which is shown this once."""
        access.require(caller, access.WRITE_WEBHOOKS)
        organization_id = access.organization_for(caller, organization_id)
        self._guard.check_url(url)
        _check_types(event_types)
        webhook_id = self._make_id("whk_")
        secret, sealed = self._sealer.make(webhook_id)
        new = NewWebhook(
            id=webhook_id,
            organization_id=organization_id,
            url=url,
            event_types=tuple(event_types),
            created_by=caller.id,
            sealed_secret=sealed,
        )
        async with self._store.transaction() as transaction:
            if await transaction.lock_organization(organization_id) is None:
                raise access.organization_not_found(organization_id)
            await access.require_still_in_use(caller, transaction)
            if await transaction.count_webhooks(organization_id) >= MAX_WEBHOOKS:
                raise WebhookLimitReachedError(
                    f"organization {organization_id} has {MAX_WEBHOOKS} webhooks, and can not have more; "
                    "delete those that are not used"
                )
            webhook = await transaction.insert_webhook(new)
            await _record(transaction, caller, None, webhook)
        return webhook, secret

    async def get(self, caller: Caller, webhook_id: str) -> Webhook:
        """Reads a webhook."""
        access.require(caller, access.READ_WEBHOOKS)
        return _visible(caller, await self._store.get_webhook(webhook_id), webhook_id)

    async def list(self, caller: Caller, organization_id: str, after: str, count: int) -> WebhookPage:
        """Lists up to `count` webhooks beyond the id `after`, newest first."""
        access.require(caller, access.READ_WEBHOOKS)
        organization_id = access.organization_for(caller, organization_id)
        webhooks = await self._store.list_webhooks(organization_id, after, count + 1)
        if not webhooks and not await self._store.has_organization(organization_id):
            raise access.organization_not_found(organization_id)
        return WebhookPage(webhooks=webhooks[:count], more=len(webhooks) > count)

    async def update(self, caller: Caller, webhook_id: str, etag: str, changes: WebhookChanges) -> Webhook:
        """Changes fields of a webhook. Switched off, what it waits for is given up; switched on, it begins anew."""
        access.require(caller, access.WRITE_WEBHOOKS)
        if "url" in changes:
            self._guard.check_url(changes["url"])
        _check_types(changes.get("event_types", ()))
        async with self._store.transaction() as transaction:
            webhook = await _lock(transaction, caller, webhook_id)
            if etag and etag != webhook.etag:
                raise EtagMismatchError(
                    f"webhook {webhook_id} was changed since {etag}; it is {webhook.etag} now", etag=webhook.etag
                )
            updated = replace(webhook, **changes)
            if updated.enabled != webhook.enabled:
                now, reason = (None, None) if updated.enabled else (await transaction.now(), DisableReason.CALLER)
                updated = replace(updated, disable_time=now, disable_reason=reason, failing_since=None)
            if updated == webhook:
                return webhook
            saved = await transaction.save_webhook(updated)
            await _record(transaction, caller, webhook, saved)
        return saved

    async def delete(self, caller: Caller, webhook_id: str) -> None:
        """Ends a webhook for good, with all that it waits for."""
        access.require(caller, access.WRITE_WEBHOOKS)
        async with self._store.transaction() as transaction:
            webhook = await _lock(transaction, caller, webhook_id)
            await transaction.delete_webhook(webhook_id)
            await _record(transaction, caller, webhook, None)

    async def rotate_secret(self, caller: Caller, webhook_id: str) -> tuple[Webhook, str]:
        """Gives a webhook a new secret, shown this once; for a day what is sent is signed with the old one as well."""
        access.require(caller, access.WRITE_WEBHOOKS)
        secret, sealed = self._sealer.make(webhook_id)
        async with self._store.transaction() as transaction:
            webhook = await _lock(transaction, caller, webhook_id)
            rotated = await transaction.rotate_webhook_secret(webhook_id, sealed, SECRET_OVERLAP)
            await _record(transaction, caller, webhook, rotated)
        return rotated, secret

    async def list_deliveries(
        self, caller: Caller, delivery_filter: DeliveryFilter, after: str, count: int
    ) -> DeliveryPage:
        """Lists up to `count` deliveries beyond the id `after`, newest first. The organization may be empty."""
        access.require(caller, access.READ_WEBHOOKS)
        if delivery_filter.webhook_id:
            webhook_id = delivery_filter.webhook_id
            webhook = _visible(caller, await self._store.get_webhook(webhook_id), webhook_id)
            if delivery_filter.organization_id not in ("", webhook.organization_id):
                raise _not_found(webhook_id)
            organization_id = webhook.organization_id
        else:
            organization_id = access.organization_for(caller, delivery_filter.organization_id)
        delivery_filter = replace(delivery_filter, organization_id=organization_id)
        deliveries = await self._store.list_deliveries(delivery_filter, after, count + 1)
        if not deliveries and not await self._store.has_organization(organization_id):
            raise access.organization_not_found(organization_id)
        return DeliveryPage(deliveries=deliveries[:count], more=len(deliveries) > count)

    async def redeliver(self, caller: Caller, webhook_id: str, delivery_id: str) -> int:
        """Has one delivery that is done made again, or without an id all of the webhook that are dead.

        Gives how many; of very many dead ones a part, as many as one statement can do.
        """
        access.require(caller, access.WRITE_WEBHOOKS)
        async with self._store.transaction() as transaction:
            webhook = await _lock(transaction, caller, webhook_id)
            _check_enabled(webhook)
            count = await transaction.redeliver(webhook_id, delivery_id)
            if delivery_id and count is None:
                raise DeliveryNotFoundError(f"webhook {webhook_id} has no delivery {delivery_id} that is done")
            await _record(transaction, caller, webhook, webhook)
        return count or 0

    async def send_test(self, caller: Caller, webhook_id: str) -> Delivery:
        """Has an event of no meaning sent, once; what came of it is seen among the deliveries."""
        access.require(caller, access.WRITE_WEBHOOKS)
        async with self._store.transaction() as transaction:
            webhook = await _lock(transaction, caller, webhook_id)
            _check_enabled(webhook)
            event_id, now = self._make_id("evt_"), await transaction.now()
            data = {"webhook_id": webhook_id, "actor_key_id": caller.key_id, "actor_subject": caller.subject}
            event = Event(
                id=event_id,
                type=EventType.WEBHOOK_TEST,
                organization_id=webhook.organization_id,
                subject=webhook_id,
                body=event_body(event_id, EventType.WEBHOOK_TEST, now, data),
            )
            delivery = await transaction.insert_test(event, webhook_id)
            await _record(transaction, caller, webhook, webhook)
        return delivery


def webhook_snapshot(webhook: Webhook) -> dict[str, object]:
    """Gives what the audit trail shows of a webhook: no secret, but that there is another one for a while."""
    until = webhook.old_secret_end_time
    return {
        "url": webhook.url,
        "event_types": list(webhook.event_types),
        "enabled": webhook.enabled,
        "disable_reason": webhook.disable_reason.value if webhook.disable_reason else "",
        "old_secret_end_time": written(until) if until else "",
        "version": webhook.version,
    }


def webhook_entry(before: Webhook | None, after: Webhook | None, webhook: Webhook) -> AuditEntry:
    """Makes the entry of the audit trail for what was done to a webhook."""
    return AuditEntry(
        organization_id=webhook.organization_id,
        entity="webhook",
        entity_id=webhook.id,
        before=webhook_snapshot(before) if before else None,
        after=webhook_snapshot(after) if after else None,
    )


async def _record(
    transaction: WebhookTransaction, caller: Caller, before: Webhook | None, after: Webhook | None
) -> None:
    webhook = after or before
    if webhook is not None:
        await transaction.record_audit(caller, webhook_entry(before, after, webhook))


async def _lock(transaction: WebhookTransaction, caller: Caller, webhook_id: str) -> Webhook:
    """Reads a webhook to be changed by the caller, whose key must still be in use."""
    webhook = _visible(caller, await transaction.lock_webhook(webhook_id), webhook_id)
    await access.require_still_in_use(caller, transaction)
    return webhook


def _visible(caller: Caller, webhook: Webhook | None, webhook_id: str) -> Webhook:
    if webhook is None or not (caller.is_root or webhook.organization_id == caller.organization_id):
        raise _not_found(webhook_id)
    return webhook


def _not_found(webhook_id: str) -> WebhookNotFoundError:
    return WebhookNotFoundError(f"webhook {webhook_id} does not exist")


def _check_enabled(webhook: Webhook) -> None:
    if not webhook.enabled:
        raise WebhookDisabledError(f"webhook {webhook.id} is disabled; set `enabled` with UpdateWebhook first")


def _check_types(event_types: Sequence[str]) -> None:
    unknown = [(index, name) for index, name in enumerate(event_types) if name not in _SUBSCRIBABLE]
    if unknown:
        raise InvalidFieldError(
            [(f"event_types[{index}]", f"must be one of {', '.join(sorted(_SUBSCRIBABLE))}") for index, _ in unknown]
        )
