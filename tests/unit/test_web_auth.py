"""The endpoint for gateways that ask over HTTP, where there is no verdict to give."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from latchgate.domain.errors import LookupBudgetError, StorageUnavailableError
from latchgate.observability import Metrics
from latchgate.web.auth import AuthEndpoint

TOKEN = "lk_0123456789abcdefghijABCDEFGHIJ0123456789"


class Failing:
    """A validator that fails in one way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def clock(self) -> float:
        """Stands still."""
        return 0.0

    def recall(self, *_arguments: object) -> None:
        """Knows nothing."""

    async def decide(self, *_arguments: object, **_named: object) -> None:
        """Fails."""
        raise self.error


async def answer_of(error: Exception) -> tuple[web.Response, Metrics]:
    """Asks where judging fails."""
    metrics, validator = Metrics(CollectorRegistry()), Failing(error)
    endpoint = AuthEndpoint(metrics, metrics, 0, lambda: True, {})
    failing: Any = validator
    endpoint.connect(failing)
    return await endpoint.answer(make_mocked_request("GET", "/auth", headers={"X-API-Key": TOKEN})), metrics


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (StorageUnavailableError("away"), "UNAVAILABLE", "UNAVAILABLE"),
        (LookupBudgetError("many"), "LOOKUP_BUDGET_EXCEEDED", "RESOURCE_EXHAUSTED"),
    ],
)
async def test_nothing_can_be_said(error: Exception, reason: str, code: str) -> None:
    """What can not be decided is 503 with when to come back, and is counted as what it is.

    One unknown token of too many is refused, which no gateway takes for a failure.
    """
    answer, metrics = await answer_of(error)
    status = 503 if reason == "UNAVAILABLE" else 429
    assert (status, "1", reason) == (answer.status, answer.headers["retry-after"], answer.headers["x-latchgate-reason"])
    assert 1 == metrics.registry.get_sample_value("latchgate_calls_total", {"method": "HTTP/auth", "code": code})


async def test_a_fault_is_an_incident() -> None:
    """A fault of the service is 500 with a number, under which the log has where it came from, and no token."""
    with capture_logs() as logged:
        answer, metrics = await answer_of(RuntimeError(f"with {TOKEN} in its text"))
    error = json.loads(str(answer.text))["error"]
    assert (500, "INTERNAL") == (answer.status, error["reason"])
    assert logged[0]["incident"] in error["message"]
    assert "RuntimeError" == logged[0]["error"]
    assert TOKEN not in str(logged) + str(answer.text)
    assert 1 == metrics.registry.get_sample_value("latchgate_calls_total", {"method": "HTTP/auth", "code": "INTERNAL"})
