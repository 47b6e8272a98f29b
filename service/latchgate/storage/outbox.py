"""The outbox: what was published and is on its way out, shared by all workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from latchgate.domain.deliveries import Judgement
from latchgate.domain.events import disabled_event
from latchgate.domain.mail import MailAttempt, MailJudgement
from latchgate.domain.outbox import Attempt, DeliveryState, EventType, OutboxDue, OutboxFigures, Reply, Webhook
from latchgate.domain.ports import IdMaker
from latchgate.domain.webhooks import webhook_entry
from latchgate.storage import queries_outbox
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.webhooks import PostgresWebhookTransaction

DISPATCH_ROWS: Final = 200
GIVE_UP_ROWS: Final = 2000
FORGET_ROWS: Final = 2000
# Longer than sending may take, with what is done before and after it.
LEASE: Final = timedelta(seconds=30)
# For how long a webhook may fail without one success before it is disabled.
DISABLE_AFTER: Final = timedelta(days=3)


class Outbox:
    """Hands events on, and gives out what is to be sent. A worker that dies loses nothing: what it had comes back."""

    def __init__(
        self, database: Database, make_id: IdMaker, *, has_mail: bool, news: asyncio.Event | None = None
    ) -> None:
        """Takes the open database, whether mail is sent at all, and what is set when there may be something to do."""
        self._database = database
        self._make_id = make_id
        self._has_mail = has_mail
        self.news = news or asyncio.Event()

    async def due(self) -> OutboxDue:
        """Says what there is to be done now."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries_outbox.OUTBOX_DUE)
        if row is None:
            raise LookupError("a statement that always gives a row gave none")
        return OutboxDue(events=row["events"], deliveries=row["deliveries"], mails=row["mails"])

    async def dispatch(self) -> int:
        """Makes deliveries and mail of events that were not handed on yet, some of them; gives how many events."""
        async with self._database.connection() as connection:
            count: int = await connection.fetchval(
                queries_outbox.EVENT_DISPATCH, DISPATCH_ROWS, self._has_mail, queries_outbox.DISPATCH_LOCK
            )
        return count

    async def take(self, count: int, each: int, busy: Mapping[str, int]) -> Sequence[Attempt]:
        """Takes up to `count` deliveries that are due, for a while.

        Of each webhook no more than `each`, less those of it that are `busy` in this worker already.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                queries_outbox.DELIVERY_TAKE, count, LEASE, each, list(busy.keys()), list(busy.values())
            )
        return [
            Attempt(
                delivery_id=row["id"],
                webhook_id=row["webhook_id"],
                organization_id=row["organization_id"],
                event_id=row["event_id"],
                event_type=EventType(row["event_type"]),
                url=row["url"],
                body=row["body"],
                sealed_secrets=tuple(filter(None, (row["sealed_secret"], row["old_sealed_secret"]))),
                number=row["attempts"],
                tries=row["tries"],
                first_time=row["first_time"],
                now=row["now"],
            )
            for row in rows
        ]

    async def finish(self, attempt: Attempt, reply: Reply, judgement: Judgement) -> Webhook | None:
        """Takes note of what came of an attempt; gives the webhook if it is disabled for it."""
        async with self._database.transaction() as connection:
            known = await connection.fetchrow(
                queries_outbox.DELIVERY_FINISH,
                attempt.delivery_id,
                attempt.number,
                judgement.state.value,
                judgement.next_time,
                reply.status,
                judgement.error and judgement.error.value,
                timedelta(seconds=reply.duration_s),
            )
            if known is None:
                return None
            if judgement.state is DeliveryState.DELIVERED:
                await connection.execute(queries_outbox.WEBHOOK_DID_WELL, attempt.webhook_id)
                return None
            if judgement.next_time is not None:
                await connection.execute(
                    queries_outbox.DELIVERY_PUT_OFF,
                    attempt.webhook_id,
                    known["subject"],
                    attempt.delivery_id,
                    judgement.next_time,
                )
            await connection.execute(queries_outbox.WEBHOOK_FAILED, attempt.webhook_id)
            return await self._disable(PostgresWebhookTransaction(connection), attempt, is_gone=judgement.is_gone)

    async def _disable(
        self, transaction: PostgresWebhookTransaction, attempt: Attempt, *, is_gone: bool
    ) -> Webhook | None:
        """Disables a webhook that is gone or has failed for long, and tells the others of its organization."""
        webhook = await transaction.disable_webhook(attempt.webhook_id, is_gone=is_gone, after=DISABLE_AFTER)
        if webhook is not None:
            await transaction.publish(disabled_event(self._make_id, webhook, await transaction.now()))
            await transaction.record_audit(None, webhook_entry(None, webhook, webhook))
        return webhook

    async def take_mail(self, count: int) -> Sequence[MailAttempt]:
        """Takes up to `count` mails that are due, for a while."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(queries_outbox.MAIL_TAKE, count, LEASE)
        return [
            MailAttempt(
                mail_id=row["id"],
                event_id=row["event_id"],
                event_type=EventType(row["type"]),
                body=row["body"],
                recipient=row["recipient"],
                number=row["attempts"],
                first_time=row["first_time"],
                now=row["now"],
            )
            for row in rows
        ]

    async def finish_mail(self, attempt: MailAttempt, judgement: MailJudgement) -> None:
        """Takes note of what came of an attempt."""
        async with self._database.connection() as connection:
            await connection.execute(
                queries_outbox.MAIL_FINISH,
                attempt.mail_id,
                attempt.number,
                judgement.state.value,
                judgement.next_time,
                judgement.error,
            )

    async def give_up(self) -> None:
        """Gives up what waits for webhooks that are disabled or deleted."""
        async with self._database.connection() as connection:
            await _repeated(connection, queries_outbox.DELIVERY_GIVE_UP, GIVE_UP_ROWS)

    async def forget(self, kept: timedelta) -> None:
        """Removes what was done longer ago than `kept`, in small statements, and what is left of deleted webhooks."""
        async with self._database.connection() as connection:
            await _repeated(connection, queries_outbox.DELIVERY_FORGET_ENDED, FORGET_ROWS)
            for statement in (
                queries_outbox.DELIVERY_FORGET,
                queries_outbox.MAIL_FORGET,
                queries_outbox.EVENT_FORGET,
                queries_outbox.NOTICE_FORGET,
            ):
                await _repeated(connection, statement, FORGET_ROWS, kept)
            await connection.execute(queries_outbox.WEBHOOK_FORGET)

    async def figures(self) -> OutboxFigures:
        """Counts what waits."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries_outbox.OUTBOX_FIGURES)
        if row is None:
            raise LookupError("a statement that always gives a row gave none")
        return OutboxFigures(
            deliveries=row["deliveries"], mails=row["mails"], oldest_s=row["oldest_s"], disabled=row["disabled"]
        )


async def _repeated(connection: Connection, statement: str, most: int, *before: object) -> None:
    """Executes a statement until it finds less than it may take on."""
    more = True
    while more:
        status: str = await connection.execute(statement, *before, most)
        more = int(status.rsplit(maxsplit=1)[-1]) == most
