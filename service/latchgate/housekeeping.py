"""What is done now and then so that nothing grows for ever: the list of it, and how often."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final, TypeAlias

from latchgate.background import SOONEST, Background
from latchgate.config import Settings
from latchgate.domain.keyring import Keyring
from latchgate.storage.audit import PostgresTrail, keep_trail
from latchgate.storage.coherence import forget_changes
from latchgate.storage.effects import EffectPoller
from latchgate.storage.housekeeping import take_turn
from latchgate.storage.postgres import Database
from latchgate.storage.purge import purge_keys
from latchgate.storage.ratelimit import forget_windows
from latchgate.storage.requests import forget_requests
from latchgate.storage.suspicion import SuspicionStore
from latchgate.storage.tokens import forget_families
from latchgate.storage.usage import forget_usage

FORGET_INTERVAL_S: Final = 30.0
AUDIT_INTERVAL_S: Final = 3600.0

Chore: TypeAlias = Callable[[], Awaitable[None]]


def keep_house(
    background: Background,
    settings: Settings,
    database: Database,
    effects: EffectPoller,
    suspicion: SuspicionStore,
    keyring: Keyring,
) -> None:
    """Has all of it done from now on."""
    trail, retention = PostgresTrail(database), timedelta(days=settings.audit_retention_days)
    usage_kept = timedelta(days=settings.usage_retention_days)
    repeat_by_one(
        background,
        database,
        "housekeeping of the audit trail",
        AUDIT_INTERVAL_S,
        [("keeping of the audit trail", lambda: keep_trail(trail, retention))],
    )
    repeat_by_one(
        background,
        database,
        "housekeeping",
        FORGET_INTERVAL_S,
        [
            ("clearing of request_ids", lambda: forget_requests(database)),
            ("clearing of the change log", lambda: forget_changes(database)),
            ("clearing of rate limits", lambda: forget_windows(database)),
            ("clearing of usage", lambda: forget_usage(database, usage_kept)),
            ("clearing of suspicious use", suspicion.forget),
            ("clearing of refresh tokens", lambda: forget_families(database)),
            ("keeping of signing keys", keyring.keep),
            ("removing of deleted keys", lambda: purge_keys(database)),
        ],
    )
    # Each worker for itself: what it goes by is for how long it has seen the same.
    background.repeat("clearing of silent workers", FORGET_INTERVAL_S, effects.sweep)


def repeat_by_one(
    background: Background, database: Database, name: str, interval_s: float, chores: Sequence[tuple[str, Chore]]
) -> None:
    """Has chores done again and again, one after the other, by one worker for all: by whichever comes first.

    One that dies while it is at them leaves them to the next one. One that is at them for longer than the interval gets
    company; so no chore relies on being the only one of its kind. Workers ask at short intervals, also for what is done
    at long ones: it is done though none of them lives for as long.
    """

    async def turn() -> None:
        if await take_turn(database, name, timedelta(seconds=SOONEST * interval_s)):
            for chore, work in chores:
                await background.attempt(chore, work)

    background.repeat(name, min(interval_s, FORGET_INTERVAL_S), turn)
