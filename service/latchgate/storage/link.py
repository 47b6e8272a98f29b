"""A connection of its own, outside the pools, for what must neither wait for others nor be cut off unnoticed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import asyncpg

from latchgate.storage.postgres import (
    SESSION_KIND,
    Connection,
    connection_settings,
    prepare_connection,
    translated,
    unavailable,
)
from latchgate.storage.session import Session


class Link:
    """One connection, made when it is first used, cut when anything fails on it, and made anew the next time.

    For one user at a time.
    """

    def __init__(self, dsn: str, *, timeout_s: float, settings: Mapping[str, str] | None = None) -> None:
        """Takes the database's address, how long connecting and each statement may take, and the session's settings."""
        self._dsn = dsn
        self._timeout_s = timeout_s
        self._settings = connection_settings(settings or {})
        self._connection: Connection | None = None

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends the connection. Raises StorageUnavailableError, whatever went wrong."""
        try:
            with translated():
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(
                        self._dsn,
                        timeout=self._timeout_s,
                        command_timeout=self._timeout_s,
                        target_session_attrs=SESSION_KIND,
                        server_settings=self._settings,
                        connection_class=Session,
                    )
                    await prepare_connection(self._connection)
                yield self._connection
        except asyncpg.PostgresError as error:
            self.cut()
            raise unavailable(error) from None
        except BaseException:
            self.cut()
            raise

    def cut(self) -> None:
        """Ends the connection without a word to the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
