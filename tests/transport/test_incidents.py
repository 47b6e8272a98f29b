"""What nobody expected: the caller is given a number, the log has what is behind it, and neither has the text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import asyncpg
import grpc
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from support.service import RunningService, refusal, run_service
from support.transport import MANAGEMENT_METHODS, call, eventually, fresh_database, good_request, sample

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOME_KEY = "key_" + "0" * 26
AWAY = "column_that_is_away"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def broken_service(postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service whose database lacks columns that every management call reads, and that callers' tokens do not need."""
    async with fresh_database(postgres_url, template_url) as url, run_service(url) as running:
        await running.create_organization("acme")
        connection = await asyncpg.connect(url)
        for table in ("key", "organization", "plan"):
            await connection.execute(f"ALTER TABLE {table} RENAME COLUMN update_time TO {AWAY}")
        await connection.execute(f"ALTER TABLE organization RENAME COLUMN scopes TO {AWAY}_too")
        await connection.close()
        yield running


# What needs none of the columns, or finds no key before it comes to them.
SPARED = {
    "ListAuditEvents",
    "GetPublishableKey",
    "ToggleKey",
    "UpdateKey",
    "RotateKey",
    "RevokeKey",
    "DeleteKey",
    "UndeleteKey",
    "GetWebhook",
    "UpdateWebhook",
    "DeleteWebhook",
    "RotateWebhookSecret",
    "ListWebhooks",
    "ListWebhookDeliveries",
    "RedeliverWebhook",
    "SendTestEvent",
    "RotateSigningKeys",
}


@pytest.mark.parametrize("method", [name for name in MANAGEMENT_METHODS if name not in SPARED])
async def test_fault_is_told_by_its_number(
    broken_service: RunningService, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """An exception that no one expected is INTERNAL with an incident number. The log has one line with that number, the
    exception's class and the places it came through; what the exception says, and a traceback, are nowhere.
    """
    with capture_logs() as lines:
        refused = await refusal(call(broken_service, method, good_request(method, key_id=SOME_KEY)))

    assert (grpc.StatusCode.INTERNAL, "INTERNAL") == (refused.code, refused.reason)
    incident = refused.metadata["incident"]
    assert incident in refused.message
    (line,) = lines
    assert ("error", "INTERNAL", incident) == (line["log_level"], line["code"], line["incident"])
    assert "UndefinedColumnError" == line["error"]
    own = [place.partition(":")[0] for place in line["where"][:-1]]
    assert "pipeline.py" == own[0]
    assert own[-1] in {"reports.py", "stores.py", "transaction.py", "audit.py", "suspicion.py"}
    assert [] == caplog.records
    for told in (repr(refused), json.dumps(lines)):
        assert "update_time" not in told
        assert "does not exist" not in told
        assert "Traceback" not in told


async def test_incidents_have_numbers_of_their_own(broken_service: RunningService) -> None:
    """Two faults are told apart, however alike they are."""
    request = good_request("ListPlans", key_id="")
    incidents = {(await refusal(call(broken_service, "ListPlans", request))).metadata["incident"] for _ in range(5)}
    assert 5 == len(incidents)


async def test_fault_is_counted(broken_service: RunningService) -> None:
    """Faults are counted as INTERNAL, for the alert on the ratio of errors."""
    labels = {"method": "OrganizationService/ListPlans", "code": "INTERNAL"}
    before = sample(broken_service, "latchgate_calls_total", **labels)

    await refusal(call(broken_service, "ListPlans", good_request("ListPlans", key_id="")))

    assert before + 1 == sample(broken_service, "latchgate_calls_total", **labels)


async def test_fault_of_the_hot_path(broken_service: RunningService) -> None:
    """A lookup that the database refuses is UNAVAILABLE, so that a gateway's failure policy applies;
    the caller is told the reason's class and not its text. Once the reason is gone, tokens are judged again.
    """
    connection = await asyncpg.connect(broken_service.database_url)
    await connection.execute(f"ALTER TABLE secret RENAME COLUMN end_time TO {AWAY}")
    with capture_logs() as lines:
        refused = await refusal(broken_service.validate("another-systems-token"))
    await connection.execute(f"ALTER TABLE secret RENAME COLUMN {AWAY} TO end_time")
    await connection.close()

    assert (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE") == (refused.code, refused.reason)
    assert "UndefinedColumnError" in refused.message
    for told in (repr(refused), json.dumps(lines)):
        assert "end_time" not in told
        assert "does not exist" not in told

    async def is_judged() -> bool:
        try:
            return "NOT_FOUND" == await broken_service.outcome("another-systems-token")
        except grpc.aio.AioRpcError:
            return False

    await eventually(is_judged)


async def test_fault_leaves_the_service_working(broken_service: RunningService) -> None:
    """Faults of some calls are none of others: tokens are judged, and no connection is lost to the pool."""
    for _ in range(20):
        await refusal(call(broken_service, "ListPlans", good_request("ListPlans", key_id="")))

    assert "NOT_FOUND" == await broken_service.outcome("another-systems-token")
    await eventually(lambda: 0 == sample(broken_service, "latchgate_pool_connections", state="busy"))
