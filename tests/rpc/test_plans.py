"""CreatePlan, ListPlans and UpdatePlan."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import grpc
import pytest

from apikeys.v1 import organization_service_pb2 as pb
from support.keys import execute, is_effective, make_plan, make_tenant, update_plan
from support.service import RunningService, call_error, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def create(service: RunningService, **fields: Any) -> pb.Plan:
    """Calls CreatePlan as root."""
    answer: pb.CreatePlanResponse = await service.organizations.CreatePlan(
        pb.CreatePlanRequest(plan=pb.Plan(**fields)), metadata=service.root
    )
    return answer.plan


async def page(service: RunningService, **fields: Any) -> pb.ListPlansResponse:
    """Calls ListPlans as root."""
    answer: pb.ListPlansResponse = await service.organizations.ListPlans(
        pb.ListPlansRequest(**fields), metadata=service.root
    )
    return answer


def new_id() -> str:
    """Makes an id that is not taken."""
    return f"plan-{uuid.uuid4().hex}"


async def test_every_field_of_a_new_plan(shared: RunningService) -> None:
    """The new plan is as it was asked for; times that a caller sends are not taken over."""
    plan_id = new_id()
    plan = await create(shared, id=plan_id, rate_limit_per_minute=60, max_keys=7)
    expected = pb.Plan(
        id=plan_id,
        rate_limit_per_minute=60,
        max_keys=7,
        create_time=plan.create_time,
        update_time=plan.create_time,
    )
    assert expected == plan
    assert {field.name for field in plan.DESCRIPTOR.fields} == {field.name for field, _ in plan.ListFields()}
    copied = await create(shared, id=new_id(), create_time={"seconds": 1}, update_time={"seconds": 2})
    assert (copied.create_time, True) == (copied.update_time, plan.create_time.seconds <= copied.create_time.seconds)


async def test_id_that_is_taken(shared: RunningService) -> None:
    """With the id a retry is safe: of any number of calls one makes the plan."""
    plan_id = new_id()
    answers = await asyncio.gather(
        *(create(shared, id=plan_id, max_keys=number) for number in range(6)), return_exceptions=True
    )
    errors = [call_error(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [(grpc.StatusCode.ALREADY_EXISTS, "PLAN_EXISTS")] * 5 == [(error.code, error.reason) for error in errors]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"id": ""}, "plan.id"),
        ({"id": "Gold"}, "plan.id"),
        ({"id": "a" * 65}, "plan.id"),
        ({"id": "gold", "rate_limit_per_minute": -1}, "plan.rate_limit_per_minute"),
        ({"id": "gold", "rate_limit_per_minute": 100_000_001}, "plan.rate_limit_per_minute"),
        ({"id": "gold", "max_keys": -1}, "plan.max_keys"),
    ],
)
async def test_limits(shared: RunningService, fields: dict[str, Any], field: str) -> None:
    """What a plan can not be, neither at first nor after a change, is refused by the field's name."""
    plan = pb.Plan(**fields)
    for call in (create(shared, **fields), update_plan(shared, plan, "max_keys")):
        error = await refusal(call)
        assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
        assert [field] == list(error.violations)


async def test_largest_plan(shared: RunningService) -> None:
    """The limits themselves can be had."""
    plan = await create(shared, id=uuid.uuid4().hex + uuid.uuid4().hex, rate_limit_per_minute=10**8, max_keys=2**31 - 1)
    assert (10**8, 2**31 - 1) == (plan.rate_limit_per_minute, plan.max_keys)


async def test_plan_must_be_given(shared: RunningService) -> None:
    """A call without a plan is refused."""
    organizations, root = shared.organizations, shared.root
    for call in (
        organizations.CreatePlan(pb.CreatePlanRequest(), metadata=root),
        organizations.UpdatePlan(pb.UpdatePlanRequest(), metadata=root),
    ):
        assert ["plan"] == list((await refusal(call)).violations)


async def test_plans_are_listed_by_id(alone: RunningService) -> None:
    """All plans are listed by id, page by page, those that the service brings along included."""
    gold, zinc = await create(alone, id="gold"), await create(alone, id="zinc", max_keys=3)
    plans = (await page(alone)).plans
    assert ["default", "gold", "root", "zinc"] == [plan.id for plan in plans]
    assert (gold, zinc) == (plans[1], plans[3])
    assert (0, 1000) == (plans[0].rate_limit_per_minute, plans[0].max_keys)
    first = await page(alone, page_size=3)
    await create(alone, id="aluminium")
    second = await page(alone, page_size=3, page_token=first.next_page_token)
    assert (["default", "gold", "root"], ["zinc"], "") == (
        [plan.id for plan in first.plans],
        [plan.id for plan in second.plans],
        second.next_page_token,
    )


async def test_page_sizes(alone: RunningService) -> None:
    """A page has 100 plans unless asked otherwise, and never more than 1000."""
    await execute(
        alone,
        "INSERT INTO plan (id, rate_limit_per_minute, max_keys) "
        "SELECT 'plan' || n, 0, 0 FROM generate_series(1, 1000) n",
    )
    assert 100 == len((await page(alone)).plans)
    largest = await page(alone, page_size=2**31 - 1)
    assert 1000 == len(largest.plans)
    assert 2 == len((await page(alone, page_size=2**31 - 1, page_token=largest.next_page_token)).plans)
    error = await refusal(page(alone, page_size=-1))
    assert ("INVALID_FIELD", ["page_size"]) == (error.reason, list(error.violations))
    error = await refusal(page(alone, page_token=largest.next_page_token[:-4]))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") == (error.code, error.reason)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["max_keys"], (60, 0)),
        (["rate_limit_per_minute"], (9, 7)),
        (["*"], (9, 0)),
        (["max_keys", "rate_limit_per_minute"], (9, 0)),
        ([], (9, 7)),
    ],
)
async def test_update(shared: RunningService, paths: list[str], expected: tuple[int, int]) -> None:
    """The fields that the mask names are changed, without one those that are not 0."""
    plan_id = await make_plan(shared, rate_limit_per_minute=60, max_keys=7)
    answer = await update_plan(shared, pb.Plan(id=plan_id, rate_limit_per_minute=9), *paths)
    assert (plan_id, *expected) == (answer.plan.id, answer.plan.rate_limit_per_minute, answer.plan.max_keys)
    assert answer.plan.create_time.ToDatetime() < answer.plan.update_time.ToDatetime()
    assert is_effective(answer.effect)


@pytest.mark.parametrize("paths", [["id"], ["create_time"], ["max_keys", "nonsense"], []])
async def test_masks_that_make_no_sense(shared: RunningService, paths: list[str]) -> None:
    """Fields that are fixed can not be named, and something must be changed."""
    error = await refusal(update_plan(shared, pb.Plan(id=await make_plan(shared)), *paths))
    assert ("INVALID_FIELD", ["update_mask"]) == (error.reason, list(error.violations))


async def test_plan_that_does_not_exist(shared: RunningService) -> None:
    """An unknown plan is NOT_FOUND."""
    error = await refusal(update_plan(shared, pb.Plan(id="no-such-plan", max_keys=1)))
    assert (grpc.StatusCode.NOT_FOUND, "PLAN_NOT_FOUND") == (error.code, error.reason)


async def test_lowered_maximum(shared: RunningService) -> None:
    """A lowered maximum ends no key and lets no further one be made, in every organization that has the plan."""
    plan_id = await make_plan(shared, max_keys=3)
    tenants = [await make_tenant(shared, name, plan_id) for name in ("acme", "rival")]
    tokens = [(await tenant.key()).token for tenant in tenants]
    await update_plan(shared, pb.Plan(id=plan_id, max_keys=1), "max_keys")
    for tenant, token in zip(tenants, tokens, strict=True):
        assert "VALID" == await shared.outcome(token)
        error = await refusal(tenant.key())
        assert ("KEY_LIMIT_REACHED", {"max_keys": "1"}) == (error.reason, error.metadata)


async def test_plan_without_room(shared: RunningService) -> None:
    """A plan that allows no keys is a way to let an organization have none."""
    organization_id = await shared.create_organization(f"acme-{uuid.uuid4().hex}", await make_plan(shared, max_keys=0))
    assert "KEY_LIMIT_REACHED" == (await refusal(shared.create_key(organization_id))).reason
