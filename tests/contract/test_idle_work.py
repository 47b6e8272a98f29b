"""What the work beside the calls asks of the database while there is nothing to do, and when there is again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from latchgate.delivering import Deliverer
from latchgate.domain.addresses import AddressGuard
from latchgate.domain.keys import KeyManager
from latchgate.domain.outbox import NewWebhook
from latchgate.observability import Metrics
from latchgate.outbound.sender import WebhookSender
from latchgate.outbound.smtp import MailSender, SmtpServer, SmtpTls
from latchgate.storage import queries_outbox
from latchgate.storage.notices import Notices
from latchgate.storage.outbox import Outbox
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from latchgate.storage.usage import UsageBuffer
from latchgate.storage.webhooks import FernetWebhookSealer, PostgresWebhookStore
from support.databases import ROOT_CALLER, draft, insert_organization, next_id, opened
from support.service import TAG_KEY


@pytest.fixture
async def sent(database_url: str) -> AsyncIterator[tuple[Database, list[str]]]:
    """A pool of one connection, and all the statements that were sent on it, but for what opens it."""
    statements: list[str] = []
    async with opened(database_url, pool_size=1) as database:
        async with database.connection() as connection:
            connection.add_query_logger(lambda record: statements.append(record.query))
        yield database, statements


@asynccontextmanager
async def delivering(database: Database) -> AsyncIterator[Deliverer]:
    """What sends, to a mail server that is not there as well."""
    server = SmtpServer(host="127.0.0.1", port=9, sender="keys@example.com", tls=SmtpTls.NONE)
    faults: list[Exception] = []
    deliverer = Deliverer(
        outbox=Outbox(database, next_id, has_mail=True),
        sealer=FernetWebhookSealer(TAG_KEY.encode()),
        sender=WebhookSender(AddressGuard()),
        mail=MailSender(server),
        observer=Metrics(CollectorRegistry()),
        failed=lambda _, error: faults.append(error),
    )
    try:
        yield deliverer
    finally:
        await deliverer.settled()
        await deliverer.close(1.0)
    assert [] == faults


async def test_turn_without_anything_to_send_is_one_statement(sent: tuple[Database, list[str]]) -> None:
    """A worker with nothing to send asks once a turn, and leaves nothing behind that would have to be cleaned."""
    database, statements = sent
    async with delivering(database) as deliverer:
        for _ in range(3):
            await deliverer.turn()

    assert [queries_outbox.OUTBOX_DUE] * 3 == statements


async def test_look_for_expiries_without_any_is_short(sent: tuple[Database, list[str]]) -> None:
    """A worker that looks for expiries again asks whether there are any, and what was noted, and no more."""
    database, statements = sent
    notices = Notices(database, next_id, (7, 1))
    await notices.work()
    statements.clear()

    await notices.work()

    assert [queries_outbox.EXPIRY_DUE, queries_outbox.NOTICE_EXISTS] == statements


async def test_flush_without_use_asks_nothing(sent: tuple[Database, list[str]]) -> None:
    """Without any use of a key nothing is written."""
    database, statements = sent
    await UsageBuffer(database).flush()

    assert [] == statements


async def test_what_is_due_is_sent_in_one_turn(
    sent: tuple[Database, list[str]], store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """What was published before a turn is tried in it, and so is what is due again: nothing waits for the next one."""
    database, _ = sent
    await insert_organization(store)
    webhook_id = next_id("whk_")
    new = NewWebhook(
        id=webhook_id,
        organization_id="acme",
        # No address that may be sent to: an attempt fails at once.
        url="https://127.0.0.1/",
        event_types=(),
        created_by="",
        sealed_secret=FernetWebhookSealer(TAG_KEY.encode()).make(webhook_id)[1],
    )
    async with PostgresWebhookStore(database).transaction() as transaction:
        await transaction.insert_webhook(new)
    await keys.create(ROOT_CALLER, "acme", draft(user_email="ann@example.com"))
    async with delivering(database) as deliverer:
        for _ in range(2):
            await deliverer.turn()
            await deliverer.settled()
            tried = await tries(observer)
            await observer.execute("UPDATE delivery SET next_time = now()")
            await observer.execute("UPDATE mail SET next_time = now()")
        # And each without the other.
        await observer.execute("UPDATE delivery SET next_time = now() + interval '1 hour'")
        await deliverer.turn()
        await deliverer.settled()
        mailed = await tries(observer)
        await observer.execute("UPDATE delivery SET next_time = now()")
        await deliverer.turn()
        await deliverer.settled()

    assert [(2, 2), (2, 3), (3, 3)] == [tried, mailed, await tries(observer)]


async def tries(observer: Connection) -> tuple[int, int]:
    """Says how often the one delivery and the one mail were tried."""
    row = await observer.fetchrow("SELECT (SELECT attempts FROM delivery), (SELECT attempts FROM mail)")
    assert row is not None
    return row[0], row[1]


async def test_what_is_left_open_is_undone(sent: tuple[Database, list[str]], observer: Connection) -> None:
    """A connection that is given back in a transaction is not lent with it, and what was done in it is undone."""
    database, _ = sent
    async with database.connection() as connection:
        await connection.execute("BEGIN")
        await connection.execute("INSERT INTO deployment (name, value) VALUES ('left', '')")
    async with database.connection() as connection:
        assert not connection.is_in_transaction()

    assert 0 == await observer.fetchval("SELECT count(*) FROM deployment WHERE name = 'left'")
