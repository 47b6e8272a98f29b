"""An import whose database goes away: what was answered is stored, and the rest can be sent again."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from apikeys.v1 import import_service_pb2 as pb
from support.databases import connected
from support.faults import CommitFault, FaultyWire
from support.imports import import_call, import_rows, new_rows, outcomes
from support.service import RunningService, refusal


async def key_count(service: RunningService) -> int:
    """Reads from the database how many keys the organization has, which must be as many as are counted."""
    async with connected(service.database_url) as connection:
        count: int = await connection.fetchval("SELECT count(*) FROM key WHERE organization_id = 'acme'")
        assert count == await connection.fetchval("SELECT key_count FROM organization WHERE id = 'acme'")
    return count


@pytest.mark.parametrize("fault", [CommitFault.CUT_BEFORE, CommitFault.CUT_AFTER])
async def test_commit_lost(wired: RunningService, wire: FaultyWire, fault: CommitFault) -> None:
    """A request whose commit was not answered is WRITE_UNKNOWN; the same rows again are all there once, as new or as
    duplicates.
    """
    rows = new_rows(5)
    happened = wire.at_next_commit(fault)

    error = await refusal(import_rows(wired, "acme", rows))

    assert happened.is_set()
    assert (grpc.StatusCode.UNAVAILABLE, "WRITE_UNKNOWN") == (error.code, error.reason)
    was_stored = fault is not CommitFault.CUT_BEFORE
    wire.cut()
    assert ["DUPLICATE" if was_stored else "CREATED"] * 5 == outcomes(await import_rows(wired, "acme", rows))
    assert 5 == await key_count(wired)


async def test_database_away_between_requests(wired: RunningService, wire: FaultyWire) -> None:
    """A database that goes away within a call ends it as UNAVAILABLE; what was answered is stored, and nothing else."""
    told: list[list[str]] = []
    is_told = asyncio.Event()

    async def requests() -> Any:
        yield pb.ImportKeysRequest(organization_id="acme", keys=new_rows(3))
        await is_told.wait()
        wire.refuse()
        yield pb.ImportKeysRequest(organization_id="acme", keys=new_rows(3))

    async def receive() -> None:
        async for response in import_call(wired.channel, requests(), wired.root):
            told.append(outcomes(response))
            is_told.set()

    error = await refusal(receive())

    assert (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE") == (error.code, error.reason)
    assert [["CREATED"] * 3] == told
    await wire.listen()
    assert 3 == await key_count(wired)
