"""UsageService: each method converts, calls one use case, and converts back."""

from __future__ import annotations

from datetime import timedelta

from apikeys.v1 import usage_service_pb2 as pb
from latchgate.domain.model import Caller
from latchgate.domain.usage import UsageReporter
from latchgate.rpc import convert
from latchgate.rpc.pages import PageTokens, fitting, page_size


class UsageService:
    """Serves apikeys.v1.UsageService."""

    def __init__(self, *, usage: UsageReporter, pages: PageTokens) -> None:
        """Takes the use cases."""
        self._usage = usage
        self._pages = pages

    async def get_usage(self, request: pb.GetUsageRequest, caller: Caller) -> pb.GetUsageResponse:
        """Counts what was answered."""
        span = convert.usage_span(request)
        return convert.usage_message(await self._usage.get(caller, request.organization_id, request.key_id, span))

    async def list_unused_keys(self, request: pb.ListUnusedKeysRequest, caller: Caller) -> pb.ListUnusedKeysResponse:
        """Lists keys that are not used."""
        organization_id = request.organization_id or caller.organization_id
        listing = ("unused keys", caller.organization_id, organization_id, request.unused_days)
        after, size = self._pages.read(listing, request.page_token), page_size(request.page_size)
        unused = timedelta(days=request.unused_days)
        page = await self._usage.unused(caller, request.organization_id, unused, after, size)
        keys, is_cut = fitting(convert.key_message(key) for key in page.keys)
        reached = keys[-1].id if is_cut else page.reached
        return convert.unused_message(keys, self._pages.make(listing, reached) if reached else "", page.unused_since)
