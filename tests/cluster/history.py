"""What was called, when, where, and what came of it. All times are nanoseconds of one monotonic clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

VALID = "VALID"
REVOKED = "REVOKED"
INACTIVE = "INACTIVE"
ORGANIZATION_INACTIVE = "ORGANIZATION_INACTIVE"

NANOSECONDS = 1_000_000_000


class Answer(Enum):
    """What the caller of a change was told."""

    EFFECTIVE = "EFFECTIVE"
    PENDING = "PENDING"
    UNKNOWN = "unknown"
    """An error after which the change may be made at any time from its invocation on, or never."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Something whose standing is read: a token by Validate, or a key by GetKey.

    `facts` are what can be said of it, each with the outcome that it leads to; the first that holds decides. With none
    it is VALID.
    """

    name: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A call that makes a fact hold (`value`) or not. From `holds_from_ns` on it must be seen everywhere."""

    what: str
    fact: str
    value: bool
    worker: str
    invoked_ns: int
    returned_ns: int
    answer: Answer
    revision: int = 0
    holds_from_ns: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A call that reads a subject's standing: an outcome and the revision that it reflects at least, or an error."""

    subject: Subject
    worker: str
    invoked_ns: int
    returned_ns: int
    outcome: str = ""
    revision: int | None = None
    error: str = ""
    is_final: bool = False


@dataclass(kw_only=True)
class History:
    """All calls of one trial."""

    began_ns: int = field(default_factory=time.monotonic_ns)
    changes: list[Change] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
