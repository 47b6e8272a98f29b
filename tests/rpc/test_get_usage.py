"""GetUsage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import usage_service_pb2 as usage_pb
from support.checks import check, check_request
from support.databases import until
from support.keys import NOBODYS_KEY, Tenant, change_key, cloned_database, execute, make_tenant, timestamp
from support.service import Metadata, RunningService, bearer, refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")

Counts = dict[str, int]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def counting(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that writes its counts soon."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, usage_flush_seconds=0.02) as running,
    ):
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def tenant(counting: RunningService) -> Tenant:
    """A tenant of the test's own."""
    return await make_tenant(counting, "acme")


async def ask(tenant: Tenant, caller: Metadata | None = None, **fields: Any) -> usage_pb.GetUsageResponse:
    """Calls GetUsage."""
    answer: usage_pb.GetUsageResponse = await tenant.service.usage.GetUsage(
        usage_pb.GetUsageRequest(**fields), metadata=caller or tenant.admin
    )
    return answer


def read(counts: Any) -> Counts:
    """Reads counts by outcome."""
    return {keys_pb.Outcome.Name(each.outcome).removeprefix("OUTCOME_"): each.count for each in counts}


async def until_counted(tenant: Tenant, expected: Counts, **fields: Any) -> usage_pb.GetUsageResponse:
    """Waits until so much is counted, of which nothing may be more on the way, and gives the answer."""
    answer = usage_pb.GetUsageResponse()

    async def is_there() -> bool:
        nonlocal answer
        answer = await ask(tenant, tenant.service.root, **fields)
        counts = read(answer.totals)
        assert all(counts[outcome] <= expected.get(outcome, 0) for outcome in counts), counts
        return counts == expected

    await until(is_there)
    return answer


async def test_every_outcome(tenant: Tenant) -> None:
    """Each answer about a known key is counted for it once, by its outcome, whichever way it was asked for."""
    created = await tenant.key(permissions=["read"], rate_limit_per_minute=1, allowed_cidrs=["192.0.2.0/24"])
    token, service = created.token, tenant.service
    at: dict[str, Any] = {"client_ip": "192.0.2.1"}
    assert "VALID" == await service.outcome(token, **at)
    assert "RATE_LIMITED" == await service.outcome(token, **at)
    for _ in range(2):
        assert "ADDRESS_DENIED" == await service.outcome(token, client_ip="198.51.100.1")
    assert "PERMISSION_DENIED" == await service.outcome(token, required_permissions=["write"], **at)
    batch = keys_pb.BatchValidateRequest(requests=[keys_pb.ValidateRequest(token=token, cost=0, **at)] * 3)
    await service.keys.BatchValidate(batch)
    envoy = check_request({"authorization": f"Bearer {token}"}, peer="192.0.2.1", extensions={"cost": "0"})
    assert 0 == (await check(service.channel, envoy)).code
    await tenant.toggle(created.key.id, active=False)
    assert "INACTIVE" == await service.outcome(token)
    await tenant.toggle(created.key.id, active=True)
    await tenant.expire(created.key.id)
    assert "EXPIRED" == await service.outcome(token)
    await tenant.set_active(active=False)
    await change_key(service, created.key.id, "UPDATE key SET expire_time = NULL WHERE id = $1", created.key.id)
    assert "ORGANIZATION_INACTIVE" == await service.outcome(token)
    await tenant.set_active(active=True)
    await tenant.revoke(created.key.id)
    assert "REVOKED" == await service.outcome(token)

    expected = {
        "VALID": 5,
        "REVOKED": 1,
        "INACTIVE": 1,
        "EXPIRED": 1,
        "ORGANIZATION_INACTIVE": 1,
        "PERMISSION_DENIED": 1,
        "ADDRESS_DENIED": 2,
        "RATE_LIMITED": 1,
    }
    answer = await until_counted(tenant, expected, key_id=created.key.id)
    assert list(expected) == list(read(answer.totals))


async def test_answers_from_memory_are_counted_each(tenant: Tenant) -> None:
    """However fast answers come from memory, each of them is counted."""
    created = await tenant.key()
    await asyncio.gather(*(tenant.service.validate(created.token) for _ in range(200)))
    await until_counted(tenant, {"VALID": 200}, key_id=created.key.id)


async def test_tokens_of_a_key_are_counted_together(tenant: Tenant) -> None:
    """A key's usage is that of all its tokens, also of those that a rotation has ended."""
    created = await tenant.key()
    rotated = await tenant.rotate(created.key.id, grace=timedelta(hours=1))
    await tenant.rotate(created.key.id, grace=timedelta(hours=1))
    assert ["REVOKED", "VALID"] == [await tenant.service.outcome(each.token) for each in (created, rotated)]
    await until_counted(tenant, {"VALID": 1, "REVOKED": 1}, key_id=created.key.id)


async def test_organization_is_the_sum_of_its_keys(tenant: Tenant, counting: RunningService) -> None:
    """An organization's usage is that of all its keys, the callers' own among them, and of no others."""
    other = await make_tenant(counting, "rival")
    for owner in (tenant, tenant, other):
        await counting.validate((await owner.key()).token)
    # Each of its keys was made by a call with its admin's key.
    answer = await until_counted(tenant, {"VALID": 4}, organization_id=tenant.id)
    assert {"VALID": 2} == read((await until_counted(tenant, {"VALID": 2}, organization_id=other.id)).totals)
    assert 24 == len(answer.buckets)
    own = await ask(tenant, step=usage_pb.USAGE_STEP_DAY)
    assert 30 == len(own.buckets)


async def test_tokens_that_nobody_knows_are_nobodys(tenant: Tenant) -> None:
    """What is NOT_FOUND is in no organization's usage."""
    assert "NOT_FOUND" == await tenant.service.outcome("lk_" + "0" * 40)
    created = await tenant.key()
    await tenant.service.validate(created.token)
    await until_counted(tenant, {"VALID": 2}, organization_id=tenant.id)


async def test_buckets_are_hours_or_days(tenant: Tenant) -> None:
    """Counts stand in the bucket of their hour, or of their day in UTC; all others are there, and empty."""
    created = await tenant.key()
    at = datetime(2026, 3, 1, 23, tzinfo=UTC)
    for hours, count in ((0, 1), (1, 2), (24, 4), (25, 8)):
        await execute(
            tenant.service,
            "INSERT INTO usage_by_secret (secret_id, hour, outcome, count)"
            " SELECT id, $2, 1, $3 FROM secret WHERE key_id = $1",
            created.key.id,
            int(at.timestamp()) // 3600 + hours,
            count,
        )

    async def buckets(start: datetime, end: datetime, step: usage_pb.UsageStep.ValueType) -> dict[datetime, Counts]:
        answer = await ask(
            tenant, key_id=created.key.id, start_time=timestamp(start), end_time=timestamp(end), step=step
        )
        assert sum(each.count for bucket in answer.buckets for each in bucket.counts) == sum(
            read(answer.totals).values()
        )
        return {bucket.start_time.ToDatetime(UTC): read(bucket.counts) for bucket in answer.buckets}

    hour, day = timedelta(hours=1), timedelta(days=1)
    by_hour = await buckets(at - hour, at + 2 * hour, usage_pb.USAGE_STEP_HOUR)
    assert {at - hour: {}, at: {"VALID": 1}, at + hour: {"VALID": 2}} == by_hour
    first = at.replace(hour=0)
    by_day = await buckets(at, at + day + 2 * hour, usage_pb.USAGE_STEP_DAY)
    assert {first: {"VALID": 1}, first + day: {"VALID": 6}, first + 2 * day: {"VALID": 8}} == by_day


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"start_time": {"seconds": 1_790_000_000}, "end_time": {"seconds": 1_789_999_999}}, "start_time"),
        ({"start_time": {"seconds": 1_600_000_000}}, "start_time"),
        ({"end_time": {"seconds": 2**62}}, "end_time"),
        ({"start_time": {"seconds": -(2**62)}}, "start_time"),
        ({"step": 3}, "step"),
        ({"key_id": "nonsense"}, "key_id"),
    ],
)
async def test_requests_that_make_no_sense(tenant: Tenant, fields: dict[str, Any], field: str) -> None:
    """A request that makes no sense is INVALID_ARGUMENT, and names the field."""
    error = await refusal(ask(tenant, **fields))
    assert (grpc.StatusCode.INVALID_ARGUMENT, [field]) == (error.code, list(error.violations))


async def test_usage_of_others(tenant: Tenant, counting: RunningService) -> None:
    """Another organization and its keys are answered like ones that never were."""
    other = await make_tenant(counting, "rival")
    theirs = (await other.key()).key.id
    for key_id in (theirs, NOBODYS_KEY):
        for organization_id in ("", tenant.id):
            error = await refusal(ask(tenant, key_id=key_id, organization_id=organization_id))
            assert (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", f"key {key_id} does not exist") == (
                error.code,
                error.reason,
                error.message,
            )
    for organization_id in (other.id, "org_root", "nobody"):
        for key_id in ("", theirs):
            error = await refusal(ask(tenant, organization_id=organization_id, key_id=key_id))
            assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)
            assert f"organization {organization_id} does not exist" == error.message
    assert "ORGANIZATION_NOT_FOUND" == (await refusal(ask(tenant, counting.root, organization_id="nobody"))).reason


async def test_who_may_ask(tenant: Tenant) -> None:
    """It takes `keys:read`, or a root key, which names whose usage it wants."""
    assert "PERMISSION_MISSING" == (await refusal(ask(tenant, await tenant.caller("read")))).reason
    assert 24 == len((await ask(tenant, bearer((await tenant.key(permissions=["keys:read"])).token))).buckets)
    error = await refusal(ask(tenant, tenant.service.root))
    assert ["organization_id"] == list(error.violations)
