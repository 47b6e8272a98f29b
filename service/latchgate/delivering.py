"""The work beside the calls that sends out what was published: to webhooks, and as mail."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

import structlog

from latchgate.domain.deliveries import judge
from latchgate.domain.errors import UnavailableError
from latchgate.domain.mail import MailAttempt, compose, judge_mail
from latchgate.domain.outbox import Attempt, DeliveryState, EventType, OutboxFigures
from latchgate.domain.retries import RetryTerms
from latchgate.domain.webhook_ports import WebhookSealer
from latchgate.outbound.sender import WebhookSender
from latchgate.outbound.signing import signed_headers
from latchgate.outbound.smtp import MailSender
from latchgate.storage.outbox import DISPATCH_ROWS, Outbox

# How many are sent at once by one worker, and to one webhook.
AT_ONCE: Final = 32
AT_ONCE_EACH: Final = 4
MAILS_AT_ONCE: Final = 4

_log = structlog.get_logger("latchgate.delivering")


class DeliveryObserver(Protocol):
    """Is told of what is sent out."""

    def delivery_attempted(self, result: str) -> None:
        """A delivery was tried: it is `delivered`, `pending` again or `dead`."""

    def mail_attempted(self, result: str) -> None:
        """A mail was tried, likewise."""

    def outbox(self, figures: OutboxFigures) -> None:
        """What waits was counted."""


class Deliverer:
    """Sends what is due. Of several workers each takes what the others have not taken."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        sealer: WebhookSealer,
        sender: WebhookSender,
        mail: MailSender | None,
        observer: DeliveryObserver,
        failed: Callable[[str, Exception], None],
    ) -> None:
        """Takes what to send from, by whom, and who is told of it and of faults of the work itself."""
        self._outbox = outbox
        self._sealer = sealer
        self._sender = sender
        self._mail = mail
        self._observer = observer
        self._failed = failed
        self._terms = RetryTerms()
        self._busy: Counter[str] = Counter()
        self._under_way: set[asyncio.Task[None]] = set()
        self._mails: set[asyncio.Task[None]] = set()

    async def turn(self) -> None:
        """Hands on what was published, and begins to send what is due. One short statement if there is nothing."""
        due = await self._outbox.due()
        if due.events:
            while await self._outbox.dispatch() == DISPATCH_ROWS:
                pass
        # What was handed on is due at once.
        if due.events or due.deliveries:
            await self._deliver_due()
        if self._mail is not None and (due.events or due.mails):
            await self._post_due(self._mail)

    async def _deliver_due(self) -> None:
        free = AT_ONCE - len(self._under_way)
        if free > 0:
            for attempt in await self._outbox.take(free, AT_ONCE_EACH, self._busy):
                self._busy[attempt.webhook_id] += 1
                self._begin(self._under_way, self._deliver(attempt))

    async def _post_due(self, sender: MailSender) -> None:
        free = MAILS_AT_ONCE - len(self._mails)
        if free > 0:
            for letter in await self._outbox.take_mail(free):
                self._begin(self._mails, self._post(sender, letter))

    def _begin(self, group: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        group.add(task)
        task.add_done_callback(group.discard)

    async def settled(self) -> None:
        """Waits until nothing is under way."""
        while under_way := [*self._under_way, *self._mails]:
            await asyncio.wait(under_way)

    async def close(self, grace_s: float) -> None:
        """Gives what is under way some seconds to finish; what does not is sent again, by whoever comes next."""
        if under_way := [*self._under_way, *self._mails]:
            _, late = await asyncio.wait(under_way, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._sender.close()

    async def look(self) -> None:
        """Counts what waits."""
        self._observer.outbox(await self._outbox.figures())

    async def _deliver(self, attempt: Attempt) -> None:
        try:
            secrets = [self._sealer.open(attempt.webhook_id, sealed) for sealed in attempt.sealed_secrets]
            headers = signed_headers(secrets, attempt.event_id, attempt.now, attempt.body)
            reply = await self._sender.send(attempt.url, headers, attempt.body)
            judgement = judge(attempt, reply, self._terms, random.random)
            disabled = await self._outbox.finish(attempt, reply, judgement)
        except UnavailableError:
            # It is due again when its time is over: it may be sent twice, and is never lost.
            return
        except Exception as error:  # noqa: BLE001 - one delivery must not end the work of all
            self._failed("sending to webhooks", error)
            return
        finally:
            self._busy[attempt.webhook_id] -= 1
            self._busy += Counter()
        self._observer.delivery_attempted(judgement.state.value)
        if judgement.state is DeliveryState.DEAD and attempt.event_type is not EventType.WEBHOOK_TEST:
            _log.warning(
                "delivery_dead",
                webhook=attempt.webhook_id,
                delivery=attempt.delivery_id,
                event_type=attempt.event_type.value,
                status=reply.status,
                error=judgement.error and judgement.error.value,
            )
        if disabled is not None:
            reason = disabled.disable_reason and disabled.disable_reason.value
            _log.warning("webhook_disabled", webhook=disabled.id, organization=disabled.organization_id, reason=reason)
        self._outbox.news.set()

    async def _post(self, sender: MailSender, attempt: MailAttempt) -> None:
        try:
            reply = await sender.send(compose(attempt))
            judgement = judge_mail(attempt, reply, self._terms, random.random)
            await self._outbox.finish_mail(attempt, judgement)
        except UnavailableError:
            return
        except Exception as error:  # noqa: BLE001 - one mail must not end the work of all
            self._failed("sending of mail", error)
            return
        self._observer.mail_attempted(judgement.state.value)
        if judgement.error:
            _log.warning("mail_not_sent", mail=attempt.mail_id, error=judgement.error, state=judgement.state.value)
        self._outbox.news.set()
