"""The keys that sign access tokens: which one signs now, which are published, when there is to be another. Pure rules.

A key is published before it signs, for longer than anybody keeps what was published, and after it, until nothing that
it has signed is good any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

from latchgate.domain.families import MAX_ACCESS

SIGNS: Final = timedelta(days=30)
"""For how long a key signs before the next one does."""
PREPARED: Final = timedelta(days=2)
"""How long before its end the next one is made."""
PUBLISHED_BEFORE: Final = timedelta(days=1)
"""For how long a key is published at least before it signs, where the one before could not be replaced in time."""
KEPT: Final = 2 * MAX_ACCESS
"""For how long one that signs no more is published: longer than what it has signed is good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """A key pair on P-256: coordinates of the public half in base64url, the private half encrypted.

    It signs from `sign_time` on, until another does.
    """

    kid: str
    x: str
    y: str
    sealed: bytes = field(repr=False)
    sign_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A key pair that was just made."""

    kid: str
    x: str
    y: str
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What is to be done about the keys: when another is to sign, which needs to be made, and which are to go."""

    make_for: datetime | None
    drop: Sequence[str]


def signing_key(keys: Sequence[SigningKey], now: datetime) -> SigningKey | None:
    """Gives the key that signs now; None if there is none.

    A transaction that began before the first key was made, and waited for it, takes that.
    """
    begun = [key for key in keys if key.sign_time <= now]
    if begun:
        return max(begun, key=lambda key: key.sign_time)
    return min(keys, key=lambda key: key.sign_time, default=None)


def upkeep(keys: Sequence[SigningKey], unusable: Collection[str], now: datetime) -> Upkeep:
    """Says what is to be done about the keys. `unusable` are those whose private halves can not be read.

    Of these one that was to sign later goes, and one that signs now is followed at once.
    """
    never = [key.kid for key in keys if key.sign_time > now and key.kid in unusable]
    left = sorted((key for key in keys if key.kid not in never), key=lambda key: key.sign_time)
    over = [before.kid for before, after in pairwise(left) if after.sign_time + KEPT <= now]
    return Upkeep(make_for=_make_for(left, unusable, now), drop=[*never, *over])


def _make_for(keys: Sequence[SigningKey], unusable: Collection[str], now: datetime) -> datetime | None:
    """Gives from when on a key is to sign that is to be made now; None if none is to be made."""
    current = signing_key(keys, now)
    if current is None or current.kid in unusable:
        return now
    is_followed = any(key.sign_time > max(now, current.sign_time) for key in keys)
    if is_followed or now < current.sign_time + SIGNS - PREPARED:
        return None
    return max(current.sign_time + SIGNS, now + PUBLISHED_BEFORE)


def jwk(key: SigningKey) -> dict[str, str]:
    """Gives the public half as it is published (RFC 7517)."""
    return {"kty": "EC", "crv": "P-256", "x": key.x, "y": key.y, "kid": key.kid, "alg": "ES256", "use": "sig"}
