"""Connections to PostgreSQL, and the one place where what can go wrong with them becomes a domain error."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from asyncpg.pool import PoolConnectionProxy

from latchgate.domain.errors import StorageUnavailableError, WriteUnknownError
from latchgate.storage.session import Session

# The driver's classes are generic to the type checker alone.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT_S = 2.0
ACQUIRE_TIMEOUT_S = 2.0
# Longer than the server's own limits below: as long as it can be reached, it is the server that says what timed out.
MANAGEMENT_TIMEOUT_S = 6.0
ROLLBACK_TIMEOUT_S = 1.0
CLOSE_TIMEOUT_S = 5.0

# Whatever the address names: a standby answers from the past, and can not be written.
SESSION_KIND = SessionAttribute.primary

# The server ends what a client that is gone has left behind: no lock outlives its holder for long. The locks of
# transactions are followed by reads that must see what the former holder committed: never under a fixed snapshot.
_SERVER_SETTINGS = {
    "application_name": "latchgate",
    "default_transaction_isolation": "read committed",
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "5s",
    "lock_timeout": "4s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "timezone": "UTC",
    "jit": "off",
}

# A connection over which nothing is acknowledged is cut by the system: what was sent within 1 s, silence within 3 s.
_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_USER_TIMEOUT", 1000), ("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2))
        if hasattr(socket, name)
    ),
)

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
    asyncpg.PostgresSystemError,
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
    except ValueError:
        # The driver's ClientConfigurationError is one: an address that can not be read. Waiting does not mend it.
        raise
    except _AWAY as error:
        raise unavailable(error) from None


def unavailable(error: Exception) -> StorageUnavailableError:
    """Makes the domain's error of the driver's."""
    return StorageUnavailableError(f"the database is not available ({type(error).__name__})")


def connection_settings(more: Mapping[str, str]) -> dict[str, str]:
    """Gives the settings of every session, with some of its own."""
    return _SERVER_SETTINGS | dict(more)


async def prepare_connection(connection: Connection) -> None:
    """Makes a new connection what the statements expect, and one that finds out when its other end is gone."""
    await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    transport: Any = getattr(connection, "_transport")  # noqa: B009 - asyncpg has no setting for it, and shows none
    found = transport.get_extra_info("socket")
    if found is not None and found.family in {socket.AF_INET, socket.AF_INET6}:
        for level, option, value in _SOCKET_OPTIONS:
            found.setsockopt(level, option, value)


async def _leave_as_it_is(_: Connection) -> None:
    """Spares a connection that is given back the driver's four statements of cleaning, a round trip each time.

    Nothing is left to be cleaned: what statements set and lock ends with their transaction, and one that is open the
    driver rolls back all the same. LISTEN, and locks and settings of sessions, are for connections outside the pool.
    """


class Database:
    """The pool of connections for management."""

    def __init__(self, management: Pool) -> None:
        """Takes a pool that may not be connected yet; see `open`."""
        self.management = management

    @classmethod
    async def open(cls, dsn: str, *, pool_size: int) -> Database:
        """Makes the pool. It connects when it is first used, and again whenever a connection is lost."""
        management = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=pool_size,
            timeout=CONNECT_TIMEOUT_S,
            target_session_attrs=SESSION_KIND,
            command_timeout=MANAGEMENT_TIMEOUT_S,
            max_inactive_connection_lifetime=60.0,
            init=prepare_connection,
            reset=_leave_as_it_is,
            server_settings=_SERVER_SETTINGS,
            connection_class=Session,
        )
        with translated():
            await management
        return cls(management)

    async def close(self) -> None:
        """Closes all connections; those that do not close by themselves in time are cut."""
        try:
            await asyncio.wait_for(self.management.close(), timeout=CLOSE_TIMEOUT_S)
        except (TimeoutError, *_AWAY):
            self.management.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends a connection of the management pool for statements of their own."""
        async with _lent(self.management) as connection:
            try:
                yield connection
            except TimeoutError:
                raise
            except BaseException:
                await _settle(connection)
                raise

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lends a connection with a transaction open: committed at the end of the block, undone if the block raises.

        Raises StorageUnavailableError only if nothing was changed, and WriteUnknownError if that can not be known: the
        commit was sent, and what came of it was not heard.
        """
        async with _lent(self.management) as connection:
            transaction = connection.transaction()
            try:
                await transaction.start()
                yield connection
            except TimeoutError:
                # The connection is cut as it is given back, and with it goes the transaction.
                raise
            except BaseException:
                await _roll_back(connection, transaction)
                raise
            await _commit(connection, transaction)


@asynccontextmanager
async def _lent(pool: Pool) -> AsyncIterator[Connection]:
    """Lends a connection, and takes it back clean or cuts it, which is no failure of what was done with it."""
    with translated():
        try:
            connection = await pool.acquire(timeout=ACQUIRE_TIMEOUT_S)
        except asyncpg.PostgresError as error:
            # Whatever a server has against a new session, nothing can be done without one.
            raise unavailable(error) from None
        try:
            yield connection
        except TimeoutError:
            # Whoever does not answer will not acknowledge a cancellation either.
            _cut(connection)
            raise
        finally:
            with suppress(asyncpg.PostgresError, *_AWAY):
                await pool.release(connection)


def _cut(connection: Connection) -> None:
    """Ends a connection without a word to the server; one that was lost before is back in its pool by now."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


async def _settle(connection: Connection) -> None:
    """Brings a session to rest after a statement that failed or was given up, or cuts it.

    One that is given up while the server prepares it leaves the session within it, with a transaction of its own that
    is open for as long as nobody asks for more.
    """
    try:
        async with asyncio.timeout(ROLLBACK_TIMEOUT_S):
            await connection.execute("SELECT 1")
    except (asyncpg.PostgresError, *_AWAY):
        _cut(connection)
    except BaseException:
        _cut(connection)
        raise


async def _roll_back(connection: Connection, transaction: asyncpg.transaction.Transaction) -> None:
    """Undoes a transaction. A connection that can not do so at once is cut, and the server undoes it."""
    try:
        async with asyncio.timeout(ROLLBACK_TIMEOUT_S):
            await transaction.rollback()
    except (asyncpg.PostgresError, *_AWAY):
        _cut(connection)
    except BaseException:
        _cut(connection)
        raise


async def _commit(connection: Connection, transaction: asyncpg.transaction.Transaction) -> None:
    """Commits. Raises WriteUnknownError unless the server has said what came of it."""
    try:
        await transaction.commit()
    except (asyncpg.PostgresError, *_AWAY) as error:
        if is_undone(error):
            raise
    else:
        return
    _cut(connection)
    raise WriteUnknownError(
        "the connection to the database was lost while the change was being stored; repeat the call to find out "
        "(with the same request_id, where it has one)"
    )


def is_undone(error: Exception) -> bool:
    """Says whether a failed commit has changed nothing: only an ERROR is sent by a server that goes on and knows.

    With FATAL the session ends and with PANIC the whole server, which may be after the commit was written.
    """
    if isinstance(error, asyncpg.PostgresConnectionError) or not isinstance(error, asyncpg.PostgresError):
        return False
    severity: str | None = error.severity_en
    return severity == "ERROR"
