"""RotateKey."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import grpc
import pytest
from google.protobuf import duration_pb2

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import (
    NOBODYS_KEY,
    Tenant,
    execute,
    hours_ahead,
    is_effective,
    state_of,
    without_fields,
)
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOUR = timedelta(hours=1)


async def test_every_field_of_the_answer(acme: Tenant) -> None:
    """The key stays what it was; its newest secret comes first, and the one before says when it ends."""
    created = await acme.key(
        name="rotated",
        permissions=["read"],
        rate_limit_per_minute=5,
        expire_time=hours_ahead(24),
        environment=key_pb2.ENVIRONMENT_TEST,
        user_id="u-1",
        user_email="ann@example.com",
        metadata={"a": "b"},
        allowed_cidrs=["10.0.0.0/8"],
    )
    rotated = await acme.rotate(created.key.id, grace=HOUR)
    changing = ("prefix", "etag", "update_time", "secrets")
    assert without_fields(created.key, *changing) == without_fields(rotated.key, *changing)
    newest, before = rotated.key.secrets
    assert rotated.token.startswith("lk_test_")
    assert rotated.token[: len("lk_test_") + 5] == rotated.key.prefix == newest.prefix
    assert (rotated.key.update_time, False) == (newest.create_time, newest.HasField("expire_time"))
    assert (created.key.prefix, created.key.create_time) == (before.prefix, before.create_time)
    assert HOUR == before.expire_time.ToDatetime() - rotated.key.update_time.ToDatetime()
    assert created.key.etag != rotated.key.etag
    assert is_effective(rotated.effect)
    assert rotated.key == await acme.get(created.key.id)


@pytest.mark.parametrize("grace", [None, timedelta(0)])
async def test_without_a_grace_period(acme: Tenant, grace: timedelta | None) -> None:
    """Without a grace period the old token is dead when the call returns."""
    created = await acme.key()
    if grace is None:
        request = keys_pb.RotateKeyRequest(key_id=created.key.id)
        rotated: keys_pb.RotateKeyResponse = await acme.service.keys.RotateKey(request, metadata=acme.admin)
    else:
        rotated = await acme.rotate(created.key.id, grace=grace)
    assert created.token != rotated.token
    assert ("REVOKED", "VALID") == (
        await acme.service.outcome(created.token),
        await acme.service.outcome(rotated.token),
    )
    assert rotated.key.update_time == rotated.key.secrets[1].expire_time


@pytest.mark.parametrize("graces", [(timedelta(0),), (timedelta(minutes=1), timedelta(0))])
async def test_a_clock_that_is_set_back_brings_no_token_back(acme: Tenant, graces: tuple[timedelta, ...]) -> None:
    """A token that a rotation has ended stays dead, also if the database's clock is set back to before that."""
    created = await acme.key()
    for grace in graces:
        rotated = await acme.rotate(created.key.id, grace=grace)
    # All that is stored is an hour later now, as after a step of the clock by an hour back.
    await execute(
        acme.service,
        "UPDATE secret SET create_time = create_time + interval '1 h', end_time = end_time + interval '1 h' "
        "WHERE key_id = $1",
        created.key.id,
    )
    await acme.toggle(created.key.id, active=False)
    await acme.toggle(created.key.id, active=True)
    assert ("REVOKED", "VALID") == (
        await acme.service.outcome(created.token),
        await acme.service.outcome(rotated.token),
    )


async def test_both_tokens_work_until_the_grace_period_ends(acme: Tenant) -> None:
    """During the grace period both tokens are good and say until when; from its end on only the new one is."""
    created = await acme.key()
    rotated = await acme.rotate(created.key.id, grace=HOUR)
    old, new = await acme.service.validate(created.token), await acme.service.validate(rotated.token)
    assert {keys_pb.OUTCOME_VALID} == {old.outcome, new.outcome}
    assert (rotated.key.secrets[1].expire_time, False) == (old.expire_time, new.HasField("expire_time"))
    await acme.end_grace(created.key.id)
    assert ("REVOKED", "VALID") == (
        await acme.service.outcome(created.token),
        await acme.service.outcome(rotated.token),
    )


async def test_second_rotation_ends_the_oldest_token(acme: Tenant) -> None:
    """A rotation within a grace period ends the oldest token at once: never do more than two work."""
    first = await acme.key()
    second = await acme.rotate(first.key.id, grace=HOUR)
    third = await acme.rotate(first.key.id, grace=HOUR)
    assert ["REVOKED", "VALID", "VALID"] == [
        await acme.service.outcome(issued.token) for issued in (first, second, third)
    ]
    assert [third.key.prefix, second.key.prefix] == [secret.prefix for secret in third.key.secrets]
    fourth = await acme.rotate(first.key.id)
    assert ["REVOKED", "REVOKED", "REVOKED", "VALID"] == [
        await acme.service.outcome(issued.token) for issued in (first, second, third, fourth)
    ]


async def test_racing_rotations(acme: Tenant) -> None:
    """Of rotations at the same time the last one's token works, and all others' are dead."""
    created = await acme.key()
    answers = await asyncio.gather(*(acme.rotate(created.key.id) for _ in range(6)))
    last = max(answers, key=lambda answer: answer.effect.revision)
    outcomes = {answer.token: await acme.service.outcome(answer.token) for answer in answers}
    assert 6 == len(outcomes)
    assert [last.token] == [token for token, outcome in outcomes.items() if outcome == "VALID"]
    assert last.key.prefix == (await acme.get(created.key.id)).prefix


async def test_expiry_comes_before_the_grace_period_ends(acme: Tenant) -> None:
    """A grace period does not outlast the key: Validate tells the earlier of the two ends."""
    expire_time = hours_ahead(1)
    created = await acme.key(expire_time=expire_time)
    await acme.rotate(created.key.id, grace=timedelta(days=90))
    assert expire_time == (await acme.service.validate(created.token)).expire_time
    await acme.expire(created.key.id)
    assert "EXPIRED" == await acme.service.outcome(created.token)


async def test_revoking_ends_both_tokens(acme: Tenant) -> None:
    """Revoking a key within a grace period kills the old token too."""
    created = await acme.key()
    rotated = await acme.rotate(created.key.id, grace=HOUR)
    await acme.revoke(created.key.id)
    assert ["REVOKED", "REVOKED"] == [await acme.service.outcome(issued.token) for issued in (created, rotated)]


async def test_last_use_of_the_old_token_stays_visible(acme: Tenant) -> None:
    """During a rotation one sees whether the old token is still used; the key shows the latest use of any token."""
    created = await acme.key()
    await execute(
        acme.service,
        "UPDATE last_used SET used_time = '2026-01-02 03:04:05Z' "
        "WHERE secret_id IN (SELECT id FROM secret WHERE key_id = $1)",
        created.key.id,
    )
    newest, before = (await acme.rotate(created.key.id, grace=HOUR)).key.secrets
    assert (False, "2026-01-02T03:04:05Z") == (newest.HasField("last_used_time"), before.last_used_time.ToJsonString())
    key = await acme.get(created.key.id)
    assert before.last_used_time == key.last_used_time
    third = (await acme.rotate(created.key.id)).key
    assert [False, False] == [secret.HasField("last_used_time") for secret in third.secrets]
    assert before.last_used_time == third.last_used_time


@pytest.mark.parametrize(
    "period",
    [
        duration_pb2.Duration(seconds=-1),
        duration_pb2.Duration(nanos=-1),
        duration_pb2.Duration(seconds=7_776_000, nanos=1),
        duration_pb2.Duration(seconds=315_576_000_000),
    ],
    ids=lambda period: f"{period.seconds}s{period.nanos}ns",
)
async def test_grace_periods_out_of_bounds(acme: Tenant, period: duration_pb2.Duration) -> None:
    """A grace period lasts from nothing to 90 days; any other is refused, and the token stays as it is."""
    created = await acme.key()
    request = keys_pb.RotateKeyRequest(key_id=created.key.id, grace_period=period)
    error = await refusal(acme.service.keys.RotateKey(request, metadata=acme.admin))
    assert ("INVALID_FIELD", ["grace_period"]) == (error.reason, list(error.violations))
    assert "VALID" == await acme.service.outcome(created.token)
    assert created.key == await acme.get(created.key.id)


async def test_longest_grace_period(acme: Tenant) -> None:
    """A grace period may last 90 days."""
    created = await acme.key()
    rotated = await acme.rotate(created.key.id, grace=timedelta(days=90))
    end = rotated.key.secrets[1].expire_time
    assert timedelta(days=90) == end.ToDatetime() - rotated.key.update_time.ToDatetime()


async def test_switched_off_key(acme: Tenant) -> None:
    """A key that is off can be rotated, as after a leak, before it is switched on again."""
    created = await acme.key()
    await acme.toggle(created.key.id, active=False)
    rotated = await acme.rotate(created.key.id)
    assert ("INACTIVE", "INACTIVE") == (state_of(rotated.key), await acme.service.outcome(rotated.token))
    await acme.toggle(created.key.id, active=True)
    assert ("REVOKED", "VALID") == (
        await acme.service.outcome(created.token),
        await acme.service.outcome(rotated.token),
    )


@pytest.mark.parametrize(
    ("end", "reason"), [("revoke", "KEY_REVOKED"), ("delete", "KEY_DELETED"), ("expire", "KEY_EXPIRED")]
)
async def test_keys_that_have_ended(acme: Tenant, end: str, reason: str) -> None:
    """A key that is revoked, deleted or expired gets no new token."""
    created = await acme.key()
    await getattr(acme, end)(created.key.id)
    error = await refusal(acme.rotate(created.key.id))
    assert (grpc.StatusCode.FAILED_PRECONDITION, reason) == (error.code, error.reason)
    assert 1 == len((await acme.get(created.key.id)).secrets)


async def test_a_key_rotates_itself(acme: Tenant) -> None:
    """A key with `keys:write` can put another token in its own one's place."""
    created = await acme.key(permissions=["keys:write"])
    caller = (("authorization", f"Bearer {created.token}"),)
    rotated = await acme.rotate(created.key.id, caller=caller)
    assert ("REVOKED", "VALID") == (
        await acme.service.outcome(created.token),
        await acme.service.outcome(rotated.token),
    )
    assert "CREDENTIALS_INVALID" == (await refusal(acme.rotate(created.key.id, caller=caller))).reason


async def test_key_that_never_was(acme: Tenant) -> None:
    """An unknown id is NOT_FOUND."""
    assert "KEY_NOT_FOUND" == (await refusal(acme.rotate(NOBODYS_KEY))).reason
