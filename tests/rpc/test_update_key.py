"""UpdateKey."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2

from apikeys.v1 import key_pb2
from support.keys import (
    NOBODYS_KEY,
    Tenant,
    database_of,
    hours_ahead,
    is_effective,
    outcome_of,
    state_of,
    with_fields,
    without_fields,
)
from support.service import refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

BEFORE: dict[str, Any] = {
    "name": "before",
    "permissions": ["read"],
    "rate_limit_per_minute": 10,
    "expire_time": hours_ahead(24),
    "metadata": {"a": "1", "b": "2"},
    "allowed_cidrs": ["10.0.0.0/8"],
}
AFTER: dict[str, Any] = {
    "name": "after",
    "permissions": ["write", "keys:read"],
    "rate_limit_per_minute": 20,
    "expire_time": hours_ahead(48),
    "metadata": {"b": "3"},
    "allowed_cidrs": ["192.0.2.0/24", "2001:db8::/32"],
}
CHANGING = ("update_time", "etag")
"""What changes with every change."""


@pytest.mark.parametrize("path", AFTER)
async def test_each_field_by_itself(acme: Tenant, path: str) -> None:
    """A mask with one path changes that field and no other, whatever else the request holds."""
    key = (await acme.key(**BEFORE)).key
    updated = await acme.update(key_pb2.Key(id=key.id, **AFTER), path)
    assert without_fields(with_fields(key, **{path: AFTER[path]}), *CHANGING) == without_fields(updated.key, *CHANGING)
    assert is_effective(updated.effect)
    assert updated.key == await acme.get(key.id)


async def test_fields_that_are_set(acme: Tenant) -> None:
    """Without a mask, the fields that are set are changed, and the others are left alone."""
    key = (await acme.key(**BEFORE)).key
    updated = (await acme.update(key_pb2.Key(id=key.id, name="after", metadata={"c": "4"}))).key
    expected = with_fields(key, name="after", metadata={"c": "4"})
    assert without_fields(expected, *CHANGING) == without_fields(updated, *CHANGING)


async def test_star_is_all_fields(acme: Tenant) -> None:
    """`*` names every field: what is set is changed, what is not is cleared."""
    key = (await acme.key(**BEFORE)).key
    updated = (await acme.update(key_pb2.Key(id=key.id, **AFTER), "*")).key
    assert without_fields(with_fields(key, **AFTER), *CHANGING) == without_fields(updated, *CHANGING)

    cleared = (await acme.update(key_pb2.Key(id=key.id, name="only a name"), "*")).key
    expected = with_fields(without_fields(key, *BEFORE), name="only a name")
    assert without_fields(expected, *CHANGING) == without_fields(cleared, *CHANGING)


@pytest.mark.parametrize("path", sorted(BEFORE.keys() - {"name"}))
async def test_clearing_a_field(acme: Tenant, path: str) -> None:
    """A field that the mask names and the key does not have is cleared."""
    key = (await acme.key(**BEFORE)).key
    updated = (await acme.update(key_pb2.Key(id=key.id), path)).key
    assert without_fields(key, path, *CHANGING) == without_fields(updated, *CHANGING)


@pytest.mark.parametrize("paths", [["name"], ["*"], ["metadata", "name"]])
async def test_name_can_not_be_cleared(acme: Tenant, paths: list[str]) -> None:
    """A key always has a name."""
    key = (await acme.key(**BEFORE)).key
    error = await refusal(acme.update(key_pb2.Key(id=key.id), *paths))
    assert ("INVALID_FIELD", ["key.name"]) == (error.reason, list(error.violations))
    assert key == await acme.get(key.id)


async def test_every_field_that_can_not_be_changed(acme: Tenant) -> None:
    """A mask with a field that is fixed or given by the service is refused as a whole."""
    key = (await acme.key(**BEFORE)).key
    fixed = {field.name for field in key.DESCRIPTOR.fields} - AFTER.keys()
    assert 17 == len(fixed)
    for path in (*fixed, "metadata.a", "key.name", "Name", "rateLimitPerMinute", "permissions[0]", "nonsense", ""):
        error = await refusal(acme.update(key_pb2.Key(id=key.id, name="after"), "name", path))
        assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
        assert ["update_mask"] == list(error.violations), path
    assert key == await acme.get(key.id)


@pytest.mark.parametrize("fields", [{}, {"state": 2, "user_id": "u-2", "organization_id": "rival", "created_by": "me"}])
async def test_nothing_to_change(acme: Tenant, fields: dict[str, Any]) -> None:
    """A request that names no field to change is a mistake; fields that can not be changed do not count."""
    key = (await acme.key(**BEFORE)).key
    error = await refusal(acme.update(key_pb2.Key(id=key.id, **fields)))
    assert ("INVALID_FIELD", ["update_mask"]) == (error.reason, list(error.violations))


async def test_fixed_fields_are_ignored(acme: Tenant) -> None:
    """A key that was read can be sent back with one field changed: the rest of it does no harm."""
    key = (await acme.key(**BEFORE)).key
    forged = with_fields(key, name="after", state=key_pb2.KEY_STATE_REVOKED, user_id="u-2", created_by="me")
    updated = (await acme.update(forged)).key
    assert without_fields(with_fields(key, name="after"), *CHANGING) == without_fields(updated, *CHANGING)


async def test_no_change_is_none(acme: Tenant) -> None:
    """Values that the key has already change neither its etag nor its update time."""
    key = (await acme.key(**BEFORE)).key
    updated = await acme.update(key, "*")
    assert (key, True) == (updated.key, is_effective(updated.effect))


async def test_every_change_shows(acme: Tenant) -> None:
    """A change moves the key's update time and its etag."""
    key = (await acme.key(**BEFORE)).key
    updated = (await acme.update(key_pb2.Key(id=key.id, name="after"))).key
    assert key.update_time.ToDatetime() < updated.update_time.ToDatetime()
    assert key.etag != updated.etag
    assert key.create_time == updated.create_time


async def test_stale_etag(acme: Tenant) -> None:
    """With an etag, a change is made only to the key as it was read."""
    key = (await acme.key(**BEFORE)).key
    updated = (await acme.update(key_pb2.Key(id=key.id, name="first"), etag=key.etag)).key
    error = await refusal(acme.update(key_pb2.Key(id=key.id, name="second"), etag=key.etag))
    assert (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", {"etag": updated.etag}) == (
        error.code,
        error.reason,
        error.metadata,
    )
    assert updated == await acme.get(key.id)
    assert "third" == (await acme.update(key_pb2.Key(id=key.id, name="third"), etag=updated.etag)).key.name


@pytest.mark.parametrize("change", ["toggle", "rotate", "update"])
async def test_every_change_makes_etags_stale(acme: Tenant, change: str) -> None:
    """An etag is stale after any change of the key, not only after an update."""
    key = (await acme.key(**BEFORE)).key
    match change:
        case "toggle":
            await acme.toggle(key.id)
        case "rotate":
            await acme.rotate(key.id)
        case "update":
            await acme.update(key_pb2.Key(id=key.id, name="after"))
    assert "ETAG_MISMATCH" == (await refusal(acme.update(key_pb2.Key(id=key.id, name="x"), etag=key.etag))).reason


async def test_racing_updates_with_one_etag(acme: Tenant) -> None:
    """Of changes that were made up from the same reading, one holds."""
    key = (await acme.key(**BEFORE)).key
    answers = await asyncio.gather(
        *(acme.update(key_pb2.Key(id=key.id, name=f"name {number}"), etag=key.etag) for number in range(8)),
        return_exceptions=True,
    )
    made = [answer.key.name for answer in answers if not isinstance(answer, BaseException)]
    assert [(await acme.get(key.id)).name] == made


async def test_racing_updates_of_different_fields(acme: Tenant) -> None:
    """Changes of different fields at the same time do not undo each other."""
    key = (await acme.key(**BEFORE)).key
    await asyncio.gather(*(acme.update(key_pb2.Key(id=key.id, **{path: AFTER[path]}), path) for path in AFTER))
    updated = await acme.get(key.id)
    assert without_fields(with_fields(key, **AFTER), *CHANGING) == without_fields(updated, *CHANGING)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "\N{SNOWMAN}" * 101}, "key.name"),
        ({"name": "a\nb"}, "key.name"),
        ({"permissions": ["read"] * 2}, "key.permissions"),
        ({"permissions": ["read", "Read"]}, "key.permissions[1]"),
        ({"permissions": [f"orders:p{i}" for i in range(101)]}, "key.permissions"),
        ({"rate_limit_per_minute": -1}, "key.rate_limit_per_minute"),
        ({"rate_limit_per_minute": 100_000_001}, "key.rate_limit_per_minute"),
        ({"metadata": {"a": "x" * 4096}}, "key.metadata"),
        ({"metadata": {"": "x"}}, 'key.metadata[""]'),
        ({"allowed_cidrs": ["10.0.0.0/8", "10.0.0.1/8"]}, "key.allowed_cidrs[1]"),
        ({"allowed_cidrs": ["fe80::1%\x00"]}, "key.allowed_cidrs[0]"),
        ({"expire_time": hours_ahead(-24)}, "key.expire_time"),
        ({"expire_time": timestamp_pb2.Timestamp(seconds=253402300799, nanos=999999999)}, "key.expire_time"),
        ({"expire_time": timestamp_pb2.Timestamp(seconds=253402300800)}, "key.expire_time"),
    ],
)
async def test_limits(acme: Tenant, fields: dict[str, Any], field: str) -> None:
    """What a key can not be made with it can not be changed to, and the field is named as it stands in the request."""
    key = (await acme.key(**BEFORE)).key
    error = await refusal(acme.update(key_pb2.Key(id=key.id, **fields)))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert [field] == list(error.violations)
    assert key == await acme.get(key.id)


async def test_permission_outside_the_catalogue(acme: Tenant) -> None:
    """A permission that is added must match the catalogue; one that the key has may stay when its scope is gone."""
    await acme.give_scopes("orders:read")
    key = (await acme.key(permissions=["orders:read"])).key
    # As when a scope is taken out of the deployment's file.
    async with database_of(acme.service) as connection:
        gone = 'UPDATE organization SET scopes = \'[{"name": "orders:write", "description": ""}]\' WHERE id = $1'
        await connection.execute(gone, acme.id)
    updated = (await acme.update(key_pb2.Key(id=key.id, permissions=["orders:read", "orders:write"]))).key
    assert ["orders:read", "orders:write"] == list(updated.permissions)
    await acme.update(key_pb2.Key(id=key.id, permissions=["orders:write"]))
    error = await refusal(acme.update(key_pb2.Key(id=key.id, permissions=["orders:read"])))
    assert ("SCOPE_UNKNOWN", {"permission": "orders:read"}) == (error.reason, error.metadata)


async def test_an_expired_key_comes_back(acme: Tenant) -> None:
    """A later expiry, or none, makes an expired key good again."""
    created = await acme.key()
    await acme.expire(created.key.id)
    assert "EXPIRED" == await acme.service.outcome(created.token)
    extended = await acme.update(key_pb2.Key(id=created.key.id, expire_time=hours_ahead(1)))
    assert ("ACTIVE", True) == (state_of(extended.key), is_effective(extended.effect))
    assert "VALID" == await acme.service.outcome(created.token)
    await acme.expire(created.key.id)
    await acme.update(key_pb2.Key(id=created.key.id), "expire_time")
    assert "VALID" == await acme.service.outcome(created.token)


async def test_an_expired_key_may_be_renamed(acme: Tenant) -> None:
    """An expiry in the past is no obstacle to other changes."""
    created = await acme.key()
    await acme.expire(created.key.id)
    key = await acme.get(created.key.id)
    updated = (await acme.update(with_fields(key, name="after"), "*")).key
    assert ("after", "EXPIRED", key.expire_time) == (updated.name, state_of(updated), updated.expire_time)


async def test_changes_hold_for_validation_at_once(acme: Tenant) -> None:
    """When the call has returned, Validate answers with the key as it is now."""
    created = await acme.key(**BEFORE | {"allowed_cidrs": []})
    await acme.update(key_pb2.Key(id=created.key.id, **AFTER), "*")
    answer = await acme.service.validate(created.token, client_ip="192.0.2.1", required_permissions=["write"])
    assert ("VALID", "after", AFTER["permissions"], AFTER["metadata"], AFTER["expire_time"], 20) == (
        outcome_of(answer),
        answer.key_name,
        list(answer.permissions),
        dict(answer.metadata),
        answer.expire_time,
        answer.rate_limit.limit,
    )
    assert "PERMISSION_DENIED" == await acme.service.outcome(
        created.token, client_ip="192.0.2.1", required_permissions=["read"]
    )
    assert "ADDRESS_DENIED" == await acme.service.outcome(created.token, client_ip="10.0.0.1")


@pytest.mark.parametrize(("end", "reason"), [("revoke", "KEY_REVOKED"), ("delete", "KEY_DELETED")])
async def test_keys_that_have_ended(acme: Tenant, end: str, reason: str) -> None:
    """A key that is revoked or deleted is not changed any more, and least of all brought back."""
    created = await acme.key()
    await getattr(acme, end)(created.key.id)
    key = await acme.get(created.key.id)
    for changes in ({"name": "after"}, {"expire_time": hours_ahead(1)}):
        error = await refusal(acme.update(key_pb2.Key(id=key.id, **changes)))
        assert (grpc.StatusCode.FAILED_PRECONDITION, reason) == (error.code, error.reason)
    assert key == await acme.get(key.id)


async def test_key_must_be_named(acme: Tenant) -> None:
    """A request without a key, or without its id, is refused; one with an id that never was is NOT_FOUND."""
    error = await refusal(acme.update(key_pb2.Key()))
    assert ("INVALID_FIELD", ["key.id"]) == (error.reason, list(error.violations))
    error = await refusal(acme.update(key_pb2.Key(id="key_1", name="after")))
    assert ("INVALID_FIELD", ["key.id"]) == (error.reason, list(error.violations))
    assert "KEY_NOT_FOUND" == (await refusal(acme.update(key_pb2.Key(id=NOBODYS_KEY, name="after")))).reason
