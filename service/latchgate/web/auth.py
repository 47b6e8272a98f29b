"""One endpoint for gateways that ask over HTTP whether a request is good: nginx's auth_request, Traefik's ForwardAuth.

A gateway sends on the headers of its client, and says in the query of its own configuration what the route needs. The
answer is 200 with who the key is in headers, or the very answer that the client is to be given.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic, perf_counter
from typing import Final

import structlog
from aiohttp import web
from multidict import CIMultiDictProxy

from latchgate.background import where
from latchgate.domain.errors import InvalidFieldError, LookupBudgetError, StorageUnavailableError, UnavailableError
from latchgate.domain.model import Outcome
from latchgate.domain.validation import Validator, as_text
from latchgate.gateway.answers import (
    COME_BACK,
    DENIALS,
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
from latchgate.gateway.credentials import (
    API_KEY,
    AUTHORIZATION,
    FORWARDED_FOR,
    IDENTITY_PREFIX,
    Needs,
    find_token,
)
from latchgate.observers import CallObserver, OutcomeObserver

AUTH_PATH: Final = "/auth"
HEALTH_PATH: Final = "/healthz"
METHOD: Final = "HTTP/auth"
"""What stands for this endpoint among the methods in metrics."""

REASON: Final = IDENTITY_PREFIX + "reason"

REMIND_S: Final = 60.0
"""How often a gateway's mistake is logged."""

Page = Callable[[web.BaseRequest], Awaitable[web.Response]]
"""What answers requests for one path."""

_log = structlog.get_logger("latchgate.web")


class AuthEndpoint:
    """Answers gateways. Until `connect` is called it can not decide anything."""

    def __init__(
        self,
        outcomes: OutcomeObserver,
        calls: CallObserver,
        trusted_hops: int,
        is_serving: Callable[[], bool],
        pages: Mapping[str, Page],
    ) -> None:
        """Takes who is told of outcomes and calls, how many proxies are trusted (see Needs), and what tells health.

        `pages` are what else there is, by its path.
        """
        self._outcomes = outcomes
        self._calls = calls
        self._needs = Needs("query", trusted_hops)
        self._identity = Remembering(lambda record: identity(record).headers)
        self._is_serving = is_serving
        self._pages = pages
        self._validator: Validator | None = None
        self._reminded_s = -REMIND_S

    def connect(self, validator: Validator) -> None:
        """Lets requests be judged."""
        self._validator = validator

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """Answers one request."""
        path = request.path
        if path == HEALTH_PATH:
            return _plain(200, "serving") if self._is_serving() else _plain(503, "not serving")
        if path in self._pages:
            return await self._pages[path](request)
        if path != AUTH_PATH:
            return _plain(404, f"there is {', '.join((AUTH_PATH, *self._pages))} and {HEALTH_PATH}")
        start_s, code = perf_counter(), "OK"
        try:
            return await self._judge(request)
        except Exception as error:  # noqa: BLE001 - nothing but an answer may get out
            code, answer = self._failed(error)
            return answer
        finally:
            self._calls.finished(METHOD, code, perf_counter() - start_s)

    async def _judge(self, request: web.BaseRequest) -> web.Response:
        headers = request.headers
        token, _, problem = find_token(_value(headers, AUTHORIZATION), _value(headers, API_KEY))
        forwarded = _value(headers, FORWARDED_FOR) or b""
        settings = {name: ",".join(request.query.getall(name)).encode() for name in request.query}
        # Whoever connects is the gateway, which has appended whom it saw.
        need = self._needs.read(settings, forwarded.rpartition(b",")[2].strip(), forwarded)
        if problem is not None:
            self._outcomes.unjudged(problem.value)
            return refusal(PROBLEMS[problem], challenge(PROBLEMS[problem]))
        validator = self._validator
        if validator is None:
            raise StorageUnavailableError("the service is starting and waits for its database")
        judgement = validator.recall(token, need, validator.clock()) or await validator.decide(as_text(token), need)
        outcome, _, _, record, rate = judgement
        self._outcomes.outcome(outcome)
        if outcome is Outcome.VALID and record is not None:
            return web.Response(headers=self._identity(record) | (rate_headers(rate) if rate else {}))
        denial = DENIALS[outcome]
        return refusal(denial, challenge(denial) | (retry_headers(rate) if rate else {}))

    def _failed(self, error: Exception) -> tuple[str, web.Response]:
        """Gives the code and the answer where there is no verdict."""
        if isinstance(error, LookupBudgetError):
            return OVERRUN.status, refusal(OVERRUN, COME_BACK)
        if isinstance(error, UnavailableError):
            return UNDECIDED.status, refusal(UNDECIDED, COME_BACK)
        if isinstance(error, InvalidFieldError):
            if monotonic() - self._reminded_s >= REMIND_S:
                self._reminded_s = monotonic()
                _log.warning("gateway_misconfigured", problem=error.message)
            return "INVALID_ARGUMENT", refusal(Denial("INVALID_ARGUMENT", 500, "INVALID_FIELD", error.message), {})
        incident = secrets.token_hex(4)
        _log.error("http_auth", incident=incident, error=type(error).__name__, where=where(error))
        message = f"the service failed; its log has the details under incident {incident}"
        return "INTERNAL", refusal(Denial("INTERNAL", 500, "INTERNAL", message), {})


def _value(headers: CIMultiDictProxy[str], name: str) -> bytes | None:
    """Gives a header as it was sent; what was sent several times, with commas between (RFC 9110, 5.3)."""
    values = headers.getall(name, None)
    return None if values is None else ",".join(values).encode("utf-8", "surrogateescape")


def refusal(denial: Denial, headers: Mapping[str, str]) -> web.Response:
    """Writes a refusal as JSON. The reason stands in a header too: nginx does not read the body."""
    headers = {REASON: denial.reason, **headers}
    return web.Response(status=denial.http, text=body(denial), content_type="application/json", headers=headers)


def _plain(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")
