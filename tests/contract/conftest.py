"""What tests of storage start from: pools on a database of the test's own, and a connection beside them to look on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from latchgate.domain.keys import KeyManager
from latchgate.storage.lookups import FindMany
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from support.databases import connected, finding, key_manager, opened


@pytest.fixture
async def observer(database_url: str) -> AsyncIterator[Connection]:
    """A connection that the code under test knows nothing of."""
    async with connected(database_url) as connection:
        yield connection


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The storage layer's pools."""
    async with opened(database_url) as database:
        yield database


@pytest.fixture
def store(database: Database) -> PostgresStore:
    """The store over these pools."""
    return PostgresStore(database)


@pytest.fixture
def keys(store: PostgresStore) -> KeyManager:
    """The use cases of keys over this store."""
    return key_manager(store)


@pytest.fixture
async def find(database_url: str) -> AsyncIterator[FindMany]:
    """Lookups, over a connection of their own."""
    async with finding(database_url) as find:
        yield find
