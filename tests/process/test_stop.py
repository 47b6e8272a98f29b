"""How a service stops: what is under way is finished, what comes later is refused, and nothing is left behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from latchgate.database import end_embedded
from latchgate.listening import Role
from support.databases import connected, until, until_waiting
from support.faults import NOT_SERVING, SERVING, health_changes
from support.processes import SERVE, Latchgate, environment, latchgate
from support.service import ROOT_TOKEN, TAG_KEY, bearer, run_service

ROOT = bearer(ROOT_TOKEN)
CLIENTS = 6
"""Of each kind: those that validate, and those that create keys."""
ANSWERS = 20 * CLIENTS
"""How many they are given before the signal."""


@dataclass
class Started:
    """A process that serves an organization `acme` with one key."""

    process: Latchgate
    address: str
    token: str

    def stub(self, channel: grpc.aio.Channel) -> Any:
        """Makes a stub."""
        return KeyServiceStub(channel)

    async def is_closed(self) -> bool:
        """Says whether a new connection is refused."""
        host, _, port = self.address.rpartition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return True
        writer.close()
        return False


@asynccontextmanager
async def started(database_url: str, folder: Path, **variables: Any) -> AsyncIterator[Started]:
    """Serves in a process that writes last-used times when it stops, not before."""
    settings: dict[str, Any] = {
        "DATABASE_URL": database_url,
        "ROOT_TOKEN": ROOT_TOKEN,
        "TAG_KEY": TAG_KEY,
        "USAGE_FLUSH_SECONDS": 3600,
    }
    async with latchgate("serve", folder, environment(**(dict(SERVE) | settings | variables))) as process:
        address = await process.address()
        async with grpc.aio.insecure_channel(address) as channel:
            organization = organizations_pb.CreateOrganizationRequest(organization_id="acme", name="Acme")
            await OrganizationServiceStub(channel).CreateOrganization(organization, metadata=ROOT)
            created = await KeyServiceStub(channel).CreateKey(creation("first"), metadata=ROOT)
        yield Started(process=process, address=address, token=created.token)


def creation(name: str) -> keys_pb.CreateKeyRequest:
    """A request for a key."""
    return keys_pb.CreateKeyRequest(organization_id="acme", name=name, permissions=["read"])


@dataclass
class Load:
    """Clients that each ask again as soon as they are answered, until they are refused."""

    answered: int = 0
    created: int = 0
    refused: Counter[tuple[bool, str]] = field(default_factory=Counter)
    """By whether the call was sent before the signal, and the code."""
    signal_s: float = float("inf")
    is_at_work: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep_asking(self, address: str, call: Callable[[Any], Any], *, creates: bool) -> None:
        """Asks on a connection of its own, without the retries that grpc makes by itself."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub: Any = KeyServiceStub(channel)
            while True:
                sent_s = time.monotonic()
                try:
                    await call(stub)
                except grpc.aio.AioRpcError as error:
                    self.refused[sent_s < self.signal_s, error.code().name] += 1
                    return
                self.answered += 1
                self.created += creates
                if self.answered == ANSWERS:
                    self.is_at_work.set()


async def test_stop_under_load(database_url: str, tmp_path: Path) -> None:
    """Every call that was sent before the signal is answered; what is sent later is answered, or refused undone.

    A later call finds the port closed (UNAVAILABLE), or crosses the news that the server stops (UNAVAILABLE, or
    CANCELLED by grpc itself, in which case no handler has seen it). A refused call has changed nothing: there are as
    many keys as calls that were answered with one.
    """
    async with started(database_url, tmp_path) as service:
        load = Load()
        validation, new_key = keys_pb.ValidateRequest(token=service.token), creation("under load")
        clients = [
            asyncio.create_task(load.keep_asking(service.address, call, creates=creates))
            for _ in range(CLIENTS)
            for call, creates in (
                (lambda stub: stub.Validate(validation), False),
                (lambda stub: stub.CreateKey(new_key, metadata=ROOT), True),
            )
        ]
        await asyncio.wait_for(load.is_at_work.wait(), 30)
        load.signal_s = time.monotonic()
        service.process.tell(signal.SIGTERM)
        await asyncio.gather(*clients)
        assert 0 == await service.process.ended()

    assert not [code for was_sent_before, code in load.refused if was_sent_before], load.refused
    assert {code for _, code in load.refused} <= {"UNAVAILABLE", "CANCELLED"}
    async with connected(database_url) as connection:
        assert load.created == await connection.fetchval("SELECT count(*) FROM key WHERE name = 'under load'")


@pytest.mark.parametrize("role", [Role.ALONE, Role.WORKER])
async def test_stop_cancels_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch, role: Role) -> None:
    """Clients that ask again as soon as they are answered lose no call to the stop: each of them finds a closed port.

    That of a worker is several servers'. Left to itself, grpc cancels calls that have arrived and not reached their
    handlers.
    """
    monkeypatch.setattr("latchgate.draining.QUIET_S", 0.1)
    monkeypatch.setattr("latchgate.draining.MAX_HOLD_S", 2.0)
    load = Load()
    async with run_service(database_url, role) as service:
        await service.create_organization("acme")
        validation = keys_pb.ValidateRequest(token=(await service.create_key()).token)
        clients = [
            asyncio.create_task(
                load.keep_asking(service.address, lambda stub: stub.Validate(validation), creates=False)
            )
            for _ in range(2 * CLIENTS)
        ]
        await asyncio.wait_for(load.is_at_work.wait(), 30)
    await asyncio.gather(*clients)
    assert {(True, "UNAVAILABLE"): 2 * CLIENTS} == load.refused


async def test_stop_finishes_calls(database_url: str, tmp_path: Path) -> None:
    """Told to stop, the only worker first says NOT_SERVING, then takes no calls, finishes those under way, and writes
    last uses; then the service ends with status 0.
    """
    async with (
        started(database_url, tmp_path, WORKERS=1) as service,
        connected(database_url) as connection,
        grpc.aio.insecure_channel(service.address) as channel,
        health_changes(service.address) as health,
    ):
        assert SERVING == await health.get()
        stub = service.stub(channel)
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
            under_way = asyncio.ensure_future(stub.CreateKey(creation("slow"), metadata=ROOT))
            await until_waiting(connection)
            await stub.Validate(keys_pb.ValidateRequest(token=service.token))

            service.process.tell(signal.SIGINT)
            assert NOT_SERVING == await asyncio.wait_for(health.get(), 10)
            await until(service.is_closed)
            assert not under_way.done()
        created = await under_way
        assert 0 == await service.process.ended()

        assert 1 == await connection.fetchval("SELECT count(*) FROM key WHERE id = $1", created.key.id)
        assert 1 == await connection.fetchval(
            "SELECT count(*) FROM last_used u JOIN secret s ON s.id = u.secret_id JOIN key k ON k.id = s.key_id"
            " WHERE k.name = 'first' AND u.used_time IS NOT NULL"
        )


async def test_grace_ends(database_url: str) -> None:
    """A call that does not come to an end keeps the service from stopping for DRAIN_SECONDS, and then no longer."""
    async with connected(database_url) as connection, connection.transaction():
        async with run_service(database_url, drain_seconds=0.2) as service:
            await service.create_organization("acme")
            await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
            under_way = asyncio.ensure_future(service.keys.CreateKey(creation("slow"), metadata=ROOT))
            await until_waiting(connection)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await under_way


async def test_second_signal(database_url: str, tmp_path: Path) -> None:
    """The second signal ends the process at once, with status 1, whatever is under way."""
    async with (
        started(database_url, tmp_path, DRAIN_SECONDS=3600) as service,
        connected(database_url) as connection,
        grpc.aio.insecure_channel(service.address) as channel,
        connection.transaction(),
    ):
        await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
        under_way = asyncio.ensure_future(service.stub(channel).CreateKey(creation("slow"), metadata=ROOT))
        await until_waiting(connection)
        service.process.tell(signal.SIGTERM)
        await service.process.event("stopping")
        service.process.tell(signal.SIGINT)
        assert 1 == await service.process.ended()
        with pytest.raises(grpc.aio.AioRpcError):
            await under_way


async def test_stop_while_waiting_for_database(tmp_path: Path) -> None:
    """A service whose database was never there stops as soon as it is told, with status 0, and its log says so."""
    variables = environment(**SERVE, DATABASE_URL="postgresql://user:hunter2-password@127.0.0.1:1/gate")
    async with latchgate("serve", tmp_path, variables) as process:
        await process.event("waiting_for_database")
        process.tell(signal.SIGTERM)
        assert 0 == await process.ended()
        await process.event("stopped")
        assert "hunter2" not in process.text


@pytest.mark.parametrize("sign", ["", "-"])
def test_second_signal_spares_others(tmp_path: Path, sign: str) -> None:
    """A process, or a group of them, that has the number of an embedded PostgreSQL that is gone is left alone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        (tmp_path / "postmaster.pid").write_text(f"{sign}{other.pid}\n{tmp_path}\n")
        end_embedded(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.1)
        other.communicate(b"\n", timeout=30)
    assert 0 == other.returncode
