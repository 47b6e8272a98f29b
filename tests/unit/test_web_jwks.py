"""The page with the keys over HTTP, where they can not be given."""

from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from latchgate.domain.errors import StorageUnavailableError
from latchgate.observability import Metrics
from latchgate.web.jwks import JWKS_PATH, JwksPage


async def answer_of(error: Exception | None) -> tuple[web.Response, str]:
    """Asks where reading fails, or with None where there is nothing to read from yet; gives how it was counted too."""
    metrics = Metrics(CollectorRegistry())
    page = JwksPage(metrics)

    async def fail() -> list[object]:
        assert error is not None
        raise error

    if error is not None:
        page.connect(fail)  # type: ignore[arg-type]  # it gives no keys of any kind
    answer = await page.answer(make_mocked_request("GET", JWKS_PATH))
    codes = ("UNAVAILABLE", "INTERNAL")
    registry = metrics.registry
    counted = [
        code
        for code in codes
        if registry.get_sample_value("latchgate_calls_total", {"method": "HTTP/jwks", "code": code})
    ]
    return answer, ",".join(counted)


@pytest.mark.parametrize("error", [None, StorageUnavailableError("away")])
async def test_not_now(error: Exception | None) -> None:
    """Before the start is done, and while the database is away, whoever asks is told to come back: nothing to keep."""
    answer, counted = await answer_of(error)
    assert (503, "1", "UNAVAILABLE") == (answer.status, answer.headers["retry-after"], counted)
    assert "cache-control" not in answer.headers


async def test_a_fault() -> None:
    """A fault is told as such, and logged with where it was, without what it says."""
    with capture_logs() as lines:
        answer, counted = await answer_of(ValueError("secret"))
    assert (500, "INTERNAL") == (answer.status, counted)
    assert ("http_jwks", "ValueError") == (lines[0]["event"], lines[0]["error"])
    assert "secret" not in repr((answer.text, lines))
