"""One service for all tests of a module that leave it as it was."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from support.service import RunningService, run_service
from support.tokens import plant_tokens
from support.transport import fresh_database
from support.webhooks import plant_webhooks


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared_service(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service on a database of the module's own, with an organization `acme`."""
    async with fresh_database(postgres_url, template_url) as url, run_service(url) as running:
        await running.create_organization("acme")
        await plant_webhooks(url)
        await plant_tokens(url)
        yield running
