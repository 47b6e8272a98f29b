"""The audit trail while the database is away."""

from __future__ import annotations

import grpc

from apikeys.v1 import key_service_pb2 as keys_pb
from support.faults import FaultyWire
from support.keys import database_of
from support.service import RunningService, bearer, refusal
from support.transport import sample

UNRECORDED = "latchgate_audit_unrecorded_total"


async def test_refusals_while_the_database_is_away(wire: FaultyWire, wired: RunningService) -> None:
    """A call that is refused is refused for its own reason while the trail can not be written, and that is counted;
    when the database is back, refusals are recorded again.
    """
    poor = bearer((await wired.create_key(permissions=["read"])).token)

    async def refused() -> tuple[grpc.StatusCode, str]:
        error = await refusal(wired.keys.ListKeys(keys_pb.ListKeysRequest(), metadata=poor))
        return error.code, error.reason

    expected = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    assert expected == await refused()
    assert 0 == sample(wired, UNRECORDED)
    wire.refuse()
    assert expected == await refused()
    assert 1 == sample(wired, UNRECORDED)
    await wire.listen()
    assert expected == await refused()
    assert 1 == sample(wired, UNRECORDED)
    async with database_of(wired) as connection:
        count = "SELECT count(*) FROM audit_event WHERE code = 'PERMISSION_DENIED'"
        assert 2 == await connection.fetchval(count)
