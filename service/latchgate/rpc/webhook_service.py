"""WebhookService: each method converts, calls one use case, and converts back."""

from __future__ import annotations

from dataclasses import replace

from apikeys.v1 import webhook_service_pb2 as pb
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.model import Caller
from latchgate.domain.webhooks import WebhookManager
from latchgate.rpc import convert, convert_webhooks
from latchgate.rpc.pages import PageTokens, fitting, page_size


class WebhookService:
    """Serves apikeys.v1.WebhookService."""

    def __init__(self, *, webhooks: WebhookManager, pages: PageTokens) -> None:
        """Takes the use cases."""
        self._webhooks = webhooks
        self._pages = pages

    async def create_webhook(self, request: pb.CreateWebhookRequest, caller: Caller) -> pb.CreateWebhookResponse:
        """Creates a webhook."""
        webhook, secret = await self._webhooks.create(caller, request.organization_id, request.url, request.event_types)
        return pb.CreateWebhookResponse(webhook=convert_webhooks.webhook_message(webhook), secret=secret)

    async def get_webhook(self, request: pb.GetWebhookRequest, caller: Caller) -> pb.GetWebhookResponse:
        """Reads a webhook."""
        webhook = await self._webhooks.get(caller, request.webhook_id)
        return pb.GetWebhookResponse(webhook=convert_webhooks.webhook_message(webhook))

    async def list_webhooks(self, request: pb.ListWebhooksRequest, caller: Caller) -> pb.ListWebhooksResponse:
        """Lists webhooks."""
        organization_id = request.organization_id or caller.organization_id
        listing = ("webhooks", caller.organization_id, organization_id)
        after = self._pages.read(listing, request.page_token)
        page = await self._webhooks.list(caller, request.organization_id, after, page_size(request.page_size))
        webhooks, is_cut = fitting(convert_webhooks.webhook_message(each) for each in page.webhooks)
        return pb.ListWebhooksResponse(
            webhooks=webhooks,
            next_page_token=self._pages.make(listing, webhooks[-1].id) if page.more or is_cut else "",
        )

    async def update_webhook(self, request: pb.UpdateWebhookRequest, caller: Caller) -> pb.UpdateWebhookResponse:
        """Changes a webhook."""
        if not request.webhook.id:
            raise InvalidFieldError([("webhook.id", "must name the webhook to change")])
        changes = convert_webhooks.webhook_changes(request)
        with convert.fields_of("webhook"):
            webhook = await self._webhooks.update(caller, request.webhook.id, request.etag, changes)
        return pb.UpdateWebhookResponse(webhook=convert_webhooks.webhook_message(webhook))

    async def delete_webhook(self, request: pb.DeleteWebhookRequest, caller: Caller) -> pb.DeleteWebhookResponse:
        """Ends a webhook."""
        await self._webhooks.delete(caller, request.webhook_id)
        return pb.DeleteWebhookResponse(webhook_id=request.webhook_id)

    async def rotate_webhook_secret(
        self, request: pb.RotateWebhookSecretRequest, caller: Caller
    ) -> pb.RotateWebhookSecretResponse:
        """Gives a webhook a new secret."""
        webhook, secret = await self._webhooks.rotate_secret(caller, request.webhook_id)
        return pb.RotateWebhookSecretResponse(webhook=convert_webhooks.webhook_message(webhook), secret=secret)

    async def list_webhook_deliveries(
        self, request: pb.ListWebhookDeliveriesRequest, caller: Caller
    ) -> pb.ListWebhookDeliveriesResponse:
        """Lists deliveries."""
        wanted = convert_webhooks.delivery_filter(request)
        named = wanted.organization_id or ("" if wanted.webhook_id else caller.organization_id)
        listing = ("deliveries", caller.organization_id, replace(wanted, organization_id=named))
        after = self._pages.read(listing, request.page_token)
        page = await self._webhooks.list_deliveries(caller, wanted, after, page_size(request.page_size))
        deliveries, is_cut = fitting(convert_webhooks.delivery_message(each) for each in page.deliveries)
        return pb.ListWebhookDeliveriesResponse(
            deliveries=deliveries,
            next_page_token=self._pages.make(listing, deliveries[-1].id) if page.more or is_cut else "",
        )

    async def redeliver_webhook(
        self, request: pb.RedeliverWebhookRequest, caller: Caller
    ) -> pb.RedeliverWebhookResponse:
        """Has deliveries made again."""
        count = await self._webhooks.redeliver(caller, request.webhook_id, request.delivery_id)
        return pb.RedeliverWebhookResponse(count=count)

    async def send_test_event(self, request: pb.SendTestEventRequest, caller: Caller) -> pb.SendTestEventResponse:
        """Has an event of no meaning sent."""
        delivery = await self._webhooks.send_test(caller, request.webhook_id)
        return pb.SendTestEventResponse(delivery=convert_webhooks.delivery_message(delivery))
