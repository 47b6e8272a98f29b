"""A service whose database is reached through a wire that breaks on demand."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.faults import FaultyWire, faulty_wire
from support.service import RunningService, run_service

POOL_SIZE = 4


@pytest.fixture
async def wire(postgres_url: str) -> AsyncIterator[FaultyWire]:
    """A wire to the tests' PostgreSQL that lets everything pass."""
    async with faulty_wire(postgres_url) as made:
        await made.listen()
        yield made


@pytest.fixture
async def wired(wire: FaultyWire, database_url: str) -> AsyncIterator[RunningService]:
    """A service behind the wire, with an organization `acme`; it writes last-used times when it stops, not before."""
    async with run_service(wire.url(database_url), pool_size=POOL_SIZE, usage_flush_seconds=3600) as running:
        await running.create_organization("acme")
        yield running
