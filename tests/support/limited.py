"""What tests ask of whole services that share the limits of keys."""

from __future__ import annotations

import asyncio
from collections import Counter

from support.databases import until
from support.keys import outcome_of
from support.service import RunningService
from support.transport import sample


async def until_shared(service: RunningService, *, is_local: bool = False) -> None:
    """Waits until a service shares its limits; or until it does not any more. It is asked meanwhile."""

    async def is_so() -> bool:
        return sample(service, "latchgate_rate_limits_local") == int(is_local)

    await until(is_so)


async def ask(service: RunningService, token: str, count: int, **fields: object) -> Counter[str]:
    """Validates so many times at once, and counts the outcomes."""
    answers = await asyncio.gather(*(service.validate(token, **fields) for _ in range(count)))
    return Counter(outcome_of(answer) for answer in answers)
