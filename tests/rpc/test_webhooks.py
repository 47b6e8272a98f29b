"""CreateWebhook, GetWebhook, ListWebhooks, UpdateWebhook, DeleteWebhook, RotateWebhookSecret."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from standardwebhooks import WebhookVerificationError

from apikeys.v1 import webhook_service_pb2 as pb
from latchgate.domain.webhooks import MAX_WEBHOOKS
from support.keys import database_of, execute
from support.service import refusal
from support.webhooks import Hooks, Receiver

pytestmark = pytest.mark.asyncio(loop_scope="session")

URL = "https://hooks.invalid/a"
NOBODYS = "whk_" + "0" * 26

ABOUT_A_WEBHOOK: dict[str, tuple[str, Callable[[str], Any]]] = {
    "GetWebhook": ("webhooks:read", lambda webhook_id: pb.GetWebhookRequest(webhook_id=webhook_id)),
    "UpdateWebhook": (
        "webhooks:write",
        lambda webhook_id: pb.UpdateWebhookRequest(webhook=pb.Webhook(id=webhook_id, url=URL), etag="v1"),
    ),
    "DeleteWebhook": ("webhooks:write", lambda webhook_id: pb.DeleteWebhookRequest(webhook_id=webhook_id)),
    "RotateWebhookSecret": ("webhooks:write", lambda webhook_id: pb.RotateWebhookSecretRequest(webhook_id=webhook_id)),
    "ListWebhookDeliveries": (
        "webhooks:read",
        lambda webhook_id: pb.ListWebhookDeliveriesRequest(webhook_id=webhook_id),
    ),
    "RedeliverWebhook": ("webhooks:write", lambda webhook_id: pb.RedeliverWebhookRequest(webhook_id=webhook_id)),
    "SendTestEvent": ("webhooks:write", lambda webhook_id: pb.SendTestEventRequest(webhook_id=webhook_id)),
}
ABOUT_AN_ORGANIZATION: dict[str, tuple[str, Callable[[str], Any]]] = {
    "CreateWebhook": (
        "webhooks:write",
        lambda organization_id: pb.CreateWebhookRequest(organization_id=organization_id, url=URL),
    ),
    "ListWebhooks": (
        "webhooks:read",
        lambda organization_id: pb.ListWebhooksRequest(organization_id=organization_id),
    ),
    "ListWebhookDeliveries": (
        "webhooks:read",
        lambda organization_id: pb.ListWebhookDeliveriesRequest(organization_id=organization_id),
    ),
}


async def update(hooks: Hooks, webhook: pb.Webhook, *paths: str, etag: str = "") -> pb.Webhook:
    """Calls UpdateWebhook with a mask of these paths."""
    mask = field_mask_pb2.FieldMask(paths=paths)
    answer = await hooks.call("UpdateWebhook", pb.UpdateWebhookRequest(webhook=webhook, update_mask=mask, etag=etag))
    updated: pb.Webhook = answer.webhook
    return updated


async def test_tables_are_complete() -> None:
    """Every method of the service is in the tables of this module."""
    methods = pb.DESCRIPTOR.services_by_name["WebhookService"].methods
    assert {method.name for method in methods} == ABOUT_A_WEBHOOK.keys() | ABOUT_AN_ORGANIZATION.keys()


@pytest.mark.parametrize("method", ABOUT_A_WEBHOOK)
async def test_webhooks_of_others(hooks: Hooks, others: Hooks, method: str) -> None:
    """Another organization's webhook is answered like one that never was, and stays as it is; root sees all."""
    theirs = (await others.create(URL)).webhook
    make = ABOUT_A_WEBHOOK[method][1]
    told = [await refusal(hooks.call(method, make(webhook_id))) for webhook_id in (theirs.id, NOBODYS)]
    assert {(grpc.StatusCode.NOT_FOUND, "WEBHOOK_NOT_FOUND")} == {(each.code, each.reason) for each in told}
    assert told[0].message.replace(theirs.id, NOBODYS) == told[1].message
    assert theirs == await others.get(theirs.id)
    await hooks.call(method, make(theirs.id), hooks.tenant.service.root)


@pytest.mark.parametrize("method", ABOUT_AN_ORGANIZATION)
async def test_other_organizations(hooks: Hooks, others: Hooks, method: str) -> None:
    """Another organization is answered like one that never was; root must name one, and may name any."""
    make = ABOUT_AN_ORGANIZATION[method][1]
    for organization_id in (others.tenant.id, "org_root", "no-such-organization"):
        error = await refusal(hooks.call(method, make(organization_id)))
        assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)
    root = hooks.tenant.service.root
    assert ["organization_id"] == list((await refusal(hooks.call(method, make(""), root))).violations)
    assert "ORGANIZATION_NOT_FOUND" == (await refusal(hooks.call(method, make("no-such-organization"), root))).reason
    await hooks.call(method, make(others.tenant.id), root)


@pytest.mark.parametrize("method", ABOUT_A_WEBHOOK | ABOUT_AN_ORGANIZATION)
async def test_the_permission_that_a_method_needs(hooks: Hooks, method: str) -> None:
    """A method can be called with its own permission alone, and not with all others together."""
    webhook_id = (await hooks.create(URL)).webhook.id
    needed, make = ABOUT_A_WEBHOOK.get(method) or ABOUT_AN_ORGANIZATION[method]
    request = make(webhook_id if method in ABOUT_A_WEBHOOK else "")
    every = {"keys:read", "keys:write", "keys:validate", "audit:read", "webhooks:read", "webhooks:write", "read"}
    error = await refusal(hooks.call(method, request, await hooks.tenant.caller(*(every - {needed}))))
    assert ("PERMISSION_MISSING", {"permission": needed}) == (error.reason, error.metadata)
    await hooks.call(method, request, await hooks.tenant.caller(needed))


async def test_every_field_of_a_new_webhook(hooks: Hooks) -> None:
    """A webhook is read and listed as it was created; its secret is in the answer of CreateWebhook alone, and is stored
    so that nobody can read it.
    """
    created = await hooks.create(URL, "api_key.created", "api_key.revoked")
    webhook = created.webhook
    expected = pb.Webhook(
        id=webhook.id,
        organization_id=hooks.tenant.id,
        url=URL,
        event_types=["api_key.created", "api_key.revoked"],
        enabled=True,
        created_by=hooks.tenant.admin_key_id,
        create_time=webhook.create_time,
        update_time=webhook.update_time,
        etag="v1",
    )
    assert expected == webhook == await hooks.get(webhook.id)
    assert re.fullmatch(r"whk_[0-9a-z]{26}", webhook.id)
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", created.secret)
    assert [webhook] == list((await hooks.call("ListWebhooks", pb.ListWebhooksRequest())).webhooks)
    async with database_of(hooks.tenant.service) as connection:
        stored = await connection.fetchval("SELECT w::text FROM webhook w WHERE id = $1", webhook.id)
    assert created.secret[6:] not in stored
    assert created.secret.encode().hex() not in stored


@pytest.mark.parametrize(
    ("url", "event_types", "field"),
    [
        ("http://8.8.8.8/", [], "url"),
        ("https://10.0.0.1/", [], "url"),
        ("https://user:password@example.com/", [], "url"),
        ("nonsense", [], "url"),
        (URL, ["api_key.created", "api_key.eaten"], "event_types[1]"),
        (URL, ["webhook.test"], "event_types[0]"),
        (URL, ["api_key.*"], "event_types[0]"),
    ],
)
async def test_webhooks_that_can_not_be(hooks: Hooks, url: str, event_types: list[str], field: str) -> None:
    """A URL to which may not be sent and an event that is none are refused by the field's name, at creation as by an
    update.
    """
    error = await refusal(hooks.call("CreateWebhook", pb.CreateWebhookRequest(url=url, event_types=event_types)))
    assert ("INVALID_FIELD", [field]) == (error.reason, list(error.violations))
    webhook = (await hooks.create(URL)).webhook
    changed = pb.Webhook(id=webhook.id, url=url, event_types=event_types)
    error = await refusal(update(hooks, changed, "url", "event_types"))
    assert ("INVALID_FIELD", [f"webhook.{field}"]) == (error.reason, list(error.violations))


async def test_number_of_webhooks(hooks: Hooks, others: Hooks) -> None:
    """An organization has as many webhooks as there may be, and not one more; a deleted one leaves its place."""
    first = (await hooks.create(URL)).webhook.id
    await execute(
        hooks.tenant.service,
        "INSERT INTO webhook (id, organization_id, url, event_types, created_by, sealed_secret)"
        " SELECT $1 || number, $1, '', '{none}', '', '' FROM generate_series(2, $2::int4) AS number",
        hooks.tenant.id,
        MAX_WEBHOOKS,
    )
    error = await refusal(hooks.create(URL))
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "WEBHOOK_LIMIT_REACHED") == (error.code, error.reason)
    await others.create(URL)
    await hooks.call("DeleteWebhook", pb.DeleteWebhookRequest(webhook_id=first))
    await hooks.create(URL)


async def test_pages(hooks: Hooks) -> None:
    """Webhooks are listed newest first, page by page; a page token is good for its own list alone."""
    made = [(await hooks.create(URL)).webhook.id for _ in range(3)]
    found, token = [], ""
    while True:
        page = await hooks.call("ListWebhooks", pb.ListWebhooksRequest(page_size=2, page_token=token))
        found += [webhook.id for webhook in page.webhooks]
        token = page.next_page_token or token
        if not page.next_page_token:
            break
    assert made[::-1] == found
    error = await refusal(hooks.call("ListWebhookDeliveries", pb.ListWebhookDeliveriesRequest(page_token=token)))
    assert "PAGE_TOKEN_INVALID" == error.reason


async def test_update(hooks: Hooks) -> None:
    """The fields of the mask are changed, without one those that are set; a stale etag is ABORTED."""
    webhook = (await hooks.create(URL, "api_key.created")).webhook
    changed = await update(hooks, pb.Webhook(id=webhook.id, url=f"{URL}b", event_types=["api_key.deleted"]), "url")
    assert (f"{URL}b", ["api_key.created"], "v2") == (changed.url, list(changed.event_types), changed.etag)
    error = await refusal(update(hooks, pb.Webhook(id=webhook.id, url=URL), "url", etag="v1"))
    assert (grpc.StatusCode.ABORTED, "ETAG_MISMATCH") == (error.code, error.reason)
    changed = await update(hooks, pb.Webhook(id=webhook.id, event_types=["api_key.deleted"]), etag="v2")
    assert (f"{URL}b", ["api_key.deleted"]) == (changed.url, list(changed.event_types))
    assert [] == list((await update(hooks, pb.Webhook(id=webhook.id), "event_types")).event_types)
    assert ["update_mask"] == list((await refusal(update(hooks, webhook, "created_by"))).violations)
    assert ["webhook.id"] == list((await refusal(update(hooks, pb.Webhook(url=URL), "url"))).violations)


async def test_switching_off_and_on(hooks: Hooks, listener: Receiver) -> None:
    """A webhook that is off gets nothing, also not later; switched on it gets what comes."""
    webhook = (await hooks.create(listener.url, "api_key.created")).webhook
    off = await update(hooks, pb.Webhook(id=webhook.id), "enabled")
    assert (False, pb.WEBHOOK_DISABLE_REASON_CALLER, True) == (
        off.enabled,
        off.disable_reason,
        off.HasField("disable_time"),
    )
    for method in ("SendTestEvent", "RedeliverWebhook"):
        error = await refusal(hooks.call(method, ABOUT_A_WEBHOOK[method][1](webhook.id)))
        assert (grpc.StatusCode.FAILED_PRECONDITION, "WEBHOOK_DISABLED") == (error.code, error.reason)
    witness = (await hooks.create(listener.url, "api_key.revoked")).webhook
    unheard = (await hooks.tenant.key()).key
    await hooks.tenant.revoke(unheard.id)
    await listener.until(1)
    assert await update(hooks, pb.Webhook(id=webhook.id, enabled=True)) == await hooks.get(webhook.id)
    heard = (await hooks.tenant.key()).key
    _, last = await listener.until(2)
    assert ["api_key.revoked", "api_key.created"] == listener.types
    assert heard.id == last.event["data"]["key"]["id"]
    assert {witness.id, webhook.id} == {each.webhook_id for each in await hooks.settled(2)}


async def test_deleted_webhooks(hooks: Hooks, listener: Receiver) -> None:
    """A deleted webhook is gone from everywhere, and gets nothing; its secret is not kept."""
    webhook = (await hooks.create(listener.url)).webhook
    answer = await hooks.call("DeleteWebhook", pb.DeleteWebhookRequest(webhook_id=webhook.id))
    assert webhook.id == answer.webhook_id
    for method, (_, make) in ABOUT_A_WEBHOOK.items():
        assert "WEBHOOK_NOT_FOUND" == (await refusal(hooks.call(method, make(webhook.id)))).reason, method
    assert [] == list((await hooks.call("ListWebhooks", pb.ListWebhooksRequest())).webhooks)
    witness = await hooks.create(listener.url)
    await hooks.tenant.key()
    (only,) = await listener.until(1)
    only.verified(witness.secret)
    async with database_of(hooks.tenant.service) as connection:
        kept = await connection.fetch("SELECT sealed_secret FROM webhook WHERE id = $1", webhook.id)
    assert all(not row["sealed_secret"] for row in kept)


async def test_rotated_secrets(hooks: Hooks, listener: Receiver) -> None:
    """For 24 hours after a rotation both secrets verify what is sent, then the new one alone; a further rotation ends
    the oldest at once.
    """
    first = await hooks.create(listener.url)
    request = pb.RotateWebhookSecretRequest(webhook_id=first.webhook.id)
    second = await hooks.call("RotateWebhookSecret", request)
    left = second.webhook.old_secret_end_time.ToDatetime() - second.webhook.update_time.ToDatetime()
    assert timedelta(hours=24) == left
    await hooks.tenant.key()
    (both,) = await listener.until(1)
    both.verified(first.secret)
    both.verified(second.secret)
    third = await hooks.call("RotateWebhookSecret", request)
    await hooks.tenant.key()
    _, newer = await listener.until(2)
    newer.verified(third.secret)
    newer.verified(second.secret)
    with pytest.raises(WebhookVerificationError):
        newer.verified(first.secret)
    await execute(
        hooks.tenant.service, "UPDATE webhook SET old_secret_end_time = now() WHERE id = $1", first.webhook.id
    )
    assert not (await hooks.get(first.webhook.id)).HasField("old_secret_end_time")
    await hooks.tenant.key()
    *_, newest = await listener.until(3)
    newest.verified(third.secret)
    with pytest.raises(WebhookVerificationError):
        newest.verified(second.secret)


async def test_changes_are_in_the_audit_trail(hooks: Hooks) -> None:
    """Each change of a webhook is recorded with its caller, and no secret with it."""
    created = await hooks.create(URL)
    await hooks.call("RotateWebhookSecret", pb.RotateWebhookSecretRequest(webhook_id=created.webhook.id))
    await update(hooks, pb.Webhook(id=created.webhook.id, url=f"{URL}b"))
    await hooks.call("DeleteWebhook", pb.DeleteWebhookRequest(webhook_id=created.webhook.id))
    async with database_of(hooks.tenant.service) as connection:
        rows = await connection.fetch(
            "SELECT method, before_change::text, after_change::text, actor_key_id FROM audit_event"
            " WHERE entity = 'webhook' AND entity_id = $1 ORDER BY sequence",
            created.webhook.id,
        )
    names = ("CreateWebhook", "RotateWebhookSecret", "UpdateWebhook", "DeleteWebhook")
    assert [f"WebhookService/{name}" for name in names] == [row["method"] for row in rows]
    assert [(False, True), (True, True), (True, True), (True, False)] == [
        (row["before_change"] is not None, row["after_change"] is not None) for row in rows
    ]
    assert {hooks.tenant.admin_key_id} == {row["actor_key_id"] for row in rows}
    assert "whsec" not in str([tuple(row) for row in rows])
