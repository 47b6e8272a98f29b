"""Connections to PostgreSQL, and the one place where what can go wrong with them becomes a domain error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from latchgate.domain.errors import StorageUnavailableError, WriteUnknownError

# The driver's classes are generic to the type checker alone.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT_S = 2.0
ACQUIRE_TIMEOUT_S = 2.0
MANAGEMENT_TIMEOUT_S = 5.0
LOOKUP_TIMEOUT_S = 1.0
LOOKUP_CONNECTIONS = 2

# The server ends what a client that is gone has left behind: no lock outlives its holder for long.
_SERVER_SETTINGS = {
    "application_name": "latchgate",
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "5s",
    "lock_timeout": "4s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "timezone": "UTC",
    "jit": "off",
}

_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InternalClientError,
)


@contextmanager
def translated() -> Iterator[None]:
    """Turns what the driver raises when the database is away, overloaded or read-only into StorageUnavailableError.

    Neither the message nor the cause is passed on: either may hold a host name, a user or values of a row.
    """
    try:
        yield
    except (asyncpg.DataError, asyncpg.ClientConfigurationError):
        # A value that a column can not hold, or an address that is none: faults that waiting does not mend.
        raise
    except _AWAY as error:
        raise StorageUnavailableError(f"the database is not available ({type(error).__name__})") from None


async def _prepare_connection(connection: Connection) -> None:
    await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


async def _keep_as_it_is(connection: Connection) -> None:
    """Spares lookups the four statements by which asyncpg resets a connection: they leave nothing to be reset."""


class Database:
    """Two pools: one for management, one held for lookups, so that neither can starve the other."""

    def __init__(self, management: Pool, lookups: Pool) -> None:
        """Takes pools that may not be connected yet; see `open`."""
        self.management = management
        self.lookups = lookups

    @classmethod
    async def open(cls, dsn: str, *, pool_size: int) -> Database:
        """Makes the pools. They connect when they are first used, and again whenever a connection is lost."""
        management = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=pool_size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=MANAGEMENT_TIMEOUT_S,
            max_inactive_connection_lifetime=60.0,
            init=_prepare_connection,
            server_settings=_SERVER_SETTINGS,
        )
        lookups = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=LOOKUP_CONNECTIONS,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=LOOKUP_TIMEOUT_S,
            max_inactive_connection_lifetime=0,
            init=_prepare_connection,
            reset=_keep_as_it_is,
            # One plan for every batch size, made once: it always goes by the index on the digest.
            server_settings=_SERVER_SETTINGS | {"plan_cache_mode": "force_generic_plan"},
        )
        with translated():
            await management
            await lookups
        return cls(management, lookups)

    async def close(self) -> None:
        """Closes all connections; those that do not close by themselves in time are cut."""
        for pool in (self.lookups, self.management):
            try:
                await asyncio.wait_for(pool.close(), timeout=5.0)
            except (TimeoutError, *_AWAY):
                pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends a connection of the management pool for statements of their own."""
        with translated():
            async with self.management.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lends a connection with a transaction open: committed at the end of the block, undone if the block raises.

        Raises WriteUnknownError if the connection is lost while the commit is under way.
        """
        with translated():
            async with self.management.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
                transaction = connection.transaction()
                await transaction.start()
                try:
                    yield connection
                except BaseException:
                    await _roll_back(connection, transaction)
                    raise
                await _commit(transaction)


async def _roll_back(connection: Connection, transaction: asyncpg.transaction.Transaction) -> None:
    """Undoes a transaction. A connection that can not do so any more is cut, and the server undoes it."""
    try:
        await transaction.rollback()
    except (asyncpg.PostgresError, *_AWAY):
        connection.terminate()


async def _commit(transaction: asyncpg.transaction.Transaction) -> None:
    try:
        await transaction.commit()
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.PostgresConnectionError,
        asyncpg.OperatorInterventionError,
    ):
        pass
    else:
        return
    raise WriteUnknownError(
        "the connection to the database was lost while the change was being stored; repeat the call to find out "
        "(with the same request_id, where it has one)"
    )
