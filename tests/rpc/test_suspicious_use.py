"""ListSuspiciousUse: who tries tokens that should not be tried."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from apikeys.v1 import audit_service_pb2 as pb
from apikeys.v1 import key_service_pb2 as keys_pb
from support.databases import until
from support.keys import Tenant, database_of, make_tenant
from support.service import Metadata, RunningService, bearer, refusal, run_service

pytestmark = pytest.mark.asyncio(loop_scope="session")

MADE_UP = "lk_" + "0" * 40


async def uses(service: RunningService, caller: Metadata, **fields: Any) -> list[pb.SuspiciousUse]:
    """Lists suspicious use."""
    answer = await service.audit.ListSuspiciousUse(pb.ListSuspiciousUseRequest(**fields), metadata=caller)
    return list(answer.uses)


def told(found: list[pb.SuspiciousUse]) -> set[tuple[str, str, str, str, int]]:
    """What is told of each."""
    return {
        (
            each.source,
            keys_pb.Outcome.Name(each.outcome).removeprefix("OUTCOME_"),
            each.organization_id,
            each.key_id,
            each.count,
        )
        for each in found
    }


async def test_what_is_counted(database_url: str) -> None:
    """Made-up tokens, revoked ones and those from elsewhere are counted by source; an organization sees those of its
    own keys alone, root sees all; a good token leaves nothing.
    """
    async with run_service(database_url, usage_flush_seconds=0.05) as service:
        acme, rival = await make_tenant(service, "acme"), await make_tenant(service, "rival")
        revoked, bound, foreign = await acme.key(), await acme.key(allowed_cidrs=["10.0.0.0/8"]), await rival.key()
        await acme.revoke(revoked.key.id)
        await rival.revoke(foreign.key.id)
        for _ in range(3):
            await service.validate(revoked.token, client_ip="192.0.2.1")
            await service.validate(MADE_UP, client_ip="2001:db8::1")
        await service.validate(bound.token, client_ip="192.0.2.2")
        await service.validate(bound.token, client_ip="10.1.2.3")
        await service.validate(foreign.token)
        await refusal(acme.list(bearer(MADE_UP)))
        own = {
            ("192.0.2.1", "REVOKED", acme.id, revoked.key.id, 3),
            ("192.0.2.2", "ADDRESS_DENIED", acme.id, bound.key.id, 1),
        }
        every = own | {
            ("", "REVOKED", rival.id, foreign.key.id, 1),
            ("2001:db8::/64", "NOT_FOUND", "", "", 3),
            ("127.0.0.1", "NOT_FOUND", "", "", 1),
        }

        async def is_written() -> bool:
            return told(await uses(service, service.root)) == every

        await until(is_written)
        assert own == told(await uses(service, acme.admin))
        assert own == told(await uses(service, service.root, organization_id=acme.id))
        # What comes later within the hour is added.
        await service.validate(revoked.token, client_ip="192.0.2.1")

        async def is_added() -> bool:
            return ("192.0.2.1", "REVOKED", acme.id, revoked.key.id, 4) in told(await uses(service, acme.admin))

        await until(is_added)


async def test_paging(alone: RunningService) -> None:
    """Pages follow each other without a gap or a repetition; a token of another list is refused."""
    async with database_of(alone) as connection:
        await connection.execute(
            "INSERT INTO suspicious_use (hour, source, outcome, organization_id, key_id, count) "
            "SELECT '2026-01-01', n::text, 'not_found', '', '', n FROM generate_series(1, 5) n"
        )
    counts, token = [], ""
    for _ in range(3):
        request = pb.ListSuspiciousUseRequest(page_size=2, page_token=token)
        answer = await alone.audit.ListSuspiciousUse(request, metadata=alone.root)
        counts += [use.count for use in answer.uses]
        token = answer.next_page_token or token
    assert [5, 4, 3, 2, 1] == counts
    assert not answer.next_page_token
    refused = await refusal(uses(alone, alone.root, organization_id="org_root", page_token=token))
    assert "PAGE_TOKEN_INVALID" == refused.reason


async def test_tenants_are_apart(acme: Tenant, rival: Tenant) -> None:
    """Another organization's suspicious use is as if it were not there, and one's own needs `audit:read`."""
    refused = await refusal(uses(acme.service, acme.admin, organization_id=rival.id))
    assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (refused.code, refused.reason)
    assert [] == await uses(acme.service, acme.admin)
    refused = await refusal(uses(acme.service, await acme.caller("keys:read")))
    assert ("PERMISSION_MISSING", "audit:read") == (refused.reason, refused.metadata["permission"])
    refused = await refusal(uses(acme.service, acme.service.root, organization_id="no-such"))
    assert "ORGANIZATION_NOT_FOUND" == refused.reason
