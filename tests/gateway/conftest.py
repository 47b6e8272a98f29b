"""All tests here run on one event loop: mark each module with `pytest.mark.asyncio(loop_scope="session")`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from support.edge import Edge
from support.edge import edge as run_edge
from support.keys import Tenant, cloned_database, make_tenant
from support.service import RunningService, run_service
from support.tokens import plant_tokens
from support.webhooks import plant_webhooks


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that gateways may ask over gRPC and HTTP."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, http_listen="127.0.0.1:0") as running,
    ):
        await plant_webhooks(url)
        await plant_tokens(url)
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def acme(shared: RunningService) -> Tenant:
    """A tenant of the test's own."""
    return await make_tenant(shared, "acme")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def edge(shared: RunningService, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    """Envoy in front of the shared service."""
    async with run_edge(tmp_path_factory.mktemp("envoy"), shared.address) as running:
        yield running
