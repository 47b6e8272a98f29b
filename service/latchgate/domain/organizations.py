"""Management of organizations and plans: for root alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from latchgate.domain import access
from latchgate.domain.audit import AuditEntry, organization_snapshot, plan_snapshot
from latchgate.domain.catalogue import check_unused
from latchgate.domain.errors import InvalidFieldError, PlanNotFoundError, RootOrganizationError
from latchgate.domain.model import (
    DEFAULT_PLAN_ID,
    ROOT_ORGANIZATION_ID,
    Caller,
    Effect,
    Organization,
    Plan,
    Scope,
)
from latchgate.domain.ports import EffectWaiter, IdMaker, OrganizationStore, Transaction
from latchgate.domain.rules import merge_catalogue


class OrganizationChanges(TypedDict, total=False):
    """The fields of an organization to change, with their new values."""

    name: str
    plan_id: str
    active: bool
    scopes: tuple[Scope, ...]


class PlanChanges(TypedDict, total=False):
    """The fields of a plan to change, with their new values."""

    rate_limit_per_minute: int
    max_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrganizationPage:
    """One page of a list; `more` says whether another follows."""

    organizations: Sequence[Organization]
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPage:
    """One page of a list; `more` says whether another follows."""

    plans: Sequence[Plan]
    more: bool


class OrganizationManager:
    """Creates, reads and changes organizations and plans."""

    def __init__(
        self,
        *,
        store: OrganizationStore,
        effects: EffectWaiter,
        make_id: IdMaker,
        deployment_scopes: Sequence[Scope] = (),
    ) -> None:
        """Takes where organizations are kept, and the scopes that the deployment adds to their catalogues."""
        self._deployment_scopes = tuple(deployment_scopes)
        self._store = store
        self._effects = effects
        self._make_id = make_id

    async def create(
        self, caller: Caller, organization_id: str, name: str, plan_id: str, scopes: Sequence[Scope]
    ) -> Organization:
        """Creates an organization."""
        access.require_root(caller)
        _check_scopes(scopes)
        async with self._store.transaction() as transaction:
            organization = await transaction.insert_organization(
                organization_id or self._make_id("org_"), name, plan_id or DEFAULT_PLAN_ID, scopes
            )
            await access.require_still_in_use(caller, transaction)
            await _record_organization(transaction, caller, None, organization, 0)
        return organization

    async def get(self, caller: Caller, organization_id: str) -> Organization:
        """Reads an organization."""
        access.require_root(caller)
        organization = await self._store.get_organization(organization_id)
        if organization is None:
            raise access.organization_not_found(organization_id)
        return organization

    async def list(self, caller: Caller, after: str, count: int) -> OrganizationPage:
        """Lists up to `count` organizations by id, beyond the id `after`."""
        access.require_root(caller)
        organizations = await self._store.list_organizations(after, count + 1)
        return OrganizationPage(organizations=organizations[:count], more=len(organizations) > count)

    async def update(
        self, caller: Caller, organization_id: str, changes: OrganizationChanges
    ) -> tuple[Organization, Effect]:
        """Changes fields of an organization."""
        access.require_root(caller)
        if changes.get("name") == "":
            raise InvalidFieldError([("name", "must not be empty")])
        if changes.get("plan_id") == "":
            raise InvalidFieldError([("plan_id", "must not be empty")])
        _check_scopes(changes.get("scopes", ()))
        if organization_id == ROOT_ORGANIZATION_ID and changes.keys() - {"name"}:
            raise RootOrganizationError(f"of {ROOT_ORGANIZATION_ID} only the name can be changed")
        async with self._store.transaction() as transaction:
            organization = await transaction.lock_organization(organization_id)
            if organization is None:
                raise access.organization_not_found(organization_id)
            await access.require_still_in_use(caller, transaction)
            if "scopes" in changes:
                await check_unused(
                    transaction, organization, merge_catalogue(self._deployment_scopes, changes["scopes"])
                )
            revision = await transaction.record_change("organization", organization_id)
            before, organization = organization, await transaction.save_organization(replace(organization, **changes))
            await _record_organization(transaction, caller, before, organization, revision)
        return organization, await self._effects.wait(revision, caller.answer_by_s)

    async def create_plan(self, caller: Caller, plan_id: str, rate_limit_per_minute: int, max_keys: int) -> Plan:
        """Creates a plan."""
        access.require_root(caller)
        async with self._store.transaction() as transaction:
            plan = await transaction.insert_plan(plan_id, rate_limit_per_minute, max_keys)
            await access.require_still_in_use(caller, transaction)
            await _record_plan(transaction, caller, None, plan, 0)
        return plan

    async def list_plans(self, caller: Caller, after: str, count: int) -> PlanPage:
        """Lists up to `count` plans by id, beyond the id `after`."""
        access.require_root(caller)
        plans = await self._store.list_plans(after, count + 1)
        return PlanPage(plans=plans[:count], more=len(plans) > count)

    async def update_plan(self, caller: Caller, plan_id: str, changes: PlanChanges) -> tuple[Plan, Effect]:
        """Changes fields of a plan."""
        access.require_root(caller)
        async with self._store.transaction() as transaction:
            plan = await transaction.lock_plan(plan_id)
            if plan is None:
                raise PlanNotFoundError(f"plan {plan_id} does not exist")
            await access.require_still_in_use(caller, transaction)
            revision = await transaction.record_change("plan", plan_id)
            before, plan = plan, await transaction.save_plan(replace(plan, **changes))
            await _record_plan(transaction, caller, before, plan, revision)
        return plan, await self._effects.wait(revision, caller.answer_by_s)


async def _record_organization(
    transaction: Transaction, caller: Caller, before: Organization | None, after: Organization, revision: int
) -> None:
    entry = AuditEntry(
        organization_id=after.id,
        entity="organization",
        entity_id=after.id,
        before=organization_snapshot(before) if before else None,
        after=organization_snapshot(after),
        revision=revision,
    )
    await transaction.record_audit(caller, entry)


async def _record_plan(
    transaction: Transaction, caller: Caller, before: Plan | None, after: Plan, revision: int
) -> None:
    """Plans belong to no organization: they are in the trail of the service's own."""
    entry = AuditEntry(
        organization_id=ROOT_ORGANIZATION_ID,
        entity="plan",
        entity_id=after.id,
        before=plan_snapshot(before) if before else None,
        after=plan_snapshot(after),
        revision=revision,
    )
    await transaction.record_audit(caller, entry)


def _check_scopes(scopes: Sequence[Scope]) -> None:
    names = Counter(scope.name for scope in scopes)
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise InvalidFieldError([("scopes", f"must name each scope once; {', '.join(repeated)} stands there again")])
