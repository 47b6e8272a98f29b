"""When keys were last used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from apikeys.v1 import key_pb2
from support.keys import Tenant, cloned_database, make_tenant
from support.service import RunningService, bearer, refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")

DEADLINE_S = 20.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def flushing(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that writes last uses soon."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, usage_flush_seconds=0.02) as running,
    ):
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def tenant(flushing: RunningService) -> Tenant:
    """A tenant of the test's own."""
    return await make_tenant(flushing, "acme")


async def used(tenant: Tenant, key_id: str) -> key_pb2.Key:
    """Waits until a key has a last use, and gives the key."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            key = await tenant.get(key_id)
            if key.HasField("last_used_time"):
                return key


async def test_validation_is_a_use(tenant: Tenant) -> None:
    """Some moments after a token was answered with VALID, its key and its secret tell when; being used is no change."""
    created = await tenant.key()
    assert not created.key.HasField("last_used_time")
    await tenant.service.validate(created.token)
    key = await used(tenant, created.key.id)
    assert key.last_used_time == key.secrets[0].last_used_time
    assert created.key.create_time.ToDatetime() <= key.last_used_time.ToDatetime()
    assert (created.key.update_time, created.key.etag) == (key.update_time, key.etag)


async def test_calling_is_a_use(tenant: Tenant) -> None:
    """A management call is a use of its caller's key."""
    created = await tenant.key(permissions=["keys:read"])
    await tenant.list(bearer(created.token))
    await used(tenant, created.key.id)


async def test_refusals_are_no_use(tenant: Tenant) -> None:
    """A token that is refused is not used: that an old token is tried does not make it look needed."""
    plain = await tenant.key(rate_limit_per_minute=1, allowed_cidrs=["10.0.0.0/8"])
    off = await tenant.key()
    await tenant.toggle(off.key.id, active=False)
    service = tenant.service
    assert "ADDRESS_DENIED" == await service.outcome(plain.token, client_ip="192.0.2.1")
    assert "PERMISSION_DENIED" == await service.outcome(
        plain.token, client_ip="10.0.0.1", required_permissions=["read"]
    )
    assert "RATE_LIMITED" == await service.outcome(plain.token, client_ip="10.0.0.1", cost=2)
    assert "INACTIVE" == await service.outcome(off.token)
    assert "PERMISSION_MISSING" == (await refusal(tenant.list(await tenant.caller("read")))).reason
    # What is used last is written last or together with the rest.
    marker = await tenant.key()
    await service.validate(marker.token)
    await used(tenant, marker.key.id)
    for created in (plain, off):
        assert not (await tenant.get(created.key.id)).HasField("last_used_time")


async def test_each_token_has_its_own_time(tenant: Tenant) -> None:
    """During a rotation one sees which of the two tokens is used."""
    created = await tenant.key()
    await tenant.rotate(created.key.id, grace=timedelta(hours=1))
    await tenant.service.validate(created.token)
    key = await used(tenant, created.key.id)
    newest, before = key.secrets
    assert (False, key.last_used_time) == (newest.HasField("last_used_time"), before.last_used_time)


@pytest.mark.parametrize("end", ["revoke", "delete", "rotate", "toggle"])
async def test_single_use_of_a_key_that_is_ended(tenant: Tenant, end: str) -> None:
    """A key that was used once, and never again because it was ended at once, has the time of that use."""
    created = await tenant.key()
    await tenant.service.validate(created.token)
    await getattr(tenant, end)(created.key.id)
    key = await used(tenant, created.key.id)
    # Not that of a later flush.
    assert key.last_used_time.ToDatetime() <= key.update_time.ToDatetime()


async def test_single_use_of_keys_that_memory_has_no_room_for(database_url: str) -> None:
    """Keys that were used once and driven out of memory by others before the flush have the times of their uses."""
    async with run_service(database_url, usage_flush_seconds=3600.0, cache_keys=1) as service:
        tenant = await make_tenant(service, "acme")
        created = [await tenant.key() for _ in range(3)]
        for each in created:
            await service.validate(each.token)
    async with run_service(database_url) as service:
        keys = [await service.get_key(each.key.id) for each in created]
    times = [key.last_used_time.ToDatetime() for key in keys]
    assert all(key.HasField("last_used_time") for key in keys)
    assert sorted(times) == times


async def test_the_last_moments_are_written_at_the_end(database_url: str) -> None:
    """A service that stops writes the uses that it still had in memory."""
    async with run_service(database_url, usage_flush_seconds=3600.0) as service:
        tenant = await make_tenant(service, "acme")
        created = await tenant.key()
        await service.validate(created.token)
    async with run_service(database_url) as service:
        assert (await service.get_key(created.key.id)).HasField("last_used_time")
