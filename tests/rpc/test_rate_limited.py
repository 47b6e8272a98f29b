"""Rate limits in Validate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import Tenant, database_of, make_plan, make_tenant, outcome_of, update_organization, update_plan
from support.service import RunningService

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def outcomes(tenant: Tenant, token: str, *costs: int) -> list[tuple[str, int, int]]:
    """Validates with these costs, one after the other; gives outcomes, limits, and what is left after each."""
    answers = [await tenant.service.validate(token, cost=cost) for cost in costs]
    return [(outcome_of(answer), answer.rate_limit.limit, answer.rate_limit.remaining) for answer in answers]


async def test_rate_limited(acme: Tenant) -> None:
    """A key is good for as many requests as its limit says; the next is refused by name, and not charged."""
    created = await acme.key(rate_limit_per_minute=3)
    assert [
        ("VALID", 3, 2),
        ("VALID", 3, 1),
        ("RATE_LIMITED", 3, 1),
        ("VALID", 3, 0),
        ("RATE_LIMITED", 3, 0),
        ("RATE_LIMITED", 3, 0),
    ] == await outcomes(acme, created.token, 1, 1, 2, 1, 1, 1)
    answer = await acme.service.validate(created.token)
    assert (created.key.id, acme.id) == (answer.key_id, answer.organization_id)


async def test_reset_time(acme: Tenant) -> None:
    """The answer says when there is room again, by the database's clock: within a minute or so, and not before now."""
    created = await acme.key(rate_limit_per_minute=1)
    async with database_of(acme.service) as connection:
        before = await connection.fetchval("SELECT now()")
    for outcome in ("VALID", "RATE_LIMITED"):
        answer = await acme.service.validate(created.token)
        reset_time = answer.rate_limit.reset_time.ToDatetime(tzinfo=UTC)
        assert outcome == outcome_of(answer)
        assert before < reset_time <= datetime.now(UTC) + timedelta(seconds=63)


async def test_cost_beyond_the_limit(acme: Tenant) -> None:
    """A request that costs more than the limit is never good, takes nothing, and is not asked to come back at once."""
    created = await acme.key(rate_limit_per_minute=3)
    answer = await acme.service.validate(created.token, cost=4)
    assert ("RATE_LIMITED", 3) == (outcome_of(answer), answer.rate_limit.remaining)
    async with database_of(acme.service) as connection:
        now: datetime = await connection.fetchval("SELECT now()")
    assert now < answer.rate_limit.reset_time.ToDatetime(tzinfo=UTC)


async def test_looking_is_free(acme: Tenant) -> None:
    """With cost 0 the limit is looked at and not charged; without a cost a request counts once."""
    created = await acme.key(rate_limit_per_minute=2)
    assert [("VALID", 2, 2), ("VALID", 2, 2)] == await outcomes(acme, created.token, 0, 0)
    assert 1 == (await acme.service.validate(created.token)).rate_limit.remaining
    assert [("VALID", 2, 0), ("VALID", 2, 0)] == await outcomes(acme, created.token, 1, 0)


async def test_refusals_are_not_charged(acme: Tenant) -> None:
    """Requests that are refused for another reason leave the limit alone."""
    created = await acme.key(rate_limit_per_minute=2, allowed_cidrs=["10.0.0.0/8"])
    for _ in range(3):
        await acme.service.validate(created.token, client_ip="192.0.2.1")
        await acme.service.validate(created.token, client_ip="10.0.0.1", required_permissions=["read"])
    answer = await acme.service.validate(created.token, client_ip="10.0.0.1")
    assert ("VALID", 1) == (outcome_of(answer), answer.rate_limit.remaining)


async def test_keys_do_not_share_limits(acme: Tenant) -> None:
    """What one key uses up is not taken from another of the organization; both tokens of a rotation share one limit."""
    first, second = await acme.key(rate_limit_per_minute=1), await acme.key(rate_limit_per_minute=1)
    rotated = await acme.rotate(first.key.id, grace=timedelta(hours=1))
    assert [("VALID", 1, 0)] == await outcomes(acme, first.token, 1)
    assert [("RATE_LIMITED", 1, 0)] == await outcomes(acme, rotated.token, 1)
    assert [("VALID", 1, 0)] == await outcomes(acme, second.token, 1)


async def test_limits_of_the_plan(shared: RunningService) -> None:
    """A key without a limit of its own has its plan's, one with a limit has that; changes of either hold at once."""
    plan_id = await make_plan(shared, rate_limit_per_minute=4)
    tenant = await make_tenant(shared, "acme", plan_id)
    plain, own = await tenant.key(), await tenant.key(rate_limit_per_minute=9)
    assert [("VALID", 4, 3)] == await outcomes(tenant, plain.token, 1)
    assert [("VALID", 9, 8)] == await outcomes(tenant, own.token, 1)

    await update_plan(shared, organizations_pb.Plan(id=plan_id, rate_limit_per_minute=2))
    assert [("VALID", 2, 0), ("RATE_LIMITED", 2, 0)] == await outcomes(tenant, plain.token, 1, 1)
    assert [("VALID", 9, 7)] == await outcomes(tenant, own.token, 1)

    await tenant.update(key_pb2.Key(id=own.key.id), "rate_limit_per_minute", caller=shared.root)
    assert [("VALID", 2, 0)] == [*await outcomes(tenant, own.token, 0)]
    await tenant.update(key_pb2.Key(id=plain.key.id, rate_limit_per_minute=3), caller=shared.root)
    assert [("VALID", 3, 0)] == await outcomes(tenant, plain.token, 1)


async def test_another_plan(shared: RunningService) -> None:
    """An organization that is given another plan has that one's limit at once; 0 means that there is none."""
    tenant = await make_tenant(shared, "acme", await make_plan(shared, rate_limit_per_minute=2))
    created = await tenant.key()
    assert [("VALID", 2, 1)] == await outcomes(tenant, created.token, 1)
    await update_organization(shared, organizations_pb.Organization(id=tenant.id, plan_id="default"))
    answer = await shared.validate(created.token, cost=1_000_000)
    assert ("VALID", False) == (outcome_of(answer), answer.HasField("rate_limit"))
