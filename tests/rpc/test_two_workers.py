"""Two services on one database, each of which answers from memory: what is changed at one, the other keeps to."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from latchgate.domain.coherence import LeaseTerms
from latchgate.storage import queries, queries_coherence
from support.databases import insert_worker, until, workers
from support.imports import foreign_token, import_rows, new_rows, row
from support.keys import (
    Tenant,
    cloned_database,
    database_of,
    hours_ahead,
    is_effective,
    make_plan,
    make_tenant,
    outcome_of,
    update_organization,
    update_plan,
)
from support.service import RunningService, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")

LEASE_S = 1.0
SLACK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A tenant, and the two services that serve it: changes are made at `tenant.service`."""

    tenant: Tenant
    other: RunningService

    @property
    def both(self) -> tuple[RunningService, RunningService]:
        """The one at which changes are made, and the other."""
        return self.tenant.service, self.other

    async def remembered(self, token: str) -> None:
        """Asks both about a good token until both answer from memory."""
        for service in self.both:

            async def is_remembered(service: RunningService = service) -> bool:
                before = hits(service)
                assert "VALID" == await service.outcome(token)
                return hits(service) > before

            await until(is_remembered)

    async def key(self, **fields: Any) -> keys_pb.CreateKeyResponse:
        """Makes a key that both have in memory."""
        created = await self.tenant.key(**fields)
        await self.remembered(created.token)
        return created

    async def outcomes(self, token: str, **fields: Any) -> list[str]:
        """Asks both at once."""
        return [outcome_of(each) for each in await self.answers(token, **fields)]

    async def answers(self, token: str, **fields: Any) -> list[keys_pb.ValidateResponse]:
        """Asks both at once, and gives their answers, the other's first."""
        return await asyncio.gather(*(service.validate(token, **fields) for service in reversed(self.both)))


def hits(service: RunningService) -> float:
    """How many tokens a service has answered from memory."""
    value = service.running.metrics.registry.get_sample_value("latchgate_memory_hits_total")
    assert value is not None
    return value


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def services(postgres_url: str, template_url: str) -> AsyncIterator[tuple[RunningService, RunningService]]:
    """Two services on a database of the module's own, with short leases."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, lease_seconds=LEASE_S) as one,
        run_service(url, lease_seconds=LEASE_S) as other,
    ):
        yield one, other


@pytest_asyncio.fixture(loop_scope="session")
async def pair(services: tuple[RunningService, RunningService]) -> AsyncIterator[Pair]:
    """A tenant of the test's own; workers that the test has made up are gone afterwards."""
    one, other = services
    async with database_of(one) as connection:
        real = set(await workers(connection))
        yield Pair(tenant=await make_tenant(one, "acme"), other=other)
        for incarnation in set(await workers(connection)) - real:
            await connection.execute(queries_coherence.WORKER_DELETE, incarnation)


Changing = Callable[[Tenant, str], Awaitable[Any]]

ENDS: dict[str, tuple[Changing, str]] = {
    "revoke": (lambda tenant, key_id: tenant.revoke(key_id), "REVOKED"),
    "delete": (lambda tenant, key_id: tenant.delete(key_id), "REVOKED"),
    "rotate": (lambda tenant, key_id: tenant.rotate(key_id), "REVOKED"),
    "toggle": (lambda tenant, key_id: tenant.toggle(key_id), "INACTIVE"),
    "permissions": (
        lambda tenant, key_id: tenant.update(key_pb2.Key(id=key_id, permissions=["write"])),
        "PERMISSION_DENIED",
    ),
    "networks": (
        lambda tenant, key_id: tenant.update(key_pb2.Key(id=key_id, allowed_cidrs=["192.0.2.0/24"])),
        "ADDRESS_DENIED",
    ),
    "organization": (
        lambda tenant, _: update_organization(
            tenant.service, organizations_pb.Organization(id=tenant.id, active=False), "active"
        ),
        "ORGANIZATION_INACTIVE",
    ),
}


@pytest.mark.parametrize("end", ENDS)
async def test_effective_is_everywhere(pair: Pair, end: str) -> None:
    """When a call that ends a key has returned as EFFECTIVE, both services refuse it at once, though both had it in
    memory; and the call takes a fraction of a lease, as the workers tell each other.
    """
    change, outcome = ENDS[end]
    token_and_ids = [await pair.key(permissions=["read"]) for _ in range(1 if end == "organization" else 4)]
    for created in token_and_ids:
        start_s = time.monotonic()
        changed = await change(pair.tenant, created.key.id)
        told_s = time.monotonic() - start_s
        answers = await pair.outcomes(created.token, required_permissions=["read"])
        assert ([outcome] * 2, True) == (answers, is_effective(changed.effect))
        assert told_s < LEASE_S / 2


async def test_rotation_with_grace(pair: Pair) -> None:
    """After a rotation with a grace period both services take both tokens, and know when the old one ends."""
    created = await pair.key()
    rotated = await pair.tenant.rotate(created.key.id, grace=timedelta(hours=1))
    assert is_effective(rotated.effect)
    assert ["VALID"] * 2 == await pair.outcomes(rotated.token)
    for answer in await pair.answers(created.token):
        assert ("VALID", True) == (outcome_of(answer), answer.HasField("expire_time"))
    await pair.tenant.revoke(created.key.id)
    for token in (created.token, rotated.token):
        assert ["REVOKED"] * 2 == await pair.outcomes(token)


async def test_what_is_shown_changes_everywhere(pair: Pair) -> None:
    """A name, an end and a limit that were changed are shown by both services from then on."""
    created = await pair.key()
    end = hours_ahead(1)
    await pair.tenant.update(key_pb2.Key(id=created.key.id, name="after", expire_time=end, rate_limit_per_minute=77))
    for answer in await pair.answers(created.token):
        assert ("after", end, 77) == (answer.key_name, answer.expire_time, answer.rate_limit.limit)


async def test_what_was_ended_comes_back_everywhere(pair: Pair) -> None:
    """A key or an organization that is switched on again is good everywhere when the call has returned."""
    created = await pair.key()
    await pair.tenant.toggle(created.key.id, active=False)
    assert ["INACTIVE"] * 2 == await pair.outcomes(created.token)
    await pair.tenant.toggle(created.key.id, active=True)
    assert ["VALID"] * 2 == await pair.outcomes(created.token)
    await pair.tenant.set_active(active=False)
    assert ["ORGANIZATION_INACTIVE"] * 2 == await pair.outcomes(created.token)
    await pair.tenant.set_active(active=True)
    assert ["VALID"] * 2 == await pair.outcomes(created.token)


async def test_what_was_deleted_comes_back_everywhere(pair: Pair) -> None:
    """A key that is undeleted at one service is accepted by both when the call has returned, though both had in memory
    that it was ended; and again, and at once for all that ask.
    """
    created = await pair.key()
    for _ in range(3):
        await pair.tenant.delete(created.key.id)
        assert ["REVOKED"] * 2 == await pair.outcomes(created.token)
        remembered = [hits(service) for service in pair.both]
        assert ["REVOKED"] * 2 == await pair.outcomes(created.token)
        assert [each + 1 for each in remembered] == [hits(service) for service in pair.both]
        undeleted = await pair.tenant.undelete(created.key.id)
        assert (["VALID"] * 2, True) == (await pair.outcomes(created.token), is_effective(undeleted.effect))


async def test_plans_change_everywhere(pair: Pair) -> None:
    """A plan's limit that was changed, and a plan that an organization was moved to, hold for keys in memory too."""
    service = pair.tenant.service
    slow, fast = (
        await make_plan(service, rate_limit_per_minute=100),
        await make_plan(service, rate_limit_per_minute=900),
    )
    created = await pair.key()

    async def limits() -> list[int]:
        return [answer.rate_limit.limit for answer in await pair.answers(created.token)]

    moved = await update_organization(
        service, organizations_pb.Organization(id=pair.tenant.id, plan_id=slow), "plan_id"
    )
    assert ([100] * 2, True) == (await limits(), is_effective(moved.effect))
    updated = await update_plan(service, organizations_pb.Plan(id=slow, rate_limit_per_minute=200))
    assert ([200] * 2, True) == (await limits(), is_effective(updated.effect))
    await update_organization(service, organizations_pb.Organization(id=pair.tenant.id, plan_id=fast), "plan_id")
    assert [900] * 2 == await limits()
    await update_plan(service, organizations_pb.Plan(id=slow, rate_limit_per_minute=300))
    assert [900] * 2 == await limits()


async def test_caller_that_was_ended_is_refused_everywhere(pair: Pair) -> None:
    """A key that was revoked at one service makes no management calls at the other."""
    created = await pair.tenant.key(permissions=["keys:read"])
    caller = (("authorization", f"Bearer {created.token}"),)
    request = keys_pb.GetKeyRequest(key_id=created.key.id)
    for service in pair.both:
        await service.keys.GetKey(request, metadata=caller)
    await pair.tenant.revoke(created.key.id)
    for service in pair.both:
        with pytest.raises(Exception, match="UNAUTHENTICATED"):
            await service.keys.GetKey(request, metadata=caller)


async def test_pending_at_the_deadline(pair: Pair) -> None:
    """While a worker does not tell that it has applied a change, the call returns as PENDING before the caller's
    deadline, with how long it may still take. The change is made, and the other workers keep to it already.
    """
    created = await pair.key()
    async with database_of(pair.tenant.service) as connection:
        await insert_worker(connection, lease_s=20)
    start_s = time.monotonic()
    changed = await revoke(pair, created.key.id, 1.0)
    assert 0.5 < time.monotonic() - start_s < 1.0
    assert key_pb2.EFFECT_STATE_PENDING == changed.effect.state
    remaining_s = changed.effect.max_remaining.ToTimedelta().total_seconds()
    wait_s = LeaseTerms(length_s=20).wait_s
    assert wait_s - 1 - SLACK_S < remaining_s < wait_s
    assert ["REVOKED"] * 2 == await pair.outcomes(created.token)


async def test_repeating_a_pending_change_waits_again(pair: Pair) -> None:
    """A call that is repeated waits for the revision of the change that was made; once the last worker has it, it is
    effective. A change whose request_id is repeated likewise.
    """
    created = await pair.key()
    async with database_of(pair.tenant.service) as connection:
        worker = await insert_worker(connection, lease_s=30)
        request = keys_pb.RotateKeyRequest(key_id=created.key.id, request_id=str(uuid.uuid4()))

        async def rotate(patience_s: float) -> keys_pb.RotateKeyResponse:
            answer: keys_pb.RotateKeyResponse = await pair.tenant.service.keys.RotateKey(
                request, metadata=pair.tenant.admin, timeout=patience_s
            )
            return answer

        rotated = [await rotate(0.4), await rotate(0.4)]
        assert [key_pb2.EFFECT_STATE_PENDING] * 2 == [each.effect.state for each in rotated]
        assert 1 == len({(each.token, each.effect.revision) for each in rotated})
        changed = [await revoke(pair, created.key.id, 0.4) for _ in range(2)]
        assert [key_pb2.EFFECT_STATE_PENDING] * 2 == [each.effect.state for each in changed]
        assert changed[0].effect.revision == changed[1].effect.revision > rotated[0].effect.revision

        rotating = asyncio.create_task(rotate(20))
        revoking = asyncio.create_task(revoke(pair, created.key.id, 20))
        await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, worker, rotated[0].effect.revision)
        assert is_effective((await rotating).effect)
        assert not revoking.done()
        await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, worker, changed[0].effect.revision)
        last = (await revoking).effect
        assert (True, changed[0].effect.revision) == (is_effective(last), last.revision)


async def test_silent_worker_does_not_hold_a_change_up_for_ever(pair: Pair) -> None:
    """A change becomes effective without a worker that is silent when that worker's lease must have ended; the worker
    is taken off, and the next change is quick again.
    """
    first, second = await pair.key(), await pair.key()
    async with database_of(pair.tenant.service) as connection:
        silent = await insert_worker(connection, lease_s=LEASE_S)
        start_s = time.monotonic()
        assert is_effective((await pair.tenant.revoke(first.key.id)).effect)
        assert LEASE_S < time.monotonic() - start_s < LeaseTerms(length_s=LEASE_S).wait_s + SLACK_S

        async def is_taken_off() -> bool:
            return silent not in await workers(connection)

        await until(is_taken_off)
        assert 2 == len(await workers(connection))
    start_s = time.monotonic()
    assert is_effective((await pair.tenant.revoke(second.key.id)).effect)
    assert time.monotonic() - start_s < LEASE_S / 2


async def test_min_revision_at_the_other(pair: Pair) -> None:
    """Who carries the revision of a change to another service is answered from a state that holds it, also if that
    service has not heard of the change: it asks the database.
    """
    created = await pair.key()
    async with database_of(pair.tenant.service) as connection:
        for number in range(5):
            async with connection.transaction():
                await connection.execute(queries.CHANGE_LOCK_TAKE, queries.CHANGE_LOCK)
                await connection.execute("UPDATE key SET active = $2 WHERE id = $1", created.key.id, number % 2 == 1)
                revision = await connection.fetchval(queries_coherence.CHANGE_INSERT, "key", created.key.id)
            expected = "VALID" if number % 2 == 1 else "INACTIVE"
            for answer in await pair.answers(created.token, min_revision=revision):
                assert (expected, True) == (outcome_of(answer), answer.revision >= revision)


async def test_revision_in_answers(pair: Pair) -> None:
    """Answers tell the revision that they take account of: from memory as from the database it is no older than the
    last change that was called effective, and it does not go back.
    """
    created = await pair.key()
    told = [0, 0]
    for number in range(6):
        effect = (await pair.tenant.update(key_pb2.Key(id=created.key.id, name=f"name {number}"))).effect
        for _ in range(3):
            revisions = [answer.revision for answer in await pair.answers(created.token)]
            assert all(effect.revision <= revision for revision in revisions)
            assert all(before <= now for before, now in zip(told, revisions, strict=True))
            told = revisions


async def test_changes_at_both_at_once(pair: Pair) -> None:
    """Changes that are made at both services at the same time are each effective at both when they have returned."""
    keys = [await pair.key() for _ in range(10)]

    async def end(number: int, created: keys_pb.CreateKeyResponse) -> None:
        service = pair.both[number % 2]
        changed = await service.keys.RevokeKey(
            keys_pb.RevokeKeyRequest(key_id=created.key.id), metadata=pair.tenant.admin
        )
        assert is_effective(changed.effect)
        assert ["REVOKED"] * 2 == await pair.outcomes(created.token)

    await asyncio.gather(*(end(number, created) for number, created in enumerate(keys)))


async def test_service_that_stops_is_not_waited_for(postgres_url: str, template_url: str) -> None:
    """A service that is stopped in order takes its row with it: changes at others do not wait for its lease."""
    async with cloned_database(postgres_url, template_url) as url, run_service(url) as one:
        tenant = await make_tenant(one, "acme")
        created = await tenant.key()
        async with run_service(url) as other:
            assert "VALID" == await other.outcome(created.token)
        start_s = time.monotonic()
        assert is_effective((await tenant.revoke(created.key.id)).effect)
        assert time.monotonic() - start_s < LEASE_S


async def revoke(pair: Pair, key_id: str, patience_s: float) -> keys_pb.RevokeKeyResponse:
    """Revokes a key with a deadline."""
    answer: keys_pb.RevokeKeyResponse = await pair.tenant.service.keys.RevokeKey(
        keys_pb.RevokeKeyRequest(key_id=key_id), metadata=pair.tenant.admin, timeout=patience_s
    )
    return answer


async def test_imported_token_that_a_lookup_just_missed(pair: Pair) -> None:
    """A foreign token that both services know to be none, in memory, is VALID at both when its import has returned as
    EFFECTIVE: each request of an import makes all workers forget what they found to be none.
    """
    tokens = [foreign_token() for _ in range(5)]
    for token in tokens:
        for service in pair.both:

            async def is_known_to_be_none(service: RunningService = service, token: str = token) -> bool:
                before = hits(service)
                assert "NOT_FOUND" == await service.outcome(token)
                return hits(service) > before

            await until(is_known_to_be_none)
    service, caller = pair.tenant.service, pair.tenant.admin
    for token in tokens:
        response = await import_rows(service, "", [row(1, token), *new_rows(3)], caller)
        assert is_effective(response.effect)
        assert ["VALID"] * 2 == await pair.outcomes(token)


async def test_import_waits_again(pair: Pair) -> None:
    """While a worker does not tell that it has applied an import the response is PENDING, and so is that to the same
    rows again: who has lost the first response is not told that all know of it.
    """
    rows = new_rows(2)
    service, caller = pair.tenant.service, pair.tenant.admin
    async with database_of(service) as connection:
        worker = await insert_worker(connection, lease_s=30)
        pending = [await import_rows(service, "", rows, caller, 1.0) for _ in range(2)]
        assert [key_pb2.EFFECT_STATE_PENDING] * 2 == [response.effect.state for response in pending]
        assert pending[0].effect.revision <= pending[1].effect.revision
        await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, worker, pending[1].effect.revision)
        assert is_effective((await import_rows(service, "", rows, caller, 10.0)).effect)
