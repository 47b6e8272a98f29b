"""Tokens: how they are minted, recognised and reduced to what may be stored.

A token is `<prefix><29 random base62 characters><11-character tag>`. The tag is the HMAC-SHA256 (RFC 2104) of prefix
and random part under the deployment's tag key, truncated to 64 bits, in base62: a made-up token is told from a real one
without asking the database. 29 base62 characters hold 172 bits of randomness, so SHA-256 without salt or stretching is
enough at rest.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from latchgate.domain.model import Environment, KeyType, NewSecret

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
RANDOM_LENGTH = 29
TAG_LENGTH = 11
BODY_LENGTH = RANDOM_LENGTH + TAG_LENGTH
HINT_LENGTH = 5
FOREIGN_MIN_LENGTH = 16
FOREIGN_MAX_LENGTH = 512

_BLOCK = 64
_PAIRS = tuple(first + second for first in ALPHABET for second in ALPHABET)
_PRINTABLE = frozenset(chr(code) for code in range(0x21, 0x7F))

Prefixes = Mapping[tuple[KeyType, Environment], str]

DEFAULT_PREFIXES: Prefixes = {
    (KeyType.SECRET, Environment.LIVE): "lk_",
    (KeyType.SECRET, Environment.TEST): "lk_test_",
    (KeyType.PUBLISHABLE, Environment.LIVE): "lk_pk_",
    (KeyType.PUBLISHABLE, Environment.TEST): "lk_pk_test_",
}


class Form(Enum):
    """What a string is, as far as can be said without the database."""

    OWN = "own"
    """Carries a right tag: minted here."""
    FOREIGN = "foreign"
    """May have been imported from another system by its digest."""
    IMPOSSIBLE = "impossible"
    """No token of any kind, or one of ours with a wrong tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MintedToken:
    """A new token, and what is stored of it."""

    token: str
    secret: NewSecret


class TokenFormat:
    """Mints and recognises tokens under one tag key."""

    def __init__(
        self, tag_key: bytes, prefixes: Prefixes = DEFAULT_PREFIXES, other_prefixes: Collection[str] = ()
    ) -> None:
        """Takes the deployment's tag key, and the prefix of each type and environment.

        `other_prefixes` are those of what the deployment gives out besides, whose tags are not made with this key.
        """
        self._inner, self._outer = _hmac_states(tag_key)
        self._prefixes = prefixes
        self._own_prefixes: Collection[str] = frozenset((*prefixes.values(), *other_prefixes))

    def mint(self, key_type: KeyType, environment: Environment) -> MintedToken:
        """Makes a token from the operating system's randomness."""
        prefix = self._prefixes[key_type, environment]
        token = self.tagged(prefix + random_text(RANDOM_LENGTH))
        readable = token if key_type is KeyType.PUBLISHABLE else None
        return MintedToken(
            token=token,
            secret=NewSecret(digest=digest(token), hint=token[: len(prefix) + HINT_LENGTH], readable_token=readable),
        )

    def tagged(self, head: str) -> str:
        """Gives prefix and random part with their tag: the whole token."""
        return head + self._tag(head)

    def recognise(self, token: str) -> Form:
        """Says what a string is. The tag is compared in constant time.

        A right tag is enough, whatever the prefix: tokens outlive a change of the configured prefixes.
        """
        if not may_be_token(token):
            return Form.IMPOSSIBLE
        body = token[-BODY_LENGTH:]
        # Of ASCII the alphabet is all that is alphanumeric.
        if len(token) > BODY_LENGTH and body.isalnum():
            if hmac.compare_digest(self._tag(token[:-TAG_LENGTH]), token[-TAG_LENGTH:]):
                return Form.OWN
            if token[:-BODY_LENGTH] in self._own_prefixes:
                return Form.IMPOSSIBLE
        return Form.FOREIGN if _PRINTABLE.issuperset(token) else Form.IMPOSSIBLE

    def begins_like_own(self, text: str) -> bool:
        """Says whether a text begins with a prefix of the tokens that are minted here."""
        return text.startswith(tuple(self._own_prefixes))

    def _tag(self, head: str) -> str:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(head.encode())
        outer.update(inner.digest())
        return _base62(int.from_bytes(outer.digest()[:8], "big"))


def random_text(length: int) -> str:
    """Gives characters of the alphabet, from the operating system's randomness."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def may_be_token(text: str) -> bool:
    """Says whether a string is of a length and of characters that a token can have, which costs next to nothing."""
    return FOREIGN_MIN_LENGTH <= len(text) <= FOREIGN_MAX_LENGTH and text.isascii()


def _hmac_states(key: bytes) -> tuple[hashlib._Hash, hashlib._Hash]:
    """Gives the two hashes of HMAC-SHA256 with the key taken in: what is the same for every tag (RFC 2104, 4)."""
    padded = (key if len(key) <= _BLOCK else hashlib.sha256(key).digest()).ljust(_BLOCK, b"\0")
    return hashlib.sha256(bytes(byte ^ 0x36 for byte in padded)), hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))


def _base62(number: int) -> str:
    """Writes a 64-bit number in TAG_LENGTH base62 digits."""
    # Without a loop, as each lookup waits for it: ten of the eleven digits are five pairs, of which there are 62 * 62.
    number, fifth = divmod(number, 3844)
    number, fourth = divmod(number, 3844)
    number, third = divmod(number, 3844)
    number, second = divmod(number, 3844)
    number, first = divmod(number, 3844)
    return f"{ALPHABET[number]}{_PAIRS[first]}{_PAIRS[second]}{_PAIRS[third]}{_PAIRS[fourth]}{_PAIRS[fifth]}"


def digest(token: str) -> bytes:
    """Gives the SHA-256 digest under which a token is stored."""
    return hashlib.sha256(token.encode()).digest()


def foreign_secret(token: str) -> NewSecret:
    """Gives what is stored of a token that was not minted here. Its hint is its first 5 characters."""
    return NewSecret(digest=digest(token), hint=token[:HINT_LENGTH])
