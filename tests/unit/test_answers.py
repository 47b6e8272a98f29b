"""Answers of Validate as they are sent: put together from parts, they are what protobuf would have written."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apikeys.v1 import key_service_pb2 as pb
from latchgate.domain.model import KeyRecord, Outcome, RateState, Verdict
from latchgate.rpc.answers import MAX_LIMITS, AnswerWriter
from support.records import KEY_RECORD

NOW_S = 1_900_000_000.25
RECORD: KeyRecord = replace(
    KEY_RECORD, shown=pb.ValidateResponse(key_id="key_1", organization_id="acme").SerializeToString()
)
WRITER = AnswerWriter(0.0)

# Where a number takes a byte more, or a part of it a place more.
edges = st.sampled_from([each for bits in range(0, 63, 7) for each in ((1 << bits) - 1, 1 << bits, (1 << bits) + 1)])
counts = st.integers(0, 2**63 - 1) | edges


@given(
    limit=counts,
    remaining=counts,
    reset_after_s=st.integers(0, 61),
    revision=counts,
    now_s=st.integers(0, 2**33),
    outcome=st.sampled_from([Outcome.VALID, Outcome.RATE_LIMITED]),
)
@example(limit=1, remaining=0, reset_after_s=0, revision=0, now_s=0, outcome=Outcome.VALID)
def test_limits(limit: int, remaining: int, reset_after_s: int, revision: int, now_s: int, outcome: Outcome) -> None:
    """Whatever the numbers, the answer says them, and each field once: some readers take the first, others the last."""
    rate = RateState(outcome is Outcome.VALID, limit, remaining, reset_after_s)
    written = WRITER.write(Verdict(outcome, revision, now_s + 0.25, RECORD, rate))
    expected = pb.ValidateResponse(
        outcome=pb.Outcome.Value(f"OUTCOME_{outcome.name}"), key_id="key_1", organization_id="acme", revision=revision
    )
    expected.rate_limit.limit, expected.rate_limit.remaining = limit, remaining
    expected.rate_limit.reset_time.seconds = now_s + reset_after_s + 1
    read = pb.ValidateResponse.FromString(written)
    assert expected == read
    assert len(read.SerializeToString()) in {len(written), len(written) - 2 * (remaining == 0)}


def test_what_is_prepared_is_not_used_beyond_its_time() -> None:
    """What answers have in common is written anew with each revision, second, limit and reset, in whatever order."""
    for revision, now_s, limit, reset_after_s in (
        (1, 9.75, 5, 61),
        (1, 10.0, 5, 61),
        (2, 10.0, 5, 61),
        (2, 10.75, 5, 61),
        (2, 11.0, 5, 61),
        (2, 10.75, 5, 61),
        (2, 10.0, 5, 7),
        (2, 10.0, 5, 61),
        (2, 12.5, 6, 61),
        (1, 10.0, 5, 61),
        (2, 12.0, 6, 61),
    ):
        rate = RateState(allowed=True, limit=limit, remaining=3, reset_after_s=reset_after_s)
        read = pb.ValidateResponse.FromString(WRITER.write(Verdict(Outcome.VALID, revision, now_s, RECORD, rate)))
        assert (revision, int(now_s) + reset_after_s + 1, limit) == (
            read.revision,
            read.rate_limit.reset_time.seconds,
            read.rate_limit.limit,
        )


def test_prepared_parts_are_bounded() -> None:
    """Where each key has a limit of its own, what is kept of limits stays within bounds."""
    writer = AnswerWriter(0.0)
    for limit in range(1, 3 * MAX_LIMITS):
        rate = RateState(allowed=True, limit=limit, remaining=0, reset_after_s=61)
        writer.write(Verdict(Outcome.VALID, 1, NOW_S, RECORD, rate))
        assert len(writer.limits) <= MAX_LIMITS


@pytest.mark.parametrize("outcome", [Outcome.PERMISSION_DENIED, Outcome.ADDRESS_DENIED])
def test_refusals_show_the_key(outcome: Outcome) -> None:
    """Where the token is good and the request is not, the answer says whose key it is."""
    read = pb.ValidateResponse.FromString(WRITER.write(Verdict(outcome, 7, NOW_S, RECORD)))
    assert (f"OUTCOME_{outcome.name}", "key_1", 7) == (pb.Outcome.Name(read.outcome), read.key_id, read.revision)
    assert not read.HasField("rate_limit")


def test_nameless() -> None:
    """Where no key is to be shown, the answer has the outcome and the revision alone."""
    read = pb.ValidateResponse.FromString(WRITER.write(Verdict(Outcome.REVOKED, 7)))
    assert pb.ValidateResponse(outcome=pb.OUTCOME_REVOKED, revision=7) == read


@pytest.mark.parametrize(
    ("ends_s", "outcome", "ttl_ms"),
    [
        ((math.inf, math.inf), Outcome.VALID, 5000),
        ((NOW_S + 2, math.inf), Outcome.VALID, 2000),
        ((math.inf, NOW_S + 0.5), Outcome.VALID, 500),
        ((math.inf, math.inf), Outcome.PERMISSION_DENIED, 0),
    ],
)
def test_time_for_which_an_answer_may_be_used_again(ends_s: tuple[float, float], outcome: Outcome, ttl_ms: int) -> None:
    """A VALID answer without a limit may be used again for the set time, but not beyond its key's or token's end."""
    record = replace(RECORD, expire_s=ends_s[0], secret_end_s=ends_s[1])
    read = pb.ValidateResponse.FromString(AnswerWriter(5.0).write(Verdict(outcome, 7, NOW_S, record)))
    assert ttl_ms == read.cache_ttl.ToMilliseconds()
