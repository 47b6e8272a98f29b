"""The domain's transaction, on one connection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

import asyncpg

from latchgate.domain.audit import AuditEntry, AuditEvent, chain
from latchgate.domain.errors import OrganizationExistsError, PlanExistsError, PlanNotFoundError
from latchgate.domain.imported import ImportRow, KnownToken
from latchgate.domain.model import Caller, Key, NewKey, NewSecret, Organization, Plan, Scope
from latchgate.domain.outbox import Event
from latchgate.domain.ports import AnsweredRequest
from latchgate.storage import queries, queries_audit, queries_coherence, queries_outbox, rows
from latchgate.storage.postgres import Connection

TOKEN_KEPT = timedelta(minutes=10)


class PostgresTransaction:
    """Implements latchgate.domain.ports.Transaction."""

    def __init__(self, connection: Connection) -> None:
        """Takes a connection on which a transaction is open."""
        self._connection = connection
        # Whether there is something to be sent out once this is committed.
        self.has_published = False

    async def now(self) -> datetime:
        """The database's clock, fixed for the transaction."""
        now: datetime = await self._connection.fetchval("SELECT now()")
        return now

    async def lock_organization(self, organization_id: str) -> Organization | None:
        """Locks an organization, and then reads it as the last holder of the lock left it."""
        if await self._connection.fetchval(queries.ORGANIZATION_LOCK, organization_id) is None:
            return None
        return rows.organization(_one(await self._connection.fetchrow(queries.ORGANIZATION_GET, organization_id)))

    async def lock_key(self, key_id: str) -> Key | None:
        """Locks a key's organization, then the key, and then reads it as the last holder of the lock left it."""
        if await self._connection.fetchval(queries.KEY_LOCK_ORGANIZATION, key_id) is None:
            return None
        if await self._connection.fetchval(queries.KEY_LOCK, key_id) is None:
            # It was removed while its lock was waited for.
            return None
        return await self._key(key_id)

    async def is_in_use(self, secret_id: int) -> bool:
        """Says whether a secret is good now, and keeps it as it is until the end."""
        return bool(await self._connection.fetchval(queries.SECRET_LOCK_IN_USE, secret_id))

    async def lasting_root_key_ids(self) -> Sequence[str]:
        """The root keys that are active and set to stay so."""
        return [row["id"] for row in await self._connection.fetch(queries.KEY_LIST_LASTING_ROOT)]

    async def insert_key(self, key: NewKey, secret: NewSecret) -> Key:
        """Stores a key with its first secret, and counts it."""
        draft = key.draft
        await self._connection.execute(
            queries.KEY_INSERT,
            key.id,
            key.organization_id,
            draft.name,
            draft.key_type.value,
            draft.environment.value,
            draft.permissions,
            draft.rate_limit_per_minute,
            draft.user_id,
            draft.user_email,
            dict(draft.metadata),
            draft.allowed_cidrs,
            key.created_by,
            draft.expire_time,
        )
        await self._insert_secret(key.id, secret)
        return await self._key(key.id)

    async def import_keys(
        self, organization_id: str, created_by: str, keys: Mapping[str, ImportRow]
    ) -> Collection[str]:
        """Stores rows whose digests are new, with their secrets, in one statement, and counts them."""
        given = [rows.imported_json(key_id, row) for key_id, row in keys.items()]
        stored = await self._connection.fetch(queries.KEY_IMPORT, organization_id, created_by, given)
        return {row["id"] for row in stored}

    async def find_tokens(self, digests: Sequence[bytes]) -> Sequence[KnownToken]:
        """Reads whose the digests are."""
        return [rows.known_token(row) for row in await self._connection.fetch(queries.SECRET_FIND_KEYS, digests)]

    async def newest_revision(self) -> int:
        """Reads the newest revision in the log."""
        revision: int = await self._connection.fetchval(queries_coherence.CHANGE_NEWEST)
        return revision

    async def save_key(self, key: Key, revision: int) -> Key:
        """Stores what can change of a key; it counts as long as it is not revoked."""
        await self._connection.execute(
            queries.KEY_UPDATE,
            key.id,
            key.name,
            key.permissions,
            key.rate_limit_per_minute,
            key.active,
            dict(key.metadata),
            key.allowed_cidrs,
            key.expire_time,
            key.revoke_time,
            key.revoke_reason,
            key.delete_time,
            revision,
        )
        return await self._key(key.id)

    async def rotate_secret(self, key_id: str, secret: NewSecret, grace: timedelta) -> None:
        """Ends the newest secret after `grace` and all before it now, then stores another."""
        await self._connection.execute(queries.SECRET_END, key_id, grace)
        await self._insert_secret(key_id, secret)

    async def insert_organization(
        self, organization_id: str, name: str, plan_id: str, scopes: Sequence[Scope]
    ) -> Organization:
        """Stores an organization."""
        try:
            await self._connection.execute(
                queries.ORGANIZATION_INSERT, organization_id, name, plan_id, rows.scopes_json(scopes)
            )
        except asyncpg.UniqueViolationError:
            raise OrganizationExistsError(f"organization {organization_id} exists already") from None
        except asyncpg.ForeignKeyViolationError:
            raise PlanNotFoundError(f"plan {plan_id} does not exist") from None
        return rows.organization(_one(await self._connection.fetchrow(queries.ORGANIZATION_GET, organization_id)))

    async def save_organization(self, organization: Organization) -> Organization:
        """Stores what can change of an organization."""
        try:
            await self._connection.execute(
                queries.ORGANIZATION_UPDATE,
                organization.id,
                organization.name,
                organization.plan_id,
                organization.active,
                rows.scopes_json(organization.scopes),
            )
        except asyncpg.ForeignKeyViolationError:
            raise PlanNotFoundError(f"plan {organization.plan_id} does not exist") from None
        return rows.organization(_one(await self._connection.fetchrow(queries.ORGANIZATION_GET, organization.id)))

    async def permissions_held(self, organization_id: str, names: Sequence[str]) -> Sequence[str]:
        """What an organization's keys are permitted that is one of `names`, or has a wildcard."""
        found = await self._connection.fetch(queries.KEY_LIST_PERMISSIONS, organization_id, names)
        return [row["permission"] for row in found]

    async def keys_holding(
        self, organization_id: str, permissions: Sequence[str], count: int
    ) -> tuple[Sequence[str], int]:
        """The first ids of the keys that hold one of some permissions, and how many there are."""
        found = await self._connection.fetch(queries.KEY_LIST_HOLDING, organization_id, permissions, count)
        return [row["id"] for row in found], found[0]["key_count"] if found else 0

    async def lock_plan(self, plan_id: str) -> Plan | None:
        """Reads a plan and keeps others from changing it."""
        row = await self._connection.fetchrow(queries.PLAN_LOCK, plan_id)
        return None if row is None else rows.plan(row)

    async def insert_plan(self, plan_id: str, rate_limit_per_minute: int, max_keys: int) -> Plan:
        """Stores a plan."""
        try:
            row = await self._connection.fetchrow(queries.PLAN_INSERT, plan_id, rate_limit_per_minute, max_keys)
        except asyncpg.UniqueViolationError:
            raise PlanExistsError(f"plan {plan_id} exists already") from None
        return rows.plan(_one(row))

    async def save_plan(self, plan: Plan) -> Plan:
        """Stores what can change of a plan."""
        row = await self._connection.fetchrow(queries.PLAN_UPDATE, plan.id, plan.rate_limit_per_minute, plan.max_keys)
        return rows.plan(_one(row))

    async def record_change(self, entity: str, entity_id: str) -> int:
        """Takes the lock that orders changes, and only then a number."""
        await self._connection.execute(queries.CHANGE_LOCK_TAKE, queries.CHANGE_LOCK)
        revision: int = await self._connection.fetchval(queries_coherence.CHANGE_INSERT, entity, entity_id)
        return revision

    async def record_audit(self, caller: Caller | None, entry: AuditEntry) -> None:
        """Takes the end of the organization's chain, and adds an event to it."""
        head = _one(await self._connection.fetchrow(queries_audit.AUDIT_HEAD_LOCK, entry.organization_id))
        event = AuditEvent.of(entry, caller, sequence=head["sequence"] + 1, event_time=head["event_time"])
        await self._connection.execute(
            queries_audit.AUDIT_EVENT_INSERT, *rows.audit_values(event), chain(head["hash"], event)
        )
        if caller is not None:
            caller.call.is_recorded = True

    async def publish(self, *events: Event) -> None:
        """Stores events in their order, to be sent out by whichever worker comes first."""
        await self._connection.execute(
            queries_outbox.EVENT_INSERT,
            [event.id for event in events],
            [event.organization_id for event in events],
            [event.type.value for event in events],
            [event.subject for event in events],
            [event.body for event in events],
            [event.mail_to for event in events],
        )
        self.has_published = True

    async def claim_request(self, slot: bytes, body_digest: bytes) -> AnsweredRequest | None:
        """Reserves a slot; a twin that is under way is waited for by the unique index."""
        if await self._connection.fetchval(queries.REQUEST_CLAIM, slot, body_digest) is not None:
            return None
        row = _one(await self._connection.fetchrow(queries.REQUEST_GET, slot, TOKEN_KEPT))
        return AnsweredRequest(
            body_digest=row["body_digest"],
            key_id=row["key_id"],
            revision=row["revision"],
            sealed_token=row["sealed_token"],
        )

    async def answer_request(self, slot: bytes, key_id: str, revision: int, sealed_token: bytes) -> None:
        """Keeps the answer in a slot that was claimed."""
        await self._connection.execute(queries.REQUEST_ANSWER, slot, key_id, revision, sealed_token)

    async def _insert_secret(self, key_id: str, secret: NewSecret) -> None:
        await self._connection.execute(queries.SECRET_INSERT, secret.digest, key_id, secret.hint, secret.readable_token)

    async def _key(self, key_id: str) -> Key:
        return rows.key(_one(await self._connection.fetchrow(queries.KEY_GET, key_id)))


def _one(row: asyncpg.Record | None) -> asyncpg.Record:
    """Gives a row that must be there, because the transaction holds it."""
    if row is None:
        raise LookupError("a row that this transaction holds is gone")
    return row
