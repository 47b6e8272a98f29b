"""Plain values to start from, and a clock that stands still until it is told to move.

A test takes one of the values and changes what it is about with `dataclasses.replace`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

from latchgate.domain.model import (
    ROOT_ORGANIZATION_ID,
    Caller,
    Environment,
    Key,
    KeyDraft,
    KeyRecord,
    KeyType,
)
from latchgate.domain.permissions import Grants

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
NOW_S = NOW.timestamp()
"""The same, in seconds since 1970."""

INSTANT = timedelta(microseconds=1)
"""The shortest span that a time can hold."""

INSTANT_S = INSTANT.total_seconds()

KEY_RECORD = KeyRecord(
    secret_id=7,
    key_id="key_01jv5s7kqd0000000000000007",
    organization_id="acme",
    organization_active=True,
    plan_id="default",
    grants=Grants(()),
    networks=(),
    rate_limit_per_minute=0,
    active=True,
    revoked=False,
    expire_s=math.inf,
    secret_end_s=math.inf,
    shown=b"what is shown of key 7",
)
"""A key without any restriction, and without any permission."""

KEY = Key(
    id=KEY_RECORD.key_id,
    organization_id=KEY_RECORD.organization_id,
    name="billing",
    key_type=KeyType.SECRET,
    environment=Environment.LIVE,
    permissions=(),
    rate_limit_per_minute=0,
    active=True,
    user_id="u-1",
    user_email="ann@example.com",
    metadata={"team": "payments"},
    allowed_cidrs=(),
    created_by="key_01jv5s7kqd0000000000000001",
    create_time=NOW - timedelta(days=30),
    update_time=NOW - timedelta(days=30),
    expire_time=None,
    revoke_time=None,
    revoke_reason="",
    delete_time=None,
    last_used_time=None,
    version=1,
    revision=0,
    read_time=NOW,
    secrets=(),
)
"""The same key as management sees it."""

DRAFT = KeyDraft(name="billing", metadata={"team": "payments"})

ROOT = Caller(
    key_id="key_01jv5s7kqd0000000000000001",
    secret_id=1,
    organization_id=ROOT_ORGANIZATION_ID,
    grants=Grants(("*",)),
)


def granting(record: KeyRecord, *permissions: str) -> KeyRecord:
    """Gives the record with these permissions."""
    return replace(record, grants=Grants(permissions))


def bound_to(record: KeyRecord, *cidrs: str) -> KeyRecord:
    """Gives the record with these networks."""
    return replace(record, networks=tuple(ip_network(cidr) for cidr in cidrs))


def caller(*permissions: str, organization_id: str = "acme") -> Caller:
    """Gives a caller with these permissions."""
    return Caller(
        key_id="key_01jv5s7kqd0000000000000002",
        secret_id=2,
        organization_id=organization_id,
        grants=Grants(permissions),
    )


class ManualClock:
    """A monotonic clock that moves when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        """Takes what it shows first, in seconds."""
        self.now_s = now_s

    def __call__(self) -> float:
        """Gives the time in seconds."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Moves it forward."""
        self.now_s += seconds
