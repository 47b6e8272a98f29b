"""What is done now and then so that nothing grows for ever: the list of it, and how often."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from latchgate.background import Background
from latchgate.config import Settings
from latchgate.domain.keyring import Keyring
from latchgate.storage.audit import PostgresTrail, keep_trail
from latchgate.storage.coherence import forget_changes
from latchgate.storage.effects import EffectPoller
from latchgate.storage.postgres import Database
from latchgate.storage.purge import purge_keys
from latchgate.storage.ratelimit import forget_windows
from latchgate.storage.requests import forget_requests
from latchgate.storage.suspicion import SuspicionStore
from latchgate.storage.tokens import forget_families
from latchgate.storage.usage import forget_usage

FORGET_INTERVAL_S: Final = 30.0
AUDIT_INTERVAL_S: Final = 3600.0


def keep_house(
    background: Background,
    settings: Settings,
    database: Database,
    effects: EffectPoller,
    suspicion: SuspicionStore,
    keyring: Keyring,
) -> None:
    """Has all of it done from now on. Every worker does it; they keep out of each other's way."""
    trail, retention = PostgresTrail(database), timedelta(days=settings.audit_retention_days)
    usage_kept = timedelta(days=settings.usage_retention_days)
    background.repeat("keeping of the audit trail", AUDIT_INTERVAL_S, lambda: keep_trail(trail, retention))
    for name, work in (
        ("clearing of request_ids", lambda: forget_requests(database)),
        ("clearing of the change log", lambda: forget_changes(database)),
        ("clearing of rate limits", lambda: forget_windows(database)),
        ("clearing of usage", lambda: forget_usage(database, usage_kept)),
        ("clearing of suspicious use", suspicion.forget),
        ("clearing of silent workers", effects.sweep),
        ("clearing of refresh tokens", lambda: forget_families(database)),
        ("keeping of signing keys", keyring.keep),
        ("removing of deleted keys", lambda: purge_keys(database)),
    ):
        background.repeat(name, FORGET_INTERVAL_S, work)
