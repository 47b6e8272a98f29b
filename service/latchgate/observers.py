"""Who is told of what happens, so that it can be counted."""

from __future__ import annotations

from typing import Protocol

from latchgate.domain.model import Outcome


class OutcomeObserver(Protocol):
    """Is told of what became of every token, and of requests that bring none."""

    def outcome(self, outcome: Outcome) -> None:
        """A token was judged."""

    def unjudged(self, problem: str) -> None:
        """A gateway's client has sent no token, or several: `missing` or `conflict`."""


class Tally(Protocol):
    """Counts calls of one method that are answered without a detour, and its answers of VALID wherever they were found.

    Counted in place, because a call of Python's for each would cost more than the counting. `quick` counts the former
    that took less than `quick_s` seconds, and `seconds` sums the time of all of them; `valid` counts the latter.
    """

    quick_s: float
    quick: int
    seconds: float
    valid: int

    def slow(self, seconds: float) -> None:
        """Counts one that took longer."""


class TokenObserver(Protocol):
    """Is told of what becomes of refresh tokens."""

    def refresh_token_reused(self) -> None:
        """One was used that was used up before, and its family has ended."""


class CallObserver(Protocol):
    """Is told of every call that is in no tally."""

    def tally(self, method: str) -> Tally:
        """Where calls of `method` are counted that are answered from memory, or looked up with nothing else to do."""

    def finished(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with the gRPC status `code`."""

    def unrecorded(self) -> None:
        """A refused call of management could not be recorded in the audit trail."""
