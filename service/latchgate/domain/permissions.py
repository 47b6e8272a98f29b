"""Permissions: how a grant is matched against what a request needs, and the catalogue of scopes.

A permission is segments joined by `:`. `*` stands for one whole segment, and as the last segment for one or more:
`orders:*` covers `orders:read` and `orders:read:all`, but neither `orders` nor `ordersx:read`; `*` alone covers all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WILDCARD = "*"


def covers(grant: str, needed: str) -> bool:
    """Says whether all that `needed` stands for, wildcards included, is part of what `grant` stands for."""
    return _covers(grant.split(":"), needed.split(":"))


def _covers(grant: Sequence[str], needed: Sequence[str]) -> bool:
    for position, segment in enumerate(grant):
        if position == len(needed):
            return False
        if segment == WILDCARD and position == len(grant) - 1:
            return True
        if segment not in (WILDCARD, needed[position]):
            return False
    return len(grant) == len(needed)


class Grants:
    """The permissions of one key, prepared for matching: exact ones by a set, wildcards one by one.

    What is in `exact` is granted; so may be what is not.
    """

    __slots__ = ("_wildcards", "exact")

    def __init__(self, permissions: Iterable[str]) -> None:
        """Takes permissions that were checked for their form when they were stored."""
        permissions = tuple(permissions)
        self.exact = frozenset(permissions)
        self._wildcards = tuple(tuple(each.split(":")) for each in permissions if WILDCARD in each)

    def cover(self, needed: str) -> bool:
        """Says whether the permission `needed` is granted."""
        if needed in self.exact:
            return True
        if not self._wildcards:
            return False
        segments = needed.split(":")
        return any(_covers(grant, segments) for grant in self._wildcards)

    def lacking(self, needed: Iterable[str]) -> str | None:
        """Gives the first of `needed` that is not granted, or None."""
        for each in needed:
            if not self.cover(each):
                return each
        return None


def orphaned(permissions: Iterable[str], removed: str, left: Sequence[str]) -> list[str]:
    """Gives those of `permissions` that stand for the scope `removed` and would match none of those that are `left`."""
    return [each for each in permissions if covers(each, removed) and not is_known(each, left)]


def is_known(permission: str, scopes: Iterable[str]) -> bool:
    """Says whether a permission is `*`, a scope of the catalogue, or a wildcard that covers at least one."""
    return permission == WILDCARD or any(covers(permission, scope) for scope in scopes)
