"""What access tokens say, and what it means that a refresh token is presented."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from latchgate.domain.families import (
    Family,
    Holder,
    TokenTerms,
    Use,
    access_end,
    claims,
    request_digest,
    still_held,
    use_of,
)
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.refresh import DEFAULT_PREFIX, RefreshToken, RefreshTokenFormat
from latchgate.domain.token import Form, TokenFormat

NOW = datetime(2026, 11, 28, 12, 0, 0, 250_000, tzinfo=UTC)
INSTANT = timedelta(microseconds=1)
TAG_KEY = bytes(range(32))
TOKENS = RefreshTokenFormat(TAG_KEY)
TERMS = TokenTerms(issuer="latchgate", audience="latchgate", access=timedelta(minutes=5), refresh=timedelta(days=30))
ONE, OTHER = UUID(int=1), UUID(int=2)
HOLDER = Holder(
    key_id="key_1",
    secret_id=1,
    organization_id="acme",
    organization_active=True,
    active=True,
    revoked=False,
    expire_time=None,
    is_ended=False,
    secret_end_time=None,
    permissions=("orders:*", "read"),
    allowed_cidrs=(),
    key_type=KeyType.SECRET,
    environment=Environment.LIVE,
    user_id="",
    read_time=NOW,
)


def family(current: RefreshToken, used: RefreshToken | None = None, **fields: Any) -> Family:
    """A family whose `used` token was used up for the current one."""
    values: dict[str, Any] = {
        "id": "fam_1",
        "key_id": "key_1",
        "secret_id": 1,
        "audience": "latchgate",
        "permissions": ("read",),
        "expire_time": NOW + timedelta(days=30),
        "token_digest": current.digest,
        "used_digest": used and used.digest,
        "request_digest": None,
        "sealed_token": None,
    }
    return Family(**(values | fields))


def test_what_a_use_means() -> None:
    """Only the newest token is used for the first time; that of the use before is a retry with the same request_id,
    while the answer is kept; all else is a second use.
    """
    oldest = TOKENS.mint()
    used, current = TOKENS.mint(oldest.handle), TOKENS.mint(oldest.handle)
    kept = family(current, used, request_digest=request_digest("fam_1", ONE), sealed_token=b"sealed")
    for request_id in (None, ONE, OTHER):
        assert Use.FIRST is use_of(kept, current, request_id)
        assert Use.REUSE is use_of(kept, oldest, request_id)
    assert Use.RETRY is use_of(kept, used, ONE)
    assert Use.REUSE is use_of(kept, used, OTHER)
    assert Use.REUSE is use_of(kept, used, None)
    assert Use.LATE is use_of(replace(kept, sealed_token=None), used, ONE)
    without = family(current, used)
    assert Use.REUSE is use_of(without, used, ONE)
    assert Use.REUSE is use_of(without, used, None)
    assert Use.REUSE is use_of(family(current), used, None)


def test_request_ids_are_digested_for_each_family() -> None:
    """What is stored of a request_id differs by family, and is not the id."""
    assert 4 == len({request_digest(each, request_id) for each in ("fam_1", "fam_2") for request_id in (ONE, OTHER)})
    assert ONE.bytes not in request_digest("fam_1", ONE)


@pytest.mark.parametrize(
    ("fields", "is_good"),
    [
        ({}, True),
        ({"organization_active": False}, False),
        ({"active": False}, False),
        ({"revoked": True}, False),
        ({"is_ended": True}, False),
        ({"expire_time": NOW}, False),
        ({"expire_time": NOW + INSTANT}, True),
        ({"secret_end_time": NOW}, False),
        ({"secret_end_time": NOW + INSTANT}, True),
    ],
)
def test_good_keys(fields: dict[str, Any], *, is_good: bool) -> None:
    """Tokens are given out for keys that may be used now, by the very secret that was exchanged."""
    assert is_good is replace(HOLDER, **fields).is_good


@pytest.mark.parametrize(
    ("client_ip", "is_within"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::1", True),
        ("11.1.2.3", False),
        ("2001:db9::1", False),
        ("", False),
        ("unix:", False),
    ],
)
def test_networks(client_ip: str, *, is_within: bool) -> None:
    """A key that is bound to networks refreshes from these alone, by addresses as Validate reads them."""
    bound = replace(HOLDER, allowed_cidrs=("10.0.0.0/8", "2001:db8::/32"))
    assert is_within is bound.may_be_at(client_ip)
    assert HOLDER.may_be_at(client_ip)


@pytest.mark.parametrize(
    ("fields", "family_s", "lasts"),
    [
        ({}, 1e6, timedelta(minutes=5)),
        ({"expire_time": NOW + timedelta(seconds=90)}, 1e6, timedelta(seconds=90)),
        ({"secret_end_time": NOW + timedelta(seconds=80)}, 1e6, timedelta(seconds=80)),
        ({}, 70, timedelta(seconds=70)),
        ({"expire_time": NOW + timedelta(days=1), "secret_end_time": NOW + timedelta(days=2)}, 1e6, TERMS.access),
    ],
)
def test_the_soonest_end(fields: dict[str, Any], family_s: float, lasts: timedelta) -> None:
    """An access token ends with whatever ends first, on the whole second before."""
    end = access_end(replace(HOLDER, **fields), NOW + timedelta(seconds=family_s), TERMS)
    assert (NOW + lasts).replace(microsecond=0) == end
    assert end <= NOW + lasts


def test_what_the_key_has_still() -> None:
    """Of what was asked for is given what the key's permissions cover, in the order in which it was asked for."""
    assert ("read", "orders:read") == still_held(("write", "read", "orders:read"), HOLDER)
    assert ("orders:*",) == still_held(("orders:*",), HOLDER)
    assert () == still_held(("orders:*", "*"), replace(HOLDER, permissions=("orders:read",)))


def test_claims() -> None:
    """A token says what RFC 9068 asks for, and of the key what gateways tell those behind them; times are whole."""
    end = access_end(HOLDER, NOW + timedelta(days=1), TERMS)
    said = claims("at_1", replace(HOLDER, user_id="u"), "orders", ("read", "orders:*"), end, "latchgate")
    assert {
        "iss": "latchgate",
        "sub": "key_1",
        "aud": "orders",
        "client_id": "key_1",
        "iat": int(NOW.timestamp()),
        "exp": int(NOW.timestamp()) + 300,
        "jti": "at_1",
        "scope": "read orders:*",
        "organization_id": "acme",
        "environment": "live",
        "key_type": "secret",
        "user_id": "u",
    } == said
    assert "user_id" not in claims("at_1", HOLDER, "orders", (), end, "latchgate")


def test_tokens_of_a_family_begin_alike() -> None:
    """All tokens of a family are known by their beginning, and are otherwise different; another family's begin
    differently.
    """
    first, other = TOKENS.mint(), TOKENS.mint()
    second = TOKENS.mint(first.handle)
    assert first.family_digest == second.family_digest != other.family_digest
    assert 3 == len({each.digest for each in (first, second, other)})
    assert first == TOKENS.read(first.token)
    assert len(DEFAULT_PREFIX) + 40 == len(first.token)
    assert first.token.startswith(DEFAULT_PREFIX + first.handle)
    assert first.token not in repr(first)


def test_what_is_no_refresh_token() -> None:
    """Without a right tag it is none: another deployment's, a changed one, a key's token; nor is it a key's token."""
    token = TOKENS.mint().token
    keys = TokenFormat(TAG_KEY, other_prefixes=[DEFAULT_PREFIX])
    minted = keys.mint(KeyType.SECRET, Environment.LIVE).token
    made_up = keys.tagged(DEFAULT_PREFIX + minted[3:32])
    for text in (minted, made_up, token[:-1], f"{token}a", token.swapcase(), "", "lk_rt_", "é" * 46):
        assert TOKENS.read(text) is None
    assert RefreshTokenFormat(bytes(32)).read(token) is None
    assert Form.IMPOSSIBLE is keys.recognise(token)
    assert keys.begins_like_own(token)
    assert token == TOKENS.read(token).token  # type: ignore[union-attr]  # it is one


def test_another_prefix() -> None:
    """A token outlives a change of the prefix that new ones get."""
    renamed = RefreshTokenFormat(TAG_KEY, "acme_rt_")
    token = TOKENS.mint()
    assert token == renamed.read(token.token)
    assert renamed.mint(token.handle).token.startswith("acme_rt_" + token.handle)
