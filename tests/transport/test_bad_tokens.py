"""Tokens that can not be any: an answer, not an error, and no question to the database."""

from __future__ import annotations

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as pb
from support.service import RunningService, refusal
from support.transport import call_raw, length_delimited, lookups

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKEN_FIELD = 1
PERMISSION_FIELD = 2
MEGABYTE = 1_000_000

OWN = "lk_" + "a" * 29
"""A token of this service but for its tag."""

IMPOSSIBLE = {
    "empty": b"",
    "blank": b" " * 43,
    "too short": b"a" * 15,
    "too long": b"a" * 513,
    "a megabyte": b"a" * MEGABYTE,
    "a megabyte with prefix": b"lk_" + b"a" * MEGABYTE,
    "NUL": b"\0" * 43,
    "NUL within": (OWN + "\0" + "a" * 10).encode(),
    "line feed at the end": (OWN + "a" * 11 + "\n").encode(),
    "no tag that fits": (OWN + "a" * 11).encode(),
    "no tag that fits, of a test key": ("lk_test_" + "a" * 40).encode(),
    "no tag that fits, of a publishable key": ("lk_pk_" + "Z" * 40).encode(),
    "Cyrillic letter that looks like a": ("lk_\u0430" + "a" * 39).encode(),
    "full-width digits": ("lk_" + "\uff10" * 40).encode(),
    "right-to-left override": ("\u202elk_" + "a" * 40).encode(),
    "combining accent": (OWN + "e\u0301" * 5 + "a").encode(),
    "emoji": "\U0001f511".encode() * 20,
    "highest code point": "\U0010ffff".encode() * 20,
    "not UTF-8": b"lk_" + b"\xff" * 40,
    "cut within a character": b"lk_" + b"a" * 39 + b"\xd0",
    "surrogate": b"lk_" + b"\xed\xa0\x80" * 14,
    "overlong slash": b"lk_" + b"\xc0\xaf" * 20,
    "not UTF-8, a megabyte": b"\xff" * MEGABYTE,
}


async def judged(service: RunningService, raw: bytes) -> pb.ValidateResponse:
    """Sends bytes to Validate, and reads the answer."""
    return pb.ValidateResponse.FromString(await call_raw(service.channel, "Validate", raw))


@pytest.mark.parametrize("token", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
async def test_impossible_token_is_not_found(shared_service: RunningService, token: bytes) -> None:
    """Whatever a client sends as its token gets the answer NOT_FOUND and no error, so that no client can choose the
    gateway's policy for failures; and it costs no lookup.
    """
    before = lookups(shared_service)

    answer = await judged(shared_service, length_delimited(TOKEN_FIELD, token))

    assert pb.ValidateResponse(outcome=pb.OUTCOME_NOT_FOUND) == answer
    assert before == lookups(shared_service)


@pytest.mark.parametrize("token", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
async def test_impossible_token_spoils_no_batch(shared_service: RunningService, token: bytes) -> None:
    """A bad token in a batch is NOT_FOUND in its place, and the others are judged as if it were not there."""
    created = await shared_service.create_key("acme")
    good = length_delimited(1, length_delimited(TOKEN_FIELD, created.token.encode()))
    bad = length_delimited(1, length_delimited(TOKEN_FIELD, token))

    raw = await call_raw(shared_service.channel, "BatchValidate", good + bad + good)

    outcomes = [response.outcome for response in pb.BatchValidateResponse.FromString(raw).responses]
    assert [pb.OUTCOME_VALID, pb.OUTCOME_NOT_FOUND, pb.OUTCOME_VALID] == outcomes


async def test_possible_token_is_looked_up(shared_service: RunningService) -> None:
    """The count of lookups that the tests above watch does move: a token with its right tag and one of a foreign format
    are asked for, once each.
    """
    created = await shared_service.create_key("acme")
    before = lookups(shared_service)

    assert "VALID" == await shared_service.outcome(created.token)
    assert before + 1 == lookups(shared_service)
    assert "NOT_FOUND" == await shared_service.outcome("another-systems-token")
    assert before + 2 == lookups(shared_service)


@pytest.mark.parametrize("position", [0, 2, 3, 20, 31, 32, 42])
async def test_altered_token_is_not_found(shared_service: RunningService, position: int) -> None:
    """A good token with one character changed is no token: in its random part or its tag it costs no lookup."""
    token = (await shared_service.create_key("acme")).token
    altered = token[:position] + ("b" if token[position] == "a" else "a") + token[position + 1 :]
    before = lookups(shared_service)

    assert "NOT_FOUND" == await shared_service.outcome(altered)
    # With another prefix it may be another system's token, which only the database can tell.
    assert before + (position < len("lk_")) == lookups(shared_service)


@pytest.mark.parametrize("suffix", [" ", "\n", "\0", "a", "="])
async def test_token_is_taken_as_it_is(shared_service: RunningService, suffix: str) -> None:
    """A good token with anything behind it is another one: nothing is trimmed, so that a token has one spelling."""
    created = await shared_service.create_key("acme")

    assert "NOT_FOUND" == await shared_service.outcome(created.token + suffix)


@pytest.mark.parametrize("field", [PERMISSION_FIELD, 3], ids=["required_permissions", "client_ip"])
async def test_unreadable_field_of_the_gateway_is_an_error(shared_service: RunningService, field: int) -> None:
    """Only the token is the client's. Other fields that are not UTF-8 are the gateway's own mistake: an error, also
    beside a token that is not UTF-8 either.
    """
    for token in (b"", length_delimited(TOKEN_FIELD, b"\xff")):
        refused = await refusal(
            call_raw(shared_service.channel, "Validate", token + length_delimited(field, b"\xff\xfe"))
        )
        assert (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST") == (refused.code, refused.reason)


async def test_fields_beside_an_unreadable_token_are_kept(shared_service: RunningService) -> None:
    """Dropping a token that is not UTF-8 leaves the rest of the request as it was: its mistakes are still told."""
    negative_revision = b"\x28" + b"\xff" * 9 + b"\x01"

    refused = await refusal(
        call_raw(shared_service.channel, "Validate", length_delimited(TOKEN_FIELD, b"\xff") + negative_revision)
    )

    assert ["min_revision"] == list(refused.violations)


async def test_flood_of_unreadable_tokens_is_refused(shared_service: RunningService) -> None:
    """A message of nothing but unreadable tokens, far more than a batch may hold, is refused without a look at each."""
    raw = length_delimited(1, length_delimited(TOKEN_FIELD, b"\xff")) * 200_000

    refused = await refusal(call_raw(shared_service.channel, "BatchValidate", raw))

    assert grpc.StatusCode.INVALID_ARGUMENT == refused.code
