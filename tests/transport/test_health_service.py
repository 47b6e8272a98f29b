"""grpc.health.v1: what is said of the service, whoever asks and however slowly they listen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from latchgate.observability import Metrics
from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import RpcServer, make_server
from support.service import RunningService, refusal
from support.transport import DEADLINE_S, Http2

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
NAMES: Final = (
    "",
    "apikeys.v1.KeyService",
    "apikeys.v1.AuditService",
    "apikeys.v1.ImportService",
    "apikeys.v1.OrganizationService",
    "apikeys.v1.UsageService",
    "apikeys.v1.WebhookService",
    "apikeys.v1.TokenService",
    "envoy.service.auth.v3.Authorization",
)
WATCH: Final = "/grpc.health.v1.Health/Watch"


@asynccontextmanager
async def health_server() -> AsyncIterator[tuple[RpcServer, Any]]:
    """Runs the real server, which needs no database for this, with a stub for its health."""
    server = make_server(pipeline=Pipeline(Metrics(CollectorRegistry()), is_validate_open=True), connection_age_s=60)
    await server.listen("127.0.0.1:0", None)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(0)


async def check(stub: Any, name: str) -> int:
    """Asks once."""
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
    status: int = answer.status
    return status


def watch(stub: Any, name: str = "") -> Any:
    """Begins to watch."""
    return stub.Watch(health_pb2.HealthCheckRequest(service=name))


async def told(watched: Any) -> int | None:
    """Waits for what a watcher is told next; None at the end."""
    async with asyncio.timeout(DEADLINE_S):
        answer = await watched.read()
    return None if answer is grpc.aio.EOF else answer.status


async def test_running_service_is_serving(service: RunningService) -> None:
    """Once the service has its database, it is SERVING as a whole and by the name of each of its services."""
    stub = health_pb2_grpc.HealthStub(service.channel)
    assert [SERVING] * len(NAMES) == [await check(stub, name) for name in NAMES]


async def test_not_serving_until_told() -> None:
    """Before it has its database, the service is NOT_SERVING; then it is what it was told to be last."""
    async with health_server() as (server, stub):
        assert [NOT_SERVING] * len(NAMES) == [await check(stub, name) for name in NAMES]
        await server.set_serving(is_serving=True)
        assert [SERVING] * len(NAMES) == [await check(stub, name) for name in NAMES]
        await server.set_serving(is_serving=False)
        assert [NOT_SERVING] * len(NAMES) == [await check(stub, name) for name in NAMES]


async def test_list_shows_all_services() -> None:
    """List answers for the server and each of its services at once."""
    messages: Any = health_pb2  # the published types do not have those of List
    async with health_server() as (server, stub):
        for is_serving, expected in ((False, NOT_SERVING), (True, SERVING)):
            await server.set_serving(is_serving=is_serving)
            listed = await stub.List(messages.HealthListRequest(), timeout=DEADLINE_S)
            assert dict.fromkeys(NAMES, expected) == {name: each.status for name, each in listed.statuses.items()}


@pytest.mark.parametrize("name", ["apikeys.v1.Nothing", "apikeys.v1.KeyService ", "\0", "KeyService", "a" * 10_000])
async def test_unknown_service_is_not_found(name: str) -> None:
    """A service that is not served here is NOT_FOUND to Check; Watch says so and goes on, as the protocol has it."""
    async with health_server() as (_, stub):
        refused = await refusal(stub.Check(health_pb2.HealthCheckRequest(service=name)))
        assert grpc.StatusCode.NOT_FOUND == refused.code
        watched = watch(stub, name)
        assert UNKNOWN == await told(watched)
        watched.cancel()


@pytest.mark.parametrize("name", NAMES)
async def test_watcher_is_told_of_each_change(name: str) -> None:
    """Who watches is told at once what holds, and then of each change; to be told the same again is no change."""
    async with health_server() as (server, stub):
        watched = watch(stub, name)
        assert NOT_SERVING == await told(watched)
        for is_serving, expected in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
            for _ in range(3):
                await server.set_serving(is_serving=is_serving)
            assert expected == await told(watched)


async def test_stop_says_so_and_ends_watches() -> None:
    """A server that stops tells watchers NOT_SERVING and ends their streams: they do not hold it up for the whole
    grace.
    """
    async with health_server() as (server, stub):
        await server.set_serving(is_serving=True)
        watched = [watch(stub, name) for name in (*NAMES, "apikeys.v1.Nothing")]
        assert [*[SERVING] * len(NAMES), UNKNOWN] == [await told(each) for each in watched]

        # Far beyond what a test may last: it can only pass if the watches end by themselves.
        async with asyncio.timeout(DEADLINE_S):
            await server.stop(600.0)

        assert [*[NOT_SERVING] * len(NAMES), None] == [await told(each) for each in watched]
        assert [None, None, None] == [await told(each) for each in watched[:3]]
        assert grpc.StatusCode.UNAVAILABLE == (await refusal(stub.Check(health_pb2.HealthCheckRequest()))).code


async def test_stopping_is_for_good() -> None:
    """Once a server has begun to stop, nothing makes it SERVING again, not even a database that comes back."""
    async with health_server() as (server, stub):
        await server.set_serving(is_serving=True)
        server.health.stop()
        await server.set_serving(is_serving=True)
        assert NOT_SERVING == await check(stub, "")


async def test_watcher_that_does_not_read_holds_up_nobody() -> None:
    """A client that watches and takes no answer keeps neither others from being told nor the server from stopping."""
    async with (
        health_server() as (server, stub),
        Http2.connected(server.port, {Http2.INITIAL_WINDOW_SIZE: 0}) as stalled,
    ):
        stream = await stalled.start_call(WATCH)
        # The headers of the answer are the last that it takes: from here on the answer itself waits for room.
        await stalled.frame(Http2.HEADERS, stream)
        watched = watch(stub)
        assert NOT_SERVING == await told(watched)

        async with asyncio.timeout(DEADLINE_S):
            await server.set_serving(is_serving=True)
            assert SERVING == await told(watched)
            assert SERVING == await check(stub, "")
            await server.stop(0.1)
