"""Webhooks and their deliveries in PostgreSQL, as management sees them."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
from cryptography.fernet import Fernet

from latchgate.domain.outbox import (
    Delivery,
    DeliveryError,
    DeliveryFilter,
    DeliveryState,
    DisableReason,
    Event,
    NewWebhook,
    Webhook,
)
from latchgate.storage import queries, queries_outbox
from latchgate.storage.postgres import Database
from latchgate.storage.sealing import fernet
from latchgate.storage.transaction import PostgresTransaction

SECRET_PREFIX = "whsec_"  # noqa: S105 - a prefix is public
SECRET_BYTES = 32
# Of very many dead deliveries as many as are made pending at once.
REVIVE_ROWS = 5000


class FernetWebhookSealer:
    """Implements latchgate.domain.webhook_ports.WebhookSealer: each under a key of its own.

    With a tag key from the settings a copy of the database opens no secret.
    """

    def __init__(self, tag_key: bytes) -> None:
        """Takes the deployment's tag key."""
        self._tag_key = tag_key

    def make(self, webhook_id: str) -> tuple[str, bytes]:
        """Makes a secret as the Standard Webhooks specification has it; gives it as it is shown and as it is stored."""
        secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
        return secret, self._fernet(webhook_id).encrypt(secret.encode())

    def open(self, webhook_id: str, sealed: bytes) -> str:
        """Gives back a secret as it is shown."""
        return self._fernet(webhook_id).decrypt(sealed).decode()

    def _fernet(self, webhook_id: str) -> Fernet:
        return fernet(self._tag_key, use=b"latchgate webhook secret", salt=webhook_id.encode())


class PostgresWebhookTransaction(PostgresTransaction):
    """Implements latchgate.domain.webhook_ports.WebhookTransaction."""

    async def count_webhooks(self, organization_id: str) -> int:
        """How many webhooks an organization has."""
        count: int = await self._connection.fetchval(queries_outbox.WEBHOOK_COUNT, organization_id)
        return count

    async def insert_webhook(self, webhook: NewWebhook) -> Webhook:
        """Stores a webhook."""
        await self._connection.execute(
            queries_outbox.WEBHOOK_INSERT,
            webhook.id,
            webhook.organization_id,
            webhook.url,
            webhook.event_types,
            webhook.created_by,
            webhook.sealed_secret,
        )
        return await self._webhook(webhook.id)

    async def lock_webhook(self, webhook_id: str) -> Webhook | None:
        """Locks a webhook, and then reads it as the last holder of the lock left it."""
        if await self._connection.fetchval(queries_outbox.WEBHOOK_LOCK, webhook_id) is None:
            return None
        return await self._webhook(webhook_id)

    async def save_webhook(self, webhook: Webhook) -> Webhook:
        """Stores what can change of a webhook."""
        await self._connection.execute(
            queries_outbox.WEBHOOK_UPDATE,
            webhook.id,
            webhook.url,
            webhook.event_types,
            webhook.enabled,
            webhook.disable_time,
            webhook.disable_reason and webhook.disable_reason.value,
            webhook.failing_since,
        )
        return await self._webhook(webhook.id)

    async def delete_webhook(self, webhook_id: str) -> None:
        """Ends a webhook, and forgets its secrets."""
        await self._connection.execute(queries_outbox.WEBHOOK_DELETE, webhook_id)

    async def rotate_webhook_secret(self, webhook_id: str, sealed: bytes, overlap: timedelta) -> Webhook:
        """Stores a new secret, and keeps the one before."""
        await self._connection.execute(queries_outbox.WEBHOOK_ROTATE, webhook_id, sealed, overlap)
        return await self._webhook(webhook_id)

    async def disable_webhook(self, webhook_id: str, *, is_gone: bool, after: timedelta) -> Webhook | None:
        """Disables a webhook that is gone, or has failed for `after`; gives it, or None if it is neither."""
        disabled = await self._connection.fetchval(queries_outbox.WEBHOOK_DISABLE, webhook_id, is_gone, after)
        return None if disabled is None else await self._webhook(webhook_id)

    async def redeliver(self, webhook_id: str, delivery_id: str) -> int | None:
        """Makes deliveries pending again."""
        status: str = await self._connection.execute(
            queries_outbox.DELIVERY_REVIVE, webhook_id, delivery_id, REVIVE_ROWS
        )
        self.has_published = True
        return int(status.rsplit(maxsplit=1)[-1]) or None

    async def insert_test(self, event: Event, webhook_id: str) -> Delivery:
        """Stores an event that is handed on to one webhook alone."""
        delivery_id: str = await self._connection.fetchval(
            queries_outbox.EVENT_INSERT_FOR_ONE,
            event.id,
            event.organization_id,
            event.type.value,
            event.subject,
            event.body,
            webhook_id,
        )
        self.has_published = True
        return delivery(_held(await self._connection.fetchrow(queries_outbox.DELIVERY_GET, delivery_id)))

    async def _webhook(self, webhook_id: str) -> Webhook:
        return webhook(_held(await self._connection.fetchrow(queries_outbox.WEBHOOK_GET, webhook_id)))


class PostgresWebhookStore:
    """Implements latchgate.domain.webhook_ports.WebhookStore."""

    def __init__(self, database: Database, published: Callable[[], None] = lambda: None) -> None:
        """Takes the open database, and who is to hear when a transaction has left something to be sent out."""
        self._database = database
        self._published = published

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[PostgresWebhookTransaction]:
        """Opens a transaction that is committed at the end of the block, and undone if the block raises."""
        async with self._database.transaction() as connection:
            transaction = PostgresWebhookTransaction(connection)
            yield transaction
        if transaction.has_published:
            self._published()

    async def get_webhook(self, webhook_id: str) -> Webhook | None:
        """Reads a webhook."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries_outbox.WEBHOOK_GET, webhook_id)
        return None if row is None else webhook(row)

    async def list_webhooks(self, organization_id: str, after: str, count: int) -> Sequence[Webhook]:
        """Lists up to `count` webhooks, newest first, beyond the id `after`."""
        async with self._database.connection() as connection:
            found = await connection.fetch(queries_outbox.WEBHOOK_LIST, organization_id, after, count)
        return [webhook(row) for row in found]

    async def list_deliveries(self, delivery_filter: DeliveryFilter, after: str, count: int) -> Sequence[Delivery]:
        """Lists up to `count` deliveries, newest first, beyond the id `after`."""
        values = (
            delivery_filter.organization_id,
            after,
            delivery_filter.state and delivery_filter.state.value,
            delivery_filter.event_type,
            count,
        )
        async with self._database.connection() as connection:
            if delivery_filter.webhook_id:
                statement = await connection.prepare(queries_outbox.DELIVERY_LIST_OF_WEBHOOK)
                found = await statement.fetch(*values, delivery_filter.webhook_id)
            else:
                statement = await connection.prepare(queries_outbox.DELIVERY_LIST)
                found = await statement.fetch(*values)
        return [delivery(row) for row in found]

    async def has_organization(self, organization_id: str) -> bool:
        """Says whether there is such an organization."""
        async with self._database.connection() as connection:
            return await connection.fetchrow(queries.ORGANIZATION_SCOPES, organization_id) is not None


def _held(row: asyncpg.Record | None) -> asyncpg.Record:
    """Gives a row that must be there, because the transaction holds it."""
    if row is None:
        raise LookupError("a row that this transaction holds is gone")
    return row


def webhook(row: asyncpg.Record) -> Webhook:
    """Reads a webhook."""
    reason = row["disable_reason"]
    return Webhook(
        id=row["id"],
        organization_id=row["organization_id"],
        url=row["url"],
        event_types=tuple(row["event_types"]),
        enabled=row["enabled"],
        disable_time=row["disable_time"],
        disable_reason=DisableReason(reason) if reason else None,
        failing_since=row["failing_since"],
        old_secret_end_time=row["old_secret_end_time"],
        created_by=row["created_by"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        version=row["version"],
    )


def delivery(row: asyncpg.Record) -> Delivery:
    """Reads a delivery."""
    error = row["last_error"]
    return Delivery(
        id=row["id"],
        webhook_id=row["webhook_id"],
        organization_id=row["organization_id"],
        event_id=row["event_id"],
        event_type=row["event_type"],
        subject=row["subject"],
        state=DeliveryState(row["state"]),
        attempts=row["attempts"],
        create_time=row["create_time"],
        next_time=row["next_time"],
        last_time=row["last_time"],
        last_status=row["last_status"],
        last_error=DeliveryError(error) if error else None,
        last_duration=row["last_duration"],
        done_time=row["done_time"],
    )
