"""AuditService: each method converts, calls one use case, and converts back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from google.protobuf import json_format, struct_pb2

from apikeys.v1 import audit_service_pb2 as pb
from apikeys.v1 import key_service_pb2
from latchgate.domain.audit import AuditFilter, ChainedEvent
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.model import Caller
from latchgate.domain.trail import AuditReader, SuspiciousUse
from latchgate.rpc import convert
from latchgate.rpc.pages import PageTokens, fitting, page_size


class AuditService:
    """Serves apikeys.v1.AuditService."""

    def __init__(self, *, trail: AuditReader, pages: PageTokens) -> None:
        """Takes the use cases."""
        self._trail = trail
        self._pages = pages

    async def list_audit_events(self, request: pb.ListAuditEventsRequest, caller: Caller) -> pb.ListAuditEventsResponse:
        """Lists events."""
        event_filter = _event_filter(request)
        named = replace(event_filter, organization_id=event_filter.organization_id or caller.organization_id)
        listing = ("audit events", caller.organization_id, named)
        before = int(self._pages.read(listing, request.page_token) or 0)
        page = await self._trail.list(caller, event_filter, before, page_size(request.page_size))
        events, is_cut = fitting(_event_message(each) for each in page.events)
        return pb.ListAuditEventsResponse(
            events=events,
            next_page_token=self._pages.make(listing, str(events[-1].sequence)) if page.more or is_cut else "",
        )

    async def list_suspicious_use(
        self, request: pb.ListSuspiciousUseRequest, caller: Caller
    ) -> pb.ListSuspiciousUseResponse:
        """Lists suspicious use."""
        # A root key's own organization and none are two lists.
        listing = ("suspicious use", caller.organization_id, request.organization_id)
        before = int(self._pages.read(listing, request.page_token) or 0)
        page = await self._trail.list_suspicious(caller, request.organization_id, before, page_size(request.page_size))
        return pb.ListSuspiciousUseResponse(
            uses=[_use_message(each) for each in page.uses],
            next_page_token=self._pages.make(listing, str(page.uses[-1].id)) if page.more else "",
        )


def _use_message(use: SuspiciousUse) -> pb.SuspiciousUse:
    message = pb.SuspiciousUse(
        source=use.source,
        outcome=key_service_pb2.Outcome.Value(f"OUTCOME_{use.outcome.name}"),
        organization_id=use.organization_id,
        key_id=use.key_id,
        count=use.count,
    )
    message.hour.FromDatetime(use.hour)
    message.first_time.FromDatetime(use.first_time)
    message.last_time.FromDatetime(use.last_time)
    return message


def _event_filter(request: pb.ListAuditEventsRequest) -> AuditFilter:
    start_time = convert.moment(request.start_time, "start_time") if request.HasField("start_time") else None
    end_time = convert.moment(request.end_time, "end_time") if request.HasField("end_time") else None
    if start_time and end_time and start_time >= end_time:
        raise InvalidFieldError([("end_time", "must lie after start_time")])
    return AuditFilter(
        organization_id=request.organization_id,
        actor_key_id=request.actor_key_id,
        actor_subject=request.actor_subject,
        entity=request.entity,
        entity_id=request.entity_id,
        method=request.method,
        code=request.code,
        start_time=start_time,
        end_time=end_time,
    )


def _event_message(chained: ChainedEvent) -> pb.AuditEvent:
    event = chained.event
    message = pb.AuditEvent(
        organization_id=event.organization_id,
        sequence=event.sequence,
        actor_key_id=event.actor_key_id,
        actor_subject=event.actor_subject,
        actor_organization_id=event.actor_organization_id,
        certificate=event.certificate,
        peer=event.peer,
        method=event.method,
        request_id=event.request_id,
        entity=event.entity,
        entity_id=event.entity_id,
        before=_struct(event.before),
        after=_struct(event.after),
        revision=event.revision,
        code=event.code,
        reason=event.reason,
        hash=chained.hash.hex(),
    )
    message.event_time.FromDatetime(event.event_time)
    return message


def _struct(snapshot: Mapping[str, object] | None) -> struct_pb2.Struct | None:
    if snapshot is None:
        return None
    struct = struct_pb2.Struct()
    json_format.ParseDict(dict(snapshot), struct)
    return struct
