"""When a change holds everywhere, and how Validate is asked to take account of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import Tenant, is_effective, make_plan, update_organization, update_plan
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def _update_plan(tenant: Tenant, _: str) -> Any:
    plan_id = await make_plan(tenant.service)
    return await update_plan(tenant.service, organizations_pb.Plan(id=plan_id, max_keys=7))


async def _undelete(tenant: Tenant, key_id: str) -> Any:
    await tenant.delete(key_id)
    return await tenant.undelete(key_id)


CHANGES: dict[str, Callable[[Tenant, str], Awaitable[Any]]] = {
    "UpdateKey": lambda tenant, key_id: tenant.update(key_pb2.Key(id=key_id, name="after")),
    "ToggleKey": lambda tenant, key_id: tenant.toggle(key_id),
    "RotateKey": lambda tenant, key_id: tenant.rotate(key_id),
    "RevokeKey": lambda tenant, key_id: tenant.revoke(key_id),
    "DeleteKey": lambda tenant, key_id: tenant.delete(key_id),
    "UndeleteKey": _undelete,
    "UpdateOrganization": lambda tenant, _: update_organization(
        tenant.service, organizations_pb.Organization(id=tenant.id, name="After")
    ),
    "UpdatePlan": _update_plan,
}


async def test_table_is_complete() -> None:
    """Every method that answers with an effect is in the table above."""
    services = (
        keys_pb.DESCRIPTOR.services_by_name["KeyService"],
        organizations_pb.DESCRIPTOR.services_by_name["OrganizationService"],
    )
    methods = [method for service in services for method in service.methods]
    assert {method.name for method in methods if "effect" in method.output_type.fields_by_name} == CHANGES.keys()


async def test_every_change_is_effective_and_later_than_the_one_before(acme: Tenant) -> None:
    """Each change takes a place of its own in the order of all changes, and holds everywhere when the call returns."""
    effects = [(await change(acme, (await acme.key()).key.id)).effect for change in CHANGES.values()]
    assert all(is_effective(effect) for effect in effects)
    revisions = [effect.revision for effect in effects]
    assert revisions == sorted(set(revisions))
    assert 0 < revisions[0]


@pytest.mark.parametrize("method", ["UpdateKey", "ToggleKey", "RevokeKey", "DeleteKey", "UpdateOrganization"])
async def test_validate_takes_account_of_the_change(acme: Tenant, method: str) -> None:
    """After the call, Validate tells a revision that holds the change, and can be asked for no older state."""
    created = await acme.key()
    revision = (await CHANGES[method](acme, created.key.id)).effect.revision
    assert revision <= (await acme.service.validate(created.token)).revision
    assert revision <= (await acme.service.validate(created.token, min_revision=revision)).revision


async def test_revision_that_was_never_given_out(acme: Tenant) -> None:
    """A revision beyond all changes is refused: waiting for it would never end."""
    created = await acme.key()
    for min_revision in (2**40, 2**63 - 1):
        error = await refusal(acme.service.validate(created.token, min_revision=min_revision))
        assert (grpc.StatusCode.FAILED_PRECONDITION, "REVISION_UNKNOWN") == (error.code, error.reason)


async def test_negative_revision(acme: Tenant) -> None:
    """A negative revision is refused, whatever the token."""
    for token in ((await acme.key()).token, "no token"):
        error = await refusal(acme.service.validate(token, min_revision=-1))
        assert ("INVALID_FIELD", ["min_revision"]) == (error.reason, list(error.violations))


async def test_key_that_was_never_changed(acme: Tenant) -> None:
    """A call that changes nothing is effective, and tells the revision of the last change: 0 if there was none."""
    key = (await acme.key()).key
    unchanged = await acme.toggle(key.id, active=True)
    assert (True, 0) == (is_effective(unchanged.effect), unchanged.effect.revision)
    changed = await acme.update(key_pb2.Key(id=key.id, name="after"))
    assert changed.effect == (await acme.toggle(key.id, active=True)).effect
