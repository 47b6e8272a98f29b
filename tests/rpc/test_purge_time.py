"""What becomes of deleted keys when their purge_time has come."""

from __future__ import annotations

from datetime import timedelta

import pytest

from latchgate.domain.model import DELETED_KEPT
from support.databases import until
from support.keys import ids, make_tenant
from support.service import refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_removed_by_the_service_itself(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running service removes deleted keys when their purge_time has come: they are as if they had never been. Those
    whose time has not come can still be brought back.
    """
    monkeypatch.setattr("latchgate.housekeeping.FORGET_INTERVAL_S", 0.05)
    async with run_service(database_url) as service:
        tenant = await make_tenant(service, "acme")
        old, young = await tenant.key(), await tenant.key()
        for created in (old, young):
            await tenant.delete(created.key.id)
        await tenant.age_deletion(young.key.id, DELETED_KEPT - timedelta(minutes=5))
        await tenant.age_deletion(old.key.id, DELETED_KEPT)

        async def is_gone() -> bool:
            return old.key.id not in ids((await tenant.list(show_deleted=True)).keys)

        await until(is_gone)
        for call in (tenant.get(old.key.id), tenant.undelete(old.key.id), tenant.revoke(old.key.id)):
            assert "KEY_NOT_FOUND" == (await refusal(call)).reason
        assert "NOT_FOUND" == await service.outcome(old.token)
        await tenant.undelete(young.key.id)
        assert "VALID" == await service.outcome(young.token)
