"""Whether the database can be used, as the health service asks it."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import pytest

from latchgate.storage.postgres import Connection
from latchgate.storage.probe import DatabaseProbe
from support.databases import connected, fault_proxy

TIMEOUT_S = 0.2


async def _sessions(observer: Connection) -> int:
    count: int = await observer.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return count


async def test_database_that_answers_can_be_used(database_url: str) -> None:
    """A database that answers can be used; all questions go over one connection, which closing ends."""
    async with connected(database_url) as observer:
        probe = DatabaseProbe(database_url, 2.0)
        assert [True] * 3 == [await probe.is_writable() for _ in range(3)]
        assert 1 == await _sessions(observer)
        await probe.close()
        await probe.close()
        assert await probe.is_writable(), "a probe that was closed connects anew"
        await probe.close()


async def test_database_that_is_away_can_not_be_used_and_later_can(database_url: str) -> None:
    """A database that is cut off can not be used from the next question on, and can be once it is back."""
    async with fault_proxy(database_url) as proxy:
        probe = DatabaseProbe(proxy.url, 2.0)
        seen = [await probe.is_writable()]
        proxy.refuse()
        seen += [await probe.is_writable(), await probe.is_writable()]
        proxy.accept()
        seen += [await probe.is_writable()]
        await probe.close()

    assert [True, False, False, True] == seen


async def test_database_that_is_silent_can_not_be_used(database_url: str) -> None:
    """A database that does not answer in time can not be used, whether it was connected before or not."""
    async with fault_proxy(database_url) as proxy:
        probe = DatabaseProbe(proxy.url, TIMEOUT_S)
        seen = [await probe.is_writable()]
        proxy.freeze()
        seen += [await probe.is_writable(), await probe.is_writable()]
        proxy.thaw()
        seen += [await probe.is_writable()]
        await probe.close()

    assert [True, False, False, True] == seen


async def test_session_that_was_ended_is_replaced(database_url: str) -> None:
    """A session that the server has ended does not make a good database look bad for longer than one question."""
    async with connected(database_url) as observer:
        probe = DatabaseProbe(database_url, 2.0)
        assert await probe.is_writable()
        await observer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await probe.is_writable()
        assert await probe.is_writable()
        await probe.close()


@pytest.mark.parametrize("name", ["no_such_database", "template0"])
async def test_database_that_refuses_can_not_be_used(postgres_url: str, name: str) -> None:
    """A database that is missing, or takes no connections for whatever reason, can not be used; that is no failure of
    the question.
    """
    probe = DatabaseProbe(urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}")), 2.0)

    assert not await probe.is_writable()
