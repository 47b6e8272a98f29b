"""What a connection is allowed: streams, headers, pings."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as pb
from latchgate.rpc.server import options
from support.service import RunningService, bearer, refusal
from support.transport import Http2, call, eventually, path_of, sample

pytestmark = pytest.mark.asyncio(loop_scope="module")

GO_LEAST_KEEPALIVE_MS = 10_000
"""grpc-go does not ping more often, whatever it is told (google.golang.org/grpc/keepalive, ClientParameters.Time)."""

ANY_REQUEST = pb.ValidateRequest(token="no token").SerializeToString()


def port(service: RunningService) -> int:
    """Gives the service's port."""
    return int(service.address.rpartition(":")[2])


async def test_limits_are_announced(shared_service: RunningService) -> None:
    """A client is told at once how many calls it may have under way, and how large its headers may be."""
    async with Http2.connected(port(shared_service)) as connection:
        announced = await connection.settings()

    assert 10_000 == announced[Http2.MAX_CONCURRENT_STREAMS]
    assert 64 * 1024 == announced[Http2.MAX_HEADER_LIST_SIZE]


@pytest.mark.parametrize("size", [70_000, 500_000, 2_000_000])
async def test_headers_beyond_the_limit_are_refused(shared_service: RunningService, size: int) -> None:
    """Metadata beyond 64 KiB is refused for the call alone: RESOURCE_EXHAUSTED, and the same connection goes on."""
    refused = await refusal(
        shared_service.keys.Validate(pb.ValidateRequest(), metadata=(("x-large", "a" * size),), timeout=10.0)
    )

    assert grpc.StatusCode.RESOURCE_EXHAUSTED == refused.code
    assert "NOT_FOUND" == await shared_service.outcome("no token")


async def test_headers_within_the_limit_are_taken(shared_service: RunningService) -> None:
    """Metadata of 15 KiB, such as a large token of another kind beside ours, is let through."""
    answer = await shared_service.keys.Validate(pb.ValidateRequest(), metadata=(("x-large", "a" * 15_000),))
    assert pb.OUTCOME_NOT_FOUND == answer.outcome


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Basic cm9vdDpyb290"),),
        (("authorization", "root-token-of-the-tests-0123456789abcdef"),),
        (("authorization", "Bearer a token with spaces"),),
        (("authorization", "Token root-token-of-the-tests-0123456789abcdef"),),
        (("authorization", "Bearer a-token-of-nobody"), ("authorization", "Bearer a-token-of-nobody")),
        (*bearer("root-token-of-the-tests-0123456789abcdef"), *bearer("root-token-of-the-tests-0123456789abcdef")),
        bearer("root-token-of-the-tests-0123456789abcde"),
        bearer("ROOT-TOKEN-OF-THE-TESTS-0123456789ABCDEF"),
    ],
)
async def test_credentials_that_are_none(shared_service: RunningService, metadata: Any) -> None:
    """Anything but one `authorization: Bearer <token>` with the token of a key is UNAUTHENTICATED."""
    refused = await refusal(call(shared_service, "ListPlans", pb.ListScopesRequest(), metadata=metadata))
    assert (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID") == (refused.code, refused.reason)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_scheme_is_written_in_any_case(shared_service: RunningService, scheme: str) -> None:
    """The name of the scheme is taken in any case (RFC 9110, section 11.1)."""
    token = shared_service.root[0][1].removeprefix("Bearer ")
    metadata = (("authorization", f"{scheme} {token}"),)
    assert await call(shared_service, "ListPlans", pb.ListScopesRequest(), metadata=metadata)


async def test_header_that_is_not_text_is_no_fault(shared_service: RunningService) -> None:
    """Bytes in the header that no gRPC library would send are answered like any other wrong token."""
    before = sample(
        shared_service, "latchgate_calls_total", method="OrganizationService/ListPlans", code="UNAUTHENTICATED"
    )
    async with Http2.connected(port(shared_service)) as connection:
        for value in (b"Bearer \xff\xfe", b"Bearer \x00\x01", "Bearer \u00e9".encode(), b"\xff" * 300):
            stream = await connection.start_call(path_of("ListPlans"), b"", [(b"authorization", value)])
            await connection.frame(Http2.HEADERS, stream)
    await eventually(
        lambda: (
            before + 4
            == sample(
                shared_service, "latchgate_calls_total", method="OrganizationService/ListPlans", code="UNAUTHENTICATED"
            )
        )
    )


async def test_ping_is_answered(shared_service: RunningService) -> None:
    """A client that pings with nothing under way, as it may, is answered and stays connected."""
    async with Http2.connected(port(shared_service)) as connection:
        await connection.settings()
        await connection.ping()
        stream = await connection.start_call(path_of("Validate"), ANY_REQUEST)
        await connection.frame(Http2.DATA, stream)


async def test_flood_of_pings_is_cut_off(shared_service: RunningService) -> None:
    """A client that does nothing but ping is told ENHANCE_YOUR_CALM and cut off; others are not."""
    async with Http2.connected(port(shared_service)) as connection:
        await connection.settings()
        for _ in range(4):
            await connection.send(Http2.PING, 0, 0, b"latchgat")
        goaway = await connection.frame(Http2.GOAWAY)

    assert Http2.ENHANCE_YOUR_CALM == int.from_bytes(goaway.payload[4:8], "big")
    assert "NOT_FOUND" == await shared_service.outcome("no token")


async def test_allowed_pings_suit_clients() -> None:
    """Clients may ping as often as grpc-go's do at most, and without a call under way.

    This reads the options: to see it happen takes several times ten seconds. The tests above show that the options are
    in force.
    """
    allowed = dict(options(60))
    assert allowed["grpc.http2.min_ping_interval_without_data_ms"] < GO_LEAST_KEEPALIVE_MS
    assert 1 == allowed["grpc.keepalive_permit_without_calls"]


async def test_many_calls_on_one_connection(shared_service: RunningService) -> None:
    """A client that starts thousands of calls at once, on one connection, is answered every one of them."""
    calls = [shared_service.keys.Validate(pb.ValidateRequest(token="no token")) for _ in range(2500)]
    assert {pb.OUTCOME_NOT_FOUND} == {(await each).outcome for each in calls}
