"""One call of gRPC: what it came with, how it ends, and what the log says of it."""

from __future__ import annotations

import asyncio
import math
import secrets
import traceback
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from latchgate.domain.errors import CredentialsInvalidError, CredentialsMissingError
from latchgate.domain.model import Caller
from latchgate.rpc.peers import peer_address
from latchgate.rpc.status import code_and_reason, internal_status, is_listed, status_of

Context = grpc.aio.ServicerContext[Any, Any]

# What is left of a caller's time for the answer, when something was waited for: a quarter of it, or this.
ANSWER_RESERVE_S: Final = 0.2
ANSWER_RESERVE_PART: Final = 0.25

_BEARER: Final = "bearer"
_PACKAGE: Final = str(Path(__file__).parents[1])
_log = structlog.get_logger("latchgate.rpc")


def answer_due_s(context: Context, now_s: float) -> float:
    """Gives until when an answer must be on its way to reach a caller that has a deadline."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None:
        return math.inf
    return now_s + remaining_s - min(ANSWER_RESERVE_S, remaining_s * ANSWER_RESERVE_PART)


class RunningCall:
    """One call: how it ends, and what its log line says."""

    def __init__(self, method: str, context: Context, start_s: float) -> None:
        """Takes the method's name, and when the call has come, by `perf_counter`."""
        self._method = method
        self._context = context
        self._start_s = start_s
        self._facts: dict[str, object] = {}
        self.caller: Caller | None = None
        self.reason = ""
        self.code = grpc.StatusCode.OK
        self._requests = 0

    def seconds(self) -> float:
        """How long it has taken so far."""
        return perf_counter() - self._start_s

    def count_request(self) -> None:
        """Counts the requests of a stream."""
        self._requests += 1
        self._facts["requests"] = self._requests

    def refuse(self, error: BaseException) -> status_pb2.Status | None:
        """Gives the status that an error ends the call with; None for a call that is ended from outside."""
        if isinstance(error, asyncio.CancelledError):
            is_late = self._is_at_deadline()
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            return None
        if not isinstance(error, Exception):
            self.code = grpc.StatusCode.UNKNOWN
            return None
        if is_listed(error):
            self.code, self.reason = code_and_reason(error)
            self._facts["reason"] = self.reason
            return status_of(error)
        self.code = grpc.StatusCode.INTERNAL
        incident = secrets.token_hex(4)
        # Not the error's text: it may hold what was sent, or what a row holds.
        self._facts |= {"incident": incident, "error": type(error).__name__, "where": _where(error)}
        return internal_status(incident)

    def _is_at_deadline(self) -> bool:
        """Says whether the caller's deadline is why the call is cancelled: grpc does not tell.

        The caller gives up at its own deadline; the one that has reached the server is rounded up by about 1 %.
        """
        remaining_s: float | None = self._context.time_remaining()
        return remaining_s is not None and remaining_s <= 0.005 + 0.02 * self.seconds()

    def log(self) -> None:
        """Writes the one line of the call."""
        caller = self.caller
        level = _log.error if self.code is grpc.StatusCode.INTERNAL else _log.info
        level(
            "call",
            method=self._method,
            code=self.code.name,
            duration_ms=round(self.seconds() * 1000, 2),
            peer=peer_address(self._context.peer()),
            caller=caller.id if caller else None,
            organization=caller.organization_id if caller else None,
            request_id=caller.call.request_id if caller else None,
            **self._facts,
        )


async def abort(context: Context, status: status_pb2.Status) -> NoReturn:
    """Ends a call with a status, by raising."""
    # grpc.aio has no abort_with_status; the details travel in the trailer that it would have filled.
    packed = rpc_status.to_status(status)
    await context.abort(packed.code, packed.details, packed.trailing_metadata)
    raise AssertionError("a call that is aborted does not go on")


def _where(error: BaseException) -> list[str]:
    """Gives the places in this package that an error came through, and the one where it was raised, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames[:-1] if frame.filename.startswith(_PACKAGE)][-6:] + frames[-1:]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in places]


def bearer_token(context: Context) -> str:
    """Gives the token of the `authorization` header (RFC 6750). Raises an UnauthenticatedError."""
    values = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
    if not values:
        raise CredentialsMissingError("this method needs the metadata `authorization: Bearer <token>`")
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != _BEARER or not token.strip():
        raise CredentialsInvalidError("the metadata must hold `authorization: Bearer <token>`, once")
    return token.strip()
