"""Reading the audit trail, and finding out whether it is whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from latchgate.domain import access
from latchgate.domain.audit import GENESIS, AuditFilter, ChainedEvent, chain
from latchgate.domain.model import Caller, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Where an organization's chain ends, and after which event what is kept of it begins.

    `last_sequence` is that of the last event that there is: of a whole chain, its end's.
    """

    organization_id: str
    sequence: int
    hash: bytes
    last_sequence: int
    start_sequence: int = 0
    start_hash: bytes = GENESIS


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPage:
    """One page of events; `more` says whether another follows."""

    events: Sequence[ChainedEvent]
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspiciousUse:
    """How often within an hour tokens were tried from one source that should not be.

    `source` is an address, a network of IPv6, `others`, or empty where none was told. Without a key it is tokens that
    nobody has.
    """

    id: int
    hour: datetime
    source: str
    outcome: Outcome
    organization_id: str
    key_id: str
    count: int
    first_time: datetime
    last_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspicionPage:
    """One page of suspicious use; `more` says whether another follows."""

    uses: Sequence[SuspiciousUse]
    more: bool


class SuspicionReader(Protocol):
    """Suspicious use at rest."""

    async def list_suspicious(self, organization_id: str | None, before: int, count: int) -> Sequence[SuspiciousUse]:
        """Lists up to `count` of an organization's, or of all for None, newest first, before the id `before` (0: none).

        Raises StorageUnavailableError.
        """


class TrailReader(Protocol):
    """The audit trail at rest. Every method raises StorageUnavailableError."""

    async def list_events(self, event_filter: AuditFilter, before: int, count: int) -> Sequence[ChainedEvent]:
        """Lists up to `count` events that match, newest first, before the sequence `before` (0: from the newest)."""

    async def has_organization(self, organization_id: str) -> bool:
        """Says whether there is such an organization."""


class AuditReader:
    """Lists events and suspicious use."""

    def __init__(self, trail: TrailReader, suspicion: SuspicionReader) -> None:
        """Takes the trail, and where suspicious use is."""
        self._trail = trail
        self._suspicion = suspicion

    async def list_suspicious(self, caller: Caller, organization_id: str, before: int, count: int) -> SuspicionPage:
        """Lists suspicious use of an organization's keys; for root that names none, all, of unknown tokens too."""
        access.require(caller, access.READ_AUDIT)
        only: str | None = None
        if organization_id or not caller.is_root:
            only = access.organization_for(caller, organization_id)
        uses = await self._suspicion.list_suspicious(only, before, count + 1)
        if not uses and only is not None and not await self._trail.has_organization(only):
            raise access.organization_not_found(only)
        return SuspicionPage(uses=uses[:count], more=len(uses) > count)

    async def list(self, caller: Caller, event_filter: AuditFilter, before: int, count: int) -> AuditPage:
        """Lists up to `count` events before a sequence, newest first. The filter's organization may be empty."""
        access.require(caller, access.READ_AUDIT)
        organization_id = access.organization_for(caller, event_filter.organization_id)
        events = await self._trail.list_events(
            replace(event_filter, organization_id=organization_id), before, count + 1
        )
        if not events and not await self._trail.has_organization(organization_id):
            raise access.organization_not_found(organization_id)
        return AuditPage(events=events[:count], more=len(events) > count)


async def find_break(kept: Chain, events: AsyncIterator[ChainedEvent]) -> str:
    """Walks along the events of a chain, in their order, and says what is wrong with them; nothing if it is whole."""
    if kept.last_sequence > kept.sequence:
        return f"event {kept.sequence + 1} lies beyond the end of the trail"
    sequence, last = kept.start_sequence, kept.start_hash
    async for each in events:
        if each.event.sequence != sequence + 1:
            return f"event {sequence + 1} is missing"
        sequence += 1
        if chain(last, each.event) != each.hash:
            return f"event {sequence} is not what was recorded, or follows another than it did"
        last = each.hash
    if sequence < kept.sequence:
        return f"event {sequence + 1} is missing"
    if (sequence, last) != (kept.sequence, kept.hash):
        return f"event {sequence} is not where the trail ends"
    return ""
