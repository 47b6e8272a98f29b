"""Ids of what the service makes."""

from __future__ import annotations

from ulid import ULID


def make_id(prefix: str) -> str:
    """Makes an id that sorts by the time it was made: a prefix and a ULID in lower case."""
    return prefix + str(ULID()).lower()
