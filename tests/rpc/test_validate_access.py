"""Validate where the deployment demands a caller: LATCHGATE_VALIDATE_ACCESS=authenticated."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant, cloned_database, make_tenant, outcome_of
from support.service import Metadata, RunningService, refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service whose Validate asks who is calling."""
    async with (
        cloned_database(postgres_url, template_url) as url,
        run_service(url, validate_access="authenticated") as running,
    ):
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def mine(guarded: RunningService) -> Tenant:
    """A tenant of the test's own."""
    return await make_tenant(guarded, "acme")


@pytest_asyncio.fixture(loop_scope="session")
async def theirs(guarded: RunningService) -> Tenant:
    """Another one."""
    return await make_tenant(guarded, "rival")


async def ask(tenant: Tenant, token: str, caller: Metadata) -> keys_pb.ValidateResponse:
    """Asks Validate, and BatchValidate whether it says the same."""
    request = keys_pb.ValidateRequest(token=token)
    answer: keys_pb.ValidateResponse = await tenant.service.keys.Validate(request, metadata=caller)
    batch: keys_pb.BatchValidateResponse = await tenant.service.keys.BatchValidate(
        keys_pb.BatchValidateRequest(requests=[request]), metadata=caller
    )
    assert [answer] == list(batch.responses)
    return answer


async def told(tenant: Tenant, caller: Metadata | None) -> tuple[grpc.StatusCode, str]:
    """Asks Validate and BatchValidate, which must refuse alike, and gives what they say."""
    keys = tenant.service.keys
    errors = [
        await refusal(keys.Validate(keys_pb.ValidateRequest(token="no token"), metadata=caller)),
        await refusal(keys.BatchValidate(keys_pb.BatchValidateRequest(), metadata=caller)),
    ]
    assert errors[0] == errors[1]
    return errors[0].code, errors[0].reason


async def test_callers_must_be_known(mine: Tenant) -> None:
    """Whoever presents no good key is told nothing of any token."""
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING") == await told(mine, None)
    wrong = (("authorization", "Bearer no token"),)
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == await told(mine, wrong)


async def test_callers_must_be_permitted(mine: Tenant) -> None:
    """A caller needs `keys:validate`; all other permissions together do not make up for it."""
    others = await mine.caller("keys:read", "keys:write", "audit:read", "read", "write")
    assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING") == await told(mine, others)
    created = await mine.key(permissions=["read"])
    for caller in (await mine.caller("keys:validate"), await mine.caller("keys:*"), mine.admin):
        answer = await ask(mine, created.token, caller)
        assert ("VALID", created.key.id) == (outcome_of(answer), answer.key_id)


async def test_tokens_of_other_organizations(mine: Tenant, theirs: Tenant) -> None:
    """A caller is told of its own organization's tokens alone: another's are NOT_FOUND, whatever their state, and their
    limits are not charged.
    """
    caller = await mine.caller("keys:validate")
    limited = await theirs.key(rate_limit_per_minute=1)
    revoked = await theirs.key()
    await theirs.revoke(revoked.key.id)
    for token in (limited.token, revoked.token):
        answer = await ask(mine, token, caller)
        assert keys_pb.ValidateResponse(outcome=keys_pb.OUTCOME_NOT_FOUND, revision=answer.revision) == answer
    charged: keys_pb.ValidateResponse = await mine.service.keys.Validate(
        keys_pb.ValidateRequest(token=limited.token), metadata=theirs.admin
    )
    assert ("VALID", 0) == (outcome_of(charged), charged.rate_limit.remaining)


async def test_root_is_told_of_all(mine: Tenant, theirs: Tenant) -> None:
    """A gateway in front of all organizations has a root key."""
    for tenant in (mine, theirs):
        created = await tenant.key()
        answer = await ask(tenant, created.token, mine.service.root)
        assert ("VALID", tenant.id) == (outcome_of(answer), answer.organization_id)


async def test_root_tokens_are_hidden(mine: Tenant) -> None:
    """A caller that is not root is not told that a token is a root key's."""
    root_token = mine.service.root[0][1].removeprefix("Bearer ")
    answer = await ask(mine, root_token, await mine.caller("keys:validate"))
    assert ("NOT_FOUND", "") == (outcome_of(answer), answer.organization_id)
