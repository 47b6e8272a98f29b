"""What Envoy is told: put together from parts, an answer is what protobuf would have written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as pb

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from latchgate.domain.model import KeyRecord, Outcome, RateState, Verdict
from latchgate.domain.validation import Need
from latchgate.gateway.answers import DENIALS, MAX_REMEMBERED, MAX_SHOWN_BYTES, PROBLEMS, Remembering
from latchgate.gateway.credentials import Carrier, Problem
from latchgate.rpc.check_request import Check
from latchgate.rpc.check_response import CheckWriter, overrun, refused
from support.checks import CheckAnswer, read_answer
from support.records import KEY_RECORD, NOW_S

SHOWN = keys_pb.ValidateResponse(
    key_id=KEY_RECORD.key_id,
    organization_id="acme",
    user_id="u-1",
    key_type=key_pb2.KEY_TYPE_SECRET,
    environment=key_pb2.ENVIRONMENT_TEST,
    permissions=["orders:read", "orders:write"],
)
RECORD = replace(KEY_RECORD, shown=SHOWN.SerializeToString(), plan_id="gold")
RATE = RateState(allowed=True, limit=60, remaining=59, reset_after_s=42)
OVER = RateState(allowed=False, limit=60, remaining=0, reset_after_s=17)


def check(carrier: Carrier = Carrier.BEARER, *, is_grpc: bool = False, spoofed: tuple[str, ...] = ()) -> Check:
    """Makes a question as it was read."""
    return Check(b"lk_token", carrier, None, Need.of((), "", 1, 0), is_grpc, spoofed)


def written(
    outcome: Outcome, record: KeyRecord | None = RECORD, rate: RateState | None = None, asked: Check | None = None
) -> CheckAnswer:
    """Writes a verdict, twice, and reads it."""
    writer, verdict = CheckWriter(), Verdict(outcome, 7, NOW_S, record, rate)
    answers = [writer.write(verdict, asked or check()) for _ in range(2)]
    assert answers[0] == answers[1]
    message = pb.CheckResponse.FromString(answers[0])
    # The parts are one message: written in one piece it says the same.
    assert message == pb.CheckResponse.FromString(message.SerializeToString())
    return read_answer(message)


def test_valid() -> None:
    """A good key is let through: who it is stands in headers and metadata, and its token goes no further."""
    answer = written(Outcome.VALID)
    assert (0, 0, "") == (answer.code, answer.http, answer.body)
    assert {
        "x-latchgate-key-id": RECORD.key_id,
        "x-latchgate-organization-id": "acme",
        "x-latchgate-user-id": "u-1",
        "x-latchgate-environment": "test",
        "x-latchgate-permissions": "orders:read,orders:write",
    } == answer.headers
    assert ("authorization",) == answer.removed
    assert {} == answer.response_headers
    assert {
        "key_id": RECORD.key_id,
        "organization_id": "acme",
        "plan": "gold",
        "environment": "test",
        "outcome": "VALID",
    } == answer.metadata


def test_headers_are_overwritten() -> None:
    """Every header of ours takes the place of one that the client sent, in old and new gateways."""
    writer = CheckWriter()
    answers = [
        pb.CheckResponse.FromString(writer.write(Verdict(outcome, 7, NOW_S, RECORD, rate), check()))
        for outcome, rate in ((Outcome.VALID, RATE), (Outcome.RATE_LIMITED, OVER))
    ]
    options = [
        *answers[0].ok_response.headers,
        *answers[0].ok_response.response_headers_to_add,
        *answers[1].denied_response.headers,
    ]
    assert 11 == len(options)
    for option in options:
        assert base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD == option.append_action
        assert not option.append.value


@pytest.mark.parametrize(
    ("carrier", "removed"),
    [
        (Carrier.BEARER, ("authorization",)),
        (Carrier.KEY, ("x-api-key",)),
        (Carrier.BOTH, ("authorization", "x-api-key")),
    ],
)
def test_credentials_are_removed(carrier: Carrier, removed: tuple[str, ...]) -> None:
    """The headers go that the token came in, and no others."""
    assert removed == written(Outcome.VALID, asked=check(carrier)).removed


def test_what_a_key_has_not_is_removed() -> None:
    """Where a key has no user and no permissions, the client can not make them up; nor other headers of ours."""
    bare = keys_pb.ValidateResponse(key_id="key_1", organization_id="acme", environment=key_pb2.ENVIRONMENT_LIVE)
    asked = check(spoofed=("x-latchgate-admin", "x-latchgate-key-id", "x-latchgate-user-id"))
    answer = written(Outcome.VALID, replace(RECORD, shown=bare.SerializeToString()), asked=asked)
    assert {"x-latchgate-key-id", "x-latchgate-organization-id", "x-latchgate-environment"} == set(answer.headers)
    removed = ("authorization", "x-latchgate-admin", "x-latchgate-permissions", "x-latchgate-user-id")
    assert removed == tuple(sorted(answer.removed))


def test_values_of_headers() -> None:
    """Only visible ASCII and spaces go into headers; all else is written with percent signs."""
    shown = keys_pb.ValidateResponse(key_id="key_1", user_id="ann lee/ü%\x85")
    answer = written(Outcome.VALID, replace(RECORD, shown=shown.SerializeToString()))
    assert "ann lee/%C3%BC%25%C2%85" == answer.headers["x-latchgate-user-id"]


def test_rate_of_a_good_key() -> None:
    """A key with a limit sees where it stands, in the header fields of the IETF's draft."""
    answer = written(Outcome.VALID, rate=RATE)
    assert {"ratelimit-policy": '"minute";q=60;w=60', "ratelimit": '"minute";r=59;t=42'} == answer.response_headers
    assert 5 == len(answer.headers)


@pytest.mark.parametrize(
    ("outcome", "code", "http"),
    [
        (Outcome.NOT_FOUND, 16, 401),
        (Outcome.REVOKED, 16, 401),
        (Outcome.INACTIVE, 16, 401),
        (Outcome.EXPIRED, 16, 401),
        (Outcome.PERMISSION_DENIED, 7, 403),
        (Outcome.ADDRESS_DENIED, 7, 403),
        (Outcome.ORGANIZATION_INACTIVE, 7, 403),
        (Outcome.RATE_LIMITED, 8, 429),
    ],
)
def test_table(outcome: Outcome, code: int, http: int) -> None:
    """Each outcome has its status, its HTTP code and its headers; JSON says why, and nobody learns the token."""
    has_record = http in {403, 429} and outcome is not Outcome.ORGANIZATION_INACTIVE
    answer = written(outcome, RECORD if has_record else None, OVER if http == 429 else None)
    expected: dict[str, Any] = {"content-type": "application/json"}
    if http == 401:
        expected["www-authenticate"] = 'Bearer realm="latchgate", error="invalid_token"'
    if http == 429:
        expected |= {
            "retry-after": "17",
            "ratelimit-policy": '"minute";q=60;w=60',
            "ratelimit": '"minute";r=0;t=17',
        }
    assert (code, http, expected) == (answer.code, answer.http, answer.headers)
    error = json.loads(answer.body)["error"]
    assert (http, outcome.name) == (error["code"], error["reason"])
    assert outcome.name == answer.metadata["outcome"]
    assert has_record is ("key_id" in answer.metadata)


def test_table_is_complete() -> None:
    """There is an answer for every outcome and every problem."""
    assert set(Outcome) - {Outcome.VALID} == set(DENIALS)
    assert set(Problem) == set(PROBLEMS)


@pytest.mark.parametrize(
    ("problem", "error"), [(Problem.MISSING, "invalid_token"), (Problem.CONFLICT, "invalid_request")]
)
def test_problems(problem: Problem, error: str) -> None:
    """Without a token to judge a request is not authenticated, and is told how to be."""
    answer = read_answer(pb.CheckResponse.FromString(refused(problem, check())))
    assert (16, 401) == (answer.code, answer.http)
    assert f'Bearer realm="latchgate", error="{error}"' == answer.headers["www-authenticate"]
    assert f"CREDENTIALS_{problem.name}" == answer.reason


@pytest.mark.parametrize("is_grpc", [False, True])
def test_one_unknown_token_of_too_many(is_grpc: bool) -> None:
    """It is a refusal with when to come back, not an error that the gateway's failure policy is asked about."""
    answer = read_answer(pb.CheckResponse.FromString(overrun(is_grpc=is_grpc)))
    assert (8, 429, "1") == (answer.code, answer.http, answer.headers["retry-after"])
    assert "LOOKUP_BUDGET_EXCEEDED" == answer.metadata["outcome"]


def test_grpc_clients() -> None:
    """A gRPC client is told in its own words: no JSON, but the code of gRPC, and the reason where its library looks."""
    answer = written(Outcome.RATE_LIMITED, RECORD, OVER, check(is_grpc=True))
    assert "8" == answer.headers["grpc-status"]
    assert "content-type" not in answer.headers
    assert DENIALS[Outcome.RATE_LIMITED].message == answer.body


def test_a_new_plan_is_told() -> None:
    """A key that is shown the same as before, under another plan, has the new one in its metadata."""
    writer = CheckWriter()
    plans = []
    for plan in ("gold", "silver"):
        verdict = Verdict(Outcome.VALID, 7, NOW_S, replace(RECORD, plan_id=plan))
        plans.append(read_answer(pb.CheckResponse.FromString(writer.write(verdict, check()))).metadata["plan"])
    assert ["gold", "silver"] == plans


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys there are, so many answers are kept and no more; each is made once while it is kept."""
    assert MAX_REMEMBERED >= 10_000
    monkeypatch.setattr("latchgate.gateway.answers.MAX_REMEMBERED", 3)
    made: list[bytes] = []

    def make(record: KeyRecord) -> bytes:
        made.append(record.shown)
        return record.shown

    remembering = Remembering(make)
    large = b"x" * (MAX_SHOWN_BYTES + 1)
    for shown in (b"1", b"2", b"3", b"4", b"4", b"5", large, large):
        assert shown == remembering(replace(RECORD, shown=shown))
    assert [b"1", b"2", b"3", b"4", b"5", large, large] == made
    assert 3 == len(remembering.known)
