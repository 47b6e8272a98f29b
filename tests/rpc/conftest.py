"""One service for all tests that keep to organizations of their own, and one of a test's own for all others.

All tests here run on one event loop: mark each module with `pytest.mark.asyncio(loop_scope="session")`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from support.keys import Tenant, cloned_database, make_tenant
from support.service import RunningService, run_service
from support.webhooks import LOOPBACK, Hooks, Receiver, make_hooks, receiver


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that is not the test's own: what is not of one organization (root keys, plans) must stay as it is."""
    async with cloned_database(postgres_url, template_url) as url, run_service(url) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def alone(database_url: str) -> AsyncIterator[RunningService]:
    """A service of the test's own."""
    async with run_service(database_url) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def acme(shared: RunningService) -> Tenant:
    """A tenant of the test's own, in the shared service."""
    return await make_tenant(shared, "acme")


@pytest_asyncio.fixture(loop_scope="session")
async def rival(shared: RunningService) -> Tenant:
    """Another tenant of the test's own, in the shared service."""
    return await make_tenant(shared, "rival")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sending(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that sends to this machine, at once."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(
            url, webhook_private_networks=LOOPBACK, outbox_poll_seconds=0.05, usage_flush_seconds=0.05
        ) as running,
    ):
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def hooks(sending: RunningService) -> Hooks:
    """The webhooks of a tenant of the test's own, in the service that sends."""
    return await make_hooks(sending, "acme")


@pytest_asyncio.fixture(loop_scope="session")
async def others(sending: RunningService) -> Hooks:
    """The webhooks of another tenant of the test's own, likewise."""
    return await make_hooks(sending, "rival")


@pytest_asyncio.fixture(loop_scope="session")
async def listener() -> AsyncIterator[Receiver]:
    """A receiver of webhooks that takes everything."""
    async with receiver() as running:
        yield running
