"""Refresh tokens: how they are minted and read.

A refresh token is `<prefix><16 characters of its family><13 characters of its own><11-character tag>`, random but for
the tag. All that follow one another begin alike: so whoever presents one that was used up is known by it, though
nothing is stored of used ones. 13 base62 characters hold 77 bits of randomness, and the tag none can make: who has an
old token guesses no newer one.

The tag is made with a key of its own, derived from the deployment's: a refresh token is no key's token, and a key's
token no refresh token, and neither costs a query where the other belongs.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from latchgate.domain.token import BODY_LENGTH, RANDOM_LENGTH, Form, TokenFormat, digest, random_text

DEFAULT_PREFIX: Final = "lk_rt_"
HANDLE_LENGTH: Final = 16
OWN_LENGTH: Final = RANDOM_LENGTH - HANDLE_LENGTH


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RefreshToken:
    """A refresh token that carries a right tag, and the part of it that it has in common with its family."""

    token: str
    handle: str

    @property
    def digest(self) -> bytes:
        """Under which it is stored as long as it is the one to be used next."""
        return digest(self.token)

    @property
    def family_digest(self) -> bytes:
        """Under which its family is stored."""
        return digest(self.handle)


class RefreshTokenFormat:
    """Mints and reads refresh tokens under one tag key."""

    def __init__(self, tag_key: bytes, prefix: str = DEFAULT_PREFIX) -> None:
        """Takes the deployment's tag key, and what refresh tokens begin with."""
        self._format = TokenFormat(hmac.digest(tag_key, b"latchgate refresh tokens", hashlib.sha256), {})
        self._prefix = prefix

    def mint(self, handle: str = "") -> RefreshToken:
        """Makes the next token of the family with this handle; without one, the first of a new family."""
        handle = handle or random_text(HANDLE_LENGTH)
        return RefreshToken(token=self.tagged(handle, random_text(OWN_LENGTH)), handle=handle)

    def tagged(self, handle: str, own: str) -> str:
        """Puts a token together of its family's part and its own."""
        return self._format.tagged(self._prefix + handle + own)

    def read(self, text: str) -> RefreshToken | None:
        """Gives the token that a text is; None if it was not minted here. Tokens outlive a change of the prefix."""
        if self._format.recognise(text) is not Form.OWN:
            return None
        body = text[-BODY_LENGTH:]
        return RefreshToken(token=text, handle=body[:HANDLE_LENGTH])
