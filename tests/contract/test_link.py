"""A connection outside the pools: made when it is needed, cut when anything fails on it, and made anew."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage.link import Link
from latchgate.storage.postgres import Connection
from support.databases import connected, fault_proxy, linked, run_cancelled, until

TIMEOUT_S = 0.5


async def session(link: Link) -> int:
    """Uses the connection, and gives the number of its session."""
    async with link.connection() as connection:
        number: int = await connection.fetchval("SELECT pg_backend_pid()")
    return number


async def sessions(observer: Connection) -> int:
    """How many sessions of the service there are."""
    count: int = await observer.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'latchgate'"
    )
    return count


async def until_no_session(observer: Connection) -> None:
    """Waits until the server has found out that all connections were cut."""

    async def is_alone() -> bool:
        return await sessions(observer) == 0

    await until(is_alone)


async def test_one_connection_is_used_again_and_again(database_url: str, observer: Connection) -> None:
    """A link connects when it is first used and not before, keeps to one session, and ends it when it is cut; it can be
    used again after that.
    """
    async with linked(database_url) as link:
        assert 0 == await sessions(observer)
        first = await session(link)
        assert {first} == {await session(link) for _ in range(3)}
        assert 1 == await sessions(observer)
        link.cut()
        link.cut()
        await until_no_session(observer)
        assert first != await session(link)
    await until_no_session(observer)


async def test_session_has_the_settings_of_all_and_its_own(database_url: str) -> None:
    """A link's session is set as those of the pools are, but for what was asked for."""
    link = Link(database_url, timeout_s=TIMEOUT_S, settings={"statement_timeout": "123ms"})
    async with link.connection() as connection:
        names = ("application_name", "statement_timeout", "idle_in_transaction_session_timeout", "TimeZone", "jit")
        settings = [await connection.fetchval(f"SHOW {name}") for name in names]
        assert {"a": 1} == await connection.fetchval("SELECT '{\"a\": 1}'::jsonb")
    link.cut()
    assert ["latchgate", "123ms", "5s", "UTC", "off"] == settings


@pytest.mark.parametrize(
    "statement", ["SELECT 1 / 0", "SELECT nothing FROM nowhere", "DO $$ BEGIN RAISE 'secret'; END $$"]
)
async def test_whatever_fails_is_unavailable(database_url: str, observer: Connection, statement: str) -> None:
    """Any error of a statement is StorageUnavailableError that tells its class and not its text, and its connection is
    not used again: what state it is in is not known.
    """
    async with linked(database_url) as link:
        before = await session(link)
        with pytest.raises(StorageUnavailableError) as caught:
            async with link.connection() as connection:
                await connection.execute(statement)
        assert (None, True) == (caught.value.__cause__, caught.value.__suppress_context__)
        for told in ("secret", "nowhere", "division"):
            assert told not in caught.value.message
        await until_no_session(observer)
        assert before != await session(link)


async def test_fault_of_who_uses_it_is_raised(database_url: str, observer: Connection) -> None:
    """What its user raises is raised as it is, and the connection is cut: a statement may be half done."""
    async with linked(database_url) as link:
        with pytest.raises(KeyError):
            async with link.connection():
                raise KeyError("x")
        await until_no_session(observer)


@pytest.mark.parametrize(
    "address", ["postgresql://postgres@127.0.0.1:1/none", "postgresql://postgres@host.invalid/none"]
)
async def test_server_that_is_not_there(address: str) -> None:
    """Where nothing listens, each use is StorageUnavailableError, which names no host."""
    async with linked(address) as link:
        for _ in range(2):
            with pytest.raises(StorageUnavailableError) as caught:
                await session(link)
            assert not {"host", "127"} & set(caught.value.message.replace(".", " ").split())


async def test_silence_ends_after_the_time_limit(database_url: str) -> None:
    """With a network that is gone, neither a statement nor connecting takes longer than the link's own limit; when the
    network is back, so is the link.
    """
    async with fault_proxy(database_url) as proxy, linked(proxy.url, TIMEOUT_S) as link:
        await session(link)
        proxy.freeze()
        for _ in range(2):
            start_s = time.monotonic()
            with pytest.raises(StorageUnavailableError):
                await session(link)
            assert TIMEOUT_S * 0.9 < time.monotonic() - start_s < TIMEOUT_S * 2
        proxy.thaw()
        await session(link)


async def test_lost_connection_is_replaced(database_url: str) -> None:
    """A connection that was cut while nobody used it is replaced once that is known."""
    async with fault_proxy(database_url) as proxy, linked(proxy.url) as link:
        before = await session(link)
        async with link.connection() as connection:
            held = connection
        proxy.cut()

        async def is_known() -> bool:
            return held.is_closed()

        await until(is_known)
        assert before != await session(link)


async def test_cancelled_use_leaves_nothing_behind(database_url: str) -> None:
    """Wherever its user is cancelled, the link works afterwards, and no session is left that still does something."""
    async with linked(database_url) as link, connected(database_url) as onlooker:
        for number in itertools.count(1):
            waits = await run_cancelled(session(link), number)
            assert await asyncio.wait_for(session(link), 10)
            assert await sessions(onlooker) >= 1

            async def is_one() -> bool:
                return await sessions(onlooker) == 1

            await until(is_one)
            link.cut()
            await until_no_session(onlooker)
            if waits is not None:
                break
        assert number > 2
