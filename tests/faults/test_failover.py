"""A standby takes over: what was acknowledged holds where commits wait for it; what is lost otherwise is noticed."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as pb
from support.databases import until
from support.replication import Pair, replicated
from support.service import RunningService, run_service

LEASE_S = 1.0


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture
async def pair(tmp_path: Path, postgres_url: str) -> AsyncIterator[Pair]:
    """Two servers of the test's own. The session's server is asked for so that the user who runs them exists."""
    assert postgres_url
    async with replicated(tmp_path, _free_ports()) as servers:
        yield servers


async def _revoke(service: RunningService, key_id: str) -> key_pb2.Effect:
    answer = await service.keys.RevokeKey(pb.RevokeKeyRequest(key_id=key_id), metadata=service.root)
    effect: key_pb2.Effect = answer.effect
    return effect


async def _until_answered(service: RunningService, token: str) -> None:
    """Waits until Validate is answered again."""

    async def is_answered() -> bool:
        try:
            await service.validate(token)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    await until(is_answered)


def _readings(service: RunningService, result: str) -> float:
    found = service.running.metrics.registry.get_sample_value("latchgate_log_readings_total", {"result": result})
    return found or 0.0


async def _has_read(service: RunningService, result: str) -> None:
    async def has_read() -> bool:
        return _readings(service, result) > 0

    await until(has_read)


async def test_synchronous_failover_loses_no_revocation(pair: Pair) -> None:
    """Where commits wait for the standby, every revocation that was answered with EFFECTIVE holds after the standby has
    taken over, on a service that had the keys in memory; keys that were not revoked are good.
    """
    async with run_service(pair.url, lease_seconds=LEASE_S) as service:
        await service.create_organization()
        await pair.wait_for_standby(is_synchronous=True)
        created = [await service.create_key() for _ in range(12)]
        for each in created:
            assert "VALID" == await service.outcome(each.token)
        effects = [await _revoke(service, each.key.id) for each in created[:10]]
        assert {key_pb2.EFFECT_STATE_EFFECTIVE} == {effect.state for effect in effects}

        await pair.primary.kill()
        await pair.standby.promote()
        await _until_answered(service, created[-1].token)

        outcomes = [await service.outcome(each.token) for each in created]
        assert ["REVOKED"] * 10 + ["VALID"] * 2 == outcomes
        await _has_read(service, "taken_over")
        assert 0 == _readings(service, "went_back")
        assert key_pb2.EFFECT_STATE_EFFECTIVE == (await _revoke(service, created[-1].key.id)).state
        assert "REVOKED" == await service.outcome(created[-1].token)


async def test_lost_changes_are_noticed(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    """Where commits do not wait for the standby, a revocation that it never got is gone when it has taken over. The
    service notices that the log is shorter than it was, says so loudly, and goes by what the database says now.
    """
    async with run_service(pair.url, lease_seconds=LEASE_S) as service:
        await service.create_organization()
        created = await service.create_key()
        kept = await service.create_key()
        assert key_pb2.EFFECT_STATE_EFFECTIVE == (await _revoke(service, kept.key.id)).state
        await pair.wait_for_standby(is_synchronous=False)
        await pair.standby.stop()
        assert key_pb2.EFFECT_STATE_EFFECTIVE == (await _revoke(service, created.key.id)).state
        assert "REVOKED" == await service.outcome(created.token)

        await pair.primary.kill()
        await pair.standby.start()
        await pair.standby.promote()
        await _until_answered(service, created.token)
        await _has_read(service, "went_back")

        assert ["VALID", "REVOKED"] == [await service.outcome(each.token) for each in (created, kept)]
        assert "revision_went_back" in capfd.readouterr().out
        assert key_pb2.EFFECT_STATE_EFFECTIVE == (await _revoke(service, created.key.id)).state
        assert "REVOKED" == await service.outcome(created.token)
