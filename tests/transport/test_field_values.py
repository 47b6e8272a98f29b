"""Values that no pattern can tell: times, networks, permissions, sizes."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2, timestamp_pb2

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as pb
from support.service import RunningService, refusal
from support.transport import call, good_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMPOSSIBLE_TIMES = {
    "now": int(time.time()),
    "the epoch": 0,
    "before the epoch": -1,
    "the first second of the year 1": -62_135_596_800,
    "before the year 1": -62_135_596_801,
    "the last second of the year 9999": 253_402_300_799,
    "the year 10000": 253_402_300_800,
    "the largest number": 2**63 - 1,
    "the smallest number": -(2**63),
}
IMPOSSIBLE_NANOS = (-1, -(2**31), 1_000_000_000, 2**31 - 1)
LATEST = 253_402_214_399


def create(**fields: Any) -> pb.CreateKeyRequest:
    """Makes a request for a key of `acme`."""
    return pb.CreateKeyRequest(organization_id="acme", name="a key", **fields)


@pytest.mark.parametrize("seconds", IMPOSSIBLE_TIMES.values(), ids=IMPOSSIBLE_TIMES)
async def test_expiry_that_can_not_be(shared_service: RunningService, seconds: int) -> None:
    """An expiry that has passed, or that lies beyond what a time can hold, is INVALID_ARGUMENT and names the field: in
    CreateKey and in UpdateKey.
    """
    created = await shared_service.create_key("acme")
    expire_time = timestamp_pb2.Timestamp(seconds=seconds)

    refused = await refusal(call(shared_service, "CreateKey", create(expire_time=expire_time)))
    assert (grpc.StatusCode.INVALID_ARGUMENT, ["expire_time"]) == (refused.code, list(refused.violations))

    update = pb.UpdateKeyRequest(key=key_pb2.Key(id=created.key.id, expire_time=expire_time))
    refused = await refusal(call(shared_service, "UpdateKey", update))
    assert (grpc.StatusCode.INVALID_ARGUMENT, ["key.expire_time"]) == (refused.code, list(refused.violations))


@pytest.mark.parametrize("nanos", IMPOSSIBLE_NANOS)
async def test_expiry_with_impossible_nanos(shared_service: RunningService, nanos: int) -> None:
    """Nanoseconds that are no part of a second are INVALID_ARGUMENT, never INTERNAL."""
    refused = await refusal(
        call(shared_service, "CreateKey", create(expire_time=timestamp_pb2.Timestamp(seconds=LATEST, nanos=nanos)))
    )
    assert (grpc.StatusCode.INVALID_ARGUMENT, ["expire_time"]) == (refused.code, list(refused.violations))


async def test_latest_expiry_is_kept(shared_service: RunningService) -> None:
    """A key may last until the end of 9999-12-30: it is created, read, listed and validated with that expiry."""
    created = await shared_service.create_key("acme", expire_time=timestamp_pb2.Timestamp(seconds=LATEST))

    assert LATEST == created.key.expire_time.seconds
    assert LATEST == (await shared_service.get_key(created.key.id)).expire_time.seconds
    assert LATEST == (await shared_service.validate(created.token)).expire_time.seconds


@pytest.mark.parametrize(
    "cidr",
    [
        "",
        "192.0.2.0/33",
        "192.0.2.0/-1",
        "192.0.2.1/24",
        "192.0.2.0/24 ",
        "192.0.2.0/24\n",
        "192.0.2.0/\u0662\u0664",
        "192.0.2",
        "192.0.2.256",
        "0192.0.2.1",
        "0x7f000001",
        "2130706433",
        "2001:db8::/129",
        "2001:db8::1/32",
        "2001:db8:::/32",
        "[2001:db8::1]",
        "localhost",
        "*",
        "/",
    ],
)
async def test_network_that_is_none(shared_service: RunningService, cidr: str) -> None:
    """What is no network in CIDR notation is INVALID_ARGUMENT and names its place in the list."""
    request = create(allowed_cidrs=["198.51.100.0/24", cidr])

    refused = await refusal(call(shared_service, "CreateKey", request))

    assert (grpc.StatusCode.INVALID_ARGUMENT, ["allowed_cidrs[1]"]) == (refused.code, list(refused.violations))


async def test_unknown_permission_is_named(shared_service: RunningService) -> None:
    """A permission that no scope of the catalogue matches is INVALID_ARGUMENT SCOPE_UNKNOWN, and says which."""
    refused = await refusal(call(shared_service, "CreateKey", create(permissions=["read", "rockets:launch"])))

    assert (grpc.StatusCode.INVALID_ARGUMENT, "SCOPE_UNKNOWN") == (refused.code, refused.reason)
    assert {"permission": "rockets:launch"} == refused.metadata


@pytest.mark.parametrize("metadata", [{"a": "b" * 4096}, {f"{number:064}": "\u00e9" * 64 for number in range(64)}])
async def test_metadata_beyond_its_size(shared_service: RunningService, metadata: dict[str, str]) -> None:
    """Metadata of more than 4 KiB, counted in bytes, is INVALID_ARGUMENT."""
    refused = await refusal(call(shared_service, "CreateKey", create(metadata=metadata)))

    assert (grpc.StatusCode.INVALID_ARGUMENT, ["metadata"]) == (refused.code, list(refused.violations))


@pytest.mark.parametrize("path", ["", "id", "key", "name.first", "NAME", "name,permissions", "secrets", "state", "\0"])
async def test_mask_that_names_what_can_not_change(shared_service: RunningService, path: str) -> None:
    """A path of an update_mask that is no field which can be changed is INVALID_ARGUMENT."""
    created = await shared_service.create_key("acme")
    mask = field_mask_pb2.FieldMask(paths=["name", path])
    request = pb.UpdateKeyRequest(key=key_pb2.Key(id=created.key.id, name="another"), update_mask=mask)

    refused = await refusal(call(shared_service, "UpdateKey", request))

    assert (grpc.StatusCode.INVALID_ARGUMENT, ["update_mask"]) == (refused.code, list(refused.violations))


async def test_every_violation_is_named(shared_service: RunningService) -> None:
    """A request with several mistakes is told all of them at once."""
    request = pb.CreateKeyRequest(
        organization_id="A", permissions=["read", "B"], rate_limit_per_minute=-1, metadata={"a": "\0"}
    )

    refused = await refusal(call(shared_service, "CreateKey", request))

    expected = {"organization_id", "name", "permissions[1]", "rate_limit_per_minute", 'metadata["a"]'}
    assert expected == set(refused.violations)


TOO_MANY_MISTAKES = {
    "permissions": create(permissions=["\u00e9" * 90 + str(number) for number in range(100)]),
    "names of metadata": create(metadata={"\u00e9\n" * 5000 + str(number): "\0" for number in range(64)}),
    "a long path": pb.UpdateKeyRequest(
        key=key_pb2.Key(id="key_" + "0" * 26), update_mask=field_mask_pb2.FieldMask(paths=["\u00e9" * 100_000])
    ),
}


@pytest.mark.parametrize("request_", TOO_MANY_MISTAKES.values(), ids=TOO_MANY_MISTAKES)
async def test_refusal_stays_small(shared_service: RunningService, request_: Any) -> None:
    """However many and however long the mistakes, the refusal is one that clients take: they drop headers that are too
    large, and would see another error in its place.
    """
    method = type(request_).__name__.removesuffix("Request")
    refused = await refusal(call(shared_service, method, request_))

    assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (refused.code, refused.reason)
    assert refused.violations


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"cost": 1_000_001}, "cost"),
        ({"cost": 2**32 - 1}, "cost"),
        ({"min_revision": -1}, "min_revision"),
        ({"min_revision": -(2**63)}, "min_revision"),
        ({"required_permissions": ["read"] * 101}, "required_permissions"),
    ],
)
async def test_validate_checks_the_gateways_fields(
    shared_service: RunningService, fields: dict[str, Any], named: str
) -> None:
    """A request that makes no sense is the gateway's mistake and told as such, whatever the token."""
    for token in ("", (await shared_service.create_key("acme")).token):
        refused = await refusal(call(shared_service, "Validate", pb.ValidateRequest(token=token, **fields)))
        assert (grpc.StatusCode.INVALID_ARGUMENT, [named]) == (refused.code, list(refused.violations))


async def test_batch_beyond_its_size(shared_service: RunningService) -> None:
    """More than 100 requests in a batch are INVALID_ARGUMENT; 100 are answered."""
    hundred = [pb.ValidateRequest(token="no token")] * 100

    refused = await refusal(
        call(shared_service, "BatchValidate", pb.BatchValidateRequest(requests=[*hundred, pb.ValidateRequest()]))
    )
    assert (grpc.StatusCode.INVALID_ARGUMENT, ["requests"]) == (refused.code, list(refused.violations))

    answer = await call(shared_service, "BatchValidate", pb.BatchValidateRequest(requests=hundred))
    assert 100 == len(answer.responses)


async def test_unknown_fields_are_let_pass(shared_service: RunningService) -> None:
    """A client that is newer than the service is understood as far as the service knows."""
    request = good_request("ListScopes", key_id="")
    request.MergeFromString(b"\xf8\x3f\x01")

    assert (await call(shared_service, "ListScopes", request)).scopes
