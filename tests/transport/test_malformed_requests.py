"""Bytes that are no request, too many of them, and too little time."""

from __future__ import annotations

import logging

import grpc
import pytest
from structlog.testing import capture_logs

from support.service import RunningService, refusal
from support.transport import (
    MANAGEMENT_METHODS,
    METHODS,
    OPEN_METHODS,
    RULED_METHODS,
    call_path,
    call_raw,
    calls,
    good_request,
    length_delimited,
    path_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

CANARY = "canary-of-the-content"

MALFORMED = {
    "length without content": b"\x0a\x10",
    "length beyond the end": b"\x0a\xff\xff\xff\xff\x07" + CANARY.encode(),
    "tag cut off": b"\xff",
    "field number 0": b"\x02\x01a",
    "wire type 7": b"\x0f",
    "end of a group that never began": b"\x0c",
    "group that never ends": b"\x0b",
    "varint of eleven bytes": b"\x78" + b"\xff" * 11,
    "JSON": b'{"token": "' + CANARY.encode() + b'"}',
    "text": CANARY.encode() * 100,
    "noise": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
}
TOO_LARGE = 4 * 1024 * 1024 + 1


@pytest.mark.parametrize("method", METHODS)
async def test_malformed_request_is_refused(
    shared_service: RunningService, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Bytes that are no message of the method are INVALID_ARGUMENT with a reason, for every method; nothing of them,
    and no stack trace, comes back or is logged.
    """
    for name, raw in MALFORMED.items():
        if name == "field number 0" and not METHODS[method].input_type.fields:
            # Protobuf's parser passes over all fields of a message that has none, also this one.
            continue
        with capture_logs() as lines:
            refused = await refusal(call_raw(shared_service.channel, method, raw, metadata=shared_service.root))

        assert (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST") == (refused.code, refused.reason), name
        assert METHODS[method].input_type.full_name in refused.message
        assert CANARY not in repr((refused, lines))
    assert [] == [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("method", MANAGEMENT_METHODS)
async def test_unknown_caller_learns_nothing_of_its_request(shared_service: RunningService, method: str) -> None:
    """Who is not known is told just that, whatever the request: it is not even read."""
    refused = await refusal(call_raw(shared_service.channel, method, MALFORMED["noise"]))

    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING") == (refused.code, refused.reason)


@pytest.mark.parametrize("method", [name for name in RULED_METHODS if METHODS[name].input_type.fields])
async def test_request_that_is_not_utf8_is_malformed(shared_service: RunningService, method: str) -> None:
    """Text that is not UTF-8 makes a management request unreadable: INVALID_ARGUMENT, never INTERNAL.

    Where the first field is no text, these bytes are a message of the wrong kind.
    """
    raw = length_delimited(1, length_delimited(1, b"\xff\xfe")) + length_delimited(2, b"\xff\xfe")

    refused = await refusal(call_raw(shared_service.channel, method, raw, metadata=shared_service.root))

    assert grpc.StatusCode.INVALID_ARGUMENT == refused.code


@pytest.mark.parametrize("method", ["Validate", "BatchValidate", "CreateKey", "CreatePlan"])
async def test_message_beyond_the_limit_is_refused(shared_service: RunningService, method: str) -> None:
    """A message of more than 4 MiB is RESOURCE_EXHAUSTED before it is read, and the connection goes on."""
    refused = await refusal(call_raw(shared_service.channel, method, b"\0" * TOO_LARGE))

    assert grpc.StatusCode.RESOURCE_EXHAUSTED == refused.code
    assert "NOT_FOUND" == await shared_service.outcome("no token")


@pytest.mark.parametrize("method", OPEN_METHODS)
async def test_compressed_message_is_measured_unpacked(shared_service: RunningService, method: str) -> None:
    """A message that is small on the wire and large in memory is refused as well."""
    bomb = b"\0" * (20 * TOO_LARGE)

    refused = await refusal(call_path(shared_service.channel, path_of(method), bomb, compression=grpc.Compression.Gzip))

    assert grpc.StatusCode.RESOURCE_EXHAUSTED == refused.code


async def test_unknown_method_is_unimplemented(shared_service: RunningService) -> None:
    """Methods and services that are not there are UNIMPLEMENTED, and make no new series among the metrics."""
    registry = shared_service.running.metrics.registry
    before = {(each.name, *each.labels.items()) for family in registry.collect() for each in family.samples}

    for path in ("/apikeys.v1.KeyService/Nothing", "/apikeys.v2.KeyService/Validate", "/nothing", "/a/b/c", "/"):
        refused = await refusal(call_path(shared_service.channel, path, b""))
        assert grpc.StatusCode.UNIMPLEMENTED == refused.code

    after = {(each.name, *each.labels.items()) for family in registry.collect() for each in family.samples}
    assert before == after


@pytest.mark.parametrize("deadline_s", [0.0, 0.001])
@pytest.mark.parametrize("method", METHODS)
async def test_deadline_that_can_not_be_kept(shared_service: RunningService, method: str, deadline_s: float) -> None:
    """A call with no time, or next to none, ends as such or as it should; it is never a fault of the service, and
    leaves nothing behind.
    """
    created = await shared_service.create_key("acme")
    raw = good_request(method, key_id=created.key.id).SerializeToString()

    started = call_raw(shared_service.channel, method, raw, metadata=shared_service.root, timeout_s=deadline_s)
    code = await started.code()

    expected = {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
    # There is no publishable key to be had.
    beside = {
        "GetPublishableKey": grpc.StatusCode.NOT_FOUND,
        # Root's key is not exchanged.
        "ExchangeKey": grpc.StatusCode.FAILED_PRECONDITION,
    }
    assert code in expected | {beside.get(method, grpc.StatusCode.OK)}
    assert 0 == calls(shared_service, method, "INTERNAL")
    assert "VALID" == await shared_service.outcome((await shared_service.create_key("acme")).token)
