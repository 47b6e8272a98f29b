"""ListAuditEvents, and what calls leave in the audit trail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf import json_format, timestamp_pb2
from google.protobuf.struct_pb2 import Struct

from apikeys.v1 import audit_service_pb2 as pb
from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.audit_service_pb2_grpc import AuditServiceStub
from latchgate.app import serving
from support.keys import NOBODYS_KEY, Tenant, database_of, update_organization
from support.service import ROOT_TOKEN, Metadata, RunningService, bearer, make_settings, refusal
from support.transport import MANAGEMENT_METHODS, call, good_request, label_of
from support.webhooks import plant_webhooks

pytestmark = pytest.mark.asyncio(loop_scope="session")

REQUEST_ID = "9f1c1d0e-6a52-4b3e-8a39-0a5f1a3c7d11"


async def events_of(tenant: Tenant, caller: Metadata | None = None, **fields: Any) -> list[pb.AuditEvent]:
    """Lists a tenant's events, newest first."""
    answer: pb.ListAuditEventsResponse = await tenant.service.audit.ListAuditEvents(
        pb.ListAuditEventsRequest(**fields), metadata=caller or tenant.admin
    )
    return list(answer.events)


def shown_of(struct: Struct) -> dict[str, Any]:
    """Gives what a snapshot says."""
    shown: dict[str, Any] = json_format.MessageToDict(struct)
    return shown


async def test_life_of_a_key(acme: Tenant) -> None:
    """Each change of a key is recorded once: who, from where, the call's own id, what it was before and after, its
    revision; and nothing that a token could be told from.
    """
    reader = await acme.caller("keys:read")
    created = await acme.key(name="ci", permissions=["read"])
    key_id = created.key.id
    await acme.update(key_pb2.Key(id=key_id, name="cd"), "name")
    await acme.toggle(key_id, active=False)
    await acme.toggle(key_id, active=True)
    rotated = await acme.rotate(key_id)
    revoked = await acme.revoke(key_id, reason="leaked")
    await acme.delete(key_id)
    await acme.get(key_id, reader)

    events = (await events_of(acme, entity_id=key_id))[::-1]

    names = ["CreateKey", "UpdateKey", "ToggleKey", "ToggleKey", "RotateKey", "RevokeKey", "DeleteKey", "GetKey"]
    assert [f"KeyService/{name}" for name in names] == [event.method for event in events]
    assert [acme.admin_key_id] * 7 == [event.actor_key_id for event in events[:7]]
    assert events[7].actor_key_id not in {"", acme.admin_key_id}
    assert {("127.0.0.1", acme.id, acme.id, "key", "OK", "")} == {
        (each.peer, each.organization_id, each.actor_organization_id, each.entity, each.code, each.reason)
        for each in events
    }
    assert not events[0].HasField("before")
    assert ("ci", ["read"]) == (shown_of(events[0].after)["name"], shown_of(events[0].after)["permissions"])
    assert ("ci", "cd") == (events[1].before["name"], events[1].after["name"])
    assert [(True, False), (False, True)] == [(each.before["active"], each.after["active"]) for each in events[2:4]]
    assert rotated.key.prefix == shown_of(events[4].after)["hints"][0]
    assert "leaked" == events[5].after["revoke_reason"]
    assert revoked.effect.revision == events[5].revision
    assert events[5].before["revoke_time"] is None
    assert not events[7].HasField("before")
    assert not events[7].HasField("after")
    assert 8 == len({event.request_id for event in events})
    shown = json.dumps([json_format.MessageToDict(event) for event in events])
    for token in (created.token, rotated.token):
        assert token not in shown
        assert token[-20:] not in shown


async def test_scopes_and_keys_that_come_back(acme: Tenant) -> None:
    """What becomes of an organization's scopes is recorded by their names, and that a deleted key was brought back."""
    await acme.create_scope("orders:read", description="Read orders.")
    key_id = (await acme.key(permissions=["orders:read"])).key.id
    await refusal(acme.delete_scope("orders:read"))
    await acme.delete(key_id)
    undeleted = await acme.undelete(key_id)
    await acme.revoke(key_id)
    await acme.delete_scope("orders:read")

    removed, made = await events_of(acme, entity="scope")
    assert ("KeyService/CreateScope", "orders:read", "Read orders.", False) == (
        made.method,
        made.entity_id,
        made.after["description"],
        made.HasField("before"),
    )
    assert ("KeyService/DeleteScope", "orders:read", "Read orders.", False) == (
        removed.method,
        removed.entity_id,
        removed.before["description"],
        removed.HasField("after"),
    )
    (refused,) = await events_of(acme, method="KeyService/DeleteScope", code="FAILED_PRECONDITION")
    assert "SCOPE_IN_USE" == refused.reason
    (event,) = await events_of(acme, method="KeyService/UndeleteKey")
    assert (key_id, undeleted.effect.revision) == (event.entity_id, event.revision)
    assert (False, True) == (event.before["delete_time"] is None, event.after["delete_time"] is None)


async def test_a_call_that_changes_nothing_is_recorded_as_one(acme: Tenant) -> None:
    """Repeating a call that is done already is recorded as a call, without a change."""
    created = await acme.key()
    for _ in range(2):
        await acme.revoke(created.key.id)
    second, first = (await events_of(acme, method="KeyService/RevokeKey"))[:2]
    assert (True, False) == (first.HasField("after"), second.HasField("after"))
    assert second.entity_id == created.key.id


async def test_refused_calls(acme: Tenant, rival: Tenant) -> None:
    """A refused call is in the trail of the caller's own organization, with why it was refused; what is another's can
    not be written to by asking for it.
    """
    foreign = await rival.key()
    before = len(await events_of(rival))
    await refusal(acme.revoke(foreign.key.id))
    reader = await acme.caller("keys:read")
    await refusal(acme.delete(NOBODYS_KEY, caller=reader))
    await refusal(acme.create(keys_pb.CreateKeyRequest(name="")))
    await refusal(acme.list(organization_id=rival.id))

    found = [(each.method, each.code, each.reason, each.entity_id) for each in await events_of(acme)]

    assert [
        ("KeyService/ListKeys", "NOT_FOUND", "ORGANIZATION_NOT_FOUND", rival.id),
        ("KeyService/CreateKey", "INVALID_ARGUMENT", "INVALID_FIELD", ""),
        ("KeyService/DeleteKey", "PERMISSION_DENIED", "PERMISSION_MISSING", NOBODYS_KEY),
        ("KeyService/CreateKey", "OK", "", found[3][3]),
        ("KeyService/RevokeKey", "NOT_FOUND", "KEY_NOT_FOUND", foreign.key.id),
    ] == found[:5]
    # But for the reading of the trail itself.
    assert before + 1 == len(await events_of(rival))


@pytest.mark.parametrize("method", MANAGEMENT_METHODS)
async def test_every_method_leaves_its_trace(alone: RunningService, method: str) -> None:
    """Each method of management, when it is carried out and when it is refused, is recorded exactly once."""
    await alone.create_organization()
    await plant_webhooks(alone.database_url)
    created = await alone.create_key()
    await alone.create_key(key_type="KEY_TYPE_PUBLISHABLE")
    poor = bearer((await alone.create_key(permissions=["read"])).token)
    async with database_of(alone) as connection:
        counted = "SELECT code, count(*) FROM audit_event WHERE method = $1 GROUP BY code"

        async def count() -> dict[str, int]:
            return {row["code"]: row["count"] for row in await connection.fetch(counted, label_of(method))}

        before = await count()
        await call(alone, method, good_request(method, key_id=created.key.id))
        allowed = await count()
        assert {"OK": 1} == {code: number - before.get(code, 0) for code, number in allowed.items()}
        await refusal(call(alone, method, good_request(method, key_id=created.key.id), metadata=poor))
        assert {"OK": 0, "PERMISSION_DENIED": 1} == {
            code: number - allowed.get(code, 0) for code, number in (await count()).items()
        }


async def test_callers_that_are_not_known_leave_no_row(acme: Tenant) -> None:
    """A call without a good token is no event of anyone's: whoever makes up tokens can not fill the trail."""
    async with database_of(acme.service) as connection:
        before = await connection.fetchval("SELECT max(sequence) FROM audit_head WHERE organization_id = $1", acme.id)
        for caller in ((("authorization", "Bearer lk_nothing"),), (("x-request-id", "1"),)):
            await refusal(acme.list(caller))
        after = await connection.fetchval("SELECT max(sequence) FROM audit_head WHERE organization_id = $1", acme.id)
    assert before == after


async def test_the_request_id_is_the_callers(acme: Tenant) -> None:
    """A call's `x-request-id` is recorded, cut to what can be shown; without one the service makes one."""
    for given, expected in ((REQUEST_ID, REQUEST_ID), ("b" * 200, "b" * 124 + " ..."), ("lk_" + "c" * 40, "lk_...")):
        await acme.list((*acme.admin, ("x-request-id", given)))
        assert expected == (await events_of(acme, method="KeyService/ListKeys"))[0].request_id
    await acme.list()
    assert 36 == len((await events_of(acme, method="KeyService/ListKeys"))[0].request_id)


async def test_what_root_does_to_an_organization(alone: RunningService) -> None:
    """What root does to an organization is in that organization's trail, where its admins see it; what is nobody's,
    such as plans, is in the service's own, and so is how the root key was made.
    """
    await alone.create_organization()
    await update_organization(alone, organizations_pb.Organization(id="acme", name="Acme & Co"), "name")
    created = await alone.create_key(permissions=["audit:read"])
    await alone.get_key(created.key.id)
    await call(alone, "ListPlans", organizations_pb.ListPlansRequest())

    async def methods(organization_id: str) -> list[str]:
        request = pb.ListAuditEventsRequest(organization_id=organization_id)
        answer = await alone.audit.ListAuditEvents(request, metadata=alone.root)
        return [event.method for event in answer.events]

    assert [
        "KeyService/GetKey",
        "KeyService/CreateKey",
        "OrganizationService/UpdateOrganization",
        "OrganizationService/CreateOrganization",
    ] == await methods("acme")
    assert ["OrganizationService/ListPlans", ""] == await methods("org_root")
    answer = await alone.audit.ListAuditEvents(pb.ListAuditEventsRequest(), metadata=bearer(created.token))
    assert {"org_root"} == {event.actor_organization_id for event in answer.events}


async def test_filters(acme: Tenant) -> None:
    """Each filter leaves what matches it, together they leave what matches all, and the times are a half-open span."""
    created = await acme.key()
    other = await acme.caller("keys:read", "keys:write")
    await acme.toggle(created.key.id, caller=other)
    await refusal(acme.get(NOBODYS_KEY, other))
    every = await events_of(acme)
    actor = next(each.actor_key_id for each in every if each.method == "KeyService/ToggleKey")

    cases: tuple[tuple[dict[str, Any], Callable[[pb.AuditEvent], bool]], ...] = (
        ({"actor_key_id": actor}, lambda each: each.actor_key_id == actor),
        ({"entity": "key"}, lambda each: each.entity == "key"),
        ({"entity_id": created.key.id}, lambda each: each.entity_id == created.key.id),
        ({"method": "KeyService/GetKey"}, lambda each: each.method == "KeyService/GetKey"),
        ({"code": "NOT_FOUND"}, lambda each: each.code == "NOT_FOUND"),
        (
            {"actor_key_id": actor, "code": "OK"},
            lambda each: each.actor_key_id == actor and each.code == "OK",
        ),
    )
    for fields, matches in cases:
        expected = [each.sequence for each in every if matches(each)]
        assert expected
        # Its own reading is newer than what it is compared with.
        found = await events_of(acme, **fields, end_time=_after(every[0]))
        assert expected == [each.sequence for each in found], fields
    span = await events_of(acme, start_time=every[3].event_time, end_time=every[1].event_time)
    assert [every[2].sequence, every[3].sequence] == [each.sequence for each in span]


def _after(event: pb.AuditEvent) -> timestamp_pb2.Timestamp:
    later = timestamp_pb2.Timestamp()
    later.FromNanoseconds(event.event_time.ToNanoseconds() + 1000)
    return later


async def test_paging(acme: Tenant) -> None:
    """Pages follow each other without a gap or a repetition while more is recorded; sequences have no gaps; a token for
    other filters is refused.
    """
    for _ in range(6):
        await acme.list()
    sequences: list[int] = []
    token = ""
    while True:
        answer = await acme.service.audit.ListAuditEvents(
            pb.ListAuditEventsRequest(page_size=3, page_token=token), metadata=acme.admin
        )
        sequences += [event.sequence for event in answer.events]
        token = answer.next_page_token
        if not token:
            break
        used = token
    assert list(range(sequences[0], 0, -1)) == sequences
    refused = await refusal(
        acme.service.audit.ListAuditEvents(
            pb.ListAuditEventsRequest(page_size=3, page_token=used, code="OK"), metadata=acme.admin
        )
    )
    assert "PAGE_TOKEN_INVALID" == refused.reason


async def test_tenants_are_apart(acme: Tenant, rival: Tenant) -> None:
    """Another organization's trail is as if it were not there, and one's own needs `audit:read`."""
    refused = await refusal(events_of(acme, organization_id=rival.id))
    assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (refused.code, refused.reason)
    assert {acme.id} == {event.organization_id for event in await events_of(acme)}
    writer = await acme.caller("keys:read", "keys:write")
    refused = await refusal(events_of(acme, writer))
    assert ("PERMISSION_MISSING", "audit:read") == (refused.reason, refused.metadata["permission"])
    missing = pb.ListAuditEventsRequest(organization_id="no-such")
    refused = await refusal(acme.service.audit.ListAuditEvents(missing, metadata=acme.service.root))
    assert "ORGANIZATION_NOT_FOUND" == refused.reason
    refused = await refusal(
        events_of(acme, start_time=timestamp_pb2.Timestamp(seconds=2), end_time=timestamp_pb2.Timestamp(seconds=1))
    )
    assert {"end_time"} == set(refused.violations)


async def test_calls_at_once(acme: Tenant) -> None:
    """Many calls at once are recorded one after the other: no sequence twice, none left out."""
    await asyncio.gather(*(acme.key(name=f"key {number}") for number in range(20)))
    events = await events_of(acme, method="KeyService/CreateKey", page_size=20)
    numbers = {event.after["name"] for event in events}
    assert {f"key {number}" for number in range(20)} == numbers
    assert list(range(events[0].sequence, events[0].sequence - 20, -1)) == [event.sequence for event in events]
    assert sorted((event.event_time.ToNanoseconds() for event in events), reverse=True) == [
        event.event_time.ToNanoseconds() for event in events
    ]


async def test_the_callers_certificate(database_url: str, tmp_path: Path) -> None:
    """With mutual TLS the subject of the client's certificate is recorded beside its key."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost")
    client = authority.issue_cert("deployer.example.com", common_name="deployer")
    server.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    credentials = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem", "tls_client_ca": tmp_path / "ca.pem"}
    async with serving(make_settings(database_url, **files)) as running:
        await running.ready
        async with grpc.aio.secure_channel(f"localhost:{running.server.port}", credentials) as channel:
            stub: Any = AuditServiceStub(channel)
            request, root = pb.ListAuditEventsRequest(organization_id="org_root"), bearer(ROOT_TOKEN)
            await stub.ListAuditEvents(request, metadata=root)
            events = (await stub.ListAuditEvents(request, metadata=root)).events
    assert ["AuditService/ListAuditEvents", ""] == [event.method for event in events]
    assert "CN=deployer" in events[0].certificate
    assert "" == events[1].certificate
