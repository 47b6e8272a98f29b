"""Tokens that were never made, each another one: what a flood consists of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum

from bench import servers
from bench.load import Feed
from latchgate.domain.token import (
    ALPHABET,
    BODY_LENGTH,
    DEFAULT_PREFIXES,
    FOREIGN_MAX_LENGTH,
    FOREIGN_MIN_LENGTH,
)

_PRINTABLE = bytes(range(0x21, 0x7F))
_OWN_PREFIX = next(iter(DEFAULT_PREFIXES.values()))


class Kind(Enum):
    """What the service can tell of a made-up token without the database."""

    WRONG_TAG = "tokens of our form with a wrong tag"
    FOREIGN = "tokens of foreign form"


def feeds(kind: Kind, count: int, rng: random.Random) -> Sequence[Feed]:
    """Gives so many sources of bodies. Each has its own length of token: foreign ones from the least to the most."""
    if kind is Kind.WRONG_TAG:
        return [_feed(_OWN_PREFIX, BODY_LENGTH, ALPHABET.encode(), rng)] * count
    between = FOREIGN_MAX_LENGTH - FOREIGN_MIN_LENGTH
    lengths = (FOREIGN_MIN_LENGTH + between * number // max(1, count - 1) for number in range(count))
    return [_feed("", length, _PRINTABLE, rng) for length in lengths]


def _feed(prefix: str, length: int, alphabet: bytes, rng: random.Random) -> Feed:
    """Gives a source of bodies that costs so little that it can keep up with a flood."""
    blank = prefix + "-" * length
    before, _, after = servers.body(blank).partition(blank.encode())
    before += prefix.encode()
    # Some letters are a little more frequent than others: nobody guesses, so that does not matter.
    table = bytes(alphabet[code % len(alphabet)] for code in range(256))
    return lambda: before + rng.randbytes(length).translate(table) + after
