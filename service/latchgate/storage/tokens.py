"""Families of refresh tokens, and the keys that sign access tokens, in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

from latchgate.domain.families import Family, Holder, NewFamily
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.signing import KeyPair, SigningKey
from latchgate.storage import queries, queries_tokens
from latchgate.storage.postgres import Database
from latchgate.storage.rows import Row
from latchgate.storage.transaction import TOKEN_KEPT, PostgresTransaction

FORGET_ROWS: Final = 2000


class PostgresTokenTransaction(PostgresTransaction):
    """Implements latchgate.domain.token_ports.TokenTransaction."""

    async def find_family(self, family_digest: bytes) -> tuple[str, str, int] | None:
        """Finds a family, without a lock."""
        row = await self._connection.fetchrow(queries_tokens.FAMILY_FIND, family_digest)
        return None if row is None else (row["id"], row["key_id"], row["secret_id"])

    async def lock_holder(self, key_id: str, secret_id: int) -> Holder | None:
        """Locks organization and key, and then reads them as the last holder of the locks left them."""
        for lock in (queries.KEY_LOCK_ORGANIZATION, queries.KEY_LOCK):
            if await self._connection.fetchval(lock, key_id) is None:
                return None
        row = await self._connection.fetchrow(queries.SECRET_GET_HOLDER, key_id, secret_id)
        return None if row is None else holder(row)

    async def insert_family(self, family: NewFamily, most: int) -> None:
        """Stores a family, and ends the oldest ones of its key."""
        await self._connection.execute(
            queries_tokens.FAMILY_INSERT,
            family.id,
            family.key_id,
            family.secret_id,
            family.audience,
            family.permissions,
            family.expire_time,
            family.token.family_digest,
            family.token.digest,
        )
        await self._connection.execute(queries_tokens.FAMILY_TRIM, family.key_id, most)

    async def lock_family(self, family_id: str) -> Family | None:
        """Locks and reads a family."""
        row = await self._connection.fetchrow(queries_tokens.FAMILY_LOCK, family_id, TOKEN_KEPT)
        return None if row is None else family(row)

    async def use_token(
        self, family: Family, token_digest: bytes, request_digest: bytes | None, sealed_token: bytes | None
    ) -> None:
        """Puts the next token in its place."""
        await self._connection.execute(queries_tokens.FAMILY_USE, family.id, token_digest, request_digest, sealed_token)

    async def delete_family(self, family_id: str) -> None:
        """Ends a family."""
        await self._connection.execute(queries_tokens.FAMILY_DELETE, family_id)

    async def signing_keys(self) -> Sequence[SigningKey]:
        """Reads the keys."""
        rows = await self._connection.fetch(queries_tokens.SIGNING_KEY_LIST)
        return [signing_key(row) for row in rows]

    async def lock_signing_keys(self) -> Sequence[SigningKey]:
        """Waits for whoever changes them, and then reads them as that one left them."""
        await self._connection.execute(queries.CHANGE_LOCK_TAKE, queries_tokens.SIGNING_LOCK)
        return await self.signing_keys()

    async def insert_signing_key(self, pair: KeyPair, sign_time: datetime) -> SigningKey:
        """Stores a key."""
        await self._connection.execute(
            queries_tokens.SIGNING_KEY_INSERT, pair.kid, pair.x, pair.y, pair.sealed, sign_time
        )
        return SigningKey(kid=pair.kid, x=pair.x, y=pair.y, sealed=pair.sealed, sign_time=sign_time)

    async def delete_signing_keys(self, kids: Sequence[str]) -> None:
        """Removes keys."""
        await self._connection.execute(queries_tokens.SIGNING_KEY_DELETE, kids)


class PostgresTokenStore:
    """Implements latchgate.domain.token_ports.TokenStore."""

    def __init__(self, database: Database) -> None:
        """Takes the open database."""
        self._database = database

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[PostgresTokenTransaction]:
        """Opens a transaction that is committed at the end of the block, and undone if the block raises."""
        async with self._database.transaction() as connection:
            yield PostgresTokenTransaction(connection)


async def forget_families(database: Database) -> None:
    """Clears the tokens that are kept for retries and too old, and removes families that have expired.

    In small statements: however much has gathered, none takes so long that it would be cut off.
    """
    async with database.connection() as connection:
        for statement, values in ((queries_tokens.FAMILY_CLEAR, (TOKEN_KEPT,)), (queries_tokens.FAMILY_FORGET, ())):
            more = True
            while more:
                status: str = await connection.execute(statement, *values, FORGET_ROWS)
                more = int(status.rsplit(maxsplit=1)[-1]) == FORGET_ROWS


def holder(row: Row) -> Holder:
    """Reads what tokens need to know of a key."""
    return Holder(
        key_id=row["key_id"],
        secret_id=row["secret_id"],
        organization_id=row["organization_id"],
        organization_active=row["organization_active"],
        active=row["active"],
        revoked=row["revoked"],
        expire_time=row["expire_time"],
        is_ended=row["is_ended"],
        secret_end_time=row["secret_end_time"],
        permissions=tuple(row["permissions"]),
        allowed_cidrs=tuple(row["allowed_cidrs"]),
        key_type=KeyType(row["key_type"]),
        environment=Environment(row["environment"]),
        user_id=row["user_id"],
        read_time=row["read_time"],
    )


def family(row: Row) -> Family:
    """Reads a family."""
    return Family(
        id=row["id"],
        key_id=row["key_id"],
        secret_id=row["secret_id"],
        audience=row["audience"],
        permissions=tuple(row["permissions"]),
        expire_time=row["expire_time"],
        token_digest=row["token_digest"],
        used_digest=row["used_digest"],
        request_digest=row["request_digest"],
        sealed_token=row["sealed_token"],
    )


def signing_key(row: Row) -> SigningKey:
    """Reads a key that signs."""
    return SigningKey(kid=row["kid"], x=row["x"], y=row["y"], sealed=row["sealed"], sign_time=row["sign_time"])
