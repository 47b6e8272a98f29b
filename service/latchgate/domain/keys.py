"""Management of keys: one use case a method.

Each demands of its caller what it needs, and then does its work in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TypedDict
from uuid import UUID

from latchgate.domain import access
from latchgate.domain.audit import AuditEntry, key_snapshot
from latchgate.domain.errors import (
    EtagMismatchError,
    InvalidFieldError,
    KeyExpiredError,
    KeyLimitReachedError,
    KeyNotFoundError,
    LastRootKeyError,
    RootOrganizationError,
)
from latchgate.domain.events import key_event
from latchgate.domain.model import (
    ROOT_ORGANIZATION_ID,
    Caller,
    Changed,
    Effect,
    Environment,
    Issued,
    Key,
    KeyDraft,
    KeyFilter,
    KeyType,
    NewKey,
    Scope,
)
from latchgate.domain.outbox import EventType
from latchgate.domain.permissions import WILDCARD
from latchgate.domain.ports import EffectWaiter, IdMaker, KeyStore, Sealer, Transaction
from latchgate.domain.requests import Retry
from latchgate.domain.rules import (
    apart_from,
    check_email,
    check_expiry,
    check_known,
    check_metadata,
    check_not_ended,
    check_publishable,
    check_undeletable,
    merge_catalogue,
    normal_cidrs,
)
from latchgate.domain.token import TokenFormat


class KeyChanges(TypedDict, total=False):
    """The fields of a key to change, with their new values."""

    name: str
    permissions: tuple[str, ...]
    rate_limit_per_minute: int
    expire_time: datetime | None
    metadata: dict[str, str]
    allowed_cidrs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPage:
    """One page of a list; `more` says whether another follows."""

    keys: Sequence[Key]
    more: bool


class KeyManager:
    """Creates, reads, changes and ends keys."""

    def __init__(
        self,
        *,
        store: KeyStore,
        tokens: TokenFormat,
        sealer: Sealer,
        effects: EffectWaiter,
        make_id: IdMaker,
        deployment_scopes: Sequence[Scope] = (),
    ) -> None:
        """Takes where keys are kept, how tokens are made, and the scopes that the deployment adds to the catalogue."""
        self._store = store
        self._tokens = tokens
        self._sealer = sealer
        self._effects = effects
        self._make_id = make_id
        self._deployment_scopes = tuple(deployment_scopes)

    async def create(
        self, caller: Caller, organization_id: str, draft: KeyDraft, request_id: UUID | None = None
    ) -> Issued:
        """Creates a key and its token."""
        access.require(caller, access.WRITE_KEYS)
        organization_id = access.organization_for(caller, organization_id)
        draft = _checked_draft(organization_id, draft)
        access.require_held(caller, draft.permissions)
        retry = Retry.of(caller, "create", request_id, (organization_id, draft)) if request_id else None
        async with self._store.transaction() as transaction:
            if retry and (earlier := await retry.earlier_answer(transaction, self._sealer)):
                answered, token = earlier
                key = await _lock(transaction, caller, answered.key_id)
                return Issued(key=key, token=token, effect=Effect(revision=answered.revision))
            await self._check_room(transaction, organization_id, draft.permissions, draft.expire_time)
            await access.require_still_in_use(caller, transaction)
            minted = self._tokens.mint(draft.key_type, draft.environment)
            new_key = NewKey(
                id=self._make_id("key_"), organization_id=organization_id, created_by=caller.id, draft=draft
            )
            key = await transaction.insert_key(new_key, minted.secret)
            await transaction.publish(key_event(self._make_id, EventType.CREATED, key, caller))
            await _record(transaction, caller, None, key)
            if retry:
                await retry.keep(transaction, self._sealer, key_id=key.id, revision=0, token=minted.token)
        return Issued(key=key, token=minted.token, effect=Effect(revision=0))

    async def _check_room(
        self,
        transaction: Transaction,
        organization_id: str,
        permissions: Iterable[str],
        expire_time: datetime | None = None,
    ) -> None:
        """Demands that the organization may have the key; from here on no other can take the last place."""
        organization = await transaction.lock_organization(organization_id)
        if organization is None:
            raise access.organization_not_found(organization_id)
        check_known(permissions, merge_catalogue(self._deployment_scopes, organization.scopes))
        check_expiry(expire_time, await transaction.now())
        if organization.key_count >= organization.max_keys:
            raise KeyLimitReachedError(
                f"organization {organization_id} has {organization.key_count} keys, and plan {organization.plan_id} "
                f"allows {organization.max_keys}; revoke keys that are not used, or raise the plan",
                max_keys=str(organization.max_keys),
            )

    async def get(self, caller: Caller, key_id: str) -> Key:
        """Reads a key."""
        access.require(caller, access.READ_KEYS)
        return access.visible(caller, await self._store.get_key(key_id), key_id)

    async def list(self, caller: Caller, key_filter: KeyFilter, after: str, count: int) -> KeyPage:
        """Lists up to `count` keys beyond the id `after`, newest first. The filter's organization may be empty."""
        access.require(caller, access.READ_KEYS)
        key_filter = replace(key_filter, organization_id=access.organization_for(caller, key_filter.organization_id))
        keys = await self._store.list_keys(key_filter, after, count + 1)
        if not keys and await self._store.scopes(key_filter.organization_id) is None:
            raise access.organization_not_found(key_filter.organization_id)
        return KeyPage(keys=keys[:count], more=len(keys) > count)

    async def update(self, caller: Caller, key_id: str, etag: str, changes: KeyChanges) -> Changed:
        """Changes fields of a key."""
        access.require(caller, access.WRITE_KEYS)
        changes = _checked_changes(changes)
        async with self._store.transaction() as transaction:
            key = await _lock(transaction, caller, key_id)
            if etag and etag != key.etag:
                raise EtagMismatchError(f"key {key_id} was changed since {etag}; it is {key.etag} now", etag=key.etag)
            check_not_ended(key)
            updated = replace(key, **changes)
            if updated != key:
                await self._check_update(transaction, caller, key, updated)
                key = await self._save(transaction, caller, key, updated, EventType.UPDATED)
        return await self._changed(caller, key)

    async def _check_update(self, transaction: Transaction, caller: Caller, key: Key, updated: Key) -> None:
        access.require_held_to_widen(caller, key, updated)
        if updated.permissions != key.permissions:
            if key.is_root:
                raise RootOrganizationError("the permissions of root keys are fixed: they may do everything")
            added = [permission for permission in updated.permissions if permission not in key.permissions]
            access.require_held(caller, added)
            check_publishable(key.key_type, updated.permissions)
            organization = await transaction.lock_organization(key.organization_id)
            own = organization.scopes if organization else ()
            check_known(added, merge_catalogue(self._deployment_scopes, own))
        if updated.expire_time != key.expire_time:
            check_expiry(updated.expire_time, await transaction.now())
            if updated.expire_time is not None:
                await _keep_a_root_key(transaction, key)

    async def toggle(self, caller: Caller, key_id: str, active: bool | None) -> Changed:
        """Switches a key on or off, or with None to the opposite of what it is."""
        access.require(caller, access.WRITE_KEYS)
        async with self._store.transaction() as transaction:
            key = await _lock(transaction, caller, key_id)
            check_not_ended(key)
            updated = replace(key, active=not key.active if active is None else active)
            if updated != key:
                access.require_held_to_widen(caller, key, updated)
                if not updated.active:
                    await _keep_a_root_key(transaction, key)
                event_type = EventType.ACTIVATED if updated.active else EventType.DEACTIVATED
                key = await self._save(transaction, caller, key, updated, event_type)
        return await self._changed(caller, key)

    async def rotate(self, caller: Caller, key_id: str, grace: timedelta, request_id: UUID | None = None) -> Issued:
        """Gives a key a new token; the one before stays good for `grace`, and any older one ends now."""
        access.require(caller, access.WRITE_KEYS)
        retry = Retry.of(caller, "rotate", request_id, (key_id, grace)) if request_id else None
        async with self._store.transaction() as transaction:
            key = await _lock(transaction, caller, key_id)
            access.require_held(caller, key.permissions)
            if retry and (earlier := await retry.earlier_answer(transaction, self._sealer)):
                answered, token = earlier
                revision = answered.revision
            else:
                check_not_ended(key)
                if key.is_expired:
                    raise KeyExpiredError(f"key {key_id} has expired; set a later expire_time first")
                await _keep_a_root_key(transaction, key)
                minted = self._tokens.mint(key.key_type, key.environment)
                token = minted.token
                await transaction.rotate_secret(key_id, minted.secret, grace)
                key = await self._save(transaction, caller, key, key, EventType.ROTATED)
                revision = key.revision
                if retry:
                    await retry.keep(transaction, self._sealer, key_id=key_id, revision=revision, token=token)
        return Issued(key=key, token=token, effect=await self._effects.wait(revision, caller.answer_by_s))

    async def revoke(self, caller: Caller, key_id: str, reason: str) -> Changed:
        """Ends a key for good, also one that is deleted and could come back; the first reason stays."""
        access.require(caller, access.WRITE_KEYS)
        async with self._store.transaction() as transaction:
            key = await _lock(transaction, caller, key_id)
            if key.revoke_time is None or key.is_deleted_alone:
                await _keep_a_root_key(transaction, key)
                revoke_time = apart_from(key.delete_time, await transaction.now())
                revoked = replace(key, revoke_time=revoke_time, revoke_reason=reason)
                key = await self._save(transaction, caller, key, revoked, EventType.REVOKED)
        return await self._changed(caller, key)

    async def delete(self, caller: Caller, key_id: str) -> Changed:
        """Ends a key and hides it; unless it is revoked as well, it can be brought back for some time."""
        access.require(caller, access.WRITE_KEYS)
        async with self._store.transaction() as transaction:
            key = await _lock(transaction, caller, key_id)
            if key.delete_time is None:
                if key.revoke_time is None:
                    await _keep_a_root_key(transaction, key)
                delete_time = apart_from(key.revoke_time, await transaction.now())
                deleted = replace(key, revoke_time=key.revoke_time or delete_time, delete_time=delete_time)
                key = await self._save(transaction, caller, key, deleted, EventType.DELETED)
        return await self._changed(caller, key)

    async def undelete(self, caller: Caller, key_id: str) -> Changed:
        """Brings back a key that was deleted and not revoked; it counts again."""
        access.require(caller, access.WRITE_KEYS)
        async with self._store.transaction() as transaction:
            key = await _lock(transaction, caller, key_id)
            check_undeletable(key)
            if key.delete_time is not None:
                access.require_held(caller, key.permissions)
                await self._check_room(transaction, key.organization_id, key.permissions)
                undeleted = replace(key, revoke_time=None, delete_time=None)
                key = await self._save(transaction, caller, key, undeleted, EventType.UNDELETED)
        return await self._changed(caller, key)

    async def publishable(self, caller: Caller, organization_id: str, environment: Environment) -> tuple[Key, str]:
        """Reads the newest active publishable key of an environment, and its token."""
        access.require(caller, access.READ_KEYS)
        organization_id = access.organization_for(caller, organization_id)
        found = await self._store.publishable_key(organization_id, environment)
        if found is None:
            if await self._store.scopes(organization_id) is None:
                raise access.organization_not_found(organization_id)
            raise KeyNotFoundError(
                f"organization {organization_id} has no active publishable key for {environment.value}; create one"
            )
        return found

    async def _save(
        self, transaction: Transaction, caller: Caller, before: Key, updated: Key, event_type: EventType
    ) -> Key:
        """Stores a changed key, and has it told to whoever wants to know."""
        saved = await transaction.save_key(updated, await transaction.record_change("key", updated.id))
        await transaction.publish(key_event(self._make_id, event_type, saved, caller))
        await _record(transaction, caller, before, saved)
        return saved

    async def _changed(self, caller: Caller, key: Key) -> Changed:
        return Changed(key=key, effect=await self._effects.wait(key.revision, caller.answer_by_s))


async def _lock(transaction: Transaction, caller: Caller, key_id: str) -> Key:
    """Reads a key to be changed by the caller, who must be one still when nobody else can change it any more."""
    key = access.visible(caller, await transaction.lock_key(key_id), key_id)
    await access.require_still_in_use(caller, transaction)
    return key


async def _record(transaction: Transaction, caller: Caller, before: Key | None, after: Key) -> None:
    entry = AuditEntry(
        organization_id=after.organization_id,
        entity="key",
        entity_id=after.id,
        before=key_snapshot(before) if before else None,
        after=key_snapshot(after),
        revision=after.revision,
    )
    await transaction.record_audit(caller, entry)


async def _keep_a_root_key(transaction: Transaction, key: Key) -> None:
    """Demands that another root key is left that is active and set to stay so. Raises LastRootKeyError."""
    if not key.is_root:
        return
    lasting = await transaction.lasting_root_key_ids()
    if key.id in lasting and len(lasting) == 1:
        raise LastRootKeyError(
            f"key {key.id} is the last root key that is active and does not expire; create another first: "
            f"CreateKey with organization_id {ROOT_ORGANIZATION_ID}"
        )


def _checked_draft(organization_id: str, draft: KeyDraft) -> KeyDraft:
    check_email(draft.user_email)
    check_metadata(draft.metadata)
    check_publishable(draft.key_type, draft.permissions)
    draft = replace(draft, allowed_cidrs=normal_cidrs(draft.allowed_cidrs))
    if organization_id != ROOT_ORGANIZATION_ID:
        return draft
    if draft.key_type is not KeyType.SECRET:
        raise InvalidFieldError([("key_type", "must be secret for a root key")])
    if draft.permissions not in ((), (WILDCARD,)):
        raise InvalidFieldError([("permissions", "must be empty for a root key: it may do everything")])
    return replace(draft, permissions=(WILDCARD,))


def _checked_changes(changes: KeyChanges) -> KeyChanges:
    if changes.get("name") == "":
        raise InvalidFieldError([("name", "must not be empty")])
    if "metadata" in changes:
        check_metadata(changes["metadata"])
    if "allowed_cidrs" in changes:
        changes = {**changes, "allowed_cidrs": normal_cidrs(changes["allowed_cidrs"])}
    return changes
