"""ListKeys."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from support.keys import Tenant, database_of, ids
from support.service import Metadata, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

CLIENT_LIMIT_BYTES = 4 * 1024 * 1024
"""What clients take in one answer, unless they are told otherwise."""


async def insert_keys(tenant: Tenant, count: int, metadata: str = "{}") -> None:
    """Stores many keys at once, as CreateKey would have, but without tokens that anyone knows."""
    async with database_of(tenant.service) as connection, connection.transaction():
        await connection.execute(
            """
            INSERT INTO key (id, organization_id, name, key_type, environment, permissions, rate_limit_per_minute,
                             user_id, user_email, metadata, allowed_cidrs, created_by)
            SELECT 'key_' || lpad(to_hex(n), 26, '0'), $1, 'many', 'secret', 'live', '{}', 0,
                   '', '', $3::jsonb, '{}', ''
            FROM generate_series($4::int + 1, $4 + $2::int) n
            """,
            tenant.id,
            count,
            metadata,
            await connection.fetchval("SELECT count(*) FROM key WHERE name = 'many'"),
        )
        await connection.execute(
            """
            WITH inserted AS (
                INSERT INTO secret (digest, key_id, hint)
                SELECT sha256(('nobody knows ' || id)::bytea), id, 'lk_xxxxx'
                FROM key
                WHERE organization_id = $1 AND name = 'many'
                RETURNING id
            )
            INSERT INTO last_used (secret_id) SELECT id FROM inserted
            """,
            tenant.id,
        )


async def all_pages(tenant: Tenant, page_size: int) -> list[list[str]]:
    """Reads a whole list, page by page."""
    pages: list[list[str]] = []
    page_token = ""
    while not pages or page_token:
        answer = await tenant.list(page_size=page_size, page_token=page_token)
        pages.append(ids(answer.keys))
        page_token = answer.next_page_token
    return pages


async def test_newest_first(acme: Tenant, rival: Tenant) -> None:
    """The caller's keys are listed, newest first, each as GetKey shows it; no one else's are."""
    await rival.key()
    made = [(await acme.key(name=f"key {number}", permissions=["read"])).key.id for number in range(3)]
    listed = (await acme.list()).keys
    assert sorted([acme.admin_key_id, *made], reverse=True) == ids(listed)
    assert [await acme.get(key.id) for key in listed] == list(listed)


async def test_pages_are_stable_under_writes(acme: Tenant) -> None:
    """Keys that are made, revoked, deleted or changed between two pages neither hide nor repeat others."""
    expected = sorted([acme.admin_key_id, *[(await acme.key()).key.id for _ in range(8)]], reverse=True)
    first = await acme.list(page_size=3)
    await acme.key()
    await acme.delete(expected[0])
    await acme.revoke(expected[4])
    await acme.toggle(expected[5], active=False)
    await acme.rotate(expected[6])
    second = await acme.list(page_size=3, page_token=first.next_page_token)
    await acme.delete(expected[7])
    third = await acme.list(page_size=3, page_token=second.next_page_token)
    assert [expected[:3], expected[3:6], [expected[6], expected[8]]] == [
        ids(page.keys) for page in (first, second, third)
    ]
    assert "" == third.next_page_token


async def test_last_page_is_known_to_be_the_last(acme: Tenant) -> None:
    """A list that fills its pages exactly has no empty page at its end."""
    await acme.key()
    await acme.key()
    await acme.key()
    assert [2, 2] == [len(page) for page in await all_pages(acme, 2)]
    assert [4] == [len(page) for page in await all_pages(acme, 4)]


async def test_page_sizes(acme: Tenant) -> None:
    """A page has 100 keys unless asked otherwise, and never more than 1000."""
    await insert_keys(acme, 1001)
    assert [100, 100] == [len((await acme.list()).keys), len((await acme.list(page_size=0)).keys)]
    assert [1000, 2] == [len(page) for page in await all_pages(acme, 2**31 - 1)]
    assert [999, 3] == [len(page) for page in await all_pages(acme, 999)]
    for page_size in (-1, -(2**31)):
        error = await refusal(acme.list(page_size=page_size))
        assert ("INVALID_FIELD", ["page_size"]) == (error.reason, list(error.violations))


async def test_pages_fit_into_an_answer(acme: Tenant) -> None:
    """A page of keys that are as large as can be is cut where clients would refuse the answer; none of them is lost."""
    await insert_keys(acme, 300, '{"' + "n" * 64 + '": "' + "\N{SNOWMAN}" * 5000 + '"}')
    first = await acme.list(page_size=1000)
    assert CLIENT_LIMIT_BYTES / 2 < first.ByteSize() < CLIENT_LIMIT_BYTES
    pages = await all_pages(acme, 1000)
    assert ids(first.keys) == pages[0]
    assert 301 == sum(len(page) for page in pages) == len({key_id for page in pages for key_id in page})


STATES = ["ACTIVE", "INACTIVE", "EXPIRED", "REVOKED", "DELETED"]


async def key_in_state(tenant: Tenant, state: str) -> str:
    """Makes a key and brings it into a state."""
    key_id = (await tenant.key(name=state)).key.id
    match state:
        case "INACTIVE":
            await tenant.toggle(key_id, active=False)
        case "EXPIRED":
            await tenant.toggle(key_id, active=False)
            await tenant.expire(key_id)
        case "REVOKED":
            await tenant.expire(key_id)
            await tenant.revoke(key_id)
        case "DELETED":
            await tenant.delete(key_id)
    return key_id


async def names(tenant: Tenant, **filters: Any) -> set[str]:
    """Lists the names of the keys that match."""
    return {key.name for key in (await tenant.list(**filters)).keys}


async def test_filter_by_state(acme: Tenant) -> None:
    """Each state finds the keys of which GetKey says that state, and no others; deleted ones only if they are shown."""
    for state in STATES:
        key_id = await key_in_state(acme, state)
        assert key_pb2.KeyState.Value(f"KEY_STATE_{state}") == (await acme.get(key_id)).state
    for state in STATES:
        number = key_pb2.KeyState.Value(f"KEY_STATE_{state}")
        expected = {state} | ({"admin"} if state == "ACTIVE" else set())
        assert expected == await names(acme, state=number, show_deleted=True)
        assert expected - {"DELETED"} == await names(acme, state=number)
    assert {"admin", *STATES} == await names(acme, show_deleted=True)
    assert {"admin", *STATES} - {"DELETED"} == await names(acme)


async def test_other_filters(acme: Tenant) -> None:
    """Filters match exactly, and all of them must."""
    publishable, test = key_pb2.KEY_TYPE_PUBLISHABLE, key_pb2.ENVIRONMENT_TEST
    await acme.key(name="plain")
    await acme.key(name="public", key_type=publishable)
    await acme.key(name="public test", key_type=publishable, environment=test)
    await acme.key(name="test of ann", environment=test, user_id="ann")
    await acme.key(name="live of ann", user_id="ann")
    await acme.key(name="of anna", user_id="anna")
    assert {"public", "public test"} == await names(acme, key_type=publishable)
    assert {"admin", "plain", "test of ann", "live of ann", "of anna"} == await names(
        acme, key_type=key_pb2.KEY_TYPE_SECRET
    )
    assert {"public test", "test of ann"} == await names(acme, environment=test)
    assert {"test of ann", "live of ann"} == await names(acme, user_id="ann")
    assert {"test of ann"} == await names(acme, user_id="ann", environment=test)
    assert set() == await names(acme, user_id="ann", key_type=publishable)
    assert set() == await names(acme, user_id="%")


async def test_filtered_pages(acme: Tenant) -> None:
    """Paging goes through what matches alone."""
    expected = sorted([(await acme.key(user_id="ann")).key.id for _ in range(3)], reverse=True)
    await acme.key()
    first = await acme.list(user_id="ann", page_size=2)
    second = await acme.list(user_id="ann", page_size=2, page_token=first.next_page_token)
    assert (expected[:2], expected[2:], "") == (ids(first.keys), ids(second.keys), second.next_page_token)


FILTERS: dict[str, Any] = {
    "key_type": key_pb2.KEY_TYPE_SECRET,
    "environment": key_pb2.ENVIRONMENT_LIVE,
    "state": key_pb2.KEY_STATE_ACTIVE,
    "user_id": "ann",
    "show_deleted": True,
}


async def assert_page_token_is_refused(tenant: Tenant, caller: Metadata | None = None, **fields: Any) -> None:
    """Demands that a page token is not accepted."""
    error = await refusal(tenant.list(caller, page_size=1, **fields))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") == (error.code, error.reason), fields


async def test_page_tokens_of_other_lists(acme: Tenant, rival: Tenant) -> None:
    """A page token goes on with its own list alone: not another organization's, caller's or filter's."""
    for tenant in (acme, rival):
        await tenant.key()
    token = (await acme.list(page_size=1)).next_page_token
    root = acme.service.root
    as_root = (await acme.list(root, organization_id=acme.id, page_size=1)).next_page_token
    organizations: organizations_pb.ListOrganizationsResponse = await acme.service.organizations.ListOrganizations(
        organizations_pb.ListOrganizationsRequest(page_size=1), metadata=root
    )
    await assert_page_token_is_refused(rival, page_token=token)
    await assert_page_token_is_refused(acme, page_token=as_root)
    await assert_page_token_is_refused(acme, root, organization_id=acme.id, page_token=token)
    await assert_page_token_is_refused(acme, root, organization_id=rival.id, page_token=as_root)
    await assert_page_token_is_refused(acme, page_token=organizations.next_page_token)
    for field, value in FILTERS.items():
        await assert_page_token_is_refused(acme, page_token=token, **{field: value})


async def test_filters_are_complete() -> None:
    """The table above has every filter that there is."""
    fields = {field.name for field in keys_pb.ListKeysRequest.DESCRIPTOR.fields}
    assert fields - {"organization_id", "page_size", "page_token"} == FILTERS.keys()


async def test_forged_page_tokens(acme: Tenant) -> None:
    """A page token can neither be made up nor be altered."""
    await acme.key()
    token = (await acme.list(page_size=1)).next_page_token
    flipped = [token[:place] + ("B" if token[place] == "A" else "A") + token[place + 1 :] for place in range(0, 160, 5)]
    made_up = ["A", "=", "\N{SNOWMAN}", "\x00", token[:-1], token[: len(token) // 2], acme.admin_key_id]
    for forged in (*flipped, *made_up):
        assert forged != token
        await assert_page_token_is_refused(acme, page_token=forged)
    error = await refusal(acme.list(page_token="A" * 1025))
    assert ("INVALID_FIELD", ["page_token"]) == (error.reason, list(error.violations))


async def test_colleagues_page_tokens(acme: Tenant) -> None:
    """A page token is good for every caller of the organization, whether or not the organization is named."""
    await acme.key()
    token = (await acme.list(page_size=1)).next_page_token
    colleague = await acme.caller("keys:read")
    for organization_id in ("", acme.id):
        page = await acme.list(colleague, organization_id=organization_id, page_size=1, page_token=token)
        assert [acme.admin_key_id] == ids(page.keys)


async def test_root_lists_the_organization_that_it_names(acme: Tenant, rival: Tenant) -> None:
    """Root names the organization, and is told when there is no such one instead of being shown an empty list."""
    root = acme.service.root
    for tenant in (acme, rival):
        assert [tenant.admin_key_id] == ids((await acme.list(root, organization_id=tenant.id)).keys)
    error = await refusal(acme.list(root))
    assert ("INVALID_FIELD", ["organization_id"]) == (error.reason, list(error.violations))
    error = await refusal(acme.list(root, organization_id="no-such-organization"))
    assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)


@pytest.mark.parametrize("field", ["key_type", "environment", "state"])
async def test_filters_that_mean_nothing(acme: Tenant, field: str) -> None:
    """A filter with a value that the contract does not have is refused by its name."""
    error = await refusal(acme.list(None, **{field: 99}))
    assert ("INVALID_FIELD", [field]) == (error.reason, list(error.violations))
