"""Validate from memory, from bytes to bytes: what is read in haste is what protobuf reads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from apikeys.v1 import key_service_pb2 as pb
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.model import KeyRecord, Outcome, Verdict
from latchgate.domain.validation import Need
from latchgate.observability import Metrics
from latchgate.rpc.answers import AnswerWriter
from latchgate.rpc.pipeline import Backend, Pipeline
from latchgate.rpc.recall import MAX_NEEDS, Recall
from latchgate.rpc.requests import parse
from latchgate.rpc.server import VALIDATE
from support.records import KEY_RECORD, NOW_S

TOKEN = "lk_0123456789abcdefghijABCDEFGHIJ0123456789"
CAME_S = 1234.5
NONE = Verdict(Outcome.NOT_FOUND, 7)
ANSWER = AnswerWriter(0.0).write(Verdict(Outcome.VALID, 1, NOW_S, KEY_RECORD))


class Judge:
    """Calls one token good, and remembers what was needed of it."""

    def __init__(self, good: str = TOKEN) -> None:
        self.good = good.encode()
        self.asked: list[tuple[bytes, Need]] = []
        self.decided: list[tuple[str, Need]] = []

    def recall(self, token: bytes, need: Need, local_s: float) -> Verdict | None:
        """Judges."""
        assert CAME_S == local_s
        self.asked.append((token, need))
        record: KeyRecord = KEY_RECORD
        return Verdict(Outcome.VALID, 1, NOW_S, record) if token == self.good else None

    async def decide(self, token: str, need: Need) -> Verdict:
        """Says of all others that they are none."""
        self.decided.append((token, need))
        return NONE


def recalling(judge: Judge) -> Recall:
    """Puts a judge behind the hot path."""
    validator: Any = judge
    metrics = Metrics(CollectorRegistry())
    return Recall(validator, AnswerWriter(0.0), metrics.tally("KeyService/Validate"), metrics)


def connect(pipeline: Pipeline, validator: Any, metrics: Metrics) -> None:
    """Puts a judge behind a pipeline, with nothing else."""
    unused: Any = None
    recall = Recall(validator, AnswerWriter(0.0), metrics.tally("KeyService/Validate"), metrics)
    backend = Backend(
        validator=validator,
        trail=unused,
        recalls={VALIDATE.full_name: recall.answer},
        boottime=unused,
        services={},
    )
    pipeline.connect(backend)


def written(answer: bytes | Coroutine[Any, Any, bytes] | None) -> bytes | None:
    """Gives an answer, and awaits it if it is to be: nothing here takes time."""
    if not isinstance(answer, Coroutine):
        return answer
    with pytest.raises(StopIteration) as ended:
        answer.send(None)
    value: bytes = ended.value.value
    return value


requests = st.builds(
    pb.ValidateRequest,
    token=st.just(TOKEN) | st.text(max_size=200),
    required_permissions=st.lists(st.sampled_from(["orders:read", "x"]), max_size=3),
    client_ip=st.sampled_from(["", "192.0.2.1", "2001:db8::1"]),
    cost=st.none() | st.integers(0, 1000),
    min_revision=st.integers(0, 2**40),
)


@given(request=requests)
@example(request=pb.ValidateRequest(token=TOKEN, cost=0))
def test_what_is_needed_is_what_protobuf_reads(request: pb.ValidateRequest) -> None:
    """For any request as clients write it, the judge is asked for its token and for just what it needs, in memory and
    where that does not have it.
    """
    judge = Judge()
    recall = recalling(judge)
    raw = request.SerializeToString()
    for _ in range(2):
        try:
            answer = written(recall.answer(raw, CAME_S))
        except IndexError:
            assert len(raw) < 2
            return
        if judge.asked:
            assert (ANSWER if request.token == TOKEN else AnswerWriter(0.0).write(NONE)) == answer
        else:
            assert answer is None
    cost = request.cost if request.HasField("cost") else 1
    need = Need.of(request.required_permissions, request.client_ip, cost, request.min_revision)
    assert all((request.token.encode(), need) == each for each in judge.asked)
    text = request.token.encode().decode("latin-1")
    assert ([] if request.token == TOKEN else [(text, need)] * len(judge.asked)) == judge.decided
    assert 2 == len(judge.asked) or not 0 < len(request.token.encode()) < 128


@given(raw=st.binary(max_size=60) | requests.map(lambda each: each.SerializeToString()), tail=st.binary(max_size=60))
@example(
    raw=pb.ValidateRequest(token=TOKEN).SerializeToString(), tail=pb.ValidateRequest(token="x").SerializeToString()
)
@example(raw=pb.ValidateRequest(token=TOKEN).SerializeToString(), tail=bytes((0x0A, 0)))
@example(raw=pb.ValidateRequest(token=TOKEN).SerializeToString(), tail=bytes((0x3A,)))
@example(raw=bytes((0x0A, len(TOKEN) + 1)) + TOKEN.encode(), tail=b"")
def test_what_is_answered_is_what_the_bytes_say(raw: bytes, tail: bytes) -> None:
    """Whatever the bytes are: an answer is given for the token that protobuf finds in them, or none at all."""
    recall = recalling(Judge())
    for data in (raw, raw + tail):
        try:
            answer = written(recall.answer(data, CAME_S))
        except Exception:  # noqa: BLE001, S112 - whatever it is, the request is gone into
            continue
        if answer is not None:
            token = parse(pb.ValidateRequest, data).token
            assert (ANSWER if token == TOKEN else AnswerWriter(0.0).write(NONE)) == answer


def test_the_last_token_counts() -> None:
    """Of two tokens in one request the last one counts for protobuf: such a request is gone into."""
    judge = Judge()
    raw = pb.ValidateRequest(token=TOKEN).SerializeToString() + pb.ValidateRequest(token="other").SerializeToString()
    assert recalling(judge).answer(raw, CAME_S) is None
    assert [] == judge.asked


def test_a_cut_token_is_no_request() -> None:
    """A message that ends before its token does is none, even if what there is of it would be a token."""
    judge = Judge()
    recall = recalling(judge)
    assert ANSWER == recall.answer(pb.ValidateRequest(token=TOKEN).SerializeToString(), CAME_S)
    assert recall.answer(bytes((0x0A, len(TOKEN) + 1)) + TOKEN.encode(), CAME_S) is None


def test_bad_needs_are_gone_into() -> None:
    """A request that makes no sense is not answered in haste, however often it comes."""
    recall = recalling(Judge())
    raw = pb.ValidateRequest(token=TOKEN, cost=1_000_001).SerializeToString()
    for _ in range(2):
        with pytest.raises(InvalidFieldError):
            recall.answer(raw, CAME_S)


def test_long_requests_are_gone_into() -> None:
    """What is kept of requests is small: one with many permissions is answered without being kept."""
    recall = recalling(Judge())
    permissions = [f"area{number}:read" for number in range(100)]
    assert (
        recall.answer(pb.ValidateRequest(token=TOKEN, required_permissions=permissions).SerializeToString(), CAME_S)
        is None
    )
    assert {} == recall.needs


def test_kinds_of_requests_are_bounded() -> None:
    """However requests differ, what is kept of them stays within bounds, and holds nothing of any token."""
    recall = recalling(Judge())
    for cost in range(MAX_NEEDS + 10):
        assert ANSWER == recall.answer(pb.ValidateRequest(token=TOKEN, cost=cost).SerializeToString(), CAME_S)
        assert len(recall.needs) <= MAX_NEEDS
    assert not [rest for rest in recall.needs if TOKEN[:8].encode() in rest]


@pytest.mark.parametrize("outcome", [Outcome.VALID, Outcome.REVOKED, Outcome.RATE_LIMITED])
def test_every_outcome_is_counted_as_what_it_is(outcome: Outcome) -> None:
    """Answers from memory are counted by their outcome, whatever it is, and by no other."""

    class Decided(Judge):
        def recall(self, token: bytes, need: Need, local_s: float) -> Verdict | None:
            """Gives the outcome."""
            del token, need, local_s
            return Verdict(outcome, 1)

    validator: Any = Decided()
    metrics = Metrics(CollectorRegistry())
    recall = Recall(validator, AnswerWriter(0.0), metrics.tally("KeyService/Validate"), metrics)
    for _ in range(3):
        answer = recall.answer(pb.ValidateRequest(token=TOKEN).SerializeToString(), CAME_S)
        assert isinstance(answer, bytes)
        assert f"OUTCOME_{outcome.name}" == pb.Outcome.Name(pb.ValidateResponse.FromString(answer).outcome)
    # Twice: to read it changes nothing.
    for _ in range(2):
        counted = {
            sample.labels["outcome"]: sample.value
            for family in metrics.registry.collect()
            if family.name == "latchgate_outcomes"
            for sample in family.samples
            if sample.name.endswith("_total") and sample.value
        }
        assert {outcome.name: 3.0} == counted


async def test_the_time_as_of_which_it_is_judged_is_memorys() -> None:
    """A call is judged as of when it came, by the clock by which leases end and no other, and timed by it as well."""
    metrics, times = Metrics(CollectorRegistry()), iter((CAME_S, CAME_S + 0.25))

    class Clocked(Judge):
        def clock(self) -> float:
            """Goes on by a quarter of a second."""
            return next(times)

    validator: Any = Clocked()
    unused: Any = None
    pipeline = Pipeline(metrics, is_validate_open=True)
    behave = pipeline.recalling(VALIDATE, unused)
    connect(pipeline, validator, metrics)

    assert ANSWER == await behave(pb.ValidateRequest(token=TOKEN).SerializeToString(), unused)
    labels = {"method": "KeyService/Validate"}
    assert 0.25 == metrics.registry.get_sample_value("latchgate_call_seconds_sum", labels)


async def test_a_call_that_is_cancelled_while_it_is_looked_up_ends_so() -> None:
    """Whoever cancels a call finds it cancelled, and it is counted as that."""
    metrics, never = Metrics(CollectorRegistry()), asyncio.Event()

    class Waiting(Judge):
        def recall(self, token: bytes, need: Need, local_s: float) -> Verdict | None:
            """Knows nothing."""
            del token, need, local_s
            return None

        async def decide(self, token: str, need: Need) -> Verdict:
            """Does not come to an end."""
            del token, need
            await never.wait()
            return Verdict(Outcome.VALID, 1)

        def clock(self) -> float:
            """Stands still."""
            return CAME_S

    class Unlimited:
        def time_remaining(self) -> None:
            """Says that there is no deadline."""

    validator: Any = Waiting()
    context: Any = Unlimited()
    unused: Any = None
    pipeline = Pipeline(metrics, is_validate_open=True)
    behave = pipeline.recalling(VALIDATE, pipeline.validation(VALIDATE, unused))
    connect(pipeline, validator, metrics)

    call = asyncio.ensure_future(behave(pb.ValidateRequest(token=TOKEN).SerializeToString(), context))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    labels = {"method": "KeyService/Validate", "code": "CANCELLED"}
    assert 1 == metrics.registry.get_sample_value("latchgate_calls_total", labels)
