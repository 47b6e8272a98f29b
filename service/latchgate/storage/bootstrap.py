"""What a deployment needs before it can serve: its tag key, and a root key. Made once, under a lock."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from latchgate.domain.audit import AuditEntry, key_snapshot
from latchgate.domain.model import (
    ROOT_ORGANIZATION_ID,
    Environment,
    Key,
    KeyDraft,
    KeyType,
    NewKey,
    NewSecret,
)
from latchgate.domain.permissions import WILDCARD
from latchgate.domain.ports import IdMaker
from latchgate.domain.token import Form, TokenFormat, digest, foreign_secret
from latchgate.storage import queries
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.transaction import PostgresTransaction

TAG_KEY = "tag_key"
TAG_KEY_FINGERPRINT = "tag_key_fingerprint"
TAG_KEY_BYTES = 32


class BootstrapError(Exception):
    """The settings and the database do not fit each other. The message names the setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RootKey:
    """What became of the root key. `token` is there only if it was made now, and is shown once."""

    key_id: str | None
    token: str | None
    is_refused: bool


async def load_tag_key(database: Database, from_settings: bytes | None) -> bytes:
    """Gives the tag key: the settings', else the stored one, else one that is made and stored now.

    Of a key from the settings only a fingerprint is stored. Raises BootstrapError if it is another than before: all
    tokens would be refused.
    """
    async with database.transaction() as connection:
        await connection.execute(queries.CHANGE_LOCK_TAKE, queries.MIGRATION_LOCK)
        stored: bytes | None = await connection.fetchval(queries.DEPLOYMENT_GET, TAG_KEY)
        fingerprint: bytes | None = await connection.fetchval(queries.DEPLOYMENT_GET, TAG_KEY_FINGERPRINT)
        key = from_settings or stored
        if key is None:
            if fingerprint is not None:
                raise BootstrapError("LATCHGATE_TAG_KEY is not set, but this database's tokens were made with one")
            key = secrets.token_bytes(TAG_KEY_BYTES)
            await connection.execute(queries.DEPLOYMENT_INSERT, TAG_KEY, key)
        if fingerprint is None:
            await connection.execute(queries.DEPLOYMENT_INSERT, TAG_KEY_FINGERPRINT, _fingerprint(key))
        elif not hmac.compare_digest(fingerprint, _fingerprint(key)):
            raise BootstrapError(
                "LATCHGATE_TAG_KEY is not the key that this database's tokens were made with: all would be refused"
            )
    return key


def _fingerprint(key: bytes) -> bytes:
    return hmac.digest(key, b"latchgate tag key", hashlib.sha256)


async def ensure_root_key(database: Database, tokens: TokenFormat, make_id: IdMaker, root_token: str | None) -> RootKey:
    """Makes the root key that the settings ask for, or on a database without any one of its own.

    A root token that was ever stored is left as it is, whatever became of its key: a revoked root key does not come
    back with a restart.
    """
    if root_token is not None and tokens.recognise(root_token) is Form.IMPOSSIBLE:
        raise BootstrapError(
            "LATCHGATE_ROOT_TOKEN looks like a token of this service with a mistake in it; use 32 to 512 printable "
            "ASCII characters that do not begin like one"
        )
    async with database.transaction() as connection:
        transaction = PostgresTransaction(connection)
        await transaction.lock_organization(ROOT_ORGANIZATION_ID)
        lasting = await transaction.lasting_root_key_ids()
        if root_token is None:
            if lasting:
                return RootKey(key_id=None, token=None, is_refused=False)
            minted = tokens.mint(KeyType.SECRET, Environment.LIVE)
            key = await _insert(transaction, make_id, minted.secret)
            await _record(transaction, key, revision=0)
            return RootKey(key_id=key.id, token=minted.token, is_refused=False)
        if await connection.fetchval(queries.SECRET_EXISTS, digest(root_token)):
            return RootKey(key_id=None, token=None, is_refused=not await _is_good(connection, digest(root_token)))
        key = await _insert(transaction, make_id, foreign_secret(root_token))
        # Minted tokens are news to nobody; that of a foreign one may be known to be none.
        await _record(transaction, key, revision=await transaction.record_change("key", key.id))
        return RootKey(key_id=key.id, token=None, is_refused=False)


async def _insert(transaction: PostgresTransaction, make_id: IdMaker, secret: NewSecret) -> Key:
    draft = KeyDraft(name="root", permissions=(WILDCARD,), metadata={})
    key_id = make_id("key_")
    return await transaction.insert_key(
        NewKey(id=key_id, organization_id=ROOT_ORGANIZATION_ID, created_by="", draft=draft), secret
    )


async def _record(transaction: PostgresTransaction, key: Key, revision: int) -> None:
    """Records a root key as the service's own work."""
    entry = AuditEntry(
        organization_id=key.organization_id,
        entity="key",
        entity_id=key.id,
        after=key_snapshot(key),
        revision=revision,
    )
    await transaction.record_audit(None, entry)


async def _is_good(connection: Connection, token_digest: bytes) -> bool:
    """Says whether a stored token is that of a root key that is in use."""
    return bool(await connection.fetchval(queries.SECRET_IS_GOOD_ROOT, token_digest))
