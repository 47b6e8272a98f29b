"""A tenant of a running service: its organization, a key that may do all in it, and the calls that tests make."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from latchgate.storage import queries, queries_coherence
from support.databases import until
from support.folders import cloning
from support.service import Metadata, RunningService, bearer

NOBODYS_KEY = "key_00000000000000000000000000"
"""An id that no key ever had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """An organization of a service. Unless a caller is given, calls are made with its admin's key, which holds `*`."""

    service: RunningService
    id: str
    admin: Metadata
    admin_key_id: str

    async def key(self, **fields: Any) -> keys_pb.CreateKeyResponse:
        """Makes a key."""
        fields.setdefault("name", "a key")
        return await self.create(keys_pb.CreateKeyRequest(**fields))

    async def caller(self, *permissions: str, **fields: Any) -> Metadata:
        """Makes a key with these permissions, and gives the metadata by which its holder makes itself known."""
        return bearer((await self.key(permissions=permissions, **fields)).token)

    def create(
        self, request: keys_pb.CreateKeyRequest, caller: Metadata | None = None
    ) -> Awaitable[keys_pb.CreateKeyResponse]:
        """Calls CreateKey."""
        return self._call("CreateKey", request, caller)

    async def get(self, key_id: str, caller: Metadata | None = None) -> key_pb2.Key:
        """Calls GetKey."""
        answer: keys_pb.GetKeyResponse = await self._call("GetKey", keys_pb.GetKeyRequest(key_id=key_id), caller)
        return answer.key

    def list(self, caller: Metadata | None = None, **fields: Any) -> Awaitable[keys_pb.ListKeysResponse]:
        """Calls ListKeys."""
        return self._call("ListKeys", keys_pb.ListKeysRequest(**fields), caller)

    def update(
        self,
        key: key_pb2.Key,
        *paths: str,
        etag: str = "",
        caller: Metadata | None = None,
    ) -> Awaitable[keys_pb.UpdateKeyResponse]:
        """Calls UpdateKey with a mask of these paths."""
        mask = field_mask_pb2.FieldMask(paths=paths)
        return self._call("UpdateKey", keys_pb.UpdateKeyRequest(key=key, update_mask=mask, etag=etag), caller)

    def toggle(
        self, key_id: str, *, active: bool | None = None, caller: Metadata | None = None
    ) -> Awaitable[keys_pb.ToggleKeyResponse]:
        """Calls ToggleKey."""
        return self._call("ToggleKey", keys_pb.ToggleKeyRequest(key_id=key_id, active=active), caller)

    def rotate(
        self,
        key_id: str,
        *,
        grace: timedelta = timedelta(0),
        request_id: str = "",
        caller: Metadata | None = None,
    ) -> Awaitable[keys_pb.RotateKeyResponse]:
        """Calls RotateKey."""
        period = duration_pb2.Duration()
        period.FromTimedelta(grace)
        request = keys_pb.RotateKeyRequest(key_id=key_id, grace_period=period, request_id=request_id)
        return self._call("RotateKey", request, caller)

    def revoke(
        self, key_id: str, *, reason: str = "", caller: Metadata | None = None
    ) -> Awaitable[keys_pb.RevokeKeyResponse]:
        """Calls RevokeKey."""
        return self._call("RevokeKey", keys_pb.RevokeKeyRequest(key_id=key_id, reason=reason), caller)

    def delete(self, key_id: str, *, caller: Metadata | None = None) -> Awaitable[keys_pb.DeleteKeyResponse]:
        """Calls DeleteKey."""
        return self._call("DeleteKey", keys_pb.DeleteKeyRequest(key_id=key_id), caller)

    def undelete(self, key_id: str, *, caller: Metadata | None = None) -> Awaitable[keys_pb.UndeleteKeyResponse]:
        """Calls UndeleteKey."""
        return self._call("UndeleteKey", keys_pb.UndeleteKeyRequest(key_id=key_id), caller)

    def publishable(
        self, caller: Metadata | None = None, **fields: Any
    ) -> Awaitable[keys_pb.GetPublishableKeyResponse]:
        """Calls GetPublishableKey."""
        return self._call("GetPublishableKey", keys_pb.GetPublishableKeyRequest(**fields), caller)

    def scopes(self, caller: Metadata | None = None, **fields: Any) -> Awaitable[keys_pb.ListScopesResponse]:
        """Calls ListScopes."""
        return self._call("ListScopes", keys_pb.ListScopesRequest(**fields), caller)

    async def create_scope(self, name: str, caller: Metadata | None = None, **fields: Any) -> keys_pb.Scope:
        """Calls CreateScope."""
        request = keys_pb.CreateScopeRequest(name=name, **fields)
        answer: keys_pb.CreateScopeResponse = await self._call("CreateScope", request, caller)
        return answer.scope

    async def delete_scope(self, name: str, caller: Metadata | None = None, **fields: Any) -> Sequence[str]:
        """Calls DeleteScope, and gives the names of the scopes that are left."""
        request = keys_pb.DeleteScopeRequest(name=name, **fields)
        answer: keys_pb.DeleteScopeResponse = await self._call("DeleteScope", request, caller)
        return [scope.name for scope in answer.scopes]

    async def scope_names(self) -> Sequence[str]:
        """Gives the names of the catalogue."""
        return [scope.name for scope in (await self.scopes()).scopes]

    async def set_active(self, *, active: bool) -> None:
        """Switches the organization, as root."""
        await update_organization(self.service, organizations_pb.Organization(id=self.id, active=active), "active")

    async def give_scopes(self, *names: str) -> None:
        """Gives the organization scopes of its own, as root."""
        scopes = [organizations_pb.ScopeDefinition(name=name) for name in names]
        await update_organization(self.service, organizations_pb.Organization(id=self.id, scopes=scopes), "scopes")

    async def expire(self, key_id: str) -> None:
        """Moves a key's expiry to this moment, by the database's clock."""
        await change_key(self.service, key_id, "UPDATE key SET expire_time = now() WHERE id = $1", key_id)

    async def age_deletion(self, key_id: str, age: timedelta) -> None:
        """Moves a key's deletion into the past, by the database's clock."""
        statement = (
            "UPDATE key SET delete_time = now() - $2::interval, revoke_time = CASE WHEN revoke_time = delete_time "
            "THEN now() - $2::interval ELSE revoke_time END WHERE id = $1"
        )
        await execute(self.service, statement, key_id, age)

    async def end_grace(self, key_id: str) -> None:
        """Moves the end of a running grace period to this moment, by the database's clock."""
        statement = "UPDATE secret SET end_time = now() WHERE key_id = $1 AND end_time > now()"
        await change_key(self.service, key_id, statement, key_id)

    def _call(self, method: str, request: Any, caller: Metadata | None) -> Awaitable[Any]:
        call: Awaitable[Any] = getattr(self.service.keys, method)(request, metadata=caller or self.admin)
        return call


async def make_tenant(service: RunningService, name: str, plan_id: str = "") -> Tenant:
    """Makes an organization whose id begins with `name`, with its admin's key."""
    organization_id = await service.create_organization(f"{name}-{uuid.uuid4().hex}", plan_id)
    admin = await service.create_key(organization_id, name="admin", permissions=["*"])
    return Tenant(service=service, id=organization_id, admin=bearer(admin.token), admin_key_id=admin.key.id)


async def make_plan(service: RunningService, *, rate_limit_per_minute: int = 0, max_keys: int = 1000) -> str:
    """Makes a plan, and gives its id."""
    plan = organizations_pb.Plan(
        id=f"plan-{uuid.uuid4().hex}", rate_limit_per_minute=rate_limit_per_minute, max_keys=max_keys
    )
    await service.organizations.CreatePlan(organizations_pb.CreatePlanRequest(plan=plan), metadata=service.root)
    return plan.id


async def update_organization(
    service: RunningService, organization: organizations_pb.Organization, *paths: str, caller: Metadata | None = None
) -> organizations_pb.UpdateOrganizationResponse:
    """Calls UpdateOrganization with a mask of these paths, as root if no caller is given."""
    request = organizations_pb.UpdateOrganizationRequest(
        organization=organization, update_mask=field_mask_pb2.FieldMask(paths=paths)
    )
    answer: organizations_pb.UpdateOrganizationResponse = await service.organizations.UpdateOrganization(
        request, metadata=caller or service.root
    )
    return answer


async def update_plan(
    service: RunningService, plan: organizations_pb.Plan, *paths: str, caller: Metadata | None = None
) -> organizations_pb.UpdatePlanResponse:
    """Calls UpdatePlan with a mask of these paths, as root if no caller is given."""
    request = organizations_pb.UpdatePlanRequest(plan=plan, update_mask=field_mask_pb2.FieldMask(paths=paths))
    answer: organizations_pb.UpdatePlanResponse = await service.organizations.UpdatePlan(
        request, metadata=caller or service.root
    )
    return answer


@asynccontextmanager
async def cloned_database(postgres_url: str, template_url: str) -> AsyncIterator[str]:
    """Makes a migrated database for more than one test, and gives its address."""
    name = f"shared_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(cloning(name, template_url))
        yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@asynccontextmanager
async def database_of(service: RunningService) -> AsyncIterator[Any]:
    """Connects to a service's database, for what no call can do or show."""
    connection = await asyncpg.connect(service.database_url)
    try:
        yield connection
    finally:
        await connection.close()


async def execute(service: RunningService, statement: str, *arguments: object) -> None:
    """Executes one statement on a service's database."""
    async with database_of(service) as connection:
        await connection.execute(statement, *arguments)


async def change_key(service: RunningService, key_id: str, statement: str, *arguments: object) -> int:
    """Executes one statement that changes a key, as a service of its own would: it stands in the log of changes.

    Comes back when the service has heard of it, and gives its revision.
    """
    async with database_of(service) as connection, connection.transaction():
        await connection.execute(queries.CHANGE_LOCK_TAKE, queries.CHANGE_LOCK)
        await connection.execute(statement, *arguments)
        revision: int = await connection.fetchval(queries_coherence.CHANGE_INSERT, "key", key_id)
    await until_applied(service, revision)
    return revision


async def until_applied(service: RunningService, revision: int) -> None:
    """Waits until a service has applied a change, and all before it."""

    async def is_applied() -> bool:
        applied = service.running.metrics.registry.get_sample_value("latchgate_applied_revision")
        return applied is not None and applied >= revision

    await until(is_applied)


def state_of(key: key_pb2.Key) -> str:
    """Gives the name of a key's state: `ACTIVE`, `REVOKED` ..."""
    return key_pb2.KeyState.Name(key.state).removeprefix("KEY_STATE_")


def outcome_of(answer: keys_pb.ValidateResponse) -> str:
    """Gives the name of an outcome: `VALID`, `REVOKED` ..."""
    return keys_pb.Outcome.Name(answer.outcome).removeprefix("OUTCOME_")


def is_effective(effect: key_pb2.Effect) -> bool:
    """Says whether a change holds everywhere."""
    return effect.state == key_pb2.EFFECT_STATE_EFFECTIVE and not effect.HasField("max_remaining")


def timestamp(time: datetime) -> timestamp_pb2.Timestamp:
    """Writes a time."""
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def hours_ahead(hours: float) -> timestamp_pb2.Timestamp:
    """Writes the time that is so many hours ahead, in whole seconds."""
    return timestamp(datetime.now(UTC).replace(microsecond=0) + timedelta(hours=hours))


def with_fields(key: key_pb2.Key, **fields: Any) -> key_pb2.Key:
    """Gives a copy of a key with other fields; None clears one."""
    changed = key_pb2.Key()
    changed.CopyFrom(key)
    for field in fields:
        changed.ClearField(field)  # type: ignore[arg-type]  # the stubs take names of fields as literals alone
    changed.MergeFrom(key_pb2.Key(**fields))
    return changed


def without_fields(key: key_pb2.Key, *fields: str) -> key_pb2.Key:
    """Gives a copy of a key without some fields, to compare the rest."""
    return with_fields(key, **dict.fromkeys(fields))


def ids(keys: Sequence[key_pb2.Key]) -> list[str]:
    """Gives the ids of keys, in their order."""
    return [key.id for key in keys]


async def retry_delay_s(call: Awaitable[Any]) -> float:
    """Awaits a call that must be refused, and gives after how many seconds it may be tried again."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # it has what is read of a Call
    for detail in status.details if status else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToTimedelta().total_seconds()
    raise AssertionError("the refusal does not say when to try again")
