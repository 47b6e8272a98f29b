"""The catalogue of scopes: what an organization's keys can be given, and what it can add and take away itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from latchgate.domain import access
from latchgate.domain.audit import AuditEntry
from latchgate.domain.errors import (
    RootOrganizationError,
    ScopeExistsError,
    ScopeInUseError,
    ScopeLimitReachedError,
    ScopeNotOwnError,
)
from latchgate.domain.model import ROOT_ORGANIZATION_ID, Caller, HeldPermission, Organization, Scope, ScopeSource
from latchgate.domain.permissions import WILDCARD, is_known, orphaned
from latchgate.domain.ports import KeyStore, Transaction
from latchgate.domain.rules import check_scope_name, merge_catalogue

MAX_OWN_SCOPES: Final = 1000
NAMED_KEYS: Final = 10
"""How many of the keys that need a scope are named."""

_OWNERS: Final = {
    ScopeSource.CORE: "the service's own",
    ScopeSource.DEPLOYMENT: "the deployment's",
    ScopeSource.ORGANIZATION: "the organization's own",
}


class ScopeManager:
    """Lists the scopes of an organization, and changes its own."""

    def __init__(self, *, store: KeyStore, deployment_scopes: Sequence[Scope] = ()) -> None:
        """Takes where organizations are kept, and the scopes that the deployment adds to the catalogue."""
        self._store = store
        self._deployment_scopes = tuple(deployment_scopes)

    async def list(self, caller: Caller, organization_id: str) -> Sequence[Scope]:
        """Reads the catalogue of an organization."""
        access.require(caller, access.READ_KEYS)
        organization_id = access.organization_for(caller, organization_id)
        own = await self._store.scopes(organization_id)
        if own is None:
            raise access.organization_not_found(organization_id)
        return merge_catalogue(self._deployment_scopes, own)

    async def create(self, caller: Caller, organization_id: str, scope: Scope) -> Scope:
        """Adds a scope to an organization's own."""
        access.require(caller, access.WRITE_SCOPES)
        organization_id = access.organization_for(caller, organization_id)
        async with self._store.transaction() as transaction:
            organization = await _lock(transaction, caller, organization_id)
            known = find(scope.name, merge_catalogue(self._deployment_scopes, organization.scopes))
            if known is not None:
                raise ScopeExistsError(
                    f"the catalogue has {scope.name} already: it is {_OWNERS[known.source]}", source=known.source.value
                )
            check_scope_name(scope.name)
            if len(organization.scopes) >= MAX_OWN_SCOPES:
                raise ScopeLimitReachedError(
                    f"organization {organization_id} has {MAX_OWN_SCOPES} scopes of its own, and can have no more; "
                    "remove some that are not used",
                    max_scopes=str(MAX_OWN_SCOPES),
                )
            await transaction.save_organization(replace(organization, scopes=(*organization.scopes, scope)))
            await _record(transaction, caller, organization_id, scope.name, before=None, after=scope)
        return scope

    async def delete(self, caller: Caller, organization_id: str, name: str) -> Sequence[Scope]:
        """Takes a scope out of an organization's own, if no key needs it; gives the catalogue that is left."""
        access.require(caller, access.WRITE_SCOPES)
        organization_id = access.organization_for(caller, organization_id)
        async with self._store.transaction() as transaction:
            organization = await _lock(transaction, caller, organization_id)
            kept = tuple(scope for scope in organization.scopes if scope.name != name)
            left = merge_catalogue(self._deployment_scopes, kept)
            if len(kept) < len(organization.scopes):
                await check_unused(transaction, organization, left)
                await transaction.save_organization(replace(organization, scopes=kept))
                removed = find(name, organization.scopes)
                await _record(transaction, caller, organization_id, name, before=removed, after=None)
            elif (known := find(name, left)) is not None:
                raise ScopeNotOwnError(
                    f"scope {name} is {_OWNERS[known.source]}, and no organization can remove it",
                    source=known.source.value,
                )
        return left


async def check_unused(transaction: Transaction, organization: Organization, left: Sequence[Scope]) -> None:
    """Demands that no key of an organization, which is locked, needs any of its scopes that is not among those `left`.

    A key that is neither revoked nor deleted needs a scope if one of its permissions stands for that and would match
    nothing any more. As long as the lock is held no key can be given it. Raises ScopeInUseError.
    """
    names = [scope.name for scope in left]
    removed = sorted({scope.name for scope in organization.scopes}.difference(names))
    held = await transaction.permissions_held(organization.id, removed) if removed else ()
    for name in removed:
        needing = orphaned(held, name, names)
        if needing:
            key_ids, count = await transaction.keys_holding(organization.id, needing, NAMED_KEYS)
            more = f" and {count - len(key_ids)} more" if count > len(key_ids) else ""
            raise ScopeInUseError(
                f"scope {name} is needed by keys, {count} in all: {', '.join(key_ids)}{more}; first change their "
                "permissions, or revoke them",
                scope=name,
                key_count=str(count),
                key_ids=",".join(key_ids),
            )


def missing(held: Iterable[HeldPermission], deployment: Iterable[Scope]) -> Mapping[str, int]:
    """Gives the permissions that match no scope of their keys' catalogues, and how many keys hold each."""
    deployment = tuple(deployment)
    counts: dict[str, int] = {}
    for each in held:
        names = [scope.name for scope in merge_catalogue(deployment, each.own_scopes)]
        if each.permission != WILDCARD and not is_known(each.permission, names):
            counts[each.permission] = counts.get(each.permission, 0) + each.key_count
    return counts


def find(name: str, catalogue: Iterable[Scope]) -> Scope | None:
    """Gives the scope of a name, or None."""
    return next((scope for scope in catalogue if scope.name == name), None)


async def _record(
    transaction: Transaction,
    caller: Caller,
    organization_id: str,
    name: str,
    *,
    before: Scope | None,
    after: Scope | None,
) -> None:
    entry = AuditEntry(
        organization_id=organization_id,
        entity="scope",
        entity_id=name,
        before={"description": before.description} if before else None,
        after={"description": after.description} if after else None,
    )
    await transaction.record_audit(caller, entry)


async def _lock(transaction: Transaction, caller: Caller, organization_id: str) -> Organization:
    """Reads an organization whose scopes the caller, who must be one still, is to change."""
    organization = await transaction.lock_organization(organization_id)
    if organization is None:
        raise access.organization_not_found(organization_id)
    await access.require_still_in_use(caller, transaction)
    if organization_id == ROOT_ORGANIZATION_ID:
        raise RootOrganizationError(f"{ROOT_ORGANIZATION_ID} has no scopes of its own: its keys may do everything")
    return organization
