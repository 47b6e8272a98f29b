"""Calls that are given up at any moment leave nothing behind."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, Final

import asyncpg
import grpc
import pytest
from google.protobuf.message import Message

from latchgate.domain import keyring
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.token import TokenFormat
from support.service import TAG_KEY, Metadata, RunningService, bearer, run_service
from support.transport import METHODS, call, call_raw, calls, eventually, fresh_database, good_request, sample

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS: Final = TokenFormat(TAG_KEY.encode())
MOMENTS: Final = 24
"""At how many moments, spread over the time that a call takes, calls are given up."""


def at_work() -> Counter[str]:
    """Counts the tasks that are there, by what they run."""
    return Counter(repr(task.get_coro()).partition(" at ")[0] for task in asyncio.all_tasks())


async def in_use(database_url: str) -> int:
    """Counts sessions that are within a transaction, or hold a lock that outlives one."""
    connection = await asyncpg.connect(database_url)
    try:
        count: int = await connection.fetchval(
            """
            SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'latchgate'
              AND state <> 'idle'
            """
        )
        return count
    finally:
        await connection.close()


async def assert_nothing_is_left(service: RunningService, before: Counter[str]) -> None:
    """Demands that all tasks, connections and transactions of calls are gone, and that everything works."""
    await eventually(lambda: 0 == sample(service, "latchgate_pool_connections", state="busy"))
    try:
        await eventually(lambda: at_work() <= before)
    except AssertionError:
        assert before == at_work()

    async def no_session_is_busy() -> bool:
        return 0 == await in_use(service.database_url)

    await eventually(no_session_is_busy)
    created = await service.create_key("acme")
    assert "VALID" == await service.outcome(created.token)
    connection = await asyncpg.connect(service.database_url)
    row = await connection.fetchrow(
        """
        SELECT o.key_count,
               (SELECT count(*) FROM key k WHERE k.organization_id = o.id AND k.revoke_time IS NULL) AS kept
        FROM organization o WHERE o.id = 'acme'
        """
    )
    await connection.close()
    assert row is not None
    assert row["kept"] == row["key_count"]


async def given_up(started: Any, after_s: float = 0.0) -> grpc.StatusCode:
    """Gives up a call after some time, in which the event loop that client and server share goes on turning."""
    end_s = time.perf_counter() + after_s
    while time.perf_counter() < end_s:  # noqa: ASYNC110 - the turns are the point
        await asyncio.sleep(0)
    started.cancel()
    try:
        await started
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def new_token() -> str:
    """Makes a token that only the database can tell to be none: a call with it has something to wait for."""
    return TOKENS.mint(KeyType.SECRET, Environment.LIVE).token


async def moments(
    service: RunningService, method: str, request: Message, metadata: Metadata | None = None
) -> list[float]:
    """Measures a call from its start to its end, and spreads moments over that time and some more."""
    start_s = time.perf_counter()
    await call(service, method, request, metadata=metadata)
    lasted_s = time.perf_counter() - start_s
    return [1.5 * lasted_s * index / MOMENTS for index in range(MOMENTS)]


@pytest.mark.parametrize("method", METHODS)
async def test_cancelled_at_any_moment(
    shared_service: RunningService, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that its caller gives up, at whatever moment, leaves no task, no connection and no transaction; what it
    was about is done or not done, and everything works.
    """
    # From memory it would be answered before it can be given up.
    monkeypatch.setattr(keyring, "PUBLISHED_KEPT_S", 0.0)
    await shared_service.create_key("acme", key_type=2)
    keys = [(await shared_service.create_key("acme")).key for _ in range(4)]
    caller = shared_service.root
    if method == "ExchangeKey":
        caller = bearer((await shared_service.create_key("acme")).token)
    before = at_work()

    codes = set()
    # On a busy machine calls may be given up before they arrive; then their times are measured anew.
    while not calls(shared_service, method, "CANCELLED"):
        first = good_request(method, key_id=keys[0].id, token=new_token())
        for index, moment_s in enumerate(await moments(shared_service, method, first, caller)):
            raw = good_request(method, key_id=keys[index % 4].id, token=new_token()).SerializeToString()
            started = call_raw(shared_service.channel, method, raw, metadata=caller)
            codes.add(await given_up(started, moment_s))

    assert grpc.StatusCode.CANCELLED in codes
    assert codes <= {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.OK,
        # Of the keys that the calls before have ended.
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    await assert_nothing_is_left(shared_service, before)


async def test_cancelled_together(shared_service: RunningService) -> None:
    """Many calls that are given up at once, while they wait for one another's locks and for connections, leave nothing
    behind either; and those that are not given up are answered.
    """
    key = (await shared_service.create_key("acme")).key
    before = at_work()

    for moment_s in await moments(shared_service, "CreateKey", good_request("CreateKey", key_id="")):
        kept: list[Any] = []
        dropped: list[Any] = []
        for number in range(20):
            method = ("UpdateKey", "CreateKey", "Validate", "BatchValidate")[number % 4]
            raw = good_request(method, key_id=key.id, token=new_token()).SerializeToString()
            started = call_raw(shared_service.channel, method, raw, metadata=shared_service.root)
            (kept if number % 5 == 0 else dropped).append(started)
        await asyncio.gather(*(given_up(started, moment_s) for started in dropped))
        await asyncio.gather(*kept)

    await assert_nothing_is_left(shared_service, before)


async def test_channel_that_goes_away(shared_service: RunningService) -> None:
    """A client that vanishes with calls under way leaves nothing behind."""
    key = (await shared_service.create_key("acme")).key
    before = at_work()

    for moment_s in (await moments(shared_service, "CreateKey", good_request("CreateKey", key_id="")))[::3]:
        channel = grpc.aio.insecure_channel(shared_service.address, options=[("grpc.use_local_subchannel_pool", 1)])
        await channel.channel_ready()
        started = [
            call_raw(
                channel,
                method,
                good_request(method, key_id=key.id, token=new_token()).SerializeToString(),
                metadata=shared_service.root,
            )
            for method in ("UpdateKey", "CreateKey", "Validate", "BatchValidate", "ListKeys") * 4
        ]
        await asyncio.gather(given_up(started.pop(), moment_s))
        await channel.close()
        await asyncio.gather(*(given_up(each) for each in started))

    await assert_nothing_is_left(shared_service, before)


async def test_deadline_while_waiting_for_a_lock(shared_service: RunningService) -> None:
    """A call whose deadline comes while another session holds its key's lock ends as DEADLINE_EXCEEDED, is counted as
    such for the alert on errors, and gives its connection back.
    """
    key = (await shared_service.create_key("acme")).key
    before, late = at_work(), calls(shared_service, "UpdateKey", "DEADLINE_EXCEEDED")
    connection = await asyncpg.connect(shared_service.database_url)
    async with connection.transaction():
        await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
        raw = good_request("UpdateKey", key_id=key.id).SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_raw(shared_service.channel, "UpdateKey", raw, metadata=shared_service.root, timeout_s=0.1)
    await connection.close()

    assert grpc.StatusCode.DEADLINE_EXCEEDED == caught.value.code()
    await eventually(lambda: late + 1 == calls(shared_service, "UpdateKey", "DEADLINE_EXCEEDED"))
    await assert_nothing_is_left(shared_service, before)


async def test_cancelled_while_waiting_for_a_lock(shared_service: RunningService) -> None:
    """A call that its caller gives up is counted as CANCELLED, which is nobody's fault, with a deadline far off too."""
    key = (await shared_service.create_key("acme")).key
    before, cancelled = at_work(), calls(shared_service, "UpdateKey", "CANCELLED")
    connection = await asyncpg.connect(shared_service.database_url)
    async with connection.transaction():
        await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
        raw = good_request("UpdateKey", key_id=key.id).SerializeToString()
        started = call_raw(shared_service.channel, "UpdateKey", raw, metadata=shared_service.root, timeout_s=60.0)
        await eventually(lambda: 1 == sample(shared_service, "latchgate_pool_connections", state="busy"))
        started.cancel()
        await eventually(lambda: cancelled + 1 == calls(shared_service, "UpdateKey", "CANCELLED"))
    await connection.close()

    await assert_nothing_is_left(shared_service, before)
    assert "a key" == (await shared_service.get_key(key.id)).name


async def test_retry_after_a_cancelled_create(shared_service: RunningService) -> None:
    """A caller that gave up CreateKey, at any moment, and calls again with the same request_id gets one key in all."""
    service, organization_id = shared_service, await shared_service.create_organization("retrying")
    requests = [good_request("CreateKey", key_id="", organization_id=organization_id)]
    for moment_s in await moments(service, "CreateKey", requests[0]):
        requests.append(good_request("CreateKey", key_id="", organization_id=organization_id))
        started = call_raw(service.channel, "CreateKey", requests[-1].SerializeToString(), metadata=service.root)
        await given_up(started, moment_s)

    created = [await call(service, "CreateKey", request) for request in requests]

    outcomes = [await service.outcome(each.token, client_ip="192.0.2.7") for each in created]
    assert ["VALID"] * len(requests) == outcomes
    listed = await call(service, "ListKeys", good_request("ListKeys", key_id="", organization_id=organization_id))
    assert sorted(each.key.id for each in created) == sorted(key.id for key in listed.keys)


async def test_stop_with_calls_under_way(postgres_url: str, template_url: str) -> None:
    """Stopping answers the calls that are under way; those that were not looked at yet are turned away, and those that
    come later are told that the service is not there.
    """
    async with fresh_database(postgres_url, template_url) as url, run_service(url) as service:
        await service.create_organization("acme")
        raw = [good_request("CreateKey", key_id="").SerializeToString() for _ in range(20)]
        started = [call_raw(service.channel, "CreateKey", each, metadata=service.root) for each in raw]
        await eventually(lambda: sample(service, "latchgate_pool_connections", state="busy") > 0)

        await service.running.server.stop(10.0)

        ended = await asyncio.gather(*started, return_exceptions=True)
        assert any(isinstance(each, bytes) for each in ended)
        codes = {each.code() for each in ended if isinstance(each, grpc.aio.AioRpcError)}
        # grpc cancels what has arrived and was not handed to Python yet.
        assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_raw(service.channel, "ListPlans", b"", metadata=service.root, timeout_s=5.0)
        assert grpc.StatusCode.UNAVAILABLE == caught.value.code()
