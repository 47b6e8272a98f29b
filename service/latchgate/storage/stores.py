"""Keys, organizations and plans in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from latchgate.domain.errors import OrganizationExistsError, PlanExistsError, PlanNotFoundError
from latchgate.domain.model import Environment, Key, KeyFilter, Organization, Plan, Scope
from latchgate.storage import queries, rows
from latchgate.storage.postgres import Database
from latchgate.storage.transaction import PostgresTransaction


class PostgresStore:
    """Implements latchgate.domain.ports.KeyStore and OrganizationStore."""

    def __init__(self, database: Database) -> None:
        """Takes the open database."""
        self._database = database

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[PostgresTransaction]:
        """Opens a transaction that is committed at the end of the block, and undone if the block raises."""
        async with self._database.transaction() as connection:
            yield PostgresTransaction(connection)

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

    async def insert_organization(
        self, organization_id: str, name: str, plan_id: str, scopes: Sequence[Scope]
    ) -> Organization:
        """Stores an organization."""
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    queries.ORGANIZATION_INSERT, organization_id, name, plan_id, rows.scopes_json(scopes)
                )
                row = await connection.fetchrow(queries.ORGANIZATION_GET, organization_id)
        except asyncpg.UniqueViolationError:
            raise OrganizationExistsError(f"organization {organization_id} exists already") from None
        except asyncpg.ForeignKeyViolationError:
            raise PlanNotFoundError(f"plan {plan_id} does not exist") from None
        if row is None:
            raise LookupError("an organization that was just stored is gone")
        return rows.organization(row)

    async def get_organization(self, organization_id: str) -> Organization | None:
        """Reads an organization."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queries.ORGANIZATION_GET, organization_id)
        return None if row is None else rows.organization(row)

    async def list_organizations(self, after: str, count: int) -> Sequence[Organization]:
        """Lists up to `count` organizations by id, beyond the id `after`."""
        async with self._database.connection() as connection:
            return [rows.organization(row) for row in await connection.fetch(queries.ORGANIZATION_LIST, after, count)]

    async def insert_plan(self, plan_id: str, rate_limit_per_minute: int, max_keys: int) -> Plan:
        """Stores a plan."""
        try:
            async with self._database.transaction() as connection:
                row = await connection.fetchrow(queries.PLAN_INSERT, plan_id, rate_limit_per_minute, max_keys)
        except asyncpg.UniqueViolationError:
            raise PlanExistsError(f"plan {plan_id} exists already") from None
        if row is None:
            raise LookupError("a plan that was just stored is gone")
        return rows.plan(row)

    async def list_plans(self, after: str, count: int) -> Sequence[Plan]:
        """Lists up to `count` plans by id, beyond the id `after`."""
        async with self._database.connection() as connection:
            return [rows.plan(row) for row in await connection.fetch(queries.PLAN_LIST, after, count)]
