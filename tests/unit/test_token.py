"""Tokens: their form, their tag, and what they are recognised as."""

from __future__ import annotations

import hashlib
import hmac
import re
from itertools import cycle
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from latchgate.domain.model import Environment, KeyType
from latchgate.domain.token import (
    BODY_LENGTH,
    DEFAULT_PREFIXES,
    Form,
    MintedToken,
    TokenFormat,
    digest,
    foreign_secret,
)

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TAG_KEY = bytes(range(32))
TOKENS = TokenFormat(TAG_KEY)

# Made with `openssl dgst -sha256 -mac HMAC` under TAG_KEY, and turned into base62 by another program.
FIXED_TOKEN = "lk_0123456789ABCDEFGHIJKLMNOPQRSFMhDvocJ8yK"
FIXED_TOKEN_WITH_SMALL_TAG = "lk_pk_test_000000000000000000000000000360AfIKpgI8gY"

KINDS = sorted(DEFAULT_PREFIXES, key=lambda kind: (kind[0].value, kind[1].value))

kinds = st.sampled_from(KINDS)
tag_keys = st.binary(min_size=32, max_size=32)
randoms = st.randoms(note_method_calls=False)


def mint(tokens: TokenFormat, kind: tuple[KeyType, Environment], random: Random) -> MintedToken:
    """Mints a token whose random part comes from `random`."""
    with patch("secrets.choice", random.choice):
        return tokens.mint(*kind)


def hmac_sha256(key: bytes, text: bytes) -> bytes:
    """Computes an HMAC step by step as RFC 2104, section 2, defines it."""
    block_length = 64
    if len(key) > block_length:
        key = hashlib.sha256(key).digest()
    key = key.ljust(block_length, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + text).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).digest()


def positional_value(digits: str) -> int:
    """Reads a base62 number, the most significant digit first."""
    return sum(BASE62.index(digit) * 62**power for power, digit in enumerate(reversed(digits)))


@pytest.mark.parametrize("kind", KINDS)
def test_form(kind: tuple[KeyType, Environment]) -> None:
    """A token is the prefix of its type and environment and 40 base62 characters."""
    token = TOKENS.mint(*kind).token
    assert re.fullmatch(re.escape(DEFAULT_PREFIXES[kind]) + "[0-9A-Za-z]{40}", token)


def test_default_prefixes() -> None:
    """The default prefixes are the documented ones: clients and secret scanners look for them."""
    assert {
        (KeyType.SECRET, Environment.LIVE): "lk_",
        (KeyType.SECRET, Environment.TEST): "lk_test_",
        (KeyType.PUBLISHABLE, Environment.LIVE): "lk_pk_",
        (KeyType.PUBLISHABLE, Environment.TEST): "lk_pk_test_",
    } == DEFAULT_PREFIXES


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ((KeyType.SECRET, Environment.LIVE), 8),
        ((KeyType.SECRET, Environment.TEST), 13),
        ((KeyType.PUBLISHABLE, Environment.LIVE), 11),
        ((KeyType.PUBLISHABLE, Environment.TEST), 16),
    ],
)
def test_hint(kind: tuple[KeyType, Environment], length: int) -> None:
    """The hint is the prefix and 5 characters of the random part, and no more of the token is ever shown again."""
    minted = TOKENS.mint(*kind)
    assert minted.token[:length] == minted.secret.hint


@pytest.mark.parametrize("kind", KINDS)
def test_only_publishable_tokens_stay_readable(kind: tuple[KeyType, Environment]) -> None:
    """What is stored of a secret token can not be turned back into it; a publishable token is kept as it is."""
    minted = TOKENS.mint(*kind)
    expected = minted.token if kind[0] is KeyType.PUBLISHABLE else None
    assert expected == minted.secret.readable_token


def test_randomness_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 29 random characters are 29 draws of `secrets` from all 62 characters, in the order they were drawn."""
    drawn_from: list[str] = []
    characters = cycle("Zz9")

    def choice(alphabet: str) -> str:
        drawn_from.append(alphabet)
        return next(characters)

    monkeypatch.setattr("secrets.choice", choice)
    token = TOKENS.mint(KeyType.SECRET, Environment.LIVE).token
    assert "lk_" + ("Zz9" * 10)[:29] == token[:-11]
    assert [sorted(BASE62)] * 29 == [sorted(alphabet) for alphabet in drawn_from]


def test_rfc_4231_vector() -> None:
    """The HMAC that these tests compare with is right: it gives RFC 4231's first and sixth test case."""
    assert (
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        == hmac_sha256(b"\x0b" * 20, b"Hi There").hex()
    )
    assert (
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        == hmac_sha256(b"\xaa" * 131, b"Test Using Larger Than Block-Size Key - Hash Key First").hex()
    )


@pytest.mark.parametrize("token", [FIXED_TOKEN, FIXED_TOKEN_WITH_SMALL_TAG])
def test_fixed_vector(token: str) -> None:
    """Tokens outlive releases: a token that was tagged once is recognised by every later version."""
    assert Form.OWN is TOKENS.recognise(token)
    assert Form.OWN is not TOKENS.recognise(token[:-1] + ("1" if token[-1] != "1" else "2"))


@given(tag_key=st.binary(max_size=100), kind=kinds, random=randoms)
def test_tag_is_a_truncated_hmac(tag_key: bytes, kind: tuple[KeyType, Environment], random: Random) -> None:
    """The tag is the first 64 bits of the HMAC-SHA256 over all that comes before it, as 11 base62 digits."""
    token = mint(TokenFormat(tag_key), kind, random).token
    head, tag = token[:-11], token[-11:]
    assert int(hmac_sha256(tag_key, head.encode()).hex()[:16], 16) == positional_value(tag)


@given(tag_key=tag_keys, kind=kinds, random=randoms)
def test_minted_tokens_are_own(tag_key: bytes, kind: tuple[KeyType, Environment], random: Random) -> None:
    """Every minted token is recognised under its tag key."""
    tokens = TokenFormat(tag_key)
    assert Form.OWN is tokens.recognise(mint(tokens, kind, random).token)


@given(tag_key=tag_keys, other=tag_keys, kind=kinds, random=randoms)
def test_other_deployments_tokens_are_impossible(
    tag_key: bytes, other: bytes, kind: tuple[KeyType, Environment], random: Random
) -> None:
    """A token of the same prefix that was minted under another tag key costs no lookup."""
    assume(tag_key != other)
    assert Form.IMPOSSIBLE is TokenFormat(other).recognise(mint(TokenFormat(tag_key), kind, random).token)


@given(kind=kinds, random=randoms, position=st.integers(0, 200), replacement=st.characters())
def test_any_changed_character_is_noticed(
    kind: tuple[KeyType, Environment], random: Random, position: int, replacement: str
) -> None:
    """A token with any one character changed is not taken for one of ours."""
    token = mint(TOKENS, kind, random).token
    position %= len(token)
    assume(token[position] != replacement)
    assert Form.OWN is not TOKENS.recognise(token[:position] + replacement + token[position + 1 :])


@given(kind=kinds, random=randoms, position=st.integers(1, BODY_LENGTH), replacement=st.sampled_from(BASE62))
def test_mistyped_tokens_cost_no_lookup(
    kind: tuple[KeyType, Environment], random: Random, position: int, replacement: str
) -> None:
    """A token with our prefix, the right form and a wrong tag is known to be none without asking the database."""
    token = mint(TOKENS, kind, random).token
    assume(token[-position] != replacement)
    changed = token[: len(token) - position] + replacement + token[len(token) - position + 1 :]
    assert len(token) == len(changed)
    assert Form.IMPOSSIBLE is TOKENS.recognise(changed)


@given(kind=kinds, random=randoms, position=st.integers(0, 200), added=st.characters())
def test_longer_and_shorter_tokens_are_noticed(
    kind: tuple[KeyType, Environment], random: Random, position: int, added: str
) -> None:
    """A token with one character more or less is not taken for one of ours."""
    token = mint(TOKENS, kind, random).token
    position %= len(token)
    assert Form.OWN is not TOKENS.recognise(token[:position] + added + token[position:])
    assert Form.OWN is not TOKENS.recognise(token[:position] + token[position + 1 :])


@given(kind=kinds, other=kinds, random=randoms)
def test_tag_covers_the_prefix(
    kind: tuple[KeyType, Environment], other: tuple[KeyType, Environment], random: Random
) -> None:
    """A token can not be passed off as one of another type or environment by changing its prefix."""
    assume(kind != other)
    body = mint(TOKENS, kind, random).token[-BODY_LENGTH:]
    assert Form.IMPOSSIBLE is TOKENS.recognise(DEFAULT_PREFIXES[other] + body)


@given(kind=kinds, random=randoms)
def test_tokens_outlive_a_change_of_prefixes(kind: tuple[KeyType, Environment], random: Random) -> None:
    """After the configured prefixes change, tokens under the old ones are still recognised."""
    renamed = TokenFormat(TAG_KEY, {each: f"new_{prefix}" for each, prefix in DEFAULT_PREFIXES.items()})
    assert Form.OWN is renamed.recognise(mint(TOKENS, kind, random).token)
    assert mint(renamed, kind, random).token.startswith(f"new_{DEFAULT_PREFIXES[kind]}")


def test_tag_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag is compared by `hmac.compare_digest`, so that it can not be guessed character by character."""
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def recording_compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr("hmac.compare_digest", recording_compare)
    wrong = FIXED_TOKEN[:-1] + "0"
    assert Form.IMPOSSIBLE is TOKENS.recognise(wrong)
    assert [(FIXED_TOKEN[-11:], wrong[-11:])] == compared


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\0",
        "lk_",
        "\0" * 43,
        " " * 43,
        FIXED_TOKEN + "\0",
        "\0" + FIXED_TOKEN,
        FIXED_TOKEN.replace("5", "\0"),
        FIXED_TOKEN + "\n",
        "\n" + FIXED_TOKEN,
        FIXED_TOKEN + " ",
        " " + FIXED_TOKEN,
        FIXED_TOKEN + "\t",
        FIXED_TOKEN.replace("5", "\x7f"),
        "Bearer " + FIXED_TOKEN,
        FIXED_TOKEN.replace("A", "\N{CYRILLIC CAPITAL LETTER A}"),
        FIXED_TOKEN.replace("K", "\N{KELVIN SIGN}"),
        FIXED_TOKEN.replace("5", "\N{FULLWIDTH DIGIT FIVE}"),
        FIXED_TOKEN.replace("5", "\N{ARABIC-INDIC DIGIT FIVE}"),
        FIXED_TOKEN.replace("k", "\N{FULLWIDTH LATIN SMALL LETTER K}", 1),
        FIXED_TOKEN + "\N{ZERO WIDTH SPACE}",
        "\N{ZERO WIDTH NO-BREAK SPACE}" + FIXED_TOKEN,
        FIXED_TOKEN + "\N{COMBINING ACUTE ACCENT}",
        FIXED_TOKEN + "\ud800",
        "\ud800" + FIXED_TOKEN,
        "\N{PILE OF POO}" * 20,
    ],
    ids=ascii,
)
def test_what_no_system_issues_is_impossible(text: str) -> None:
    """Blanks, control characters and everything beyond ASCII, look-alikes above all, are refused unlooked-up."""
    assert Form.IMPOSSIBLE is TOKENS.recognise(text)


@pytest.mark.parametrize("character", ["a", "\0", " ", "\N{KELVIN SIGN}"], ids=ascii)
def test_huge_strings_are_impossible(character: str) -> None:
    """A megabyte of anything is refused unlooked-up, also with a good token at either end."""
    huge = character * 1_000_000
    assert [Form.IMPOSSIBLE] * 3 == [TOKENS.recognise(text) for text in (huge, huge + FIXED_TOKEN, FIXED_TOKEN + huge)]


@given(text=st.text())
def test_any_text_is_recognised_as_something(text: str) -> None:
    """No text whatever makes recognition fail, or passes for a token that was minted here."""
    assert TOKENS.recognise(text) in (Form.FOREIGN, Form.IMPOSSIBLE)


@pytest.mark.parametrize(
    "token",
    [
        "sk_live_51H8xYzKq2mN4pR6sT8uV0wX",
        "5b1c0d9e-53a4-4a55-9f0c-2f5c1f7cf1a0",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
        "ghp_" + "a" * 36,
        "a" * 40,
        "xk_" + "a" * 40,
        "lk_" + "a" * 39,
        "lk_" + "a" * 41,
        "lk_" + "a" * 20 + "-" + "a" * 19,
    ],
)
def test_tokens_of_other_systems_are_foreign(token: str) -> None:
    """Printable ASCII that is not of our form may have been imported, also under a prefix like ours."""
    assert Form.FOREIGN is TOKENS.recognise(token)


@pytest.mark.parametrize(
    ("length", "form"),
    [
        (15, Form.IMPOSSIBLE),
        (16, Form.FOREIGN),
        (512, Form.FOREIGN),
        (513, Form.IMPOSSIBLE),
    ],
)
def test_length_of_foreign_tokens(length: int, form: Form) -> None:
    """A foreign token has 16 to 512 characters."""
    assert form is TOKENS.recognise("~" * length)


@given(text=st.text(st.characters(codec="ascii"), min_size=16, max_size=60))
def test_foreign_tokens_are_printable(text: str) -> None:
    """Of all ASCII strings that are not ours, those without blanks and control characters are foreign."""
    expected = Form.FOREIGN if re.fullmatch(r"[!-~]+", text) else Form.IMPOSSIBLE
    assert expected is TOKENS.recognise(text)


def test_digest_is_sha256() -> None:
    """A token is found by the plain SHA-256 of its bytes, so that other systems can hand over theirs by digest."""
    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" == digest("abc").hex()


@given(kind=kinds, random=randoms)
def test_minted_secret_has_the_tokens_digest(kind: tuple[KeyType, Environment], random: Random) -> None:
    """What is stored of a minted token is the digest of the whole of it, under which validation looks."""
    minted = mint(TOKENS, kind, random)
    assert hashlib.sha256(minted.token.encode("ascii")).digest() == minted.secret.digest
    assert digest(minted.token) == minted.secret.digest


def test_foreign_secret() -> None:
    """Of a foreign token only the digest and the first 5 characters are stored, and it never stays readable."""
    secret = foreign_secret("sk_live_51H8xYzKq2mN4pR6sT8uV0wX")
    assert hashlib.sha256(b"sk_live_51H8xYzKq2mN4pR6sT8uV0wX").digest() == secret.digest
    assert "sk_li" == secret.hint
    assert secret.readable_token is None
