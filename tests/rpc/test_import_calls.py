"""ImportKeys as a stream: who may go on, what ends it, and what is kept of it then."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from apikeys.v1 import import_service_pb2 as pb
from apikeys.v1 import key_pb2
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from latchgate.app import Running, serving
from support.imports import (
    foreign_token,
    import_call,
    import_requests,
    import_rows,
    new_rows,
    outcomes,
    row,
    sha256,
)
from support.keys import Tenant, database_of, execute, make_plan, make_tenant
from support.service import ROOT_TOKEN, Metadata, bearer, call_error, make_settings, refusal
from support.transport import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def key_count(tenant: Tenant) -> int:
    """Says how many keys the tenant has, without its admin's."""
    return len((await tenant.list(page_size=1000)).keys) - 1


class Talk:
    """A call in which each request is sent when the test says so."""

    def __init__(self, channel: grpc.aio.Channel, caller: Metadata, organization_id: str = "") -> None:
        self._organization_id = organization_id
        self._requests: asyncio.Queue[pb.ImportKeysRequest | None] = asyncio.Queue()
        self.call = import_call(channel, self.requests(), caller)
        self._responses = aiter(self.call)

    async def requests(self) -> AsyncIterator[pb.ImportKeysRequest]:
        """Gives what the test has said to send."""
        while (request := await self._requests.get()) is not None:
            yield request

    async def send(self, *rows: pb.ImportedKey) -> pb.ImportKeysResponse:
        """Sends a request and gives its response."""
        self.tell(*rows)
        response: pb.ImportKeysResponse = await anext(self._responses)
        return response

    def tell(self, *rows: pb.ImportedKey) -> None:
        """Sends a request."""
        self._requests.put_nowait(pb.ImportKeysRequest(organization_id=self._organization_id, keys=rows))

    async def end(self) -> None:
        """Says that nothing more comes, and demands that the call ends well."""
        self._requests.put_nowait(None)
        assert [] == [response async for response in self._responses]
        assert grpc.StatusCode.OK == await self.call.code()


async def test_each_request_is_answered_before_the_next_is_sent(acme: Tenant) -> None:
    """A caller that waits for each response has it, and what was answered is stored while the call goes on."""
    talk = Talk(acme.service.channel, acme.admin)
    for number in range(1, 4):
        token = foreign_token()
        assert ["CREATED"] == outcomes(await talk.send(row(number, token)))
        assert "VALID" == await acme.service.outcome(token)
    await talk.end()


@pytest.mark.parametrize("end", ["revoke", "delete", "rotate", "toggle", "expire", "narrow"])
async def test_caller_that_is_ended_within_the_call(acme: Tenant, end: str) -> None:
    """A caller whose key is ended, or loses the permission, is refused at its next request; what was answered stays."""
    caller = await acme.key(permissions=["keys:write"])
    talk = Talk(acme.service.channel, bearer(caller.token))
    await talk.send(row(1, foreign_token()))
    if end == "narrow":
        await acme.update(key_pb2.Key(id=caller.key.id, permissions=["read"]))
    else:
        await getattr(acme, end)(caller.key.id)

    error = await refusal(talk.send(row(2, foreign_token())))

    reason = "PERMISSION_MISSING" if end == "narrow" else "CREDENTIALS_INVALID"
    assert reason == error.reason
    assert 1 == len([key for key in (await acme.list()).keys if key.name.startswith("key ")])


async def test_caller_that_is_ended_while_it_waits(acme: Tenant) -> None:
    """A caller whose key is revoked while its request waits for a lock is refused, and nothing of it is stored."""
    caller = await acme.key(permissions=["keys:write"])
    talk = Talk(acme.service.channel, bearer(caller.token))
    await talk.send(row(1, foreign_token()))
    async with database_of(acme.service) as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM organization WHERE id = $1 FOR UPDATE", acme.id)
        waiting = asyncio.create_task(refusal(talk.send(row(2, foreign_token()))))
        await eventually(partial(is_waited_for, connection))
        await execute(acme.service, "UPDATE key SET revoke_time = now() WHERE id = $1", caller.key.id)
    error = await waiting
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (error.code, error.reason)
    assert 1 == len([key for key in (await acme.list()).keys if key.name.startswith("key ")])


async def is_waited_for(connection: Any) -> bool:
    """Says whether anybody waits for a lock."""
    waiting: int = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
    return waiting > 0


async def test_fault_of_the_service(acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault within a request ends the call as INTERNAL, with a number under which the log has where it came about,
    and without what it says: it may hold what was sent.
    """

    async def fail(*_: object) -> None:
        raise RuntimeError("hunter2-password")

    monkeypatch.setattr("latchgate.domain.importing.KeyImporter.store", fail)
    with capture_logs() as lines:
        error = await refusal(import_rows(acme.service, "", new_rows(1), acme.admin))
    (line,) = lines
    assert (grpc.StatusCode.INTERNAL, "INTERNAL") == (error.code, error.reason)
    assert ("error", "RuntimeError", error.metadata["incident"]) == (line["log_level"], line["error"], line["incident"])
    assert "hunter2" not in repr(line) + repr(error)


async def test_service_that_stops(database_url: str) -> None:
    """A service that stops answers the request that it has, and tells the caller at the next one to go elsewhere: it
    does not have to wait until all is imported.
    """
    started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def live() -> None:
        async with serving(make_settings(database_url, drain_seconds=60)) as running:
            await running.ready
            started.set_result(running)
            await stop.wait()

    living = asyncio.create_task(live())
    running = await started
    async with grpc.aio.insecure_channel(running.listen) as channel:
        stub: Any = OrganizationServiceStub(channel)
        await stub.CreateOrganization(
            organizations_pb.CreateOrganizationRequest(organization_id="acme", name="Acme"), metadata=bearer(ROOT_TOKEN)
        )
        talk = Talk(channel, bearer(ROOT_TOKEN), "acme")
        await talk.send(row(1, foreign_token()))
        stop.set()
        await eventually(lambda: not running.server.health.is_serving)
        error = await refusal(talk.send(row(2, foreign_token())))
        assert (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE") == (error.code, error.reason)
        await asyncio.wait_for(living, 20)


async def test_caller_must_be_known_before_anything_is_read(acme: Tenant) -> None:
    """A stranger is refused before a request has come."""
    for caller, reason in (((), "CREDENTIALS_MISSING"), (bearer("x"), "CREDENTIALS_INVALID")):
        call = import_call(acme.service.channel, Talk(acme.service.channel, acme.admin).requests(), caller)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(call))
        error = call_error(caught.value)
        assert (grpc.StatusCode.UNAUTHENTICATED, reason) == (error.code, error.reason)


async def test_only_so_many_rows_in_a_call(acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that sends more rows than it may ends with IMPORT_TOO_LONG; what was answered before is stored."""
    monkeypatch.setattr("latchgate.domain.importing.MAX_ROWS", 3)
    talk = Talk(acme.service.channel, acme.admin)
    assert ["CREATED"] * 3 == outcomes(await talk.send(*new_rows(3)))
    error = await refusal(talk.send(*new_rows(1)))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "IMPORT_TOO_LONG") == (error.code, error.reason)
    assert 3 == await key_count(acme)


async def test_request_that_breaks_a_rule(acme: Tenant) -> None:
    """A request without rows, with too many, or with an organization that can not be one is INVALID_FIELD; bytes that
    are no request are MALFORMED_REQUEST; a call without any request is fine.
    """
    error = await refusal(import_rows(acme.service, "", [], acme.admin))
    assert ("INVALID_FIELD", ["keys"]) == (error.reason, list(error.violations))
    many = [pb.ImportedKey(row=number) for number in range(1001)]
    error = await refusal(import_rows(acme.service, "", many, acme.admin))
    assert ("INVALID_FIELD", ["keys"]) == (error.reason, list(error.violations))
    error = await refusal(import_rows(acme.service, "NO ID", new_rows(1), acme.admin))
    assert ("INVALID_FIELD", ["organization_id"]) == (error.reason, list(error.violations))
    assert [] == await import_requests(acme.service, [], acme.admin)

    async def raw() -> AsyncIterator[bytes]:
        yield b"\xff"

    start: Any = acme.service.channel.stream_stream("/apikeys.v1.ImportService/ImportKeys")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(start(raw(), metadata=acme.admin)))
    assert "MALFORMED_REQUEST" == call_error(caught.value).reason


async def test_request_of_the_largest_size(acme: Tenant) -> None:
    """A thousand rows are taken in one request."""
    tenant = await make_tenant(acme.service, "large", await make_plan(acme.service, max_keys=1001))
    response = await import_rows(tenant.service, "", new_rows(1000, metadata={"a": "b" * 1000}), tenant.admin)
    assert {"CREATED"} == set(outcomes(response))
    assert 1000 == len({result.key_id for result in response.results})


async def test_call_is_one_line_without_secrets(acme: Tenant) -> None:
    """A call is one line of the log, with the number of its requests; neither tokens nor digests are in it, also where
    a digest is there already or a row is wrong.
    """
    token, wrong = foreign_token(), foreign_token()
    requests = [
        pb.ImportKeysRequest(keys=[row(1, token), row(2, wrong, digest=wrong.encode()[:32])]),
        pb.ImportKeysRequest(keys=[row(1, token)]),
        pb.ImportKeysRequest(organization_id="no-such-organization", keys=[row(1, token)]),
    ]
    with capture_logs() as lines:
        error = await refusal(import_requests(acme.service, requests, acme.admin))

    (line,) = lines
    assert ("ImportService/ImportKeys", "NOT_FOUND", "ORGANIZATION_NOT_FOUND", 3, acme.admin_key_id) == (
        line["method"],
        line["code"],
        line["reason"],
        line["requests"],
        line["caller"],
    )
    digest = sha256(token)
    for secret in (token, wrong, digest.hex(), base64.b64encode(digest).decode(), repr(digest)):
        assert secret not in repr(line) + repr(error)


async def test_call_that_is_given_up(acme: Tenant) -> None:
    """A call that its caller cancels keeps what was answered, and is logged as cancelled, not as a fault."""
    talk = Talk(acme.service.channel, acme.admin)
    await talk.send(*new_rows(2))
    with capture_logs() as lines:
        talk.call.cancel()
        await eventually(lambda: bool(lines))
    assert [("CANCELLED", "info")] == [(line["code"], line["log_level"]) for line in lines]
    assert 2 == await key_count(acme)


async def test_call_that_is_given_up_within_a_request(acme: Tenant) -> None:
    """Of a request that was under way when the caller gave up nothing is stored, if it could not be stored before."""
    talk = Talk(acme.service.channel, acme.admin)
    await talk.send(*new_rows(2))
    async with database_of(acme.service) as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM organization WHERE id = $1 FOR UPDATE", acme.id)

        async def is_left_alone() -> bool:
            return not await is_waited_for(connection)

        talk.tell(*new_rows(3))
        await eventually(partial(is_waited_for, connection))
        talk.call.cancel()
        await eventually(is_left_alone)
    assert 2 == await key_count(acme)
