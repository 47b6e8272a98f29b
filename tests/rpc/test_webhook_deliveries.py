"""ListWebhookDeliveries, RedeliverWebhook and SendTestEvent."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from aiohttp import web

from apikeys.v1 import webhook_service_pb2 as pb
from support.databases import until
from support.keys import execute
from support.service import refusal
from support.transport import eventually, sample
from support.webhooks import Hooks, Receiver, make_due

pytestmark = pytest.mark.asyncio(loop_scope="session")

PENDING = pb.WEBHOOK_DELIVERY_STATE_PENDING
DELIVERED = pb.WEBHOOK_DELIVERY_STATE_DELIVERED
DEAD = pb.WEBHOOK_DELIVERY_STATE_DEAD


async def send_test(hooks: Hooks, webhook_id: str) -> pb.WebhookDelivery:
    """Calls SendTestEvent."""
    answer = await hooks.call("SendTestEvent", pb.SendTestEventRequest(webhook_id=webhook_id))
    delivery: pb.WebhookDelivery = answer.delivery
    return delivery


async def redeliver(hooks: Hooks, webhook_id: str, delivery_id: str = "") -> int:
    """Calls RedeliverWebhook."""
    request = pb.RedeliverWebhookRequest(webhook_id=webhook_id, delivery_id=delivery_id)
    count: int = (await hooks.call("RedeliverWebhook", request)).count
    return count


async def give_up(hooks: Hooks, listener: Receiver, count: int = 1) -> list[pb.WebhookDelivery]:
    """Lets what fails now fail for three days, and gives what is dead then."""
    before = len(listener.received)
    await execute(hooks.tenant.service, "UPDATE delivery SET first_time = now() - interval '3 days' WHERE attempts > 0")
    await make_due(hooks.tenant.service)
    await listener.until(before + 1)
    return await hooks.settled(count)


async def test_delivery_that_did_well(hooks: Hooks, listener: Receiver) -> None:
    """A delivery shows what was sent of which event, and what was answered when."""
    webhook = (await hooks.create(listener.url)).webhook
    key = (await hooks.tenant.key()).key
    (received,) = await listener.until(1)
    (delivery,) = await hooks.settled()
    expected = pb.WebhookDelivery(
        id=delivery.id,
        webhook_id=webhook.id,
        organization_id=hooks.tenant.id,
        event_id=received.headers["webhook-id"],
        event_type="api_key.created",
        subject=key.id,
        state=DELIVERED,
        attempts=1,
        create_time=delivery.create_time,
        last_attempt_time=delivery.last_attempt_time,
        last_status=204,
        last_duration=delivery.last_duration,
        done_time=delivery.done_time,
    )
    assert expected == delivery
    assert delivery.create_time.ToDatetime() <= delivery.last_attempt_time.ToDatetime()
    assert 0 < delivery.last_duration.ToTimedelta().total_seconds() < 10


async def test_dead_deliveries_can_be_sent_again(hooks: Hooks, listener: Receiver) -> None:
    """What failed for three days is dead, and shown with why; sent again it has the same event, and all its retries."""
    webhook = (await hooks.create(listener.url, "api_key.created")).webhook
    listener.default = 503
    await hooks.tenant.key()
    await listener.until(1)
    (waiting,) = await hooks.deliveries(state=PENDING)
    assert waiting.HasField("next_attempt_time")
    (dead,) = await give_up(hooks, listener)
    assert (DEAD, 503, pb.WEBHOOK_DELIVERY_ERROR_HTTP_STATUS, 2, False) == (
        dead.state,
        dead.last_status,
        dead.last_error,
        dead.attempts,
        dead.HasField("next_attempt_time"),
    )
    listener.default = 200
    assert 1 == await redeliver(hooks, webhook.id)
    *_, last = await listener.until(3)
    (delivery,) = await hooks.settled(webhook_id=webhook.id)
    assert (dead.id, DELIVERED, 3, dead.event_id) == (
        delivery.id,
        delivery.state,
        delivery.attempts,
        last.headers["webhook-id"],
    )
    assert 0 == await redeliver(hooks, webhook.id)


async def test_one_delivery_can_be_sent_again(hooks: Hooks, others: Hooks, listener: Receiver) -> None:
    """One delivery that is done is sent again, the same as before; another webhook's can not be."""
    webhook = (await hooks.create(listener.url)).webhook
    other = (await others.create(listener.url, "webhook.disabled")).webhook
    await hooks.tenant.key()
    (first,) = await listener.until(1)
    (delivery,) = await hooks.settled()
    assert 1 == await redeliver(hooks, webhook.id, delivery.id)
    _, again = await listener.until(2)
    assert (first.body, first.headers["webhook-id"]) == (again.body, again.headers["webhook-id"])
    for call in (
        redeliver(others, other.id, delivery.id),
        redeliver(hooks, webhook.id, "dlv_" + "0" * 26),
    ):
        error = await refusal(call)
        assert (grpc.StatusCode.NOT_FOUND, "DELIVERY_NOT_FOUND") == (error.code, error.reason)


async def test_filters_and_pages(hooks: Hooks, listener: Receiver) -> None:
    """Deliveries are listed newest first, page by page, by webhook, state and type of event."""
    every = (await hooks.create(listener.url)).webhook
    some = (await hooks.create(listener.url, "api_key.revoked")).webhook
    for _ in range(3):
        await hooks.tenant.revoke((await hooks.tenant.key()).key.id)
    found = await hooks.settled(9)
    assert sorted((each.id for each in found), reverse=True) == [each.id for each in found]
    assert 9 == len(await hooks.deliveries(state=DELIVERED))
    assert [] == await hooks.deliveries(state=DEAD)
    assert {some.id} == {each.webhook_id for each in await hooks.deliveries(webhook_id=some.id)}
    assert 6 == len(await hooks.deliveries(webhook_id=every.id))
    assert 3 == len(await hooks.deliveries(webhook_id=every.id, event_type="api_key.revoked"))
    assert 6 == len(await hooks.deliveries(event_type="api_key.revoked"))
    paged, token = [], ""
    while True:
        request = pb.ListWebhookDeliveriesRequest(page_size=4, page_token=token)
        page = await hooks.call("ListWebhookDeliveries", request)
        paged += list(page.deliveries)
        token = page.next_page_token
        if not token:
            break
    assert found == paged


async def test_test_event(hooks: Hooks, listener: Receiver) -> None:
    """A test is sent to its webhook alone, whatever that has asked for, once: it says at once what came of it."""
    webhook = (await hooks.create(listener.url, "api_key.deleted")).webhook
    await hooks.create(listener.url)
    sent = await send_test(hooks, webhook.id)
    assert (PENDING, "webhook.test", webhook.id) == (sent.state, sent.event_type, sent.webhook_id)
    (received,) = await listener.until(1)
    by = {"actor_key_id": hooks.tenant.admin_key_id, "actor_subject": ""}
    assert {"webhook_id": webhook.id} | by == received.event["data"]
    (delivery,) = await hooks.settled()
    assert (sent.id, DELIVERED) == (delivery.id, delivery.state)
    listener.answers.append(500)
    await send_test(hooks, webhook.id)
    failed = (await hooks.settled(2))[0]
    assert (DEAD, 500, 1) == (failed.state, failed.last_status, failed.attempts)


async def test_webhook_that_is_gone(hooks: Hooks, listener: Receiver) -> None:
    """A webhook that answers 410 is disabled and says why; what waits for it is dead some moments later."""
    webhook = (await hooks.create(listener.url)).webhook
    is_waiting = asyncio.Event()

    async def be_gone(_: web.BaseRequest) -> web.Response:
        await is_waiting.wait()
        return web.Response(status=410)

    listener.answers.append(be_gone)
    key = (await hooks.tenant.key()).key
    await hooks.tenant.toggle(key.id)

    async def waits() -> bool:
        return 2 == len(await hooks.deliveries())

    await until(waits)
    is_waiting.set()
    disabled = await hooks.settled(2)
    assert [pb.WEBHOOK_DELIVERY_ERROR_WEBHOOK_DISABLED, pb.WEBHOOK_DELIVERY_ERROR_HTTP_STATUS] == [
        each.last_error for each in disabled
    ]
    shown = await hooks.get(webhook.id)
    assert (False, pb.WEBHOOK_DISABLE_REASON_GONE) == (shown.enabled, shown.disable_reason)
    assert shown.HasField("disable_time")
    assert shown.HasField("failing_since_time")
    assert ["api_key.created"] == listener.types


async def test_metrics(hooks: Hooks, listener: Receiver) -> None:
    """What is sent is counted by what came of it, and what waits is shown."""
    service = hooks.tenant.service
    webhook = (await hooks.create(listener.url)).webhook
    before = {
        result: sample(service, "latchgate_webhook_attempts_total", result=result) for result in ("delivered", "dead")
    }
    listener.answers.append(500)
    for _ in range(2):
        await send_test(hooks, webhook.id)
    await hooks.settled(2)

    def are_counted() -> bool:
        return all(
            count < sample(service, "latchgate_webhook_attempts_total", result=result)
            for result, count in before.items()
        )

    await eventually(are_counted)
    await eventually(lambda: sample(service, "latchgate_webhooks_disabled") >= 0)
