"""What the management of webhooks needs from the outside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Protocol

from latchgate.domain.outbox import Delivery, DeliveryFilter, Event, NewWebhook, Webhook
from latchgate.domain.ports import Transaction


class WebhookSealer(Protocol):
    """Makes the secrets that webhooks are signed with, and keeps them encrypted."""

    def make(self, webhook_id: str) -> tuple[str, bytes]:
        """Makes a secret for a webhook; gives it as it is shown and as it is stored."""

    def open(self, webhook_id: str, sealed: bytes) -> str:
        """Gives back a secret as it is shown."""


class WebhookTransaction(Transaction, Protocol):
    """One transaction, in which webhooks can be changed too. A webhook is locked after its organization."""

    async def count_webhooks(self, organization_id: str) -> int:
        """How many webhooks an organization has. Only with the organization locked."""

    async def insert_webhook(self, webhook: NewWebhook) -> Webhook:
        """Stores a webhook."""

    async def lock_webhook(self, webhook_id: str) -> Webhook | None:
        """Reads a webhook and keeps others from changing it until the end."""

    async def save_webhook(self, webhook: Webhook) -> Webhook:
        """Stores the changed fields of a webhook that was locked."""

    async def delete_webhook(self, webhook_id: str) -> None:
        """Ends a webhook that was locked; its deliveries go with it, some time later."""

    async def rotate_webhook_secret(self, webhook_id: str, sealed: bytes, overlap: timedelta) -> Webhook:
        """Stores a new secret of a webhook that was locked, and keeps the one before for `overlap`."""

    async def redeliver(self, webhook_id: str, delivery_id: str) -> int | None:
        """Makes a delivery of the webhook that is done pending again, or with an empty id those that are dead.

        Gives how many; None if there was none.
        """

    async def insert_test(self, event: Event, webhook_id: str) -> Delivery:
        """Stores an event for one webhook alone."""


class WebhookStore(Protocol):
    """Webhooks at rest. Every method raises StorageUnavailableError when the database does not answer."""

    def transaction(self) -> AbstractAsyncContextManager[WebhookTransaction]:
        """Opens a transaction; see latchgate.domain.ports.KeyStore."""

    async def get_webhook(self, webhook_id: str) -> Webhook | None:
        """Reads a webhook."""

    async def list_webhooks(self, organization_id: str, after: str, count: int) -> Sequence[Webhook]:
        """Lists up to `count` webhooks, newest first, beyond the id `after` (empty: from the newest)."""

    async def list_deliveries(self, delivery_filter: DeliveryFilter, after: str, count: int) -> Sequence[Delivery]:
        """Lists up to `count` deliveries, newest first, beyond the id `after` (empty: from the newest)."""

    async def has_organization(self, organization_id: str) -> bool:
        """Says whether there is such an organization."""
