"""Keys, organizations and plans in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

from latchgate.domain.audit import AuditEntry
from latchgate.domain.model import Caller, Environment, HeldPermission, Key, KeyFilter, Organization, Plan, Scope
from latchgate.storage import queries, rows
from latchgate.storage.postgres import Database
from latchgate.storage.transaction import PostgresTransaction


class PostgresStore:
    """Implements latchgate.domain.ports.KeyStore, OrganizationStore, AuditTrail, and logins.OrganizationStanding."""

    def __init__(self, database: Database, published: Callable[[], None] = lambda: None) -> None:
        """Takes the open database, and who is to hear when a transaction has left something to be sent out."""
        self._database = database
        self._published = published

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[PostgresTransaction]:
        """Opens a transaction that is committed at the end of the block, and undone if the block raises."""
        async with self._database.transaction() as connection:
            transaction = PostgresTransaction(connection)
            yield transaction
        if transaction.has_published:
            self._published()

    async def record_audit(self, caller: Caller, entry: AuditEntry) -> None:
        """Records an entry by itself."""
        async with self.transaction() as transaction:
            await transaction.record_audit(caller, entry)

    async def get_key(self, key_id: str) -> Key | None:
        """Reads a key."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries.KEY_GET, key_id)
        return None if row is None else rows.key(row)

    async def list_keys(self, key_filter: KeyFilter, after: str, count: int) -> Sequence[Key]:
        """Lists up to `count` keys, newest first, beyond the id `after`."""
        values = (
            key_filter.organization_id,
            after,
            key_filter.key_type and key_filter.key_type.value,
            key_filter.environment and key_filter.environment.value,
            key_filter.state and key_filter.state.value,
            key_filter.show_deleted,
            count,
        )
        async with self._database.connection() as connection:
            if key_filter.user_id:
                statement = await connection.prepare(queries.KEY_LIST_OF_USER)
                found = await statement.fetch(*values, key_filter.user_id)
            else:
                statement = await connection.prepare(queries.KEY_LIST)
                found = await statement.fetch(*values)
        return [rows.key(row) for row in found]

    async def publishable_key(self, organization_id: str, environment: Environment) -> tuple[Key, str] | None:
        """Reads the newest active publishable key, and its token."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries.KEY_GET_PUBLISHABLE, organization_id, environment.value)
            found = row and await connection.fetchrow(queries.KEY_GET, row["id"])
        return (rows.key(found), row["readable_token"]) if row and found else None

    async def scopes(self, organization_id: str) -> Sequence[Scope] | None:
        """Reads an organization's own scopes."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries.ORGANIZATION_SCOPES, organization_id)
        return None if row is None else rows.scopes(row["scopes"])

    async def permissions_beyond(self, names: Sequence[str]) -> Sequence[HeldPermission]:
        """What keys hold that is neither one of `names` nor a scope of their organization's own."""
        async with self._database.connection() as connection:
            found = await connection.fetch(queries.KEY_COUNT_PERMISSIONS, names)
        return [rows.held_permission(row) for row in found]

    async def get_organization(self, organization_id: str) -> Organization | None:
        """Reads an organization."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries.ORGANIZATION_GET, organization_id)
        return None if row is None else rows.organization(row)

    async def standing(self, organization_id: str) -> tuple[datetime, bool | None]:
        """Gives the database's clock, and whether an organization is active; None if there is none."""
        async with self._database.connection() as connection:
            (row,) = await connection.fetch(queries.ORGANIZATION_STANDING, organization_id)
        return row["now"], row["active"]

    async def list_organizations(self, after: str, count: int) -> Sequence[Organization]:
        """Lists up to `count` organizations by id, beyond the id `after`."""
        async with self._database.connection() as connection:
            return [rows.organization(row) for row in await connection.fetch(queries.ORGANIZATION_LIST, after, count)]

    async def list_plans(self, after: str, count: int) -> Sequence[Plan]:
        """Lists up to `count` plans by id, beyond the id `after`."""
        async with self._database.connection() as connection:
            return [rows.plan(row) for row in await connection.fetch(queries.PLAN_LIST, after, count)]
