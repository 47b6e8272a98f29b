"""Scopes that keys hold, and that were taken out of the deployment's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import HeldPermission
from latchgate.storage.stores import PostgresStore
from support.keys import make_tenant
from support.service import RunningService, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")


def missing(service: RunningService) -> dict[str, int]:
    """Gives what the start has found."""
    return dict(service.running.ready.result().missing_scopes)


async def test_what_a_start_finds(database_url: str, tmp_path: Path) -> None:
    """A start finds the permissions that match no scope any more, and how many keys hold each: of all organizations,
    and of keys alone that are neither revoked nor deleted. These keys are good as before.
    """
    file = tmp_path / "scopes.toml"
    file.write_text('[scopes]\n"orders:read" = "Read."\n"stock:read" = "Read."\n"kept:read" = "Read."\n')
    async with run_service(database_url, scopes_file=file) as service:
        assert {} == missing(service)
        acme, rival = await make_tenant(service, "acme"), await make_tenant(service, "rival")
        # Of its own: for it nothing of these is missing.
        await rival.give_scopes("stock:write")
        created = await acme.key(permissions=["orders:read", "read"])
        for tenant in (acme, rival):
            await tenant.key(permissions=["stock:*", "orders:read", "kept:read"])
        await acme.revoke((await acme.key(permissions=["orders:read"])).key.id)
        await acme.delete((await acme.key(permissions=["orders:read"])).key.id)
    file.write_text('[scopes]\n"kept:read" = "Read."\n')
    async with run_service(database_url, scopes_file=file) as service:
        assert {"orders:read": 3, "stock:*": 1} == missing(service)
        assert "VALID" == await service.outcome(created.token, required_permissions=["orders:read"])


async def test_start_that_can_not_look(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can not be found out, the service serves all the same."""

    async def fail(_store: PostgresStore, _names: list[str]) -> list[HeldPermission]:
        raise StorageUnavailableError("it takes too long")

    monkeypatch.setattr(PostgresStore, "permissions_beyond", fail)
    async with run_service(database_url) as service:
        assert {} == missing(service)
        await make_tenant(service, "acme")
