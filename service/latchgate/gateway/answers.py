"""What a gateway tells its clients, and those behind it. The same for every way in which gateways ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar
from urllib.parse import quote

from apikeys.v1 import key_pb2, key_service_pb2
from latchgate.domain.model import KeyRecord, Outcome, Rate
from latchgate.gateway.credentials import IDENTITY_PREFIX, Problem

REALM: Final = "latchgate"
POLICY: Final = "minute"
"""The name of the one limit that a key has."""
WINDOW_S: Final = 60

_IDENTITY: Final = ("key-id", "organization-id", "user-id", "environment", "permissions")
IDENTITY_HEADERS: Final = frozenset(IDENTITY_PREFIX + name for name in _IDENTITY)
"""The headers by which those behind the gateway hear who is calling."""

# What a value may hold as it is: all that is visible, but the sign of what follows.
_AS_THEY_ARE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class Denial(NamedTuple):
    """How a request is refused: `status` names gRPC's code, and RFC 6750 has the words of `error`."""

    status: str
    http: int
    reason: str
    message: str
    error: str = ""


def _unauthenticated(reason: str, message: str, error: str = "invalid_token") -> Denial:
    return Denial("UNAUTHENTICATED", 401, reason, message, error)


def _forbidden(reason: str, message: str) -> Denial:
    return Denial("PERMISSION_DENIED", 403, reason, message)


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
        "RESOURCE_EXHAUSTED", 429, "RATE_LIMITED", "the key is over its rate limit; come back later"
    ),
}

UNDECIDED: Final = Denial("UNAVAILABLE", 503, "UNAVAILABLE", "the token can not be judged now; try again in a second")
# A refusal, not what gateways take for a failure: who makes up tokens must not choose what they do without an answer.
OVERRUN: Final = Denial(
    "RESOURCE_EXHAUSTED", 429, "LOOKUP_BUDGET_EXCEEDED", "too many unknown tokens at once; try again in a second"
)
COME_BACK: Final = {"retry-after": "1"}


MAX_REMEMBERED: Final = 20_000
"""Of how many keys what is told of them is remembered: some 25 MB, as keys usually are."""
MAX_SHOWN_BYTES: Final = 1024
"""Of keys that have more to show, with many permissions or metadata, it is made each time."""

Told = TypeVar("Told")


class Remembering(Generic[Told]):
    """Makes of a key what it is told as, once: until the key, or its plan, is another."""

    def __init__(self, make: Callable[[KeyRecord], Told]) -> None:
        """Takes what makes it."""
        self._make = make
        # By what is shown of a key, which a record says in the same bytes for as long as it is in memory.
        self.known: dict[bytes, tuple[str, Told]] = {}

    def __call__(self, record: KeyRecord) -> Told:
        """Gives what a key is told as."""
        known = self.known.get(record.shown)
        if known is None or known[0] != record.plan_id:
            if len(record.shown) > MAX_SHOWN_BYTES:
                return self._make(record)
            if len(self.known) >= MAX_REMEMBERED:
                # The one that came first.
                del self.known[next(iter(self.known))]
            known = self.known[record.shown] = (record.plan_id, self._make(record))
        return known[1]


class Identity(NamedTuple):
    """Who a key is, as those behind the gateway are told, and as the gateway's own log and limits are."""

    headers: dict[str, str]
    facts: dict[str, str]


def identity(record: KeyRecord) -> Identity:
    """Reads who a key is. What it has not stands in no header; values are visible ASCII, with `%` for all else."""
    shown = key_service_pb2.ValidateResponse.FromString(record.shown)
    environment = key_pb2.Environment.Name(shown.environment).removeprefix("ENVIRONMENT_").lower()
    values = (shown.key_id, shown.organization_id, shown.user_id, environment, ",".join(shown.permissions))
    return Identity(
        {
            IDENTITY_PREFIX + name: quote(value, safe=_AS_THEY_ARE)
            for name, value in zip(_IDENTITY, values, strict=True)
            if value
        },
        {
            "key_id": shown.key_id,
            "organization_id": shown.organization_id,
            "plan": record.plan_id,
            "environment": environment,
        },
    )


def challenge(denial: Denial) -> dict[str, str]:
    """Writes the header that says how to be authenticated, for those that are not."""
    return {"www-authenticate": f'Bearer realm="{REALM}", error="{denial.error}"'} if denial.error else {}


def body(denial: Denial) -> str:
    """Writes a refusal as JSON."""
    error = {"code": denial.http, "status": denial.status, "reason": denial.reason, "message": denial.message}
    return json.dumps({"error": error}) + "\n"


def rate_headers(rate: Rate) -> dict[str, str]:
    """Writes where a key stands, in the header fields of draft-ietf-httpapi-ratelimit-headers-10."""
    _, limit, remaining, reset_after_s = rate
    return {
        "ratelimit-policy": f'"{POLICY}";q={limit};w={WINDOW_S}',
        "ratelimit": f'"{POLICY}";r={remaining};t={reset_after_s}',
    }


def retry_headers(rate: Rate) -> dict[str, str]:
    """Writes where a key stands that is over its limit, and when to come back."""
    _, _, _, reset_after_s = rate
    return {"retry-after": str(reset_after_s), **rate_headers(rate)}
