"""The outbox: nothing is lost, nothing overtakes, and whoever shares the work does not get into each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from latchgate.domain.deliveries import Judgement
from latchgate.domain.events import key_event
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import Key
from latchgate.domain.outbox import (
    Attempt,
    DeliveryError,
    DeliveryFilter,
    DeliveryState,
    EventType,
    NewWebhook,
    OutboxDue,
    Reply,
    Webhook,
)
from latchgate.storage import queries, queries_outbox
from latchgate.storage.outbox import LEASE, Outbox
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from latchgate.storage.transaction import PostgresTransaction
from latchgate.storage.webhooks import PostgresWebhookStore
from support.databases import ROOT_CALLER, draft, insert_organization, next_id

DELIVERED = Judgement(state=DeliveryState.DELIVERED, error=None)
DEAD = Judgement(state=DeliveryState.DEAD, error=DeliveryError.HTTP_STATUS)
GONE = Judgement(state=DeliveryState.DEAD, error=DeliveryError.HTTP_STATUS, is_gone=True)
WELL, BADLY = Reply(status=200), Reply(status=500, duration_s=0.25)
DUE = "UPDATE delivery SET next_time = now() WHERE state = 'pending'"


@pytest.fixture
def outbox(database: Database) -> Outbox:
    """An outbox."""
    return Outbox(database, next_id, has_mail=False)


@pytest.fixture
def webhooks(database: Database) -> PostgresWebhookStore:
    """Where webhooks are kept."""
    return PostgresWebhookStore(database)


async def add(webhooks: PostgresWebhookStore, *event_types: str, organization_id: str = "acme") -> str:
    """Stores a webhook, and gives its id."""
    new = NewWebhook(
        id=next_id("whk_"),
        organization_id=organization_id,
        url="https://example.com/",
        event_types=event_types,
        created_by="",
        sealed_secret=b"sealed",
    )
    async with webhooks.transaction() as transaction:
        return (await transaction.insert_webhook(new)).id


async def make_keys(store: PostgresStore, keys: KeyManager, count: int) -> list[str]:
    """Makes an organization and keys of it, and gives their ids."""
    await insert_organization(store)
    return [(await keys.create(ROOT_CALLER, "acme", draft())).key.id for _ in range(count)]


async def take(outbox: Outbox, count: int = 100, each: int = 100, **busy: int) -> list[Attempt]:
    """Takes what is due, by the order of their events."""
    return sorted(await outbox.take(count, each, busy), key=lambda attempt: attempt.event_id)


def told(attempts: Sequence[Attempt]) -> list[str]:
    """Gives the types of what was taken."""
    return [attempt.event_type.value.removeprefix("api_key.") for attempt in attempts]


async def known(webhooks: PostgresWebhookStore, webhook_id: str) -> Webhook:
    """Reads a webhook that is there."""
    webhook = await webhooks.get_webhook(webhook_id)
    assert webhook is not None
    return webhook


async def test_events_go_to_who_has_asked_for_them(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager
) -> None:
    """An event makes a delivery for each webhook of its organization that wants its type, or all; others get nothing,
    and nothing is handed on twice.
    """
    (key_id,) = await make_keys(store, keys, 1)
    await insert_organization(store, "rival")
    every, revoked = await add(webhooks), await add(webhooks, "api_key.revoked", "api_key.deleted")
    await add(webhooks, organization_id="rival")
    await keys.revoke(ROOT_CALLER, key_id, "leaked")

    assert [2, 0] == [await outbox.dispatch(), await outbox.dispatch()]

    found = await webhooks.list_deliveries(DeliveryFilter(organization_id="acme"), "", 10)
    assert {(every, "api_key.created"), (every, "api_key.revoked"), (revoked, "api_key.revoked")} == {
        (each.webhook_id, each.event_type) for each in found
    }
    assert [] == await webhooks.list_deliveries(DeliveryFilter(organization_id="rival"), "", 10)


async def test_what_is_due_is_said(
    database: Database,
    webhooks: PostgresWebhookStore,
    store: PostgresStore,
    keys: KeyManager,
    observer: Connection,
) -> None:
    """Events, deliveries and mail are due as long as they wait, and are not while somebody has them."""
    outbox = Outbox(database, next_id, has_mail=True)
    nothing = OutboxDue(events=False, deliveries=False, mails=False)
    await insert_organization(store)
    await add(webhooks)
    assert nothing == await outbox.due()
    await keys.create(ROOT_CALLER, "acme", draft(user_email="ann@example.com"))
    assert replace(nothing, events=True) == await outbox.due()

    await outbox.dispatch()

    assert OutboxDue(events=False, deliveries=True, mails=True) == await outbox.due()
    (attempt,) = await take(outbox)
    assert replace(nothing, mails=True) == await outbox.due()
    await outbox.take_mail(1)
    assert nothing == await outbox.due()
    await observer.execute(DUE)
    assert replace(nothing, deliveries=True) == await outbox.due()
    (attempt,) = await take(outbox)
    await outbox.finish(attempt, WELL, DELIVERED)
    await observer.execute("UPDATE mail SET next_time = now()")
    assert replace(nothing, mails=True) == await outbox.due()


async def test_what_is_undone_is_not_told(
    store: PostgresStore, keys: KeyManager, outbox: Outbox, database: Database
) -> None:
    """An event is stored with its change: of a change that is undone nobody is told."""
    (key_id,) = await make_keys(store, keys, 1)
    assert 1 == await outbox.dispatch()
    key = await store.get_key(key_id)
    assert isinstance(key, Key)
    async with database.transaction() as connection:
        undone = connection.transaction()
        await undone.start()
        await PostgresTransaction(connection).publish(key_event(next_id, EventType.UPDATED, key))
        await undone.rollback()
    assert 0 == await outbox.dispatch()


async def test_one_hands_on_at_a_time(
    outbox: Outbox, database: Database, store: PostgresStore, keys: KeyManager
) -> None:
    """While a worker hands events on, others leave them to it: none could overtake an earlier one of the same key."""
    await make_keys(store, keys, 1)
    async with database.transaction() as holder:
        await holder.execute(queries.CHANGE_LOCK_TAKE, queries_outbox.DISPATCH_LOCK)
        assert 0 == await outbox.dispatch()
    assert 1 == await outbox.dispatch()


async def test_events_of_a_key_are_sent_in_order(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """Of each key one event is under way at a time, the earliest; one that is to be tried again holds up those after
    it, and those of no other key; when it is delivered or dead, the next one's turn has come.
    """
    first, second = await make_keys(store, keys, 2)
    await add(webhooks)
    await keys.toggle(ROOT_CALLER, first, active=False)
    await keys.toggle(ROOT_CALLER, second, active=False)
    await keys.revoke(ROOT_CALLER, first, "")
    await outbox.dispatch()

    created = await take(outbox)
    assert ["created", "created"] == told(created)
    assert [] == await take(outbox)
    later = created[0].now + timedelta(hours=1)
    again = Judgement(state=DeliveryState.PENDING, error=DeliveryError.TIMEOUT, next_time=later)
    await outbox.finish(created[0], BADLY, again)
    await outbox.finish(created[1], WELL, DELIVERED)
    other = await take(outbox)
    assert ["deactivated"] == told(other)

    # Those that wait behind it are not even looked at before it is tried again.
    put_off = await observer.fetch("SELECT next_time FROM delivery WHERE subject = $1 AND attempts = 0", first)
    assert [later, later] == [row["next_time"] for row in put_off]
    await observer.execute(DUE)
    (repeated,) = [each for each in await take(outbox) if each.event_type is EventType.CREATED]
    assert (2, created[0].first_time) == (repeated.tries, repeated.first_time)
    await outbox.finish(repeated, BADLY, DEAD)
    await observer.execute(DUE)
    (deactivated,) = [each for each in await take(outbox) if each.number == 1]
    await outbox.finish(deactivated, WELL, DELIVERED)
    await observer.execute(DUE)
    assert "revoked" in told(await take(outbox))


async def test_webhooks_do_not_hold_each_other_up(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager
) -> None:
    """Of each webhook no more than its share is under way, what is under way already counted; others get theirs."""
    await make_keys(store, keys, 5)
    slow, quick = await add(webhooks), await add(webhooks)
    await outbox.dispatch()
    taken = [attempt.webhook_id for attempt in await take(outbox, 100, 3, **{slow: 2})]
    assert (1, 3) == (taken.count(slow), taken.count(quick))
    taken = [attempt.webhook_id for attempt in await take(outbox, 100, 3, **{slow: 3})]
    assert (0, 2) == (taken.count(slow), taken.count(quick))
    assert 1 == len(await take(outbox, 1, 3))


async def test_workers_take_what_others_have_not(
    outbox: Outbox, database: Database, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager
) -> None:
    """A worker does not wait for what another is about to take: it takes the rest."""
    await make_keys(store, keys, 4)
    await add(webhooks)
    await outbox.dispatch()
    async with database.transaction() as other:
        theirs = await other.fetch(queries_outbox.DELIVERY_TAKE, 1, LEASE, 100, [], [])
        ours = await take(outbox)
        assert (1, 3) == (len(theirs), len(ours))
    assert [] == await take(outbox)
    assert theirs[0]["id"] not in {attempt.delivery_id for attempt in ours}


async def test_what_a_dead_worker_had_comes_back(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """What was taken and not finished is due again once its time is over; what the one that was too slow then says of
    it is not heeded.
    """
    await make_keys(store, keys, 1)
    webhook_id = await add(webhooks)
    await outbox.dispatch()
    (slow,) = await take(outbox)
    left = await observer.fetchval("SELECT next_time - last_time FROM delivery")
    assert timedelta(seconds=30) == left
    await observer.execute(DUE)
    (again,) = await take(outbox)
    assert (slow.delivery_id, slow.event_id, slow.body, 2) == (
        again.delivery_id,
        again.event_id,
        again.body,
        again.number,
    )
    assert await outbox.finish(slow, BADLY, GONE) is None
    await outbox.finish(again, WELL, DELIVERED)
    (delivery,) = await webhooks.list_deliveries(DeliveryFilter(organization_id="acme"), "", 10)
    assert (DeliveryState.DELIVERED, 2, 200, None) == (
        delivery.state,
        delivery.attempts,
        delivery.last_status,
        delivery.last_error,
    )
    assert (await known(webhooks, webhook_id)).enabled


async def test_webhook_that_is_gone_is_disabled(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """A webhook that says that it is gone is disabled at once; the organization's others are told, the trail shows it,
    and what waited for it is dead, and can be sent again once it is enabled.
    """
    (key_id,) = await make_keys(store, keys, 1)
    gone = await add(webhooks, "api_key.created", "api_key.revoked")
    witness = await add(webhooks, "webhook.disabled")
    await keys.revoke(ROOT_CALLER, key_id, "")
    await outbox.dispatch()
    (attempt,) = await take(outbox)
    disabled = await outbox.finish(attempt, Reply(status=410), GONE)
    assert disabled == await known(webhooks, gone)
    assert (False, "gone") == (disabled.enabled, disabled.disable_reason and disabled.disable_reason.value)
    await outbox.give_up()
    await outbox.dispatch()
    (news,) = await take(outbox)
    assert (witness, EventType.WEBHOOK_DISABLED) == (news.webhook_id, news.event_type)
    assert gone in news.body
    recorded = await observer.fetchval("SELECT entity_id FROM audit_event WHERE entity = 'webhook'")
    assert gone == recorded

    dead = DeliveryFilter(organization_id="acme", webhook_id=gone, state=DeliveryState.DEAD)
    assert ["api_key.created", "api_key.revoked"] == sorted(
        each.event_type for each in await webhooks.list_deliveries(dead, "", 10)
    )
    async with webhooks.transaction() as transaction:
        await transaction.save_webhook(_enabled(disabled))
        assert 2 == await transaction.redeliver(gone, "")
    (revived,) = [each for each in await take(outbox) if each.webhook_id == gone]
    assert ("created", 1, 2) == (*told([revived]), revived.tries, revived.number)


def _enabled(webhook: Webhook) -> Webhook:
    """The same webhook, switched on."""
    fields = {name: getattr(webhook, name) for name in Webhook.__slots__}
    return Webhook(**(fields | {"enabled": True, "disable_time": None, "disable_reason": None, "failing_since": None}))


async def test_webhook_that_fails_for_long_is_disabled(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """After three days without one success a webhook is disabled, and not before; one success begins the count anew."""
    await make_keys(store, keys, 4)
    webhook_id = await add(webhooks)
    await outbox.dispatch()
    attempts = await take(outbox)
    aged = "UPDATE webhook SET failing_since = failing_since - $1::interval"

    assert await outbox.finish(attempts[0], BADLY, DEAD) is None
    assert (await known(webhooks, webhook_id)).failing_since is not None
    await observer.execute(aged, timedelta(days=2, hours=23))
    assert await outbox.finish(attempts[1], BADLY, DEAD) is None
    await observer.execute(aged, timedelta(hours=1))
    await outbox.finish(attempts[2], WELL, DELIVERED)
    assert (await known(webhooks, webhook_id)).failing_since is None

    await observer.execute("UPDATE webhook SET failing_since = now() - interval '3 days'")
    disabled = await outbox.finish(attempts[3], BADLY, DEAD)
    assert disabled is not None
    assert "failing" == (disabled.disable_reason and disabled.disable_reason.value)


async def test_what_was_done_long_ago_is_forgotten(
    outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """Events and deliveries are kept for their time after they are done; what is pending stays, and its event with it.
    Of a deleted webhook nothing stays.
    """
    await make_keys(store, keys, 2)
    webhook_id = await add(webhooks)
    await outbox.dispatch()
    first, _ = await take(outbox)
    await outbox.finish(first, WELL, DELIVERED)
    counted = "SELECT (SELECT count(*) FROM event), (SELECT count(*) FROM delivery), (SELECT count(*) FROM webhook)"

    await outbox.forget(timedelta(days=30))
    assert (2, 2, 1) == tuple(await observer.fetchrow(counted) or ())
    await observer.execute("UPDATE event SET create_time = create_time - interval '31 days'")
    await observer.execute("UPDATE delivery SET done_time = done_time - interval '31 days'")
    await outbox.forget(timedelta(days=30))
    assert (1, 1, 1) == tuple(await observer.fetchrow(counted) or ())
    async with webhooks.transaction() as transaction:
        await transaction.delete_webhook(webhook_id)
    await outbox.give_up()
    await outbox.forget(timedelta(days=30))
    assert (0, 0, 0) == tuple(await observer.fetchrow(counted) or ())


async def test_figures(outbox: Outbox, webhooks: PostgresWebhookStore, store: PostgresStore, keys: KeyManager) -> None:
    """What waits is counted, with how long the oldest has."""
    await make_keys(store, keys, 2)
    await add(webhooks)
    await outbox.dispatch()
    figures = await outbox.figures()
    assert (2, 0, 0, True) == (figures.deliveries, figures.mails, figures.disabled, 0 <= figures.oldest_s < 60)
