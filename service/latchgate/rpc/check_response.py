"""Answers Envoy: verdicts as envoy.service.auth.v3.CheckResponse, in bytes.

What is the same in many answers is written once, and answers are put together from parts: parts of a protobuf message,
one after the other, are the message, also where a message within it comes in parts
(https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.type.v3 import http_status_pb2
from google.protobuf import struct_pb2
from google.rpc import status_pb2

from latchgate.domain.model import Judgement, KeyRecord, Outcome, Rate
from latchgate.gateway.answers import (
    COME_BACK,
    DENIALS,
    IDENTITY_HEADERS,
    OVERRUN,
    PROBLEMS,
    UNDECIDED,
    Denial,
    Remembering,
    body,
    challenge,
    identity,
    rate_headers,
    retry_headers,
)
from latchgate.gateway.credentials import API_KEY, AUTHORIZATION, Carrier, Problem
from latchgate.rpc.check_request import CONTENT_TYPE, Check
from latchgate.rpc.status import make_status

_VALID: Final = Outcome.VALID
_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


class CheckWriter:
    """Writes answers."""

    def __init__(self) -> None:
        """Begins with none prepared."""
        self._allowing = Remembering(_allowing)

    def write(self, judgement: Judgement, check: Check) -> bytes:
        """Writes a verdict."""
        outcome, _, _, record, rate = judgement
        if outcome is _VALID and record is not None:
            answer = self._allowing(record) + _REMOVED[check.carrier]
            if check.spoofed:
                answer += _removing(set(check.spoofed) - IDENTITY_HEADERS)
            return answer if rate is None else answer + _allowed(rate)
        answer = denied(DENIALS[outcome], is_grpc=check.is_grpc)
        if record is not None:
            answer += _metadata(record, outcome)
        if rate is not None:
            answer += _refused(rate)
        return answer


def _allowing(record: KeyRecord) -> bytes:
    """Writes the answer VALID: who the key is, for those behind the gateway and for the gateway itself.

    What the key has not is removed: else the client could set it.
    """
    headers = identity(record).headers
    ok = pb.OkHttpResponse(headers=_options(headers), headers_to_remove=sorted(IDENTITY_HEADERS - headers.keys()))
    message = pb.CheckResponse(ok_response=ok)
    message.status.SetInParent()
    return _written(message) + _metadata(record, _VALID)


def _metadata(record: KeyRecord, outcome: Outcome) -> bytes:
    """Writes what the gateway's own rate limiter and access log may want to know of a key."""
    told = struct_pb2.Struct()
    told.update({**identity(record).facts, "outcome": outcome.name})
    return _written(pb.CheckResponse(dynamic_metadata=told))


def refused(problem: Problem, check: Check) -> bytes:
    """Writes the answer to a request without a token to judge."""
    return denied(PROBLEMS[problem], is_grpc=check.is_grpc)


@lru_cache(maxsize=256)
def denied(denial: Denial, *, is_grpc: bool) -> bytes:
    """Writes the answer that refuses a request."""
    status = make_status(grpc.StatusCode[denial.status], denial.message, denial.reason, {})
    told = struct_pb2.Struct()
    told.update({"outcome": denial.reason})
    return _written(
        pb.CheckResponse(
            status=status_pb2.Status(code=status.code, message=denial.message),
            denied_response=_http(denial, status, is_grpc=is_grpc),
            dynamic_metadata=told,
        )
    )


def undecided(status: status_pb2.Status, *, is_grpc: bool) -> bytes:
    """Writes the answer that says that there is none: the gateway does what it is set to do without one."""
    response = _http(UNDECIDED, status, is_grpc=is_grpc)
    response.headers.extend(_options(COME_BACK))
    return _written(pb.CheckResponse(status=status_pb2.Status(code=status.code), error_response=response))


def overrun(*, is_grpc: bool) -> bytes:
    """Writes the answer to one token of too many that nobody knows."""
    come_back = pb.DeniedHttpResponse(headers=_options(COME_BACK))
    return denied(OVERRUN, is_grpc=is_grpc) + _written(pb.CheckResponse(denied_response=come_back))


def _http(denial: Denial, status: status_pb2.Status, *, is_grpc: bool) -> pb.DeniedHttpResponse:
    """Writes what the client is told: JSON, or what its gRPC library takes for the status of its call."""
    headers = challenge(denial)
    if is_grpc:
        # The gateway makes grpc-message of the body; the code it would guess from that of HTTP.
        details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode()
        headers |= {"grpc-status": str(status.code), "grpc-status-details-bin": details}
    else:
        headers |= {CONTENT_TYPE: "application/json"}
    return pb.DeniedHttpResponse(
        status=http_status_pb2.HttpStatus(code=denial.http),
        headers=_options(headers),
        body=denial.message if is_grpc else body(denial),
    )


@lru_cache(maxsize=16_384)
def _allowed(rate: Rate) -> bytes:
    """Writes where a key stands, for the client to read in the answer that it gets.

    Remembered, because keys of the same limit stand where others stood before them.
    """
    headers = _options(rate_headers(rate))
    return _written(pb.CheckResponse(ok_response=pb.OkHttpResponse(response_headers_to_add=headers)))


def _refused(rate: Rate) -> bytes:
    """Writes where a key stands that is over its limit, and when to come back."""
    headers = _options(retry_headers(rate))
    return _written(pb.CheckResponse(denied_response=pb.DeniedHttpResponse(headers=headers)))


def _options(headers: Mapping[str, str]) -> list[base_pb2.HeaderValueOption]:
    return [
        base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=name, value=value), append_action=_OVERWRITE)
        for name, value in headers.items()
    ]


def _written(answer: pb.CheckResponse) -> bytes:
    written: bytes = answer.SerializeToString()
    return written


def _removing(names: Iterable[str]) -> bytes:
    """Writes that headers do not get beyond the gateway."""
    ok = pb.OkHttpResponse(headers_to_remove=sorted(names))
    return _written(pb.CheckResponse(ok_response=ok)) if ok.headers_to_remove else b""


_CARRIERS: Final = {
    Carrier.NONE: (),
    Carrier.BEARER: (AUTHORIZATION,),
    Carrier.KEY: (API_KEY,),
    Carrier.BOTH: (AUTHORIZATION, API_KEY),
}
_REMOVED: Final = tuple(_removing(_CARRIERS[carrier]) for carrier in Carrier)
