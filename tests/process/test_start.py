"""A start that fails leaves nothing behind, and a service that can not go on ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from latchgate.app import Running, serving
from latchgate.config import Settings, as_variables
from latchgate.listening import Role
from latchgate.rpc.server import ListenError
from latchgate.storage.bootstrap import BootstrapError
from latchgate.workers import worker
from latchgate.workers.channel import Channel, Message
from support.databases import connected, until
from support.service import TAG_KEY, make_settings


def free_address() -> str:
    """An address of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def is_free(address: str) -> bool:
    """Whether nobody listens on an address."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


async def assert_nothing_left(database_url: str, *addresses: str) -> None:
    """Demands that no task runs, no port is open, and no session of the database is left."""
    assert {asyncio.current_task()} == {task for task in asyncio.all_tasks() if not task.done()}
    assert [True] * len(addresses) == [is_free(address) for address in addresses]
    async with connected(database_url) as connection:

        async def is_alone() -> bool:
            count: int = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            return count == 0

        await until(is_alone)


@pytest.mark.parametrize("taken", ["listen", "metrics_listen"])
async def test_port_in_use(database_url: str, taken: str) -> None:
    """When one of the ports can not be had, the other is free again, and so is all else."""
    addresses = {"listen": free_address(), "metrics_listen": free_address()}
    with socket.socket() as holder:
        host, _, port = addresses[taken].rpartition(":")
        holder.bind((host, int(port)))
        holder.listen()
        with pytest.raises(ListenError):
            async with serving(make_settings(database_url, **addresses)):
                pass
        await assert_nothing_left(database_url, *(address for name, address in addresses.items() if name != taken))


async def test_settings_that_do_not_fit(database_url: str) -> None:
    """When the database turns out to be one of another tag key, everything that was opened before is closed."""
    async with serving(make_settings(database_url)) as running:
        await running.ready
    addresses = {"listen": free_address(), "metrics_listen": free_address()}
    with pytest.raises(BootstrapError):
        async with serving(make_settings(database_url, tag_key=TAG_KEY[::-1], **addresses)) as running:
            await running.ready
    await assert_nothing_left(database_url, *addresses.values())


async def test_orderly_end(database_url: str) -> None:
    """A service that has served leaves nothing behind either."""
    addresses = {"listen": free_address(), "metrics_listen": free_address()}
    async with serving(make_settings(database_url, **addresses)) as running:
        await running.ready
        assert addresses == {"listen": running.listen, "metrics_listen": running.metrics_listen}
    await assert_nothing_left(database_url, *addresses.values())


@pytest.mark.usefixtures("undone")
async def test_worker_that_can_not_go_on(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When work that a worker can not do without has ended, it ends too, and tells its supervisor why in one line."""
    served: asyncio.Future[Running] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def seen(settings: Settings, role: Role) -> AsyncIterator[Running]:
        async with AsyncExitStack() as stack:
            served.set_result(await stack.enter_async_context(serving(settings, role)))
            yield await served

    monkeypatch.setattr("latchgate.app.serving", seen)
    for name, value in as_variables(make_settings(database_url), {}).items():
        monkeypatch.setenv(name, value)
    ours, theirs = socket.socketpair()
    supervisor = await Channel.open(ours)
    work = asyncio.create_task(worker.work(theirs, 1, "worker"))
    while (await told(supervisor))["is"] != "ready":
        pass
    await (await served).server.servers[-1].stop(None)
    while (message := await told(supervisor))["is"] != "failed":
        pass
    assert "gRPC server" in message["problem"]
    assert 1 == await asyncio.wait_for(work, 30)
    await supervisor.close()


async def told(channel: Channel) -> Message:
    """Waits for what a worker says next."""
    message = await asyncio.wait_for(channel.receive(), 30)
    assert message is not None
    return message
