"""CreateKey."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import (
    Tenant,
    database_of,
    hours_ahead,
    make_plan,
    make_tenant,
    state_of,
)
from support.service import RunningService, call_error, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

LAST_MOMENT = timestamp_pb2.Timestamp(seconds=253402300799, nanos=999999999)


async def test_every_field_of_the_answer(acme: Tenant) -> None:
    """The new key is as it was asked for, belongs to the caller's organization, and says who made it."""
    expire_time = hours_ahead(1)
    created = await acme.key(
        name="Kasse 1 \N{LATIN SMALL LETTER U WITH DIAERESIS}",
        permissions=["read", "keys:*"],
        rate_limit_per_minute=60,
        expire_time=expire_time,
        key_type=key_pb2.KEY_TYPE_SECRET,
        environment=key_pb2.ENVIRONMENT_TEST,
        user_id="u-1",
        user_email="ann@example.com",
        metadata={"team": "payments", "empty": ""},
        allowed_cidrs=["203.0.113.7", "2001:DB8::/32"],
    )
    key = created.key
    expected = key_pb2.Key(
        id=key.id,
        organization_id=acme.id,
        name="Kasse 1 \N{LATIN SMALL LETTER U WITH DIAERESIS}",
        prefix=created.token[: len("lk_test_") + 5],
        key_type=key_pb2.KEY_TYPE_SECRET,
        environment=key_pb2.ENVIRONMENT_TEST,
        permissions=["read", "keys:*"],
        rate_limit_per_minute=60,
        state=key_pb2.KEY_STATE_ACTIVE,
        user_id="u-1",
        user_email="ann@example.com",
        metadata={"team": "payments", "empty": ""},
        allowed_cidrs=["203.0.113.7/32", "2001:db8::/32"],
        create_time=key.create_time,
        update_time=key.create_time,
        expire_time=expire_time,
        etag=key.etag,
        created_by=acme.admin_key_id,
        secrets=[key_pb2.Secret(prefix=key.prefix, create_time=key.create_time)],
    )
    assert expected == key
    assert re.fullmatch(r"key_[0-9a-z]{26}", key.id)
    assert "" != key.etag
    assert key.HasField("create_time")
    unset = {field.name for field in key.DESCRIPTOR.fields} - {field.name for field, _ in key.ListFields()}
    assert {"revoke_time", "purge_time", "last_used_time", "revoke_reason"} == unset


async def test_defaults(acme: Tenant) -> None:
    """A name is all that must be given: a secret live key comes of it, good for nothing but to be recognised."""
    created = await acme.key(name="plain")
    key = created.key
    assert (acme.id, key_pb2.KEY_TYPE_SECRET, key_pb2.ENVIRONMENT_LIVE) == (
        key.organization_id,
        key.key_type,
        key.environment,
    )
    assert ([], [], {}, 0, False) == (
        list(key.permissions),
        list(key.allowed_cidrs),
        dict(key.metadata),
        key.rate_limit_per_minute,
        key.HasField("expire_time"),
    )
    assert "VALID" == await acme.service.outcome(created.token)
    assert "PERMISSION_DENIED" == await acme.service.outcome(created.token, required_permissions=["read"])


@pytest.mark.parametrize(
    ("key_type", "environment", "prefix"),
    [
        (key_pb2.KEY_TYPE_SECRET, key_pb2.ENVIRONMENT_LIVE, "lk_"),
        (key_pb2.KEY_TYPE_SECRET, key_pb2.ENVIRONMENT_TEST, "lk_test_"),
        (key_pb2.KEY_TYPE_PUBLISHABLE, key_pb2.ENVIRONMENT_LIVE, "lk_pk_"),
        (key_pb2.KEY_TYPE_PUBLISHABLE, key_pb2.ENVIRONMENT_TEST, "lk_pk_test_"),
    ],
)
async def test_token_says_what_it_is_for(
    acme: Tenant, key_type: key_pb2.KeyType.ValueType, environment: key_pb2.Environment.ValueType, prefix: str
) -> None:
    """A token's prefix tells its type and environment; what is shown of it later is the prefix and 5 characters."""
    created = await acme.key(key_type=key_type, environment=environment)
    assert re.fullmatch(prefix + "[0-9A-Za-z]{40}", created.token)
    assert created.token[: len(prefix) + 5] == created.key.prefix
    answer = await acme.service.validate(created.token)
    assert (key_type, environment) == (answer.key_type, answer.environment)


async def test_secret_token_is_not_stored(alone: RunningService) -> None:
    """Whoever reads the whole database finds no token of a secret key in it, whether or not it can be retried."""
    await alone.create_organization("acme")
    plain = (await alone.create_key("acme")).token
    retried = (await alone.create_key("acme", request_id="6f2c1a34-5ad2-4f0b-9a55-0f1c6f6a8a10")).token
    content = await _whole_database(alone)
    for token in (plain, retried):
        assert hashlib.sha256(token.encode()).hexdigest() in content
        assert token[-40:] not in content
        assert token[-40:].encode().hex() not in content
        assert not any(part.encode().hex() in content for part in _base64_parts(token))


async def _whole_database(service: RunningService) -> str:
    """Writes all rows of all tables, bytes in hexadecimal digits."""
    rows: list[str] = []
    async with database_of(service) as connection:
        for table in await connection.fetch("SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r'"):
            found = await connection.fetch(f"SELECT t::text AS content FROM {table['oid']} t")  # noqa: S608 - a table
            rows += [row["content"] for row in found]
    return "\n".join(rows)


def _base64_parts(token: str) -> list[str]:
    """Gives what base64 makes of a token, wherever in a longer value it begins."""
    return [base64.b64encode(b"\0" * before + token.encode())[4:-4].decode() for before in range(3)]


LIMITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"name": "\N{SNOWMAN}" * 100}, {"name": "\N{SNOWMAN}" * 101}, "name"),
    ({"name": " x"}, {"name": ""}, "name"),
    ({"name": "tab is a control character"}, {"name": "a\tb"}, "name"),
    ({"rate_limit_per_minute": 100_000_000}, {"rate_limit_per_minute": 100_000_001}, "rate_limit_per_minute"),
    ({"rate_limit_per_minute": 0}, {"rate_limit_per_minute": -1}, "rate_limit_per_minute"),
    ({"user_id": "u" * 200}, {"user_id": "u" * 201}, "user_id"),
    ({"user_id": ""}, {"user_id": "u\x00"}, "user_id"),
    ({"user_email": "a" * 242 + "@example.com"}, {"user_email": "a" * 243 + "@example.com"}, "user_email"),
    ({"user_email": "ann@example.com"}, {"user_email": "ann"}, "user_email"),
    ({"metadata": {"a": "\N{SNOWMAN}" * 1365}}, {"metadata": {"ab": "\N{SNOWMAN}" * 1365}}, "metadata"),
    ({"metadata": {f"n{i}": "" for i in range(64)}}, {"metadata": {f"n{i}": "" for i in range(65)}}, "metadata"),
    ({"metadata": {"n" * 64: "line\nbreak"}}, {"metadata": {"n" * 65: ""}}, 'metadata["' + "n" * 65 + '"]'),
    ({"metadata": {"a": ""}}, {"metadata": {"": "a"}}, 'metadata[""]'),
    ({"metadata": {"a": "\x01"}}, {"metadata": {"a": "\x00"}}, 'metadata["a"]'),
    (
        {"allowed_cidrs": [f"10.0.0.{i}" for i in range(100)]},
        {"allowed_cidrs": [f"10.0.0.{i}" for i in range(101)]},
        "allowed_cidrs",
    ),
    ({"allowed_cidrs": ["::/0"]}, {"allowed_cidrs": ["::/0", "10.0.0.1/8"]}, "allowed_cidrs[1]"),
    ({"allowed_cidrs": ["fe80::1"]}, {"allowed_cidrs": ["fe80::1%\x00"]}, "allowed_cidrs[0]"),
    ({"key_type": 2}, {"key_type": 3}, "key_type"),
    ({"environment": 2}, {"environment": 3}, "environment"),
    ({"expire_time": timestamp_pb2.Timestamp(seconds=253402214400)}, {"expire_time": LAST_MOMENT}, "expire_time"),
    (
        {"expire_time": hours_ahead(24)},
        {"expire_time": timestamp_pb2.Timestamp(seconds=253402300800)},
        "expire_time",
    ),
    ({"expire_time": hours_ahead(24)}, {"expire_time": hours_ahead(-24)}, "expire_time"),
    (
        {"request_id": "6F2C1A34-5AD2-4F0B-9A55-0F1C6F6A8A11"},
        {"request_id": "6f2c1a345ad24f0b9a550f1c6f6a8a11"},
        "request_id",
    ),
]


@pytest.mark.parametrize(("taken", "refused", "field"), LIMITS, ids=[field for *_, field in LIMITS])
async def test_limits(acme: Tenant, taken: dict[str, Any], refused: dict[str, Any], field: str) -> None:
    """Every field has its limit: what reaches it is taken, what goes beyond is refused by the field's name."""
    created = await acme.key(**taken)
    assert created.key == await acme.get(created.key.id)
    error = await refusal(acme.key(**refused))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert [field] == list(error.violations)


async def test_every_bad_field_is_named(acme: Tenant) -> None:
    """All that the contract's rules refuse is told at once."""
    error = await refusal(acme.key(name="", rate_limit_per_minute=-1, user_email="ann"))
    assert {"name", "rate_limit_per_minute", "user_email"} == error.violations.keys()


async def test_number_of_permissions(acme: Tenant) -> None:
    """A key has at most 100 permissions, each once and each well formed."""
    names = [f"orders:p{i}" for i in range(101)]
    await acme.give_scopes(*names)
    assert names[:100] == list((await acme.key(permissions=names[:100])).key.permissions)
    assert ["permissions"] == list((await refusal(acme.key(permissions=names))).violations)
    assert ["permissions"] == list((await refusal(acme.key(permissions=["read", "read"]))).violations)
    for malformed in ("", "Orders:read", "orders:", ":read", "orders:re*", "**", "orders read", "orders:read\n"):
        error = await refusal(acme.key(permissions=["read", malformed]))
        assert ["permissions[1]"] == list(error.violations), malformed


@pytest.mark.parametrize("permission", ["ordres:read", "orders", "orders:*", "read:*", "*:publish"])
async def test_permission_outside_the_catalogue(acme: Tenant, permission: str) -> None:
    """A permission that matches no scope of the organization's catalogue is a slip of the pen, and is named."""
    error = await refusal(acme.key(permissions=["read", permission]))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "SCOPE_UNKNOWN") == (error.code, error.reason)
    assert {"permission": permission} == error.metadata


@pytest.mark.parametrize("permission", ["*", "orders:*", "*:read", "orders:*:all", "*:*:all", "orders:read:*"])
async def test_wildcards_that_match_the_catalogue(acme: Tenant, permission: str) -> None:
    """A wildcard can be given when it matches at least one scope of the catalogue."""
    await acme.give_scopes("orders:read:all")
    assert [permission] == list((await acme.key(permissions=[permission])).key.permissions)


async def test_no_more_keys_than_the_plan_allows(shared: RunningService) -> None:
    """However many calls race for the last places, the organization never has more keys than its plan allows."""
    tenant = await make_tenant(shared, "small", await make_plan(shared, max_keys=4))
    answers = await asyncio.gather(*(tenant.key(name=f"key {i}") for i in range(12)), return_exceptions=True)
    errors = [call_error(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert (12, 9) == (len(answers), len(errors))
    assert {(grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_LIMIT_REACHED", "4")} == {
        (error.code, error.reason, error.metadata["max_keys"]) for error in errors
    }
    assert 4 == len((await tenant.list()).keys)


async def test_what_makes_room(shared: RunningService) -> None:
    """A key gives up its place when it is revoked or deleted, once; one that is off or has expired keeps it."""
    tenant = await make_tenant(shared, "small", await make_plan(shared, max_keys=3))
    first, second = await tenant.key(), await tenant.key()
    await tenant.toggle(first.key.id, active=False)
    await tenant.expire(second.key.id)
    assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key())).reason

    await tenant.revoke(first.key.id)
    await tenant.revoke(first.key.id)
    await tenant.delete(first.key.id)
    third = await tenant.key()
    assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key())).reason

    await tenant.delete(third.key.id)
    assert "ACTIVE" == state_of((await tenant.key()).key)
    assert "KEY_LIMIT_REACHED" == (await refusal(tenant.key())).reason


async def test_root_must_name_the_organization(shared: RunningService) -> None:
    """A caller with a root key never makes a further root key by forgetting whose key it wants."""
    error = await refusal(shared.create_key(""))
    assert ("INVALID_FIELD", ["organization_id"]) == (error.reason, list(error.violations))


async def test_organization_that_does_not_exist(shared: RunningService) -> None:
    """A key for an organization that is not there is refused."""
    error = await refusal(shared.create_key("no-such-organization"))
    assert (grpc.StatusCode.NOT_FOUND, "ORGANIZATION_NOT_FOUND") == (error.code, error.reason)


async def test_own_organization_may_be_named(acme: Tenant) -> None:
    """A caller may name its own organization."""
    created = await acme.create(keys_pb.CreateKeyRequest(organization_id=acme.id, name="named"))
    assert acme.id == created.key.organization_id


async def test_ids_and_tokens_are_never_reused(acme: Tenant) -> None:
    """Keys that are made at the same time have ids and tokens of their own."""
    created = await asyncio.gather(*(acme.key() for _ in range(20)))
    assert 20 == len({each.key.id for each in created}) == len({each.token for each in created})
