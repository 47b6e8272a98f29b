"""What all tests stand on: one real PostgreSQL for the session, one database and one service for each test."""

from __future__ import annotations

import asyncio
import gc
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from latchgate.storage.embedded import EmbeddedPostgres
from latchgate.storage.migrate import migrate
from support.folders import cloning, quick_folder
from support.service import RunningService, run_service

TEMPLATE = "latchgate_template"
# Whole files go to processes, in this order: with long ones at the end one process would work for all.
ORDER = ("process", "bench", "contract", "transport", "gateway", "rpc", "simulation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the folders whose files take the longest; folders that ORDER does not name come last."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(ORDER)}
    items.sort(key=lambda item: ranks.get(item.path.parent, len(ranks)))


def pytest_collection_finish() -> None:
    """Has garbage not be looked for among what was imported, where it never is: some tests look for it again and
    again.
    """
    gc.collect()
    gc.freeze()


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The address of a server where tests may make databases: LATCHGATE_TEST_DATABASE_URL, or one started for them."""
    given = os.environ.get("LATCHGATE_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with quick_folder("latchgate-tests-") as folder:
        server = EmbeddedPostgres.start(folder)
        try:
            url = asyncio.run(server.create_database())
            # What is lost in a crash is not needed again.
            settings = ("fsync = off", "synchronous_commit = off", "full_page_writes = off", "max_wal_size = '1GB'")
            statements = [f"ALTER SYSTEM SET {setting}" for setting in settings]
            asyncio.run(_execute(url, *statements, "SELECT pg_reload_conf()"))
            yield url
        finally:
            server.stop()


@pytest.fixture(scope="session")
def template_url(postgres_url: str) -> str:
    """A migrated database of which each test gets a copy."""
    asyncio.run(_execute(postgres_url, f"DROP DATABASE IF EXISTS {TEMPLATE}", f"CREATE DATABASE {TEMPLATE}"))
    url = _with_database(postgres_url, TEMPLATE)
    asyncio.run(migrate(url))
    return url


@pytest.fixture
async def empty_database_url(postgres_url: str) -> AsyncIterator[str]:
    """A database of the test's own with nothing in it."""
    name = f"test_{uuid.uuid4().hex}"
    await _execute(postgres_url, f"CREATE DATABASE {name}")
    yield _with_database(postgres_url, name)
    await _execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database_url(postgres_url: str, template_url: str) -> AsyncIterator[str]:
    """A migrated database of the test's own."""
    name = f"test_{uuid.uuid4().hex}"
    await _execute(postgres_url, cloning(name, template_url))
    yield _with_database(postgres_url, name)
    await _execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[RunningService]:
    """The whole service, in this process, on a port and a database of the test's own."""
    async with run_service(database_url) as running:
        yield running
