"""BatchValidate."""

from __future__ import annotations

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant, hours_ahead, outcome_of
from support.service import RunningService, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def batch(service: RunningService, *requests: keys_pb.ValidateRequest) -> list[keys_pb.ValidateResponse]:
    """Calls BatchValidate."""
    answer: keys_pb.BatchValidateResponse = await service.keys.BatchValidate(
        keys_pb.BatchValidateRequest(requests=requests)
    )
    return list(answer.responses)


async def test_answers_are_in_order(acme: Tenant) -> None:
    """Each request has the answer that Validate would have given it, in the place that it has."""
    good = await acme.key(permissions=["read"], metadata={"a": "b"}, expire_time=hours_ahead(1))
    off = await acme.key()
    await acme.toggle(off.key.id)
    bound = await acme.key(allowed_cidrs=["10.0.0.0/8"])
    requests = [
        keys_pb.ValidateRequest(token="no token"),
        keys_pb.ValidateRequest(token=good.token, required_permissions=["read"]),
        keys_pb.ValidateRequest(token=off.token),
        keys_pb.ValidateRequest(token=good.token, required_permissions=["write"]),
        keys_pb.ValidateRequest(token=bound.token, client_ip="10.0.0.1"),
        keys_pb.ValidateRequest(token=bound.token),
        keys_pb.ValidateRequest(),
    ]
    answers = await batch(acme.service, *requests)
    expected = ["NOT_FOUND", "VALID", "INACTIVE", "PERMISSION_DENIED", "VALID", "ADDRESS_DENIED", "NOT_FOUND"]
    assert expected == [outcome_of(answer) for answer in answers]
    assert [await acme.service.keys.Validate(request) for request in requests] == answers


async def test_duplicates(acme: Tenant) -> None:
    """A token that stands in a batch several times is charged as often as it is allowed, first come first served."""
    created = await acme.key(rate_limit_per_minute=3)
    answers = await batch(acme.service, *[keys_pb.ValidateRequest(token=created.token)] * 5)
    assert ["VALID"] * 3 + ["RATE_LIMITED"] * 2 == [outcome_of(answer) for answer in answers]
    assert [2, 1, 0, 0, 0] == [answer.rate_limit.remaining for answer in answers]


async def test_sizes(acme: Tenant) -> None:
    """A batch has up to 100 requests, none included."""
    token = (await acme.key()).token
    request = keys_pb.ValidateRequest(token=token)
    assert [] == await batch(acme.service)
    assert ["VALID"] * 100 == [outcome_of(answer) for answer in await batch(acme.service, *[request] * 100)]
    error = await refusal(batch(acme.service, *[request] * 101))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert ["requests"] == list(error.violations)


@pytest.mark.parametrize(
    ("wrong", "code", "reason"),
    [
        ({"cost": 1_000_001}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"min_revision": -1}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"min_revision": 2**40}, grpc.StatusCode.FAILED_PRECONDITION, "REVISION_UNKNOWN"),
    ],
)
async def test_one_error_is_the_calls(acme: Tenant, wrong: dict[str, int], code: grpc.StatusCode, reason: str) -> None:
    """A request that makes no sense, or can not be decided, fails the whole call, wherever it stands."""
    token = (await acme.key()).token
    good = keys_pb.ValidateRequest(token=token)
    bad = keys_pb.ValidateRequest(token=token, cost=wrong.get("cost"), min_revision=wrong.get("min_revision", 0))
    for requests in ([bad, good, good], [good, good, bad], [bad, bad]):
        error = await refusal(batch(acme.service, *requests))
        assert (code, reason) == (error.code, error.reason)


async def test_min_revision_of_each(acme: Tenant) -> None:
    """Each request's answer holds the change that it asks for."""
    created = await acme.key()
    revision = (await acme.toggle(created.key.id)).effect.revision
    request = keys_pb.ValidateRequest(token=created.token, min_revision=revision)
    for answer in await batch(acme.service, request, keys_pb.ValidateRequest(token=created.token)):
        assert ("INACTIVE", True) == (outcome_of(answer), revision <= answer.revision)
