"""A change is stored, or not, and its answer is lost on the way: a retry finds out, and never does it twice."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from support.databases import connected, until
from support.faults import CommitFault, FaultyWire
from support.service import RunningService, refusal, run_service

UNKNOWN = [CommitFault.CUT_BEFORE, CommitFault.CUT_AFTER, CommitFault.SILENCE]
# What the service waits for a statement's answer, here; so that silence is told soon.
STATEMENT_S = 0.5

Request = keys_pb.CreateKeyRequest | keys_pb.RotateKeyRequest


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the service wait less long for a database that does not answer."""
    monkeypatch.setattr("latchgate.storage.postgres.MANAGEMENT_TIMEOUT_S", STATEMENT_S)


def creation() -> keys_pb.CreateKeyRequest:
    """A request for a key that can be repeated."""
    return keys_pb.CreateKeyRequest(
        organization_id="acme", name="retried", permissions=["read"], request_id=str(uuid.uuid4())
    )


def rotation(key_id: str) -> keys_pb.RotateKeyRequest:
    """A request for a new token that can be repeated."""
    return keys_pb.RotateKeyRequest(key_id=key_id, request_id=str(uuid.uuid4()))


def issue(service: RunningService, request: Request, stub: Any = None) -> Any:
    """Sends a request for a token; through another stub than the service's own, if one is given."""
    method = type(request).__name__.removesuffix("Request")
    return getattr(stub or service.keys, method)(request, metadata=service.root)


async def key_ids(service: RunningService) -> list[str]:
    """Reads from the database which keys the organization has."""
    async with connected(service.database_url) as connection:
        rows = await connection.fetch("SELECT id FROM key WHERE organization_id = 'acme' ORDER BY id")
    return [row["id"] for row in rows]


async def secret_count(service: RunningService) -> int:
    """Reads from the database how many tokens the organization's keys were ever given."""
    async with connected(service.database_url) as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM secret s JOIN key k ON k.id = s.key_id WHERE k.organization_id = 'acme'"
        )
    return count


async def assert_issued_once(service: RunningService, request: Request) -> str:
    """Demands that two retries give the organization's only key and one good token; gives the key's id."""
    first, second = await issue(service, request), await issue(service, request)
    assert (first.key.id, first.token) == (second.key.id, second.token)
    assert "VALID" == await service.outcome(first.token)
    assert [first.key.id] == await key_ids(service)
    key_id: str = first.key.id
    return key_id


@pytest.mark.parametrize("fault", UNKNOWN)
async def test_creation_lost(wired: RunningService, wire: FaultyWire, fault: CommitFault) -> None:
    """CreateKey whose commit was not answered is WRITE_UNKNOWN; the retry gives one key, whatever came of the first."""
    request = creation()
    happened = wire.at_next_commit(fault)

    error = await refusal(issue(wired, request))

    assert happened.is_set()
    assert (grpc.StatusCode.UNAVAILABLE, "WRITE_UNKNOWN") == (error.code, error.reason)
    stored = await key_ids(wired)
    assert (0 if fault is CommitFault.CUT_BEFORE else 1) == len(stored)
    key_id = await assert_issued_once(wired, request)
    assert (stored or [key_id]) == [key_id]
    assert 1 == await secret_count(wired)


@pytest.mark.parametrize("fault", UNKNOWN)
async def test_rotation_lost(wired: RunningService, wire: FaultyWire, fault: CommitFault) -> None:
    """RotateKey whose commit was not answered is WRITE_UNKNOWN; the retry gives one new token, and the old is dead."""
    created = await wired.create_key()
    request = rotation(created.key.id)
    happened = wire.at_next_commit(fault)

    error = await refusal(issue(wired, request))

    assert happened.is_set()
    assert (grpc.StatusCode.UNAVAILABLE, "WRITE_UNKNOWN") == (error.code, error.reason)
    assert ("VALID" if fault is CommitFault.CUT_BEFORE else "REVOKED") == await wired.outcome(created.token)
    await assert_issued_once(wired, request)
    assert 2 == await secret_count(wired)
    assert "REVOKED" == await wired.outcome(created.token)


@pytest.mark.parametrize("fault", UNKNOWN)
async def test_revocation_lost(wired: RunningService, wire: FaultyWire, fault: CommitFault) -> None:
    """RevokeKey needs no request_id: repeated after WRITE_UNKNOWN it succeeds, whether it was stored before or not."""
    created = await wired.create_key()
    request = keys_pb.RevokeKeyRequest(key_id=created.key.id, reason="leaked")
    wire.at_next_commit(fault)

    error = await refusal(wired.keys.RevokeKey(request, metadata=wired.root))

    assert "WRITE_UNKNOWN" == error.reason
    await wired.keys.RevokeKey(request, metadata=wired.root)
    assert "REVOKED" == await wired.outcome(created.token)


@pytest.mark.parametrize("fault", UNKNOWN)
async def test_undeletion_lost(wired: RunningService, wire: FaultyWire, fault: CommitFault) -> None:
    """UndeleteKey that is repeated after WRITE_UNKNOWN succeeds, whether it was stored before or not, and the key
    counts once.
    """
    created = await wired.create_key()
    await wired.keys.DeleteKey(keys_pb.DeleteKeyRequest(key_id=created.key.id), metadata=wired.root)
    request = keys_pb.UndeleteKeyRequest(key_id=created.key.id)
    wire.at_next_commit(fault)

    error = await refusal(wired.keys.UndeleteKey(request, metadata=wired.root))

    assert "WRITE_UNKNOWN" == error.reason
    await wired.keys.UndeleteKey(request, metadata=wired.root)
    assert "VALID" == await wired.outcome(created.token)
    async with connected(wired.database_url) as connection:
        assert 1 == await connection.fetchval("SELECT key_count FROM organization WHERE id = 'acme'")


async def test_connection_lost_after_answer(wired: RunningService, wire: FaultyWire) -> None:
    """A change whose commit was answered is answered as done, though the connection is lost right after it."""
    created = await wired.create_key()
    happened = wire.at_next_commit(CommitFault.CUT_ANSWERED)

    # Without `active` a toggle turns the key off, and would on again if it were told to be repeated.
    answer = await wired.keys.ToggleKey(keys_pb.ToggleKeyRequest(key_id=created.key.id), metadata=wired.root)

    assert happened.is_set()
    assert "INACTIVE" == await wired.outcome(created.token)
    assert answer.key.etag == (await wired.get_key(created.key.id)).etag


@pytest.mark.parametrize("method", ["CreateKey", "RotateKey"])
async def test_client_lost(wired: RunningService, wire: FaultyWire, method: str) -> None:
    """When the connection of the client is lost after the commit, its retry on another gives the same key and token."""
    is_rotation = method == "RotateKey"
    request = rotation((await wired.create_key()).key.id) if is_rotation else creation()
    async with grpc.aio.insecure_channel(wired.address) as channel:
        happened = wire.at_next_commit(CommitFault.SILENCE)
        lost = asyncio.ensure_future(issue(wired, request, KeyServiceStub(channel)))
        await asyncio.wait_for(happened.wait(), 10)
    await asyncio.wait({lost})
    assert lost.cancelled()
    stored = await key_ids(wired)

    key_id = await assert_issued_once(wired, request)

    assert stored == [key_id]
    assert (2 if is_rotation else 1) == await secret_count(wired)


async def test_cancelled_during_commit(wired: RunningService, wire: FaultyWire) -> None:
    """A call that is cancelled while its commit is under way takes no connection with it."""
    happened = wire.at_next_commit(CommitFault.SILENCE)
    call = issue(wired, creation())
    await asyncio.wait_for(happened.wait(), 10)
    call.cancel()

    async def is_free() -> bool:
        busy = wired.running.metrics.registry.get_sample_value("latchgate_pool_connections", {"state": "busy"})
        return busy == 0.0

    await until(is_free)
    created = await asyncio.gather(*(wired.create_key() for _ in range(9)))
    assert 9 == len({each.key.id for each in created})


@pytest.mark.parametrize("let_pass", range(3))
async def test_first_start_lost(
    wire: FaultyWire, empty_database_url: str, monkeypatch: pytest.MonkeyPatch, let_pass: int
) -> None:
    """A first start of which a commit is not answered (schema, tag key, root key) is repeated and ends the same."""
    monkeypatch.setattr("latchgate.app.START_RETRY_S", 0.05)
    happened = wire.at_next_commit(CommitFault.CUT_AFTER, let_pass=let_pass)
    async with run_service(wire.url(empty_database_url)) as service:
        assert happened.is_set()
        await service.create_organization("acme")
        assert "VALID" == await service.outcome((await service.create_key()).token)
        async with connected(service.database_url) as connection:
            assert 1 == await connection.fetchval("SELECT count(*) FROM key WHERE organization_id = 'org_root'")
