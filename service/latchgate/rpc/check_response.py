"""Answers Envoy: verdicts as envoy.service.auth.v3.CheckResponse, in bytes.

What is the same in many answers is written once, and answers are put together from parts: parts of a protobuf message,
one after the other, are the message, also where a message within it comes in parts
(https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as pb
from envoy.type.v3 import http_status_pb2
from google.protobuf import struct_pb2
from google.rpc import status_pb2

from apikeys.v1 import key_pb2, key_service_pb2
from latchgate.domain.model import KeyRecord, Outcome, RateState, Verdict
from latchgate.rpc.check_request import API_KEY, AUTHORIZATION, CONTENT_TYPE, IDENTITY_PREFIX, Carrier, Check, Problem
from latchgate.rpc.status import make_status

_VALID: Final = Outcome.VALID
_RATE_LIMITED: Final = Outcome.RATE_LIMITED
_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

REALM: Final = "latchgate"
POLICY: Final = "minute"
"""The name of the one limit that a key has."""
WINDOW_S: Final = 60

MAX_PREPARED: Final = 20_000
"""Of how many keys the answers are kept, some 25 MB of them."""

_IDENTITY_HEADERS: Final = ("key-id", "organization-id", "user-id", "environment", "permissions")
# What a value may hold as it is: all that is visible, but the sign of what follows.
_AS_THEY_ARE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class Denial(NamedTuple):
    """How a request is refused: RFC 6750 has the words of `challenge`."""

    code: grpc.StatusCode
    http: int
    reason: str
    message: str
    challenge: str = ""


def _unauthenticated(reason: str, message: str, error: str = "invalid_token") -> Denial:
    return Denial(grpc.StatusCode.UNAUTHENTICATED, 401, reason, message, error)


def _forbidden(reason: str, message: str) -> Denial:
    return Denial(grpc.StatusCode.PERMISSION_DENIED, 403, reason, message)


PROBLEMS: Final = {
    Problem.MISSING: _unauthenticated(
        "CREDENTIALS_MISSING", "send a token as `Authorization: Bearer <token>` or `X-API-Key: <token>`"
    ),
    Problem.CONFLICT: _unauthenticated(
        "CREDENTIALS_CONFLICT", "send one token, once: this request holds several", "invalid_request"
    ),
}
DENIALS: Final = {
    Outcome.NOT_FOUND: _unauthenticated("NOT_FOUND", "the token is not known"),
    Outcome.REVOKED: _unauthenticated("REVOKED", "the token was revoked"),
    Outcome.INACTIVE: _unauthenticated("INACTIVE", "the key is switched off"),
    Outcome.EXPIRED: _unauthenticated("EXPIRED", "the key has expired"),
    Outcome.ORGANIZATION_INACTIVE: _forbidden("ORGANIZATION_INACTIVE", "the key's organization is switched off"),
    Outcome.PERMISSION_DENIED: _forbidden("PERMISSION_DENIED", "the key lacks a permission that this needs"),
    Outcome.ADDRESS_DENIED: _forbidden("ADDRESS_DENIED", "the key may not be used from this address"),
    Outcome.RATE_LIMITED: Denial(
        grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "RATE_LIMITED", "the key is over its rate limit; come back later"
    ),
}

UNDECIDED: Final = Denial(
    grpc.StatusCode.UNAVAILABLE, 503, "UNAVAILABLE", "the token can not be judged now; try again in a second"
)
OVERRUN: Final = Denial(
    grpc.StatusCode.UNAVAILABLE, 503, "LOOKUP_BUDGET_EXCEEDED", "too many unknown tokens at once; try again in a second"
)
_COME_BACK: Final = {"retry-after": "1"}


class CheckWriter:
    """Writes answers."""

    def __init__(self) -> None:
        """Begins with none prepared."""
        # By what is shown of a key: the plan that goes with it, and the answer VALID.
        self.prepared: dict[bytes, tuple[str, bytes]] = {}

    def write(self, verdict: Verdict, check: Check) -> bytes:
        """Writes a verdict."""
        outcome, _, _, record, rate = verdict
        if outcome is _VALID and record is not None:
            known = self.prepared.get(record.shown)
            if known is None or known[0] != record.plan_id:
                known = self._prepare(record)
            answer = known[1] + _REMOVED[check.carrier]
            if check.spoofed:
                answer += _removing(set(check.spoofed) - _OWN_HEADERS)
            return answer if rate is None else answer + _allowed(rate)
        answer = denied(DENIALS[outcome], is_grpc=check.is_grpc)
        if record is not None:
            answer += _metadata(record, outcome)
        if rate is not None and outcome is _RATE_LIMITED:
            answer += _refused(rate)
        return answer

    def _prepare(self, record: KeyRecord) -> tuple[str, bytes]:
        """Writes the answer VALID of a key."""
        if len(self.prepared) >= MAX_PREPARED:
            # The one that was prepared first.
            del self.prepared[next(iter(self.prepared))]
        known = self.prepared[record.shown] = (record.plan_id, _allowing(record))
        return known


def _allowing(record: KeyRecord) -> bytes:
    """Writes the answer VALID: who the key is, for those behind the gateway and for the gateway itself.

    What the key has not is removed: else the client could set it.
    """
    shown = key_service_pb2.ValidateResponse.FromString(record.shown)
    values = dict(
        zip(
            _IDENTITY_HEADERS,
            (shown.key_id, shown.organization_id, shown.user_id, _environment(shown), ",".join(shown.permissions)),
            strict=True,
        )
    )
    given = {IDENTITY_PREFIX + name: quote(value, safe=_AS_THEY_ARE) for name, value in values.items() if value}
    message = pb.CheckResponse(
        ok_response=pb.OkHttpResponse(headers=_options(given), headers_to_remove=sorted(_OWN_HEADERS - given.keys()))
    )
    message.status.SetInParent()
    return _written(message) + _metadata(record, _VALID)


def _environment(shown: key_service_pb2.ValidateResponse) -> str:
    return key_pb2.Environment.Name(shown.environment).removeprefix("ENVIRONMENT_").lower()


def _metadata(record: KeyRecord, outcome: Outcome) -> bytes:
    """Writes what the gateway's own rate limiter and access log may want to know of a key."""
    shown = key_service_pb2.ValidateResponse.FromString(record.shown)
    told = struct_pb2.Struct()
    told.update(
        {
            "key_id": shown.key_id,
            "organization_id": shown.organization_id,
            "plan": record.plan_id,
            "environment": _environment(shown),
            "outcome": outcome.name,
        }
    )
    return _written(pb.CheckResponse(dynamic_metadata=told))


def refused(problem: Problem, check: Check) -> bytes:
    """Writes the answer to a request without a token to judge."""
    return denied(PROBLEMS[problem], is_grpc=check.is_grpc)


@lru_cache(maxsize=256)
def denied(denial: Denial, *, is_grpc: bool) -> bytes:
    """Writes the answer that refuses a request."""
    status = make_status(denial.code, denial.message, denial.reason, {})
    told = struct_pb2.Struct()
    told.update({"outcome": denial.reason})
    return _written(
        pb.CheckResponse(
            status=status_pb2.Status(code=status.code, message=denial.message),
            denied_response=_http(denial, status, is_grpc=is_grpc),
            dynamic_metadata=told,
        )
    )


def undecided(status: status_pb2.Status) -> bytes:
    """Writes the answer that says that there is none: the gateway does what it is set to do without one."""
    response = _http(UNDECIDED, status, is_grpc=False)
    response.headers.extend(_options(_COME_BACK))
    return _written(pb.CheckResponse(status=status_pb2.Status(code=status.code), error_response=response))


def overrun(status: status_pb2.Status) -> bytes:
    """Writes the answer to one token of too many that nobody knows.

    It is a refusal: were it none, whoever makes up tokens could choose what the gateway does without an answer.
    """
    response = _http(OVERRUN, status, is_grpc=False)
    response.headers.extend(_options(_COME_BACK))
    return _written(pb.CheckResponse(status=status_pb2.Status(code=status.code), denied_response=response))


def _http(denial: Denial, status: status_pb2.Status, *, is_grpc: bool) -> pb.DeniedHttpResponse:
    """Writes what the client is told: JSON, or what its gRPC library takes for the status of its call."""
    headers = {"www-authenticate": f'Bearer realm="{REALM}", error="{denial.challenge}"'} if denial.challenge else {}
    if is_grpc:
        # The gateway makes grpc-message of the body; the code it would guess from that of HTTP.
        details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode()
        headers |= {"grpc-status": str(status.code), "grpc-status-details-bin": details}
        body = denial.message
    else:
        headers |= {CONTENT_TYPE: "application/json"}
        body = _json(denial)
    return pb.DeniedHttpResponse(
        status=http_status_pb2.HttpStatus(code=denial.http),
        headers=_options(headers),
        body=body,
    )


def _json(denial: Denial) -> str:
    error = {
        "code": denial.http,
        "status": denial.code.name,
        "reason": denial.reason,
        "message": denial.message,
    }
    return json.dumps({"error": error}) + "\n"


def _allowed(rate: RateState) -> bytes:
    """Writes where a key stands, for the client to read in the answer that it gets."""
    headers = _options(_rate_headers(rate))
    return _written(pb.CheckResponse(ok_response=pb.OkHttpResponse(response_headers_to_add=headers)))


def _refused(rate: RateState) -> bytes:
    """Writes where a key stands that is over its limit, and when to come back."""
    headers = {"retry-after": str(rate.reset_after_s), **_rate_headers(rate)}
    return _written(pb.CheckResponse(denied_response=pb.DeniedHttpResponse(headers=_options(headers))))


def _rate_headers(rate: RateState) -> dict[str, str]:
    """Writes the header fields of draft-ietf-httpapi-ratelimit-headers-10."""
    return {
        "ratelimit-policy": f'"{POLICY}";q={rate.limit};w={WINDOW_S}',
        "ratelimit": f'"{POLICY}";r={rate.remaining};t={rate.reset_after_s}',
    }


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


_OWN_HEADERS: Final = frozenset(IDENTITY_PREFIX + name for name in _IDENTITY_HEADERS)
_CARRIERS: Final = {
    Carrier.NONE: (),
    Carrier.BEARER: (AUTHORIZATION,),
    Carrier.KEY: (API_KEY,),
    Carrier.BOTH: (AUTHORIZATION, API_KEY),
}
_REMOVED: Final = tuple(_removing(_CARRIERS[carrier]) for carrier in Carrier)
