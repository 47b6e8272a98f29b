"""Who is told of what happens, so that it can be counted."""

from __future__ import annotations

from typing import Protocol

from latchgate.domain.model import Outcome


class OutcomeObserver(Protocol):
    """Is told of every outcome of Validate."""

    def outcome(self, outcome: Outcome) -> None:
        """A token was judged."""


class CallObserver(Protocol):
    """Is told of every call."""

    def finished(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with the gRPC status `code`."""
