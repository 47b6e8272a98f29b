"""What Envoy asks: which token is judged, from where, and for what."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from envoy.service.auth.v3 import external_auth_pb2
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from latchgate.domain.errors import InvalidFieldError, MalformedRequestError
from latchgate.gateway.credentials import MAX_ROUTES, Carrier, Problem
from latchgate.rpc import check_request
from latchgate.rpc.check_request import Check, CheckReader
from support.checks import PEER
from support.checks import check_request as asked

TOKEN = "lk_0123456789abcdefghijABCDEFGHIJ0123456789"


def read(headers: Mapping[str, str], *, trusted_hops: int = 0, peer: str = PEER, **extensions: str) -> Check:
    """Reads a question with these headers, which must be the same if they come raw."""
    reader = CheckReader(trusted_hops)
    check = reader.read(asked(headers, peer=peer, extensions=extensions).SerializeToString())
    raw = [(name, value.encode()) for name, value in headers.items()]
    assert check == reader.read(asked(raw=raw, peer=peer, extensions=extensions).SerializeToString())
    return check


@pytest.mark.parametrize(
    ("headers", "carrier"),
    [
        ({"authorization": f"Bearer {TOKEN}"}, Carrier.BEARER),
        ({"authorization": f"bearer {TOKEN}"}, Carrier.BEARER),
        ({"authorization": f"BEARER   {TOKEN} "}, Carrier.BEARER),
        ({"authorization": f"Bearer\t{TOKEN}"}, Carrier.BEARER),
        ({"x-api-key": TOKEN}, Carrier.KEY),
        ({"x-api-key": f" {TOKEN}\t"}, Carrier.KEY),
        ({"authorization": "Basic dTpw", "x-api-key": TOKEN}, Carrier.KEY),
        ({"authorization": f"Bearer {TOKEN}", "x-api-key": ""}, Carrier.BEARER),
        ({"authorization": f"Bearer {TOKEN}", "x-api-key": TOKEN}, Carrier.BOTH),
        ({"authorization": "Bearer", "x-api-key": TOKEN}, Carrier.BOTH),
        ({"authorization": 'Digest username="u", realm="r"', "x-api-key": TOKEN}, Carrier.KEY),
    ],
)
def test_credentials(headers: Mapping[str, str], carrier: Carrier) -> None:
    """The token is taken from Authorization: Bearer in any spelling, else from X-API-Key; another scheme is let be."""
    check = read(headers)
    assert (TOKEN.encode(), carrier, None) == (check.token, check.carrier, check.problem)


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, Problem.MISSING),
        ({"authorization": ""}, Problem.MISSING),
        ({"authorization": "Bearer"}, Problem.MISSING),
        ({"authorization": "Bearer  "}, Problem.MISSING),
        ({"authorization": TOKEN}, Problem.MISSING),
        ({"authorization": f"Basic {TOKEN}"}, Problem.MISSING),
        ({"authorization": f"Bearer{TOKEN}"}, Problem.MISSING),
        ({"x-api-key": "  "}, Problem.MISSING),
        ({"x-api-key": TOKEN, "authorization": f"Bearer {TOKEN}x"}, Problem.CONFLICT),
        ({"authorization": f"Bearer {TOKEN},Bearer {TOKEN}"}, Problem.CONFLICT),
        ({"x-api-key": f"{TOKEN},{TOKEN}"}, Problem.CONFLICT),
        ({"x-api-key": TOKEN, "authorization": f"Basic dTpw,Bearer {TOKEN}"}, Problem.CONFLICT),
    ],
)
def test_no_credentials(headers: Mapping[str, str], problem: Problem) -> None:
    """Without a token, or with more than one, there is nothing to judge."""
    check = read(headers)
    assert (b"", problem) == (check.token, check.problem)


def test_repeated_raw_headers() -> None:
    """Headers that were sent twice are a conflict when they come one by one, too."""
    for name, value in (("authorization", f"Bearer {TOKEN}"), ("x-api-key", TOKEN)):
        raw = asked(raw=[(name, value.encode())] * 2).SerializeToString()
        assert Problem.CONFLICT is CheckReader().read(raw).problem


@given(value=st.binary(max_size=60))
def test_any_bytes_are_read(value: bytes) -> None:
    """Whatever bytes a client sends as its token, the question can be read."""
    raw = asked(raw=[("x-api-key", value)]).SerializeToString()
    same = (
        asked({"x-api-key": "?" * len(value)}).SerializeToString().replace(b"?" * len(value), value) if value else raw
    )
    for question in (raw, same):
        check = CheckReader().read(question)
        assert check.problem or check.token == value.strip(b" \t")


def test_what_is_no_question() -> None:
    """Bytes that are no CheckRequest are told from a request without a token."""
    with pytest.raises(MalformedRequestError):
        CheckReader().read(b"\x0a\x05abc")
    assert Problem.MISSING is CheckReader().read(b"").problem


def test_needs_of_a_route() -> None:
    """The route says which permissions and what cost; separators are commas, spaces, or both."""
    for written in ("orders:read,orders:write", "orders:read orders:write", " orders:read , orders:write,"):
        need = read({}, required_permissions=written, cost="7").need
        assert ({"orders:read", "orders:write"}, 7) == (set(need.permissions), need.cost)
    need = read({}).need
    assert (set(), 1, 0) == (set(need.permissions), need.cost, need.min_revision)
    assert 0 == read({}, cost="0").need.cost


@pytest.mark.parametrize(
    ("extensions", "field"),
    [
        ({"cost": "much"}, "cost"),
        ({"cost": "-1"}, "cost"),
        ({"cost": "1000001"}, "cost"),
        ({"cost": "9" * 5000}, "cost"),
        ({"cost": ""}, "cost"),
        ({"required_permissions": ""}, "required_permissions"),
        ({"required_permissions": " , ,"}, "required_permissions"),
        ({"required_permissions": "a " * 2_000_000}, "required_permissions"),
        ({"required_permission": "orders:read"}, "required_permission"),
        ({"required_permissions": "orders:read", "x": "y"}, "x"),
        ({"required_permissions": ",".join(f"p{n}" for n in range(101))}, "required_permissions"),
    ],
)
def test_slips_of_the_pen(extensions: Mapping[str, str], field: str) -> None:
    """What a route says is refused by name if it makes no sense, however often: it must not open what it protects."""
    reader = CheckReader()
    reader.read(asked({}).SerializeToString())
    for _ in range(2):
        with pytest.raises(InvalidFieldError) as caught:
            reader.read(asked({}, extensions=extensions).SerializeToString())
        assert field in caught.value.violations[0][0]


@pytest.mark.parametrize(
    ("peer", "client_ip"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("/run/envoy.sock", ""),
        ("", ""),
        ("envoy", ""),
    ],
)
def test_client_address(peer: str, client_ip: str) -> None:
    """The client's address is the peer's; what is no address is none. What the client says of itself does not count."""
    assert client_ip == read({"x-forwarded-for": "10.0.0.1"}, peer=peer).need.client_ip


@pytest.mark.parametrize(
    ("forwarded", "hops", "client_ip"),
    [
        ("203.0.113.5, 192.0.2.10", 1, "203.0.113.5"),
        ("10.6.6.6, 203.0.113.5,192.0.2.10", 1, "203.0.113.5"),
        ("10.6.6.6, 203.0.113.5, 198.51.100.2, 192.0.2.10", 2, "203.0.113.5"),
        ("203.0.113.5:4711, 192.0.2.10", 1, "203.0.113.5"),
        ("[2001:db8::5]:4711, 192.0.2.10", 1, "2001:db8::5"),
        ("2001:db8::5, 192.0.2.10", 1, "2001:db8::5"),
        ("unknown, 192.0.2.10", 1, ""),
        ("192.0.2.10", 1, PEER),
        ("", 1, PEER),
    ],
)
def test_trusted_hops(forwarded: str, hops: int, client_ip: str) -> None:
    """With trusted proxies before the gateway, the address is the one that the first of them saw."""
    assert client_ip == read({"x-forwarded-for": forwarded}, trusted_hops=hops).need.client_ip


@pytest.mark.parametrize(
    ("content_type", "is_grpc"),
    [
        ("application/grpc", True),
        ("application/grpc+proto", True),
        ("Application/gRPC;x=y", True),
        ("application/grpc-web", False),
        ("application/json", False),
        ("text/plain; application/grpc", False),
    ],
)
def test_grpc_clients(content_type: str, is_grpc: bool) -> None:
    """GRPC clients are known by the type of their requests."""
    assert is_grpc is read({"content-type": content_type}).is_grpc


def test_spoofed_headers() -> None:
    """Headers that only the service may set are noticed, also such as it does not set."""
    headers = {"x-latchgate-admin": "1", "x-latchgate-key-id": "key_x", "x-latch": "1"}
    assert ("x-latchgate-admin", "x-latchgate-key-id") == read(headers).spoofed


def test_memory_of_routes_is_bounded() -> None:
    """However many routes there are, so many are remembered and no more, and clients are not: whatever they send."""
    reader = CheckReader(1)
    for number in range(MAX_ROUTES + 10):
        reader.read(asked({}, extensions={"required_permissions": f"p{number}"}).SerializeToString())
    for number in range(10):
        headers = {"x-forwarded-for": f"{number}{'x' * 100_000}, 10.0.0.1"}
        assert "" == reader.read(asked(headers, peer=f"{number}" * 1_000_000).SerializeToString()).need.client_ip
    assert len(reader._needs) <= MAX_ROUTES  # noqa: SLF001 - not to be seen from outside


def test_names_that_nobody_knows_are_not_repeated() -> None:
    """What stands where a name should be may be anything, a token as well: its beginning is enough to find it."""
    with pytest.raises(InvalidFieldError) as caught:
        CheckReader().read(asked({}, extensions={TOKEN: "1"}).SerializeToString())
    assert TOKEN not in caught.value.message


def test_fields_are_envoys() -> None:
    """What is read has the names, numbers and types of Envoy's messages, but for bytes in place of text."""

    def compare(ours: Descriptor, theirs: Descriptor) -> int:
        compared = 0
        for field in ours.fields:
            envoys = theirs.fields_by_name[field.name]
            assert (envoys.number, envoys.is_repeated) == (field.number, field.is_repeated), field.full_name
            if field.message_type and envoys.message_type:
                compared += compare(field.message_type, envoys.message_type)
            else:
                assert field.type in {envoys.type, field.TYPE_BYTES}
                assert envoys.type in {field.TYPE_STRING, field.TYPE_BYTES}
            compared += 1
        return compared

    ours: Descriptor = check_request._CheckRequest.DESCRIPTOR  # noqa: SLF001 - the same
    assert 18 == compare(ours, external_auth_pb2.CheckRequest.DESCRIPTOR)
