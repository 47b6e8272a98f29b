"""Usage while connections to the database are lost: what was answered is counted, each answer once."""

from __future__ import annotations

from typing import Any

import grpc

from support.databases import Fault, connected, fault_proxy, until
from support.service import RunningService, run_service

ROUNDS = 24


async def ask(service: RunningService, token: str, times: int) -> int:
    """Asks about a token, and gives how often it was answered; the others could not be decided."""
    answered = 0
    for _ in range(times):
        try:
            answered += await service.outcome(token) == "VALID"
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
    return answered


async def until_written(service: RunningService) -> None:
    """Waits until nothing is left to be written."""

    async def is_written() -> bool:
        return service.running.metrics.registry.get_sample_value("latchgate_last_used_pending") == 0

    await until(is_written)


async def counted(database_url: str, key_id: str) -> dict[str, Any]:
    """Reads what is stored of a key: counts for it and for its organization, and whether it has a last use."""
    async with connected(database_url) as connection:
        row = await connection.fetchrow(
            """
            SELECT (SELECT sum(count) FROM usage_by_secret u WHERE u.secret_id = s.id) AS key,
                   (SELECT sum(count) FROM usage_by_organization WHERE organization_id = 'acme') AS organization,
                   (SELECT used_time IS NOT NULL FROM last_used WHERE secret_id = s.id) AS is_used
            FROM secret s WHERE s.key_id = $1
            """,
            key_id,
        )
    return dict(row or {})


async def test_lost_connections(database_url: str) -> None:
    """While connections are cut again and again, at whatever the service is with its database, each answer that was
    given is counted, and none twice.
    """
    async with (
        fault_proxy(database_url) as proxy,
        run_service(proxy.url, usage_flush_seconds=0.005) as service,
    ):
        await service.create_organization()
        created = await service.create_key()
        answered = 0
        for number in range(ROUNDS):
            # At what a flush has come to, by turns with at nothing in particular.
            proxy.strike(number // 2 + 1, Fault.LOSE_ANSWER)
            if number % 2:
                proxy.cut()
            answered += await ask(service, created.token, 5)
            await until_written(service)
        assert answered > 2 * ROUNDS
        expected = {"key": answered, "organization": answered, "is_used": True}
        assert expected == await counted(database_url, created.key.id)


async def test_answers_while_the_database_is_away(database_url: str) -> None:
    """What was answered from memory while the database was away is counted when it is back, also by a service that
    stops then.
    """
    async with fault_proxy(database_url) as proxy:
        async with run_service(proxy.url, usage_flush_seconds=0.005, lease_seconds=60.0) as service:
            await service.create_organization()
            created = await service.create_key()
            answered = await ask(service, created.token, 10)
            proxy.refuse()
            answered += await ask(service, created.token, 50)
            proxy.accept()
            await until_written(service)
            expected = {"key": answered, "organization": answered, "is_used": True}
            assert expected == await counted(database_url, created.key.id)
            assert answered > 50
            proxy.refuse()
            more = await ask(service, created.token, 10)
            proxy.accept()
        expected = {"key": answered + more, "organization": answered + more, "is_used": True}
        assert expected == await counted(database_url, created.key.id)
