"""Every SQL constant against the migrated schema, and its columns against what is read from them."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Union, cast

import asyncpg

from latchgate.domain import families, signing
from latchgate.domain.imported import KnownToken
from latchgate.domain.model import Key, KeyRecord, Organization, Plan, Scope
from latchgate.domain.token import digest
from latchgate.storage import queries, queries_tokens, rows, tokens
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.signing import JoseSigner
from latchgate.storage.stores import PostgresStore
from support.databases import insert_key, show, store_organization
from support.statements import OUTBOX, prepared, statements

KEY_COLUMNS = {
    "id", "organization_id", "name", "key_type", "environment", "permissions", "rate_limit_per_minute", "active",
    "user_id", "user_email", "metadata", "allowed_cidrs", "created_by", "create_time", "update_time", "expire_time",
    "revoke_time", "revoke_reason", "delete_time", "version", "revision", "read_time", "hints", "create_times",
    "end_times", "used_times", "last_used_time",
}  # fmt: skip
ORGANIZATION_COLUMNS = {
    "id", "name", "plan_id", "active", "scopes", "key_count", "max_keys", "create_time", "update_time",
}  # fmt: skip
PLAN_COLUMNS = {"id", "rate_limit_per_minute", "max_keys", "create_time", "update_time"}
FOUND_COLUMNS = {
    "secret_id", "key_id", "organization_id", "organization_active", "key_name", "kind", "allowed_cidrs",
    "rate_limit_per_minute", "active", "revoked", "expire_s", "secret_end_s", "create_s", "user_id", "user_email",
    "metadata", "plan_id",
}  # fmt: skip
AUDIT_COLUMNS = {
    "organization_id", "sequence", "event_time", "actor_key_id", "actor_organization_id", "certificate",
    "peer", "method", "request_id", "entity", "entity_id", "before_change", "after_change", "revision", "code",
    "reason", "actor_subject", "hash",
}  # fmt: skip
KNOWN_COLUMNS = {
    "digest", "hint", "key_id", "organization_id", "name", "key_type", "environment", "permissions",
    "rate_limit_per_minute", "active", "user_id", "user_email", "metadata", "allowed_cidrs", "expire_time", "is_ended",
}  # fmt: skip
FAMILY_COLUMNS = {
    "id", "key_id", "secret_id", "audience", "permissions", "expire_time", "token_digest", "used_digest",
    "request_digest", "sealed_token",
}  # fmt: skip
HOLDER_COLUMNS = {
    "key_id", "secret_id", "organization_id", "organization_active", "active", "revoked", "expire_time", "is_ended",
    "secret_end_time", "permissions", "allowed_cidrs", "key_type", "environment", "user_id", "read_time",
}  # fmt: skip
LOG_COLUMNS = {"head", "timeline", "now_s", "is_member", "entity", "entity_id"}

# What each constant takes and gives, as PostgreSQL understands it.
STATEMENTS: dict[str, tuple[str, set[str]]] = {
    "KEY_GET": ("text", KEY_COLUMNS),
    "KEY_GET_MANY": ("text[]", KEY_COLUMNS),
    "KEY_LOCK": ("text", {"?column?"}),
    "KEY_LOCK_ORGANIZATION": ("text", {"id"}),
    "KEY_LIST": ("text text text text text bool int8", KEY_COLUMNS),
    "KEY_LIST_OF_USER": ("text text text text text bool int8 text", KEY_COLUMNS),
    "KEY_REACH": ("text text int8", {"now", "reach"}),
    "KEY_LIST_UNUSED": ("text text text timestamptz int8", KEY_COLUMNS),
    "KEY_GET_PUBLISHABLE": ("text text", {"id", "readable_token"}),
    "KEY_LIST_LASTING_ROOT": ("", {"id"}),
    "KEY_INSERT": ("text text text text text text[] int4 text text jsonb text[] text timestamptz", set()),
    "KEY_UPDATE": ("text text text[] int4 bool jsonb text[] timestamptz timestamptz text timestamptz int8", set()),
    "KEY_PURGE": ("interval int8", {"id", "organization_id", "name", "delete_time"}),
    "KEY_LIST_PERMISSIONS": ("text text[]", {"permission"}),
    "KEY_LIST_HOLDING": ("text text[] int8", {"id", "key_count"}),
    "KEY_COUNT_PERMISSIONS": ("text[]", {"permission", "own_scopes", "key_count"}),
    "KEY_IMPORT": ("text text jsonb", {"id"}),
    "SECRET_FIND_KEYS": ("bytea[]", KNOWN_COLUMNS),
    "SECRET_INSERT": ("bytea text text text", set()),
    "SECRET_END": ("text interval", set()),
    "SECRET_LOCK_IN_USE": ("int8", {"?column?"}),
    "SECRET_EXISTS": ("bytea", {"exists"}),
    "SECRET_IS_GOOD_ROOT": ("bytea", {"exists"}),
    "SECRET_FIND": ("bytea[]", {"now_s", "revision", "digest", *FOUND_COLUMNS}),
    "LAST_USED_UPDATE": ("int8[] float8[]", {"secret_id"}),
    "USAGE_FLUSH_MARK": ("uuid int8", {"?column?"}),
    "USAGE_SECRET_ADD": ("int4 int8[] int2[] int8[]", set()),
    "USAGE_ORGANIZATION_ADD": ("int4 text[] int2[] int8[]", set()),
    "USAGE_OF_KEY": ("text int4 int4 int4", {"step", "outcome", "count"}),
    "USAGE_OF_ORGANIZATION": ("text int4 int4 int4", {"step", "outcome", "count"}),
    "USAGE_SECRET_FORGET": ("interval int8", set()),
    "USAGE_ORGANIZATION_FORGET": ("interval int8", set()),
    "USAGE_FLUSH_FORGET": ("interval", set()),
    "FAMILY_FIND": ("bytea", {"id", "key_id", "secret_id"}),
    "FAMILY_INSERT": ("text text int8 text text[] timestamptz bytea bytea", set()),
    "FAMILY_TRIM": ("text int8", set()),
    "FAMILY_LOCK": ("text interval", FAMILY_COLUMNS),
    "FAMILY_USE": ("text bytea bytea bytea", set()),
    "FAMILY_DELETE": ("text", set()),
    "FAMILY_CLEAR": ("interval int8", set()),
    "FAMILY_FORGET": ("int8", set()),
    "SECRET_GET_HOLDER": ("text int8", HOLDER_COLUMNS),
    "SIGNING_KEY_LIST": ("", {"kid", "x", "y", "sealed", "sign_time"}),
    "SIGNING_KEY_INSERT": ("text text text bytea timestamptz", set()),
    "SIGNING_KEY_DELETE": ("text[]", set()),
    "RATE_EXCHANGE": (
        "text[] int4[] int4[] int4[] int4[] int4[] int8[] int4[]",
        {"workers", "key_id", "granted", "slot", "ages", "costs", "used", "now_s"},
    ),
    "RATE_FORGET": ("int8", set()),
    "ORGANIZATION_GET": ("text", ORGANIZATION_COLUMNS),
    "ORGANIZATION_LOCK": ("text", {"?column?"}),
    "ORGANIZATION_LIST": ("text int8", ORGANIZATION_COLUMNS),
    "ORGANIZATION_SCOPES": ("text", {"scopes"}),
    "ORGANIZATION_STANDING": ("text", {"now", "active"}),
    "ORGANIZATION_INSERT": ("text text text jsonb", set()),
    "ORGANIZATION_UPDATE": ("text text text bool jsonb", set()),
    "PLAN_LOCK": ("text", PLAN_COLUMNS),
    "PLAN_LIST": ("text int8", PLAN_COLUMNS),
    "PLAN_INSERT": ("text int4 int4", PLAN_COLUMNS),
    "PLAN_UPDATE": ("text int4 int4", PLAN_COLUMNS),
    "CHANGE_LOCK_TAKE": ("int8", {"pg_advisory_xact_lock"}),
    "CHANGE_NEWEST": ("", {"revision"}),
    "CHANGE_INSERT": ("text text", {"revision", "pg_notify"}),
    "CHANGE_FORGET": ("interval int8", set()),
    "LOG_READ": ("uuid int8 int8", LOG_COLUMNS),
    "LOG_READ_RENEWING": ("uuid int8 int8", LOG_COLUMNS),
    "WORKER_INSERT": ("uuid float8", set()),
    "WORKER_ACKNOWLEDGE": ("uuid int8", set()),
    "WORKER_LIST": ("", {"incarnation", "applied_revision", "seen_revision", "renewals", "lease_s", "timeline"}),
    "WORKER_EVICT": ("uuid int8 int8", {"?column?"}),
    "WORKER_EVICT_SILENT": ("uuid int8", {"?column?"}),
    "WORKER_DELETE": ("uuid", set()),
    "REQUEST_CLAIM": ("bytea bytea", {"slot"}),
    "REQUEST_GET": ("bytea interval", {"body_digest", "key_id", "revision", "sealed_token"}),
    "REQUEST_ANSWER": ("bytea text int8 bytea", set()),
    "REQUEST_CLEAR": ("interval int8", set()),
    "REQUEST_DELETE": ("interval int8", set()),
    "AUDIT_HEAD_LOCK": ("text", {"sequence", "hash", "event_time"}),
    "AUDIT_EVENT_INSERT": (
        "text int8 timestamptz text text text text text text text text jsonb jsonb int8 text text text bytea",
        set(),
    ),
    "AUDIT_EVENT_LIST": ("text int8 text text text text text text timestamptz timestamptz int8", AUDIT_COLUMNS),
    "AUDIT_EVENT_WALK": ("text int8 int8 int8", AUDIT_COLUMNS),
    "AUDIT_CHAIN_LIST": ("", {"organization_id", "sequence", "hash", "start_sequence", "start_hash", "last_sequence"}),
    "AUDIT_ORPHAN_LIST": ("", {"organization_id"}),
    "SUSPICIOUS_USE_ADD": ("text[] text[] text[] text[] int8[]", set()),
    "SUSPICIOUS_USE_LIST": (
        "text int8 int8",
        {"id", "hour", "source", "outcome", "organization_id", "key_id", "count", "first_time", "last_time"},
    ),
    "SUSPICIOUS_USE_FORGET": ("interval int8", set()),
    "AUDIT_MAKE_PARTITIONS": ("", {"audit_make_partitions"}),
    "AUDIT_FORGET": ("interval", {"audit_forget"}),
    "ROLE_CURRENT": ("", {"current_user"}),
    "ROLE_GRANTS": ("text", {"statement"}),
    "SCHEMA_VERSION": ("", {"version_num"}),
    "MIGRATION_LOCK_TAKE": ("int8", {"pg_advisory_lock"}),
    "HOUSEKEEPING_TAKE": ("text interval", {"?column?"}),
    "DEPLOYMENT_GET": ("text", {"value"}),
    "DEPLOYMENT_INSERT": ("text bytea", set()),
    "DATABASE_PROBE": ("", {"pg_is_in_recovery"}),
}


async def test_every_statement_fits_the_schema(database: Database) -> None:
    """Each constant of the modules of queries can be prepared against the migrated schema, takes what its callers pass
    and gives what they read. A constant that is added without an entry in this table fails here; those of the outbox
    have a table of their own.
    """
    others = {
        name: value for module, named in statements().items() if module != OUTBOX for name, value in named.items()
    }
    assert STATEMENTS == await prepared(database, others)


class WatchedRow:
    """A row that remembers which of its columns were read."""

    def __init__(self, row: asyncpg.Record) -> None:
        """Takes the row."""
        self._row = row
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """Gives a column."""
        self.read.add(name)
        return self._row[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A statement that is read into a dataclass: with which values to run it, by which reader, into what."""

    statement: str
    values: tuple[Any, ...]
    reader: Callable[[asyncpg.Record], Any]
    result: type[Any]
    beside: frozenset[str] = frozenset()


async def test_columns_are_those_that_are_read(database: Database, store: PostgresStore) -> None:
    """Each column that a statement gives is read into its dataclass, none is asked for that it does not give, and each
    field holds a value of its declared type.
    """
    await store_organization(store, "acme", "Acme", "default", (Scope(name="a:b", description="c"),))
    key, token = await insert_key(
        store,
        permissions=("read",),
        allowed_cidrs=("10.0.0.0/8",),
        metadata={"a": "b"},
        user_id="u1",
        expire_time=datetime.now(UTC) + timedelta(days=1),
    )
    page = ("acme", "", None, None, None, False, 5)
    readings = [
        Reading(statement=queries.KEY_GET, values=(key.id,), reader=rows.key, result=Key),
        Reading(statement=queries.KEY_LIST, values=page, reader=rows.key, result=Key),
        Reading(statement=queries.KEY_LIST_OF_USER, values=(*page, "u1"), reader=rows.key, result=Key),
        Reading(
            statement=queries.SECRET_FIND,
            values=([digest(token)],),
            reader=partial(rows.key_record, show=show),
            result=KeyRecord,
            beside=frozenset({"now_s", "revision", "digest"}),
        ),
        Reading(
            statement=queries.SECRET_FIND_KEYS,
            values=([digest(token)],),
            reader=rows.known_token,
            result=KnownToken,
        ),
        Reading(statement=queries.ORGANIZATION_GET, values=("acme",), reader=rows.organization, result=Organization),
        Reading(statement=queries.ORGANIZATION_LIST, values=("", 1), reader=rows.organization, result=Organization),
        Reading(statement=queries.PLAN_LOCK, values=("default",), reader=rows.plan, result=Plan),
        Reading(statement=queries.PLAN_LIST, values=("", 1), reader=rows.plan, result=Plan),
        Reading(statement=queries.PLAN_INSERT, values=("new", 1, 2), reader=rows.plan, result=Plan),
        Reading(statement=queries.PLAN_UPDATE, values=("default", 1, 2), reader=rows.plan, result=Plan),
    ]
    secret_id = await _exchanged(database, key)
    kept = timedelta(minutes=10)
    readings += [
        Reading(
            statement=queries.SECRET_GET_HOLDER,
            values=(key.id, secret_id),
            reader=tokens.holder,
            result=families.Holder,
        ),
        Reading(
            statement=queries_tokens.FAMILY_LOCK, values=("fam_1", kept), reader=tokens.family, result=families.Family
        ),
        Reading(
            statement=queries_tokens.SIGNING_KEY_LIST, values=(), reader=tokens.signing_key, result=signing.SigningKey
        ),
    ]
    async with database.connection() as connection:
        for reading in readings:
            row = await connection.fetchrow(reading.statement, *reading.values)
            assert row is not None
            watched = WatchedRow(row)
            value = reading.reader(cast("asyncpg.Record", watched))
            assert set(row.keys()) - reading.beside == watched.read, reading.statement
            assert isinstance(value, reading.result)
            assert {} == _mistyped(value)


async def _exchanged(database: Database, key: Key) -> int:
    """Stores what an exchange of a key leaves; gives the id of its secret."""
    pair = JoseSigner(b"tag key").make()
    async with tokens.PostgresTokenStore(database).transaction() as transaction:
        await transaction.insert_signing_key(pair, await transaction.now())
    async with database.connection() as connection:
        secret_id: int = await connection.fetchval("SELECT id FROM secret WHERE key_id = $1", key.id)
        await connection.execute(
            queries_tokens.FAMILY_INSERT,
            *("fam_1", key.id, secret_id, "orders", ("read",), datetime.now(UTC), b"1" * 32, b"2" * 32),
        )
    return secret_id


def _mistyped(value: Any) -> dict[str, Any]:
    """Gives the fields of a dataclass whose values are not of the declared type."""
    hints = typing.get_type_hints(type(value))
    return {
        field.name: getattr(value, field.name)
        for field in fields(value)
        if not _is_of(getattr(value, field.name), hints[field.name])
    }


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in {Union, types.UnionType}:
        return any(_is_of(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(each, typing.get_args(hint)[0]) for each in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)


async def test_what_may_be_none_is_what_may_be_null(observer: Connection) -> None:
    """A field is declared as possibly None exactly if its column may be null."""
    for table, result in (("key", Key), ("organization", Organization), ("plan", Plan)):
        nullable = await observer.fetch(
            "SELECT attname, NOT attnotnull AS nullable FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0",
            table,
        )
        columns = {row["attname"]: row["nullable"] for row in nullable}
        hints = typing.get_type_hints(result)
        declared = {name: type(None) in typing.get_args(hint) for name, hint in hints.items() if name in columns}
        assert {name: columns[name] for name in declared} == declared


async def test_digest_is_32_bytes_and_unique(store: PostgresStore, observer: Connection) -> None:
    """The table of secrets takes no digest that is not 32 bytes long, and none twice."""
    await store_organization(store, "acme", "Acme", "default")
    key, token = await insert_key(store)

    async def complaint(value: bytes) -> str | None:
        try:
            await observer.execute("INSERT INTO secret (digest, key_id, hint) VALUES ($1, $2, '')", value, key.id)
        except (asyncpg.CheckViolationError, asyncpg.UniqueViolationError) as error:
            return error.constraint_name
        return None

    assert "secret_digest_is_sha256" == await complaint(b"\1" * 31)
    assert "secret_digest_is_sha256" == await complaint(b"\1" * 33)
    assert "secret_digest_unique" == await complaint(digest(token))
    assert await complaint(b"\1" * 32) is None
