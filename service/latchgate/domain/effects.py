"""When a change holds everywhere."""

from __future__ import annotations

from latchgate.domain.model import Effect


class ImmediateEffects:
    """Implements latchgate.domain.ports.EffectWaiter for workers that read the database for every answer.

    Such a worker never answers from before a change that was committed when it was asked: each is effective at once.
    """

    async def wait(self, revision: int) -> Effect:
        """Needs not wait."""
        return Effect(revision=revision)
