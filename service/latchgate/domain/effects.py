"""When a change holds everywhere: what is known of the workers, and what time alone makes sure of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from latchgate.domain.coherence import LeaseTerms

# No lease is longer: how long to wait at most where the workers can not be asked.
MAX_LEASE_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker's row, as one snapshot shows it. `seen_revision` is how far its last renewal read the log.

    `timeline` is the history that the server is on: another one once a standby has taken over.
    """

    incarnation: UUID
    applied_revision: int
    seen_revision: int
    renewals: int
    lease_s: float
    timeline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a change stands: for how long it may still not hold somewhere, and which workers' leases have ended.

    With nothing remaining it is effective: no worker can answer from before it. Those that are overdue may be taken
    off, if they still have not renewed their rows since the change; until then every change waits for them.
    """

    remaining_s: float
    overdue: tuple[Member, ...]


def standing(revision: int, since_s: float, members: Sequence[Member], now_s: float) -> Standing:
    """Judges a change whose commit had returned at `since_s`, by rows that were read after it.

    A worker has either applied the change, or its lease was given by a renewal from before the commit, and has ended
    when `wait_s` of its length has passed. A worker that is not among the rows has joined later and read the log then.
    """
    laggards = [member for member in members if member.applied_revision < revision]
    left_s = [since_s + LeaseTerms(length_s=member.lease_s).wait_s - now_s for member in laggards]
    return Standing(
        remaining_s=max(left_s, default=0.0),
        overdue=tuple(member for member, left in zip(laggards, left_s, strict=True) if left <= 0),
    )


def longest_wait_s(since_s: float, now_s: float) -> float:
    """For how long a change may still not hold somewhere, whoever the workers are."""
    return since_s + LeaseTerms(length_s=MAX_LEASE_S).wait_s - now_s
