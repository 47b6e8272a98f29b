"""What goes out by itself: events to webhooks, and mail. Put together here, and begun."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Final

from latchgate.background import Background
from latchgate.config import Settings
from latchgate.delivering import Deliverer, DeliveryObserver
from latchgate.domain.addresses import AddressGuard
from latchgate.housekeeping import FORGET_INTERVAL_S, repeat_by_one
from latchgate.ids import make_id
from latchgate.outbound.sender import WebhookSender
from latchgate.outbound.smtp import MailSender
from latchgate.storage.notices import Notices
from latchgate.storage.outbox import Outbox
from latchgate.storage.postgres import Database
from latchgate.storage.webhooks import FernetWebhookSealer

SEND_GRACE_S: Final = 5.0
SENDING_POOL_SIZE: Final = 2
# How many turns of sending there are to one of what is done less often.
NOTICE_TURNS: Final = 5


async def send_out(  # noqa: PLR0913 - what a worker is made of, each by its name
    stack: AsyncExitStack,
    *,
    settings: Settings,
    background: Background,
    observer: DeliveryObserver,
    news: asyncio.Event,
    dsn: str,
    tag_key: bytes,
) -> None:
    """Begins to send out what is published, and to publish what time brings about; `stack` ends it.

    `news` is set when there may be something to be sent.
    """
    # Connections of its own: what is sent takes none from calls.
    database = await Database.open(dsn, pool_size=SENDING_POOL_SIZE)
    stack.push_async_callback(database.close)
    server = settings.smtp_server
    outbox = Outbox(database, make_id, has_mail=server is not None, news=news)
    notices = Notices(database, make_id, settings.notice_days)
    deliverer = Deliverer(
        outbox=outbox,
        sealer=FernetWebhookSealer(tag_key),
        sender=WebhookSender(AddressGuard(settings.private_networks)),
        mail=MailSender(server) if server else None,
        observer=observer,
        failed=background.failed,
    )
    # Less than the sending of one webhook may take: its worker is not waited for longer than it would be for calls.
    stack.push_async_callback(deliverer.close, min(settings.drain_seconds, SEND_GRACE_S))

    async def publish_notices() -> None:
        await outbox.give_up()
        if await notices.work():
            news.set()

    async def forget() -> None:
        await outbox.forget(timedelta(days=settings.event_retention_days))

    poll_s = settings.outbox_poll_seconds
    background.repeat("sending out of events", poll_s, deliverer.turn, news)
    background.repeat("looking for expiries", NOTICE_TURNS * poll_s, publish_notices)
    background.repeat("counting of what waits", NOTICE_TURNS * poll_s, deliverer.look)
    repeat_by_one(background, database, "housekeeping of events", FORGET_INTERVAL_S, [("clearing of events", forget)])
