"""How events of the audit trail are chained, and what a walk along the chain finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from latchgate.domain.audit import GENESIS, AuditEntry, AuditEvent, ChainedEvent, canonical, chain
from latchgate.domain.trail import Chain, find_break
from support.records import ROOT

START = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)


def made(count: int = 5) -> list[ChainedEvent]:
    """A chain as the service makes it."""
    events, last = [], GENESIS
    for number in range(1, count + 1):
        entry = AuditEntry(
            organization_id="acme", entity="key", entity_id=f"key_{number}", after={"name": "Zoë", "limit": number}
        )
        event = AuditEvent.of(entry, ROOT, sequence=number, event_time=START + timedelta(seconds=number))
        last = chain(last, event)
        events.append(ChainedEvent(event=event, hash=last))
    return events


def end_of(events: Sequence[ChainedEvent], **start: Any) -> Chain:
    """Where a chain ends."""
    last = events[-1].event.sequence
    return Chain(organization_id="acme", sequence=last, hash=events[-1].hash, **({"last_sequence": last} | start))


async def found(kept: Chain, events: Sequence[ChainedEvent]) -> str:
    """What a walk finds."""

    async def walk() -> AsyncIterator[ChainedEvent]:
        for event in events:
            yield event

    return await find_break(kept, walk())


async def test_a_whole_chain() -> None:
    """A chain as it was made is whole; so is one whose first events are gone, if it is noted where it begins then."""
    events = made()
    assert "" == await found(end_of(events), events)
    rest = end_of(events, start_sequence=2, start_hash=events[1].hash)
    assert "" == await found(rest, events[2:])


@pytest.mark.parametrize("index", range(5))
async def test_an_event_that_is_gone(index: int) -> None:
    """Whichever event is removed, the first and the last too, it is said which one is missing."""
    events = made()
    assert f"event {index + 1} is missing" == await found(end_of(events), events[:index] + events[index + 1 :])


@pytest.mark.parametrize("name", AuditEvent.__slots__)
async def test_an_event_that_was_changed(name: str) -> None:
    """A change of any field of an event shows."""
    events = made()
    value: Any = getattr(events[2].event, name)
    if isinstance(value, str):
        other: Any = value + "x"
    elif isinstance(value, datetime):
        other = value + timedelta(microseconds=1)
    elif name == "sequence":
        other = 7
    elif isinstance(value, int):
        other = value + 1
    else:
        other = {"name": "Zoé"}
    events[2] = replace(events[2], event=replace(events[2].event, **{name: other}))
    assert await found(end_of(events), events) in {
        "event 3 is not what was recorded, or follows another than it did",
        "event 3 is missing",
    }


async def test_an_event_with_its_hash_made_anew() -> None:
    """Whoever changes an event and makes its hash anew is betrayed by the next one; at the end, by where it ended."""
    events = made()
    for index, expected in (
        (2, "event 4 is not what was recorded, or follows another than it did"),
        (4, "event 5 is not where the trail ends"),
    ):
        changed = replace(events[index].event, code="PERMISSION_DENIED")
        forged = [*events]
        forged[index] = ChainedEvent(event=changed, hash=chain(events[index - 1].hash, changed))
        assert expected == await found(end_of(events), forged)


async def test_events_beyond_the_end() -> None:
    """An event that was added behind the end of the trail shows."""
    events = made()
    shorter = end_of(events[:4], last_sequence=5)
    assert "event 5 lies beyond the end of the trail" == await found(shorter, events[:4])


def test_the_canonical_form() -> None:
    """What is hashed can be made by others: SHA-256 over the hash before and JSON with sorted names, as documented."""
    event = made(1)[0].event
    content = canonical(event).decode()
    assert sorted(json.loads(content)) == list(json.loads(content))
    assert '"after":{"limit":1,"name":"Zoë"}' in content
    assert '"event_time":"2026-02-01T00:00:00.000000+00:00"' in content
    assert hashlib.sha256(GENESIS + content.encode()).digest() == chain(GENESIS, event)


def test_events_of_before_subjects_were_recorded() -> None:
    """The event of a caller with a key is hashed as it was before subjects were recorded; a subject is hashed too."""
    event = made(1)[0].event
    assert "actor_subject" not in json.loads(canonical(event))
    named = replace(event, actor_key_id="", actor_subject="https://login.example.com#alice")
    assert "https://login.example.com#alice" == json.loads(canonical(named))["actor_subject"]
    assert chain(GENESIS, named) != chain(GENESIS, replace(named, actor_subject=""))
