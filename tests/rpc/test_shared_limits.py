"""Rate limits over two whole services on one database."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from support.databases import until
from support.keys import cloned_database, database_of, execute, make_tenant, outcome_of
from support.limited import ask, until_shared
from support.service import RunningService, run_service
from support.transport import sample

pytestmark = pytest.mark.asyncio(loop_scope="session")

Pair = tuple[RunningService, RunningService]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def pair(postgres_url: str, template_url: str) -> AsyncIterator[Pair]:
    """Two services on a database of the module's own, which know of each other, as if they had been there for long."""
    async with cloned_database(postgres_url, template_url) as url:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("latchgate.limiting.SETTLE_S", 0.0)
            async with run_service(url) as one, run_service(url) as other:
                for service in (one, other):
                    await until_shared(service)
                yield one, other


async def used(service: RunningService, key_id: str) -> int:
    """What a key's shared window holds."""
    async with database_of(service) as connection:
        costs = await connection.fetchval("SELECT costs FROM rate_window WHERE key_id = $1", key_id)
    return sum(costs or ())


async def until_used(service: RunningService, key_id: str, expected: int) -> None:
    """Waits until a key's shared window holds so much."""

    async def is_so() -> bool:
        found.append(await used(service, key_id))
        return found[-1] == expected

    found: list[int] = []
    try:
        await until(is_so)
    except TimeoutError:
        pytest.fail(f"the window holds {found[-1]}, not {expected}")


async def test_one_limit_for_all(pair: Pair) -> None:
    """What two services are asked for at the same time is admitted once between them, and one more for each at most."""
    tenant = await make_tenant(pair[0], "acme")
    for limit in (1, 20, 150):
        created = await tenant.key(rate_limit_per_minute=limit)
        outcomes: Counter[str] = Counter()
        for _ in range(4):
            for counted in await asyncio.gather(*(ask(each, created.token, limit + 20) for each in pair)):
                outcomes += counted
        assert limit <= outcomes["VALID"] <= 1.05 * limit + 2
        assert {"VALID", "RATE_LIMITED"} == set(outcomes)


async def test_what_one_has_used_the_other_tells(pair: Pair) -> None:
    """Each service says what is left for all, and when there is room for a request that it refuses."""
    one, other = pair
    tenant = await make_tenant(one, "acme")
    created = await tenant.key(rate_limit_per_minute=10)
    assert "VALID" == await one.outcome(created.token, cost=7)
    looked_at = await other.validate(created.token, cost=0)
    assert 3 == looked_at.rate_limit.remaining
    refused = await other.validate(created.token, cost=4)
    assert ("RATE_LIMITED", 3) == (outcome_of(refused), refused.rate_limit.remaining)
    assert 55 < refused.rate_limit.reset_time.seconds - time.time() < 64
    assert "VALID" == await other.outcome(created.token, cost=3)


async def test_refusals_come_from_memory(pair: Pair) -> None:
    """No call to a key that is over its limit waits for the database; the statements that look whether there is room
    are a few a second, however many calls there are.
    """
    one, other = pair
    tenant = await make_tenant(one, "acme")
    created = await tenant.key(rate_limit_per_minute=5)
    await ask(one, created.token, 10)
    await ask(other, created.token, 10)
    for service in pair:
        waits = sample(service, "latchgate_rate_limit_waits_total")
        asks, start_s = sample(service, "latchgate_rate_limit_asks_total"), time.monotonic()
        for _ in range(20):
            assert {"RATE_LIMITED": 50} == await ask(service, created.token, 50)
        assert waits == sample(service, "latchgate_rate_limit_waits_total")
        assert sample(service, "latchgate_rate_limit_asks_total") - asks <= 2 + 5 * (time.monotonic() - start_s)


async def has_asked(service: RunningService, count: float) -> bool:
    """Whether a worker has heard the answer to so many things that it has asked."""
    return sample(service, "latchgate_rate_limit_asks_total") >= count


async def test_a_key_that_is_used_now_and_then_does_not_wait(pair: Pair) -> None:
    """Calls far from the limit are answered from memory from the first one on, and reported."""
    tenant = await make_tenant(pair[0], "acme")
    created = await tenant.key(rate_limit_per_minute=30)
    for service in pair:
        await service.validate(created.token, required_permissions=["not:granted"])
    waits, asks = (
        [sample(service, f"latchgate_rate_limit_{what}_total") for service in pair] for what in ("waits", "asks")
    )
    for number in range(5):
        for service in pair:
            assert "VALID" == await service.outcome(created.token)
        await until_used(pair[0], created.key.id, 2 * (number + 1))
        # Workers hear of it a moment after the window has it.
        for service, before in zip(pair, asks, strict=True):
            await until(partial(has_asked, service, before + number + 1))
    assert waits == [sample(service, "latchgate_rate_limit_waits_total") for service in pair]


async def test_a_key_far_from_its_limit_leaves_no_trace(pair: Pair) -> None:
    """Of a key that uses less than a sixtieth of its limit the windows are told nothing, and nobody waits."""
    tenant = await make_tenant(pair[0], "acme")
    created = await tenant.key(rate_limit_per_minute=10_000)
    waits = [sample(service, "latchgate_rate_limit_waits_total") for service in pair]
    for service in pair:
        assert {"VALID": 60} == await ask(service, created.token, 60)
    assert waits == [sample(service, "latchgate_rate_limit_waits_total") for service in pair]
    assert 0 == await used(pair[0], created.key.id)


async def test_calls_that_are_refused_for_another_reason_are_not_charged(pair: Pair) -> None:
    """Denials take nothing from the limit that all share, and neither do refusals for the rate."""
    tenant = await make_tenant(pair[0], "acme")
    created = await tenant.key(rate_limit_per_minute=4, allowed_cidrs=["10.0.0.0/8"])
    for service in pair:
        await ask(service, created.token, 10, client_ip="192.0.2.1")
        await ask(service, created.token, 10, client_ip="10.0.0.1", required_permissions=["not:granted"])
        await ask(service, created.token, 10, client_ip="10.0.0.1", cost=5)
    assert 0 == await used(pair[0], created.key.id)
    assert {"VALID": 1} == await ask(pair[1], created.token, 1, client_ip="10.0.0.1", cost=4)
    for service in pair:
        assert {"RATE_LIMITED": 10} == await ask(service, created.token, 10, client_ip="10.0.0.1", cost=2)
    await tenant.toggle(created.key.id, active=False)
    assert {"INACTIVE": 10} == await ask(pair[0], created.token, 10, client_ip="10.0.0.1")
    await until_used(pair[0], created.key.id, 4)


async def test_windows_away(pair: Pair) -> None:
    """While the windows can not be reached each service admits its fair share, and a gauge says so. When they are back
    what was admitted meanwhile is charged, for all.
    """
    tenant = await make_tenant(pair[0], "acme")
    created, untouched = await tenant.key(rate_limit_per_minute=20), await tenant.key(rate_limit_per_minute=1)
    await execute(pair[0], "ALTER TABLE rate_window RENAME TO away")
    for service in pair:
        await ask(service, untouched.token, 2)
        await until_shared(service, is_local=True)
        assert {"VALID": 10, "RATE_LIMITED": 10} == await ask(service, created.token, 20)
        answer = await service.validate(created.token, cost=0)
        assert (20, 0) == (answer.rate_limit.limit, answer.rate_limit.remaining)
        assert sample(service, "latchgate_rate_limit_statements_total", result="error") >= 1
    await execute(pair[0], "ALTER TABLE away RENAME TO rate_window")
    for service in pair:
        await until_shared(service)
    await until_used(pair[0], created.key.id, 20)
    for service in pair:
        assert (await ask(service, created.token, 10))["RATE_LIMITED"] >= 9


async def test_a_service_that_stops_gives_back_what_it_holds(database_url: str) -> None:
    """After a stop in order the windows hold what was admitted, and no permit that nobody can use."""
    async with run_service(database_url) as one:
        tenant = await make_tenant(one, "acme")
        created = await tenant.key(rate_limit_per_minute=39)
        async with run_service(database_url) as other:
            assert {"VALID": 20} == await ask(other, created.token, 20)
            assert "VALID" == await other.outcome(created.token)
        assert 21 == await used(one, created.key.id)


async def test_windows_are_in_the_database_for_a_minute_alone(pair: Pair) -> None:
    """What the table tells of a key that is at work: what was asked last, and no more."""
    tenant = await make_tenant(pair[0], "acme")
    created = await tenant.key(rate_limit_per_minute=7)
    assert {"VALID": 1} == await ask(pair[0], created.token, 1, cost=3)
    async with database_of(pair[0]) as connection:
        row = await connection.fetchval(
            "SELECT to_jsonb(w) - '{key_id, newest, back_slot}'::text[] FROM rate_window w WHERE key_id = $1",
            created.key.id,
        )
    told = json.loads(row)
    asked = {"allowed", "charged", "smallest", "needed", "wanted", "back", "granted"}
    assert {*asked, "ages", "costs"} == told.keys()
    assert (7, 3) == (told["allowed"], sum(told["costs"]))
