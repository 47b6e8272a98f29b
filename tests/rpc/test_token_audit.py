"""What exchanges and refreshes leave behind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format

from apikeys.v1 import audit_service_pb2 as audit_pb
from apikeys.v1 import key_service_pb2 as keys_pb
from support.databases import until
from support.keys import Tenant, database_of, make_tenant
from support.service import run_service
from support.tokens import REFRESH_TOKENS, exchange, refresh, refused_refresh, revoke

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def events_of(tenant: Tenant, **fields: Any) -> list[audit_pb.AuditEvent]:
    """Lists a tenant's events of tokens, oldest first."""
    answer = await tenant.service.audit.ListAuditEvents(
        audit_pb.ListAuditEventsRequest(**fields), metadata=tenant.admin
    )
    return [event for event in answer.events if event.method.startswith("TokenService/")][::-1]


async def test_life_of_a_family(acme: Tenant) -> None:
    """An exchange, each refresh and the end are events of the key: which family, for whom and for what; no token."""
    created = await acme.key(permissions=["read"])
    grant = await exchange(acme.service, created.token, audience="orders")
    following = await refresh(acme.service, grant.refresh_token)
    await revoke(acme.service, following.refresh_token)
    exchanged, refreshed, revoked = await events_of(acme)
    assert [f"TokenService/{name}" for name in ("ExchangeKey", "RefreshToken", "RevokeToken")] == [
        event.method for event in (exchanged, refreshed, revoked)
    ]
    assert {("token_family", exchanged.entity_id, created.key.id, acme.id, acme.id, "127.0.0.1", "OK", "")} == {
        (
            event.entity,
            event.entity_id,
            event.actor_key_id,
            event.actor_organization_id,
            event.organization_id,
            event.peer,
            event.code,
            event.reason,
        )
        for event in (exchanged, refreshed, revoked)
    }
    shown = json_format.MessageToDict(exchanged.after)
    assert (created.key.id, "orders", ["read"]) == (shown["key_id"], shown["audience"], shown["permissions"])
    assert (False, False) == (refreshed.HasField("before"), refreshed.HasField("after"))
    assert (exchanged.after, "revoked") == (revoked.before, revoked.after["end_reason"])
    said = json.dumps([json_format.MessageToDict(event) for event in (exchanged, refreshed, revoked)])
    for token in (grant.refresh_token, following.refresh_token, grant.access_token):
        assert token not in said
        assert token[6:30] not in said


async def test_reuse(acme: Tenant) -> None:
    """A second use is recorded twice: that the family has ended, and that the call was refused and why."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    await refresh(acme.service, grant.refresh_token)
    assert "REFRESH_TOKEN_REUSED" == await refused_refresh(acme.service, grant.refresh_token)
    exchanged, _, ended, refused = await events_of(acme)
    assert (exchanged.entity_id, "OK", "reused") == (ended.entity_id, ended.code, ended.after["end_reason"])
    assert ("TokenService/RefreshToken", "UNAUTHENTICATED", "REFRESH_TOKEN_REUSED", created.key.id) == (
        refused.method,
        refused.code,
        refused.reason,
        refused.actor_key_id,
    )
    assert ended.request_id == refused.request_id


async def test_refused_refresh(acme: Tenant) -> None:
    """A refresh that is refused because of its key is an event of that key."""
    created = await acme.key()
    grant = await exchange(acme.service, created.token)
    await acme.toggle(created.key.id, active=False)
    await refused_refresh(acme.service, grant.refresh_token)
    (refused,) = await events_of(acme, code="UNAUTHENTICATED")
    assert (created.key.id, "REFRESH_TOKEN_INVALID") == (refused.actor_key_id, refused.reason)


async def test_what_is_nobodys(database_url: str) -> None:
    """Refresh tokens that nobody has leave no event, and are counted among suspicious use; so are their revocations."""
    async with run_service(database_url, usage_flush_seconds=0.05) as service:
        tenant = await make_tenant(service, "acme")
        async with database_of(service) as connection:
            before = await connection.fetchval("SELECT count(*) FROM audit_event")
            for token in (REFRESH_TOKENS.mint().token, "lk_rt_" + "0" * 40, "made-up"):
                await refused_refresh(service, token)
                await revoke(service, token)

            async def is_written() -> bool:
                answer = await service.audit.ListSuspiciousUse(
                    audit_pb.ListSuspiciousUseRequest(), metadata=service.root
                )
                found = [(use.source, keys_pb.Outcome.Name(use.outcome), use.key_id, use.count) for use in answer.uses]
                return found == [("127.0.0.1", "OUTCOME_NOT_FOUND", "", 6)]

            await until(is_written)
            method = "SELECT count(*) FROM audit_event WHERE method LIKE 'TokenService/%'"
            assert 0 == await connection.fetchval(method)
        assert before >= 1
        assert [] == await events_of(tenant)


async def test_tenants_are_apart(acme: Tenant, rival: Tenant) -> None:
    """What is done with one organization's tokens is in no other's trail."""
    grant = await exchange(acme.service, (await acme.key()).token)
    await refresh(acme.service, grant.refresh_token)
    assert [] == await events_of(rival)
    assert 2 == len(await events_of(acme))
