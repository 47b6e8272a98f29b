"""Keys from other systems: what is given of them, what is known of their tokens, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from latchgate.domain.model import Effect, KeyDraft

_COMPARED: Final = (
    "name",
    "key_type",
    "environment",
    "permissions",
    "rate_limit_per_minute",
    "expire_time",
    "user_id",
    "user_email",
    "metadata",
    "allowed_cidrs",
)


class RowOutcome(Enum):
    """What became of a row."""

    CREATED = "created"
    DUPLICATE = "duplicate"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRow:
    """A key as another system has it. `number` is the caller's own."""

    number: int
    digest: bytes
    hint: str
    active: bool
    draft: KeyDraft


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What became of a row.

    `key_id` is empty where there is none that the caller may know of; `differences` names the fields in which that key
    is not as the row says. `violations` holds pairs of a field's path and what it must be.
    """

    number: int
    outcome: RowOutcome
    key_id: str = ""
    differences: tuple[str, ...] = ()
    violations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownToken:
    """The key that a digest belongs to. `is_ended` says that the key is revoked or the token replaced."""

    digest: bytes
    key_id: str
    organization_id: str
    hint: str
    active: bool
    is_ended: bool
    draft: KeyDraft

    def differences(self, row: ImportRow) -> tuple[str, ...]:
        """Names the fields in which the key is not as a row says."""
        names = [name for name in _COMPARED if getattr(self.draft, name) != getattr(row.draft, name)]
        if self.hint != row.hint:
            names.append("hint")
        if self.is_ended or self.active != row.active:
            names.append("state")
        return tuple(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedBatch:
    """What became of the rows of one transaction, in their order, and whether all workers know of it."""

    results: Sequence[RowResult]
    effect: Effect
