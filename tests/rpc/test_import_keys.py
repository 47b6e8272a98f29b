"""ImportKeys: customers of another system keep their tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from apikeys.v1 import audit_service_pb2 as audit_pb
from apikeys.v1 import import_service_pb2 as pb
from apikeys.v1 import key_pb2
from support.imports import (
    foreign_token,
    import_call,
    import_requests,
    import_rows,
    new_rows,
    outcomes,
    row,
    sha256,
    violations,
)
from support.keys import (
    Tenant,
    database_of,
    hours_ahead,
    is_effective,
    make_plan,
    make_tenant,
    outcome_of,
    state_of,
    timestamp,
)
from support.service import refusal
from support.transport import grpcurl

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def rows_of(tenant: Tenant, *rows: pb.ImportedKey, **options: Any) -> pb.ImportKeysResponse:
    """Imports rows as the tenant's admin."""
    return await import_rows(tenant.service, "", rows, tenant.admin, **options)


async def key_count(tenant: Tenant) -> int:
    """Says how many keys the tenant has, without its admin's."""
    return len((await tenant.list(page_size=1000)).keys) - 1


async def test_imported_key_is_what_was_given(acme: Tenant) -> None:
    """An imported key has all that its row says, and its token is VALID with that, in its own format."""
    token, end = foreign_token(), hours_ahead(1)
    fields: dict[str, Any] = {
        "name": "Ünïcode ☃ 'quotes' \\",
        "environment": key_pb2.ENVIRONMENT_TEST,
        "permissions": ["read", "keys:*"],
        "rate_limit_per_minute": 77,
        "expire_time": end,
        "user_id": "u1",
        "user_email": "ann@example.com",
        "metadata": {"a": '{"b": [1]}', "ü": ""},
        "allowed_cidrs": ["192.0.2.0/24", "2001:db8::1/128"],
    }

    response = await rows_of(acme, row(7, token, **fields))

    assert (["CREATED"], True) == (outcomes(response), is_effective(response.effect))
    (result,) = response.results
    key = await acme.get(result.key_id)
    assert (7, token[:12], acme.id, acme.admin_key_id) == (
        result.row,
        key.prefix,
        key.organization_id,
        key.created_by,
    )
    assert (key_pb2.KEY_TYPE_SECRET, "ACTIVE") == (key.key_type, state_of(key))
    expected = pb.ImportedKey(**fields)
    for name in fields:
        assert getattr(expected, name) == getattr(key, name), name
    answer = await acme.service.validate(token, required_permissions=["keys:read"], client_ip="192.0.2.7")
    assert ("VALID", key.id, acme.id, "u1", end, 77) == (
        outcome_of(answer),
        answer.key_id,
        answer.organization_id,
        answer.user_id,
        answer.expire_time,
        answer.rate_limit.limit,
    )


async def test_key_that_was_switched_off(acme: Tenant) -> None:
    """A key that is switched off in the other system is so here, and can be switched on; its token is none of a
    stranger.
    """
    token = foreign_token()
    response = await rows_of(acme, row(1, token, active=False))
    assert "INACTIVE" == await acme.service.outcome(token)
    await acme.toggle(response.results[0].key_id, active=True)
    assert "VALID" == await acme.service.outcome(token)


async def test_each_row_has_its_result(acme: Tenant, rival: Tenant) -> None:
    """Results come in the order of the rows: created, there already, twice in one request, another's, and wrong."""
    old, new, theirs = foreign_token(), foreign_token(), foreign_token()
    first = (await rows_of(acme, row(1, old))).results[0]
    await rows_of(rival, row(1, theirs))
    rows = [row(10, new), row(11, new), row(12, old, name="key 1"), row(13, theirs), row(14, foreign_token(), name="")]

    response = await rows_of(acme, *rows)

    assert [10, 11, 12, 13, 14] == [result.row for result in response.results]
    assert ["CREATED", "DUPLICATE", "DUPLICATE", "DUPLICATE", "INVALID"] == outcomes(response)
    created, twice, there, taken, wrong = response.results
    assert (created.key_id, ["name"]) == (twice.key_id, list(twice.differences))
    assert (first.key_id, []) == (there.key_id, list(there.differences))
    assert pb.ImportResult(row=13, outcome=pb.IMPORT_OUTCOME_DUPLICATE) == taken
    assert ["name"] == list(violations(wrong))
    assert 2 == await key_count(acme)


async def test_same_rows_again(acme: Tenant) -> None:
    """Rows that are sent again, in whatever requests, make no second keys and are told to be there as they say."""
    rows = new_rows(7, permissions=["read"], metadata={"a": "b"}, expire_time=hours_ahead(1))
    first = await rows_of(acme, *rows)
    requests = [pb.ImportKeysRequest(keys=rows[:3]), pb.ImportKeysRequest(keys=rows[3:])]

    again = await import_requests(acme.service, requests, acme.admin)

    assert [["DUPLICATE"] * 3, ["DUPLICATE"] * 4] == [outcomes(each) for each in again]
    results = [result for each in again for result in each.results]
    assert [result.key_id for result in first.results] == [result.key_id for result in results]
    assert {()} == {tuple(result.differences) for result in results}
    assert 7 == await key_count(acme)
    async with database_of(acme.service) as connection:
        count = await connection.fetchval("SELECT key_count FROM organization WHERE id = $1", acme.id)
    assert 7 + 1 == count


async def test_differences_are_named(acme: Tenant) -> None:
    """A key that is there and is not as the row says stays as it is, and the fields are named."""
    token = foreign_token()
    created = (await rows_of(acme, row(1, token, permissions=["read"]))).results[0]
    changed = row(1, token, name="other", hint="sk", environment=2, permissions=["write"], rate_limit_per_minute=5)
    changed.expire_time.CopyFrom(hours_ahead(1))
    changed.user_id, changed.user_email, changed.active = "u2", "b@example.com", False
    changed.metadata["a"] = "b"
    changed.allowed_cidrs.append("192.0.2.1")
    before = await acme.get(created.key_id)

    (result,) = (await rows_of(acme, changed)).results

    expected = {
        "name", "hint", "environment", "permissions", "rate_limit_per_minute", "expire_time", "user_id", "user_email",
        "metadata", "allowed_cidrs", "state",
    }  # fmt: skip
    assert (created.key_id, expected) == (result.key_id, set(result.differences))
    assert before == await acme.get(created.key_id)


@pytest.mark.parametrize("end", ["revoke", "delete", "rotate", "toggle"])
async def test_ended_key_is_not_brought_back(acme: Tenant, end: str) -> None:
    """A token that was ended here stays so when it is imported again, and the row is told that its state differs."""
    token = foreign_token()
    created = (await rows_of(acme, row(1, token))).results[0]
    await getattr(acme, end)(created.key_id)
    before = await acme.service.outcome(token)

    (result,) = (await rows_of(acme, row(1, token))).results

    assert (created.key_id, ["state"]) == (result.key_id, list(result.differences))
    assert before == await acme.service.outcome(token) != "VALID"


WRONG: dict[str, dict[str, Any]] = {
    "digest": {"digest": b"\x80" * 31},
    "digest, long": {"digest": b"\x80" * 33},
    "digest, none": {"digest": b""},
    "digest, text": {"digest": b"sk_live_0123456789abcdef01234567"},
    "hint": {"hint": "sk_live_01234567"},
    "hint, space": {"hint": "sk live"},
    "hint, control": {"hint": "sk\n"},
    "hint, own": {"hint": "lk_abcde"},
    "hint, own publishable": {"hint": "lk_pk_test_abc"},
    "name": {"name": "a" * 101},
    "name, none": {"name": ""},
    "name, control": {"name": "a\nb"},
    "environment": {"environment": 99},
    "permissions[1]": {"permissions": ["read", "A B"]},
    "permissions[0], unknown": {"permissions": ["no:such"]},
    "permissions": {"permissions": ["read", "read"]},
    "rate_limit_per_minute": {"rate_limit_per_minute": -1},
    "expire_time": {"expire_time": hours_ahead(-1)},
    "expire_time, year 0": {"expire_time": type(hours_ahead(0))(seconds=-(2**62))},
    "user_id": {"user_id": "u" * 201},
    "user_email": {"user_email": "no address"},
    "user_email, long": {"user_email": f"{'a' * 60}@{'.'.join(['b' * 60] * 4)}.example"},
    "metadata": {"metadata": {"a": "b" * 4096}},
    "metadata, control": {"metadata": {"a\n": "b"}},
    "allowed_cidrs[0]": {"allowed_cidrs": ["192.0.2.1/24"]},
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_row_is_told_and_the_others_are_stored(acme: Tenant, wrong: str) -> None:
    """A row that breaks a rule is INVALID with the field and what it must be, and nothing of what stands there; the
    rows around it are stored.
    """
    fields = WRONG[wrong]
    rows = [row(1, foreign_token()), row(2, foreign_token(), **fields), row(3, foreign_token())]

    response = await rows_of(acme, *rows)

    assert ["CREATED", "INVALID", "CREATED"] == outcomes(response)
    told = violations(response.results[1])
    assert [wrong.partition(",")[0]] == list(told)
    (advice,) = told.values()
    assert advice
    for value in filter(None, map(str, fields.values())):
        assert value not in advice
    assert 2 == await key_count(acme)


async def test_what_stands_there_is_not_told(acme: Tenant) -> None:
    """Faults that depend on a value or on the time are told in the same words in every row, and without the value."""
    rows = [
        row(1, foreign_token(), allowed_cidrs=["192.0.2.1/24"]),
        row(2, foreign_token(), expire_time=hours_ahead(-1)),
        row(3, foreign_token(), metadata={"a": "b" * 4096}),
    ]
    told = [next(iter(violations(result).values())) for result in (await rows_of(acme, *rows)).results]
    assert [
        "must not have bits set beyond its prefix length",
        "must lie in the future",
        "must be at most 4096 bytes in all",
    ] == told


async def test_digest_of_the_hint(acme: Tenant) -> None:
    """A hint that is the whole token is refused: nothing that is stored may be a token."""
    (result,) = (await rows_of(acme, row(1, "short-token", hint="short-token"))).results
    assert ["hint"] == list(violations(result))


async def test_all_that_is_wrong_is_told(acme: Tenant) -> None:
    """All that is wrong with a row is told, up to ten things."""
    fields: dict[str, Any] = {"name": "", "user_id": "\n", "permissions": [f"A{number}" for number in range(30)]}
    (result,) = (await rows_of(acme, row(1, foreign_token(), **fields))).results
    assert 10 == len(result.violations)


async def test_only_what_is_held_can_be_given(acme: Tenant) -> None:
    """A caller without a permission can not import keys that have it, nor import at all without `keys:write`."""
    caller = await acme.caller("keys:write", "read")
    rows = [row(1, foreign_token(), permissions=["read"]), row(2, foreign_token(), permissions=["read", "write"])]
    response = await import_rows(acme.service, "", rows, caller)
    assert ["CREATED", "INVALID"] == outcomes(response)
    assert {"permissions[1]": "must be a permission that the calling key has itself"} == violations(response.results[1])

    others = await acme.caller("keys:read", "keys:validate", "audit:read", "read", "write")
    error = await refusal(import_rows(acme.service, "", new_rows(1), others))
    assert (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING") == (error.code, error.reason)
    assert {"permission": "keys:write"} == error.metadata


async def test_scopes_of_the_organization(acme: Tenant) -> None:
    """Permissions are held against the organization's own catalogue."""
    await acme.give_scopes("orders:read")
    rows = [row(1, foreign_token(), permissions=["orders:*"]), row(2, foreign_token(), permissions=["order:*"])]
    assert ["CREATED", "INVALID"] == outcomes(await rows_of(acme, *rows))


async def test_organizations_are_apart(acme: Tenant, rival: Tenant) -> None:
    """Nobody but root imports for another organization, which is answered like one that never was; root must name it;
    and the service's own takes none.
    """
    for organization_id in (rival.id, "org_root", "no-such-organization"):
        error = await refusal(import_rows(acme.service, organization_id, new_rows(1), acme.admin))
        assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)
        assert f"organization {organization_id} does not exist" == error.message
    assert 0 == await key_count(rival)

    assert ["CREATED"] == outcomes(await import_rows(acme.service, rival.id, new_rows(1)))
    assert 1 == await key_count(rival)
    error = await refusal(import_rows(acme.service, "", new_rows(1)))
    assert "organization_id" in error.violations
    error = await refusal(import_rows(acme.service, "no-such-organization", new_rows(1)))
    assert "ORGANIZATION_NOT_FOUND" == error.reason
    error = await refusal(import_rows(acme.service, "org_root", new_rows(1)))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "ROOT_ORGANIZATION") == (error.code, error.reason)


async def test_digest_of_another_organization(acme: Tenant, rival: Tenant) -> None:
    """A digest that another organization has is a DUPLICATE that names no key, and theirs stays as it is."""
    minted = await rival.key(name="theirs")
    (result,) = (await rows_of(acme, row(1, minted.token, hint="x"))).results
    assert pb.ImportResult(row=1, outcome=pb.IMPORT_OUTCOME_DUPLICATE) == result
    answer = await acme.service.validate(minted.token)
    assert ("VALID", rival.id) == (outcome_of(answer), answer.organization_id)


async def test_plan_has_room_for_so_many(acme: Tenant) -> None:
    """What is beyond the plan's number of keys ends the call, with nothing of its request stored; duplicates and wrong
    rows take no room, and the last place can be filled.
    """
    plan = await make_plan(acme.service, max_keys=6)
    tenant = await make_tenant(acme.service, "small", plan)
    first, second = new_rows(3), new_rows(3)
    requests = [pb.ImportKeysRequest(keys=rows) for rows in (first, second)]
    responses = []

    async def receive() -> None:
        async for response in import_call(tenant.service.channel, _stream(requests), tenant.admin):
            responses.append(outcomes(response))  # noqa: PERF401 - it ends with an error

    error = await refusal(receive())
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_LIMIT_REACHED") == (error.code, error.reason)
    assert {"max_keys": "6"} == error.metadata
    assert [["CREATED"] * 3] == responses
    assert 3 == await key_count(tenant)

    rest = await rows_of(tenant, *first, *second[:2], row(9, foreign_token(), name=""))
    assert ["DUPLICATE"] * 3 + ["CREATED"] * 2 + ["INVALID"] == outcomes(rest)
    assert 5 == await key_count(tenant)


async def _stream(requests: list[pb.ImportKeysRequest]) -> AsyncIterator[pb.ImportKeysRequest]:
    for request in requests:
        yield request


async def test_by_grpcurl(acme: Tenant) -> None:
    """Stock grpcurl imports, with nothing but what reflection tells: digests are base64, requests follow each other."""
    tokens = [foreign_token(), foreign_token()]
    requests = [
        {"keys": [{"row": 1, "digest": base64.b64encode(sha256(token)).decode(), "name": "by hand"}]}
        for token in (*tokens, tokens[0])
    ]
    finished = await grpcurl(
        "-H",
        f"authorization: {acme.admin[0][1]}",
        "-d",
        "\n".join(map(json.dumps, requests)),
        acme.service.address,
        "apikeys.v1.ImportService/ImportKeys",
    )
    assert "" == finished.err
    decoder, rest, told = json.JSONDecoder(), finished.out.strip(), []
    while rest:
        answer, end = decoder.raw_decode(rest)
        told.append(answer["results"][0]["outcome"])
        rest = rest[end:].strip()
    assert ["IMPORT_OUTCOME_CREATED"] * 2 + ["IMPORT_OUTCOME_DUPLICATE"] == told
    assert ["VALID"] * 2 == [await acme.service.outcome(token) for token in tokens]


async def test_tokens_that_could_be_own(acme: Tenant) -> None:
    """A token that begins like an own one and has not its length is a foreign one, and good once it is imported; one
    that looks just like an own one can not be told from an invented one, and is never looked up.
    """
    short, like = "lk_0123456789abcdef", "lk_" + "0" * 40
    response = await rows_of(acme, row(1, short, hint=""), row(2, like, hint=""))
    assert ["CREATED"] * 2 == outcomes(response)
    assert ["VALID", "NOT_FOUND"] == [await acme.service.outcome(token) for token in (short, like)]


async def test_times_to_the_microsecond(acme: Tenant) -> None:
    """An end with nanoseconds is stored to the microsecond, and the same row again is the same key."""
    end = timestamp(hours_ahead(1).ToDatetime())
    end.nanos = 123_456_789
    rows = new_rows(1, expire_time=end)
    await rows_of(acme, *rows)
    assert [[]] == [list(result.differences) for result in (await rows_of(acme, *rows)).results]


async def test_audit_trail(acme: Tenant) -> None:
    """Of a request one event is recorded, not one a key: how many keys it made and between which ids theirs lie. A
    request that made none leaves an event as well, all under the one id of the call; neither tokens nor digests are in
    them.
    """
    rows = new_rows(4)
    requests = [pb.ImportKeysRequest(keys=part) for part in (rows[:3], rows[:3], rows[3:])]
    metadata = (*acme.admin, ("x-request-id", "import-of-tuesday"))
    responses = await import_requests(acme.service, requests, metadata)
    await refusal(import_rows(acme.service, "no-such-organization", rows, acme.admin))

    answer = await acme.service.audit.ListAuditEvents(
        audit_pb.ListAuditEventsRequest(method="ImportService/ImportKeys"), metadata=acme.admin
    )

    refused, last, again, first = answer.events
    ids = sorted(result.key_id for result in responses[0].results)
    expected = {"keys": 3, "first_key_id": ids[0], "last_key_id": ids[-1]}
    assert expected == json_format.MessageToDict(first.after)
    assert ("key_import", ids[0], responses[0].effect.revision) == (first.entity, first.entity_id, first.revision)
    assert 1 == last.after["keys"]
    assert ("", False, "OK") == (again.entity, again.HasField("after"), again.code)
    assert {"import-of-tuesday"} == {event.request_id for event in (first, again, last)}
    assert ("NOT_FOUND", "ORGANIZATION_NOT_FOUND") == (refused.code, refused.reason)
    shown = str([json_format.MessageToDict(event) for event in answer.events])
    for row_ in rows:
        assert row_.digest.hex() not in shown
        assert base64.b64encode(row_.digest).decode() not in shown
