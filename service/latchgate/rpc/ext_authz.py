"""Envoy's authorization service (envoy.service.auth.v3.Authorization), on the same rules as Validate.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/ext_authz_filter
"""

from __future__ import annotations

from collections.abc import Coroutine
from time import monotonic
from typing import Any, Final

import grpc
import structlog
from google.rpc import status_pb2

from latchgate.domain import access
from latchgate.domain.errors import InvalidFieldError, MalformedRequestError
from latchgate.domain.model import Caller, Outcome
from latchgate.domain.validation import Validator, as_text
from latchgate.observers import OutcomeObserver, Tally
from latchgate.rpc.check_request import Check, CheckReader, is_from_grpc
from latchgate.rpc.check_response import CheckWriter, overrun, refused, undecided
from latchgate.rpc.status import reason_of

ERROR_RESPONSE: Final = "x-latchgate-error-response"
"""Metadata of a gateway that knows `error_response` (Envoy from 1.37 on), to be set to `true` by its configuration."""

REMIND_S: Final = 60.0
"""How often a gateway's mistake is logged."""

_VALID: Final = Outcome.VALID
_BUDGET: Final = "LOOKUP_BUDGET_EXCEEDED"
_log = structlog.get_logger("latchgate.rpc")


class ExtAuthz:
    """Serves Check."""

    def __init__(
        self, *, validator: Validator, reader: CheckReader, writer: CheckWriter, outcomes: OutcomeObserver
    ) -> None:
        """Takes who judges, who reads and writes, and who is told of outcomes."""
        self._validator = validator
        self._reader = reader
        self._writer = writer
        self._outcomes = outcomes
        self._reminded_s = -REMIND_S

    async def check(self, raw: bytes, caller: Caller | None) -> bytes:
        """Judges the request of a gateway's client; gives a CheckResponse as it is sent."""
        check = self._read(raw)
        if check.problem is not None:
            self._outcomes.unjudged(check.problem.value)
            return refused(check.problem, check)
        judgement = await self._validator.decide(
            as_text(check.token), check.need, only_organization_id=access.only_organization(caller)
        )
        self._outcomes.outcome(judgement[0])
        return self._writer.write(judgement, check)

    def _read(self, raw: bytes) -> Check:
        """Reads a question. What can not be read is the gateway's fault, of which its operator has to hear."""
        try:
            return self._reader.read(raw)
        except (InvalidFieldError, MalformedRequestError) as error:
            if monotonic() - self._reminded_s >= REMIND_S:
                self._reminded_s = monotonic()
                _log.warning("gateway_misconfigured", problem=error.message)
            raise


class CheckRecall:
    """Answers Check from memory, where it can."""

    def __init__(
        self, validator: Validator, reader: CheckReader, writer: CheckWriter, tally: Tally, outcomes: OutcomeObserver
    ) -> None:
        """Takes who judges, who reads and writes, and who is told of outcomes: of VALID the tally."""
        self._recall = validator.recall
        self._decide = validator.decide
        self._read = reader.read
        self._write = writer.write
        self._tally = tally
        self._outcomes = outcomes

    def answer(self, raw: bytes, came_s: float) -> bytes | Coroutine[Any, Any, bytes]:
        """Gives the answer to a request that was there at `came_s` by the validator's clock.

        Where memory does not have it, what gives it is to be awaited. Raises what CheckReader does, and
        InvalidFieldError.
        """
        check = self._read(raw)
        if check.problem is not None:
            self._outcomes.unjudged(check.problem.value)
            return refused(check.problem, check)
        judgement = self._recall(check.token, check.need, came_s)
        if judgement is None:
            return self._ask(check)
        if judgement[0] is _VALID:
            self._tally.valid += 1
        else:
            self._outcomes.outcome(judgement[0])
        return self._write(judgement, check)

    async def _ask(self, check: Check) -> bytes:
        judgement = await self._decide(as_text(check.token), check.need)
        if judgement[0] is _VALID:
            self._tally.valid += 1
        else:
            self._outcomes.outcome(judgement[0])
        return self._write(judgement, check)


def refuse(status: status_pb2.Status, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes | None:
    """Says an error in Envoy's words, where the gateway understands them; else the call ends with its status."""
    if reason_of(status) == _BUDGET:
        return overrun(is_grpc=is_from_grpc(raw))
    knows = any(name == ERROR_RESPONSE and value == "true" for name, value in context.invocation_metadata() or ())
    return undecided(status, is_grpc=is_from_grpc(raw)) if knows else None
