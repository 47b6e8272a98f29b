"""Validate: each outcome, and what is told with it."""

from __future__ import annotations

from datetime import timedelta

import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as keys_pb
from support.keys import Tenant, change_key, hours_ahead, outcome_of
from support.service import ROOT_TOKEN, RunningService, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

IDENTITY = {
    "key_id",
    "organization_id",
    "user_id",
    "user_email",
    "key_name",
    "key_type",
    "environment",
    "permissions",
    "create_time",
    "expire_time",
    "metadata",
}
"""The fields that say who a key is."""


async def full_key(tenant: Tenant) -> keys_pb.CreateKeyResponse:
    """Makes a key of which every field is set."""
    return await tenant.key(
        name="checkout",
        permissions=["read"],
        rate_limit_per_minute=5,
        expire_time=hours_ahead(24),
        environment=key_pb2.ENVIRONMENT_TEST,
        user_id="u-1",
        user_email="ann@example.com",
        metadata={"team": "payments"},
        allowed_cidrs=["10.0.0.0/8"],
    )


async def ask(tenant: Tenant, token: str, **fields: object) -> keys_pb.ValidateResponse:
    """Asks for a request that `full_key` is good for, but for what is given."""
    return await tenant.service.validate(token, **{"client_ip": "10.0.0.1", "required_permissions": ["read"]} | fields)


def shown(answer: keys_pb.ValidateResponse) -> set[str]:
    """Gives the names of the fields that are set, but for those that every answer may have."""
    return {field.name for field, _ in answer.ListFields()} - {"outcome", "revision", "cache_ttl"}


async def test_valid(acme: Tenant) -> None:
    """A key is VALID as soon as the call that created it has returned, and the answer says all there is to hand on."""
    created = await full_key(acme)
    answer = await ask(acme, created.token)
    expected = keys_pb.ValidateResponse(
        outcome=keys_pb.OUTCOME_VALID,
        key_id=created.key.id,
        organization_id=acme.id,
        user_id="u-1",
        user_email="ann@example.com",
        key_name="checkout",
        key_type=key_pb2.KEY_TYPE_SECRET,
        environment=key_pb2.ENVIRONMENT_TEST,
        permissions=["read"],
        create_time=created.key.create_time,
        expire_time=created.key.expire_time,
        metadata={"team": "payments"},
        rate_limit=keys_pb.RateLimit(limit=5, remaining=4, reset_time=answer.rate_limit.reset_time),
        revision=answer.revision,
    )
    assert expected == answer
    assert {field.name for field in answer.DESCRIPTOR.fields} - {"outcome", "revision", "cache_ttl"} == shown(answer)


async def test_valid_without_extras(acme: Tenant) -> None:
    """A plain key has no expiry, no limit, no user and no metadata; the answer may not be used again without asking."""
    answer = await acme.service.validate((await acme.key()).token)
    expected = IDENTITY - {"user_id", "user_email", "permissions", "expire_time", "metadata"}
    assert ("VALID", expected, timedelta(0)) == (outcome_of(answer), shown(answer), answer.cache_ttl.ToTimedelta())


@pytest.mark.parametrize(
    "token",
    [
        "",
        " ",
        "lk_",
        "lk_" + "0" * 40,
        "lk_test_" + "A" * 40,
        "lk_pk_" + "z" * 40,
        "lk_" + "0" * 4000,
        "x" * 100_000,
        "\x00" * 40,
        "lk_" + "\N{SNOWMAN}" * 40,
        "Bearer lk_" + "0" * 40,
        "'; DROP TABLE key; --",
        "key_00000000000000000000000000",
        "foreign-token-that-nobody-imported",
    ],
    ids=lambda token: ascii(token[:24]),
)
async def test_not_found(shared: RunningService, token: str) -> None:
    """What is no token of this service is NOT_FOUND: an answer like any other, and no error."""
    answer = await shared.validate(token)
    assert ("NOT_FOUND", set()) == (outcome_of(answer), shown(answer))


async def test_token_with_a_mistake(acme: Tenant) -> None:
    """A token with one character changed, added or left out is NOT_FOUND."""
    token = (await acme.key()).token
    for place in range(len(token)):
        wrong = token[:place] + ("b" if token[place] == "a" else "a") + token[place + 1 :]
        assert "NOT_FOUND" == await acme.service.outcome(wrong)
    for wrong in (token[:-1], token[1:], token + "a", token + " ", " " + token, token + "\n", token.swapcase()):
        assert "NOT_FOUND" == await acme.service.outcome(wrong)
    assert "VALID" == await acme.service.outcome(token)


async def test_hint_is_no_token(acme: Tenant) -> None:
    """What is shown of a token later is good for nothing."""
    key = (await acme.key()).key
    for text in (key.prefix, key.id, key.etag):
        assert "NOT_FOUND" == await acme.service.outcome(text)


async def test_imported_token(shared: RunningService) -> None:
    """A token of another format whose digest is stored is found, as the root token of the settings is."""
    answer = await shared.validate(ROOT_TOKEN)
    assert ("VALID", "org_root", ["*"]) == (outcome_of(answer), answer.organization_id, list(answer.permissions))


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("revoke", "REVOKED"),
        ("delete", "REVOKED"),
        ("rotate", "REVOKED"),
        ("toggle", "INACTIVE"),
        ("expire", "EXPIRED"),
    ],
)
async def test_tokens_that_are_not_accepted(acme: Tenant, end: str, outcome: str) -> None:
    """A token that is not accepted is told why, and not whose it was: not even to whom it should be reported."""
    created = await full_key(acme)
    await getattr(acme, end)(created.key.id)
    answer = await ask(acme, created.token)
    assert (outcome, set()) == (outcome_of(answer), shown(answer))


async def test_expiry_is_the_databases(acme: Tenant) -> None:
    """A key is good until its expiry, by the database's clock, and from that very moment on it is not."""
    created = await acme.key()
    statement = "UPDATE key SET expire_time = now() + $2::interval WHERE id = $1"
    await change_key(acme.service, created.key.id, statement, created.key.id, timedelta(minutes=1))
    assert "VALID" == await acme.service.outcome(created.token)
    await change_key(acme.service, created.key.id, statement, created.key.id, timedelta(0))
    assert "EXPIRED" == await acme.service.outcome(created.token)


async def test_organization_inactive(acme: Tenant, rival: Tenant) -> None:
    """All keys of an inactive organization are refused at once, those of others are not; all come back with it."""
    created = await full_key(acme)
    await acme.set_active(active=False)
    answer = await ask(acme, created.token)
    assert ("ORGANIZATION_INACTIVE", set()) == (outcome_of(answer), shown(answer))
    assert "VALID" == await rival.service.outcome((await rival.key()).token)
    await acme.set_active(active=True)
    assert "VALID" == outcome_of(await ask(acme, created.token))


async def test_order_of_the_reasons(acme: Tenant) -> None:
    """Of several reasons the first of the contract's order is told: one that will last before one that may pass."""
    created = await full_key(acme)
    wrong = {"client_ip": "192.0.2.1", "required_permissions": ["write"], "cost": 6}
    assert "ADDRESS_DENIED" == outcome_of(await ask(acme, created.token, **wrong))
    assert "PERMISSION_DENIED" == outcome_of(await ask(acme, created.token, **wrong | {"client_ip": "10.0.0.1"}))
    assert "RATE_LIMITED" == outcome_of(await ask(acme, created.token, cost=6))
    await acme.set_active(active=False)
    assert "ORGANIZATION_INACTIVE" == outcome_of(await ask(acme, created.token, **wrong))
    root = acme.service.root
    await acme.toggle(created.key.id, active=False, caller=root)
    assert "INACTIVE" == outcome_of(await ask(acme, created.token, **wrong))
    await acme.expire(created.key.id)
    assert "EXPIRED" == outcome_of(await ask(acme, created.token, **wrong))
    await acme.revoke(created.key.id, caller=root)
    assert "REVOKED" == outcome_of(await ask(acme, created.token, **wrong))


async def test_permission_denied(acme: Tenant) -> None:
    """A key that lacks one of the permissions that are needed is refused by name, so that it can be given more."""
    created = await full_key(acme)
    for needed in (["write"], ["read", "write"], ["READ"], [""], ["*"]):
        answer = await ask(acme, created.token, required_permissions=needed)
        assert ("PERMISSION_DENIED", IDENTITY) == (outcome_of(answer), shown(answer))
        assert (created.key.id, ["read"]) == (answer.key_id, list(answer.permissions))
    assert "VALID" == outcome_of(await ask(acme, created.token, required_permissions=["read", "read"]))


async def test_number_of_needed_permissions(acme: Tenant) -> None:
    """A request may need up to 100 permissions."""
    created = await acme.key(permissions=["*"])
    assert "VALID" == await acme.service.outcome(created.token, required_permissions=["read"] * 100)
    error = await refusal(acme.service.validate(created.token, required_permissions=["read"] * 101))
    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    assert ["required_permissions"] == list(error.violations)


async def test_addresses(acme: Tenant) -> None:
    """A key that is bound to networks is good from within them alone, IPv4 in either form."""
    created = await acme.key(allowed_cidrs=["10.0.0.0/8", "2001:db8::/32", "192.0.2.7"])
    for address in ("10.0.0.0", "10.255.255.255", "::ffff:10.1.2.3", "2001:db8::1", "192.0.2.7"):
        assert "VALID" == await acme.service.outcome(created.token, client_ip=address), address
    for address in ("11.0.0.0", "9.255.255.255", "192.0.2.8", "2001:db9::1", "::10.1.2.3", "::1"):
        assert "ADDRESS_DENIED" == await acme.service.outcome(created.token, client_ip=address), address


async def test_address_denied(acme: Tenant) -> None:
    """A key that is used from elsewhere, or from nowhere known, is refused by name: its owner wants to know."""
    created = await full_key(acme)
    for address in ("192.0.2.1", ""):
        answer = await ask(acme, created.token, client_ip=address)
        assert ("ADDRESS_DENIED", IDENTITY) == (outcome_of(answer), shown(answer))
        assert created.key.id == answer.key_id


async def test_mapped_networks(acme: Tenant) -> None:
    """An IPv4 network that was written as IPv6 is what it means, and is shown as that."""
    created = await acme.key(allowed_cidrs=["::ffff:10.0.0.0/104"])
    assert ["10.0.0.0/8"] == list(created.key.allowed_cidrs)
    assert "VALID" == await acme.service.outcome(created.token, client_ip="10.1.2.3")


@pytest.mark.parametrize("address", ["10.0.0.1:443", "10.0.0.0/8", "[2001:db8::1]", "localhost", "unknown"])
async def test_addresses_that_are_none(acme: Tenant, address: str) -> None:
    """Where the address decides, what is none is the gateway's mistake, and is told as one."""
    created = await full_key(acme)
    error = await refusal(ask(acme, created.token, client_ip=address))
    assert ("INVALID_FIELD", ["client_ip"]) == (error.reason, list(error.violations))


async def test_request_that_makes_no_sense(acme: Tenant) -> None:
    """A cost beyond a million is refused, whatever the token: a gateway's mistake shows at once."""
    for token in ((await acme.key()).token, "no token"):
        error = await refusal(acme.service.validate(token, cost=1_000_001))
        assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
        assert ["cost"] == list(error.violations)
