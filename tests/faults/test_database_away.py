"""The database goes away, and comes back: what is answered meanwhile, and that everything is as before after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from latchgate.app import Running, serving
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.token import TokenFormat
from latchgate.storage.embedded import EmbeddedPostgres
from latchgate.storage.lookups import STATEMENT_TIMEOUT_S
from support.databases import connected, until, until_waiting
from support.faults import NOT_SERVING, SERVING, FaultyWire, health_changes
from support.folders import quick_folder
from support.service import ROOT_TOKEN, TAG_KEY, CallError, RunningService, bearer, make_settings, refusal, run_service

POOL_SIZE = 4
MORE_THAN_THE_POOL = POOL_SIZE + 5
# Far less than any of the service's own time limits towards the database: who is refused is refused at once.
AT_ONCE_S = 0.9
# More than all of them together: nobody waits for ever.
BOUND_S = 15.0
# The two seconds in which health is to know, and some for a machine that is busy.
HEALTH_S = 6.0
INVENTED = "lk_" + "0" * 40
LEASE_S = 1.0


def create(service: RunningService, timeout: float | None = None) -> Any:
    """Asks for a key."""
    return service.keys.CreateKey(
        keys_pb.CreateKeyRequest(organization_id="acme", name="a key", permissions=["read"]),
        metadata=service.root,
        timeout=timeout,
    )


def validate(service: RunningService, token: str, timeout: float | None = None) -> Any:
    """Asks about a token."""
    return service.keys.Validate(keys_pb.ValidateRequest(token=token), timeout=timeout)


def unheard_of() -> str:
    """Makes a token that only the database can tell to be none."""
    return TokenFormat(TAG_KEY.encode()).mint(KeyType.SECRET, Environment.LIVE).token


def assert_unavailable(errors: Sequence[CallError]) -> None:
    """Demands that calls were refused for the database's sake, and that they say so to programs."""
    expected = [(grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")] * len(errors)
    assert expected == [(error.code, error.reason) for error in errors]


async def assert_recovered(service: RunningService, token: str) -> None:
    """Demands that, once the service has found its database again, more calls than the pool has connections succeed."""

    async def is_back() -> bool:
        try:
            return "NOT_FOUND" == await service.outcome(unheard_of())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise

    await until(is_back)
    created = await asyncio.gather(*(create(service, BOUND_S) for _ in range(MORE_THAN_THE_POOL)))
    outcomes = await asyncio.gather(*(service.outcome(each.token) for each in created), service.outcome(token))
    assert {"VALID"} == set(outcomes)
    assert 0.0 == busy_connections(service.running)


def busy_connections(running: Running) -> float | None:
    """Reads from the metrics how many connections for management are at work."""
    return running.metrics.registry.get_sample_value("latchgate_pool_connections", {"state": "busy"})


async def test_start_without_database(wire: FaultyWire, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose database is away listens, says so at once to everyone who asks, and serves when it comes."""
    monkeypatch.setattr("latchgate.app.START_RETRY_S", 0.05)
    wire.refuse()
    async with (
        serving(make_settings(wire.url(database_url))) as running,
        grpc.aio.insecure_channel(running.listen) as channel,
        health_changes(running.listen) as health,
    ):
        stub: Any = KeyServiceStub(channel)
        assert NOT_SERVING == await health.get()
        listing = keys_pb.ListKeysRequest(organization_id="acme")
        assert_unavailable(
            [
                await refusal(stub.Validate(keys_pb.ValidateRequest(token=INVENTED), timeout=AT_ONCE_S)),
                await refusal(stub.ListKeys(listing, metadata=bearer(ROOT_TOKEN), timeout=AT_ONCE_S)),
            ]
        )

        await wire.listen()
        await asyncio.wait_for(running.ready, BOUND_S)

        assert SERVING == await health.get()
        answer = await stub.Validate(keys_pb.ValidateRequest(token=ROOT_TOKEN))
        assert keys_pb.OUTCOME_VALID == answer.outcome


async def test_start_with_black_hole(wire: FaultyWire, database_url: str) -> None:
    """A service whose database swallows everything listens and answers, and can be stopped before it ever serves."""
    wire.swallow()
    async with (
        serving(make_settings(wire.url(database_url))) as running,
        grpc.aio.insecure_channel(running.listen) as channel,
    ):
        stub: Any = KeyServiceStub(channel)
        call = stub.Validate(keys_pb.ValidateRequest(token=INVENTED), timeout=AT_ONCE_S)
        assert_unavailable([await refusal(call)])
        assert not running.ready.done()
    assert running.ready.cancelled()


async def test_away_and_back_again(wired: RunningService, wire: FaultyWire) -> None:
    """While the database is away each call that needs it is UNAVAILABLE at once; a token that is in memory is answered
    for as long as the lease lasts. When it is back all are answered, time and again.
    """
    known = (await wired.create_key()).token
    assert "VALID" == await wired.outcome(known)
    for _ in range(3):
        token = (await wired.create_key()).token
        wire.refuse()
        assert "VALID" == await wired.outcome(known)
        calls = [create(wired, AT_ONCE_S) for _ in range(MORE_THAN_THE_POOL)]
        calls += [validate(wired, token, AT_ONCE_S) for _ in range(MORE_THAN_THE_POOL)]
        assert_unavailable(await asyncio.gather(*(refusal(call) for call in calls)))

        await wire.listen()
        await assert_recovered(wired, token)


async def test_memory_ends_with_the_lease(wire: FaultyWire, database_url: str) -> None:
    """A worker that is cut off from the database stops answering from memory when its lease ends: a key that may have
    been revoked elsewhere is UNAVAILABLE, whether the database refuses or is silent. It is answered again afterwards.
    """
    async with run_service(wire.url(database_url), lease_seconds=LEASE_S) as service:
        await service.create_organization("acme")
        token = (await service.create_key()).token

        async def is_over() -> bool:
            try:
                assert "VALID" == await service.outcome(token)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return True
                raise
            return False

        for fail in (wire.refuse, wire.swallow):
            assert "VALID" == await service.outcome(token)
            fail()
            cut_s = time.monotonic()
            assert "VALID" == await service.outcome(token)
            await until(is_over)
            # The last renewal was sent before the cut; the first refusal may be that of a lookup that timed out.
            assert time.monotonic() - cut_s < LEASE_S + STATEMENT_TIMEOUT_S + 0.5
            assert_unavailable([await refusal(validate(service, token, BOUND_S))])
            wire.flow()
            await wire.listen()
            await assert_recovered(service, token)


async def test_connections_cut_under_load(wired: RunningService, wire: FaultyWire) -> None:
    """Of calls under way when all connections are cut, each is answered or UNAVAILABLE; none that comes after is."""
    token = (await wired.create_key()).token
    wire.delay_s = 0.002
    for _ in range(2):
        calls = [create(wired, BOUND_S) for _ in range(MORE_THAN_THE_POOL)]
        calls += [validate(wired, token, BOUND_S) for _ in range(MORE_THAN_THE_POOL)]
        # Some have been answered then, some are under way, and some wait for a connection.
        await calls[0]
        wire.cut()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        codes = {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
        assert codes <= {grpc.StatusCode.UNAVAILABLE}
    wire.delay_s = 0.0

    await assert_recovered(wired, token)


async def test_black_hole(wired: RunningService, wire: FaultyWire) -> None:
    """With a database that swallows everything each call is UNAVAILABLE within a bound; after it all are answered."""
    token = (await wired.create_key()).token
    await asyncio.gather(*(create(wired) for _ in range(MORE_THAN_THE_POOL)))

    wire.swallow()
    calls = [create(wired, BOUND_S) for _ in range(MORE_THAN_THE_POOL)]
    calls += [validate(wired, token, BOUND_S) for _ in range(MORE_THAN_THE_POOL)]
    assert_unavailable(await asyncio.gather(*(refusal(call) for call in calls)))

    wire.flow()
    await assert_recovered(wired, token)


async def test_deadline_in_black_hole(wired: RunningService, wire: FaultyWire, database_url: str) -> None:
    """A caller's deadline that comes before the database answers ends the call, and what it began with it."""
    token = (await wired.create_key()).token
    wire.swallow()
    calls = [create(wired, 0.2), validate(wired, token, 0.2)]
    codes = [error.code for error in await asyncio.gather(*(refusal(call) for call in calls))]
    assert [grpc.StatusCode.DEADLINE_EXCEEDED] * 2 == codes

    wire.flow()
    await assert_recovered(wired, token)
    async with connected(database_url) as connection:
        # The first, and those of assert_recovered.
        assert 1 + MORE_THAN_THE_POOL == await connection.fetchval(
            "SELECT count(*) FROM key WHERE organization_id = 'acme'"
        )


async def test_deadline_within_transaction(wired: RunningService, database_url: str) -> None:
    """A change whose caller's deadline comes while it is under way is undone, and holds no lock and no connection."""
    async with connected(database_url) as connection:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
            call = asyncio.ensure_future(refusal(create(wired, 0.5)))
            await until_waiting(connection)
            assert grpc.StatusCode.DEADLINE_EXCEEDED == (await call).code

        async def is_clean() -> bool:
            open_sessions = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
                " AND pid <> pg_backend_pid()"
            )
            return open_sessions == 0 and busy_connections(wired.running) == 0

        await until(is_clean)
        assert 0 == await connection.fetchval("SELECT count(*) FROM key WHERE organization_id = 'acme'")


async def test_all_backends_terminated(wired: RunningService, database_url: str) -> None:
    """When the server ends all sessions, calls fail at most until the service has heard of it."""
    token = (await wired.create_key()).token
    async with connected(database_url) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async def is_back() -> bool:
        try:
            await asyncio.gather(validate(wired, token, BOUND_S), create(wired, BOUND_S))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True

    await until(is_back)
    await assert_recovered(wired, token)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder for a PostgreSQL of the test's own, where the user that it runs as can reach it."""
    with quick_folder("latchgate-faults-") as made:
        yield made


async def test_server_restarted(data_dir: Path) -> None:
    """PostgreSQL may be stopped and started under a running service: it says so, and goes on by itself."""
    server = await asyncio.to_thread(EmbeddedPostgres.start, data_dir)
    try:
        async with run_service(await server.create_database(), pool_size=POOL_SIZE) as service:
            await service.create_organization("acme")
            token = (await service.create_key()).token

            await asyncio.to_thread(server.stop)
            assert_unavailable([await refusal(validate(service, token, BOUND_S))])
            assert_unavailable([await refusal(create(service, BOUND_S))])

            server = await asyncio.to_thread(EmbeddedPostgres.start, data_dir)
            await assert_recovered(service, token)
    finally:
        await asyncio.to_thread(server.stop)


async def test_invented_tokens_while_away(wired: RunningService, wire: FaultyWire) -> None:
    """A flood of tokens with wrong tags is told NOT_FOUND while the database is away, and does not even ask for it."""
    wire.refuse()
    await wire.listen()
    wire.swallow()
    asked = lookups(wired)
    tokens = [f"lk_{number:040}" for number in range(300)]

    outcomes = await asyncio.gather(*(wired.outcome(token) for token in tokens))

    assert {"NOT_FOUND"} == set(outcomes)
    assert asked == lookups(wired)
    wire.flow()


def lookups(service: RunningService) -> list[float | None]:
    """Reads from the metrics how many digests the database was asked for, with and without an answer."""
    registry = service.running.metrics.registry
    return [
        registry.get_sample_value("latchgate_lookups_total", {"result": result}) for result in ("answered", "error")
    ]


async def test_health_follows_database(wire: FaultyWire, database_url: str) -> None:
    """Health and the metric say within about two seconds that the database is away or silent, and that it is back: the
    metric at once, health as soon as there is no lease any more to answer by.
    """
    async with (
        run_service(wire.url(database_url), lease_seconds=LEASE_S) as service,
        health_changes(service.address) as health,
    ):
        assert SERVING == await health.get()
        for is_silent in (False, True):
            if is_silent:
                wire.swallow()
            else:
                wire.refuse()
            assert NOT_SERVING == await asyncio.wait_for(health.get(), HEALTH_S)
            assert 0.0 == database_up(service)

            wire.flow()
            await wire.listen()
            assert SERVING == await asyncio.wait_for(health.get(), HEALTH_S)
            assert 1.0 == database_up(service)


async def test_health_while_the_lease_lasts(wired: RunningService, wire: FaultyWire) -> None:
    """While a worker may answer from memory it is healthy, though its database is away, which the metric tells."""
    known = (await wired.create_key()).token
    assert "VALID" == await wired.outcome(known)
    async with health_changes(wired.address) as health:
        assert SERVING == await health.get()
        wire.refuse()

        async def is_known() -> bool:
            return 0.0 == database_up(wired)

        await until(is_known)
        left_s = wired.running.metrics.registry.get_sample_value("latchgate_lease_left_seconds")
        assert left_s
        assert health.empty()
        assert "VALID" == await wired.outcome(known)


def database_up(service: RunningService) -> float | None:
    """Reads from the metrics whether the database is there."""
    return service.running.metrics.registry.get_sample_value("latchgate_database_up")
