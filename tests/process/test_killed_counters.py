"""Usage when a worker is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from support.databases import connected, until
from support.fleets import OWN_CONNECTION, fleet
from support.processes import until_gone
from support.service import ROOT_TOKEN, bearer

CONNECTIONS = 8
ASKED = 5


async def make_key(address: str) -> str:
    """Makes a key, and gives its token."""
    root = bearer(ROOT_TOKEN)
    async with grpc.aio.insecure_channel(address) as channel:
        organizations: Any = OrganizationServiceStub(channel)
        keys: Any = KeyServiceStub(channel)
        await organizations.CreateOrganization(
            organizations_pb.CreateOrganizationRequest(organization_id="acme", name="Acme"), metadata=root
        )
        created = await keys.CreateKey(keys_pb.CreateKeyRequest(organization_id="acme", name="a key"), metadata=root)
    token: str = created.token
    return token


async def ask(address: str, token: str) -> int:
    """Asks about a token over several connections, so that all workers are asked; gives how often it was answered."""

    async def keep_asking() -> int:
        async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
            stub: Any = KeyServiceStub(channel)
            answers = [await stub.Validate(keys_pb.ValidateRequest(token=token)) for _ in range(ASKED)]
        return sum(answer.outcome == keys_pb.OUTCOME_VALID for answer in answers)

    return sum(await asyncio.gather(*(keep_asking() for _ in range(CONNECTIONS))))


async def test_what_was_written_outlives_a_killed_worker(database_url: str, tmp_path: Path) -> None:
    """What a worker has counted and written stays counted when it is killed, and its successor adds to it: no answer is
    counted twice, and none is lost that was written.
    """
    async with fleet(database_url, tmp_path, USAGE_FLUSH_SECONDS="0.05") as service, connected(database_url) as reader:
        token = await make_key(service.address)

        async def counted() -> int:
            count: int = await reader.fetchval(
                "SELECT coalesce(sum(count), 0)::int8 FROM usage_by_organization WHERE organization_id = 'acme'"
            )
            return count

        async def until_counted(expected: int) -> None:
            async def is_there() -> bool:
                count = await counted()
                assert count <= expected
                return count == expected

            await until(is_there)

        answered = await ask(service.address, token)
        await until_counted(answered)
        (killed,) = service.pids(1)
        os.kill(killed, signal.SIGKILL)
        await until_gone(killed)
        await service.until_ready(1, 2)
        answered += await ask(service.address, token)
        await until_counted(answered)
        assert CONNECTIONS * ASKED * 2 == answered
        service.process.tell(signal.SIGTERM)
        assert 0 == await service.process.ended()
        assert answered == await counted()
