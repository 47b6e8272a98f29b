"""The values that the rules speak of. All times are timezone-aware.

All are frozen but Call, KeyRecord, and what uses are counted in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple

from latchgate.domain.permissions import Grants

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

ROOT_ORGANIZATION_ID = "org_root"
DEFAULT_PLAN_ID = "default"

DELETED_KEPT = timedelta(days=30)
"""For how long a deleted key can be brought back, and is kept."""
INSTANT = timedelta(microseconds=1)
"""The shortest span that two stored times can be apart."""


class KeyType(Enum):
    """How a key's token is to be handled."""

    # Enum's own is a function of Python's, which is called for each lookup.
    __hash__ = object.__hash__

    SECRET = "secret"  # noqa: S105 - the name of a type of keys
    PUBLISHABLE = "publishable"


class Environment(Enum):
    """Which traffic a key is for."""

    __hash__ = object.__hash__

    LIVE = "live"
    TEST = "test"


class KeyState(Enum):
    """What a key's life has come to."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    EXPIRED = "expired"
    REVOKED = "revoked"
    DELETED = "deleted"


class Outcome(Enum):
    """The answer to Validate."""

    VALID = "valid"
    NOT_FOUND = "not_found"
    REVOKED = "revoked"
    INACTIVE = "inactive"
    EXPIRED = "expired"
    ORGANIZATION_INACTIVE = "organization_inactive"
    PERMISSION_DENIED = "permission_denied"
    ADDRESS_DENIED = "address_denied"
    RATE_LIMITED = "rate_limited"


class ScopeSource(Enum):
    """Who put a scope into the catalogue."""

    CORE = "core"
    DEPLOYMENT = "deployment"
    ORGANIZATION = "organization"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """An entry of the catalogue."""

    name: str
    description: str = ""
    source: ScopeSource = ScopeSource.ORGANIZATION


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPermission:
    """A permission that keys hold which are neither revoked nor deleted, and how many they are.

    `own_scopes` are those of their organizations, alike for all of these keys; empty where they do not matter.
    """

    permission: str
    own_scopes: tuple[Scope, ...]
    key_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """One token's stored trace, without its digest. `end_time` is when a rotation ends it."""

    hint: str
    create_time: datetime
    end_time: datetime | None
    last_used_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as management sees it, at `read_time` of the database's clock.

    `rate_limit_per_minute` of 0 means the plan's. `revision` is that of the key's last change, 0 if there was none.
    `secrets` holds the newest secret and the one before it, newest first.
    """

    id: str
    organization_id: str
    name: str
    key_type: KeyType
    environment: Environment
    permissions: tuple[str, ...]
    rate_limit_per_minute: int
    active: bool
    user_id: str
    user_email: str
    metadata: Mapping[str, str]
    allowed_cidrs: tuple[str, ...]
    created_by: str
    create_time: datetime
    update_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    revoke_reason: str
    delete_time: datetime | None
    last_used_time: datetime | None
    version: int
    revision: int
    read_time: datetime
    secrets: tuple[Secret, ...]

    @property
    def etag(self) -> str:
        """Changes with every change of the key."""
        return f"v{self.version}"

    @property
    def is_root(self) -> bool:
        """Whether the key is one of the service's own."""
        return self.organization_id == ROOT_ORGANIZATION_ID

    @property
    def is_expired(self) -> bool:
        """Whether the key's expiry has come."""
        return self.expire_time is not None and self.expire_time <= self.read_time

    @property
    def purge_time(self) -> datetime | None:
        """From when on the key, which is deleted, is to be removed; None if it is not deleted, and for root keys.

        Those stay: by their secrets a start knows that the root token of the settings was ended before.
        """
        return None if self.delete_time is None or self.is_root else self.delete_time + DELETED_KEPT

    @property
    def is_deleted_alone(self) -> bool:
        """Whether the key was deleted and, neither before nor after that, revoked: the two times are the same then."""
        return self.delete_time is not None and self.delete_time == self.revoke_time

    @property
    def state(self) -> KeyState:
        """The first that holds of deleted, revoked, expired, inactive; else active."""
        if self.delete_time is not None:
            return KeyState.DELETED
        if self.revoke_time is not None:
            return KeyState.REVOKED
        if self.is_expired:
            return KeyState.EXPIRED
        return KeyState.ACTIVE if self.active else KeyState.INACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDraft:
    """A key that a caller asks for."""

    name: str
    key_type: KeyType = KeyType.SECRET
    environment: Environment = Environment.LIVE
    permissions: tuple[str, ...] = ()
    rate_limit_per_minute: int = 0
    expire_time: datetime | None = None
    user_id: str = ""
    user_email: str = ""
    metadata: Mapping[str, str]
    allowed_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key that is about to be stored."""

    id: str
    organization_id: str
    created_by: str
    draft: KeyDraft


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSecret:
    """A secret that is about to be stored. `readable_token` is kept for publishable keys alone."""

    digest: bytes
    hint: str
    readable_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFilter:
    """Which of an organization's keys to list; None matches all."""

    organization_id: str
    key_type: KeyType | None = None
    environment: Environment | None = None
    state: KeyState | None = None
    user_id: str = ""
    show_deleted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Named defaults. A rate limit of 0 means none."""

    id: str
    rate_limit_per_minute: int
    max_keys: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Organization:
    """A tenant. `key_count` counts the keys that are neither revoked nor deleted; `max_keys` is its plan's."""

    id: str
    name: str
    plan_id: str
    active: bool
    scopes: tuple[Scope, ...]
    key_count: int
    max_keys: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Whether a change holds everywhere; `max_remaining` is None when it does."""

    revision: int
    max_remaining: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A key together with the token that is shown this once."""

    key: Key
    token: str
    effect: Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A key after a change."""

    key: Key
    effect: Effect


class KeyKind:
    """What many keys have in common: one and the same object for all that have it, so that it is known by itself."""

    __slots__ = ("environment", "grants", "key_type", "permissions")

    def __init__(self, key_type: KeyType, environment: Environment, permissions: tuple[str, ...]) -> None:
        """Takes permissions that were checked for their form when they were stored."""
        self.key_type = key_type
        self.environment = environment
        self.permissions = permissions
        self.grants = Grants(permissions)


class KeyIdentity(NamedTuple):
    """What an answer shows of a key. Times are in seconds since 1970; `end_s` is infinite where no end is set."""

    key_id: str
    organization_id: str
    user_id: str
    user_email: str
    key_name: str
    kind: KeyKind
    create_s: float
    end_s: float
    metadata: Mapping[str, str]


class Permits:
    """What a worker may admit of one key's requests without asking: `left` permits, until a time of its own clock.

    `used` is what the key has used of its limit by now, as far as is known. Whoever holds one counts in it.
    """

    __slots__ = ("left", "until_s", "used")

    def __init__(self) -> None:
        """Begins with nothing."""
        self.left = 0
        self.until_s = -math.inf
        self.used = 0


class Uses:
    """How often one secret was answered VALID, and when last; to be counted in until a time of the database's clock.

    Times are in seconds since 1970.
    """

    __slots__ = ("until_s", "used_s", "valid")

    def __init__(self, until_s: float) -> None:
        """Begins with nothing."""
        self.until_s = until_s
        self.valid = 0
        self.used_s = 0.0


NO_PERMITS: Final = Permits()
NO_USES: Final = Uses(-math.inf)


@dataclass(slots=True, weakref_slot=True)
class KeyRecord:
    """What validation needs of one secret, its key, organization and plan. Made once, when it is loaded.

    `rate_limit_per_minute` is the effective one; 0 means none. Ends are in seconds since 1970 of the database's clock;
    infinite where none is set. `shown` is the KeyIdentity as the transport has written it.

    `good_until_s` is told from the others: until then, of the same clock, nothing about the key itself is to be said
    against its use. `permits` and `uses` are where its uses are counted, for as long as these say: these two are
    changed, and nothing else ever is. It is not frozen only because one is made for every lookup.
    """

    secret_id: int
    key_id: str
    organization_id: str
    organization_active: bool
    plan_id: str
    grants: Grants
    networks: tuple[Network, ...]
    rate_limit_per_minute: int
    active: bool
    revoked: bool
    expire_s: float
    secret_end_s: float
    shown: bytes
    good_until_s: float = field(init=False)
    permits: Permits = field(default=NO_PERMITS, init=False, compare=False, repr=False)
    uses: Uses = field(default=NO_USES, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Tells until when the key is good."""
        is_good = self.active and self.organization_active and not self.revoked
        self.good_until_s = min(self.expire_s, self.secret_end_s) if is_good else -math.inf


class Lookup(NamedTuple):
    """What is known of a digest: the record, or None; the database's clock; the newest change that is taken account of.

    `now_s` is in seconds since 1970.
    """

    record: KeyRecord | None
    now_s: float
    revision: int


class RateState(NamedTuple):
    """Where a key stands with its limit. `reset_after_s` is in whole seconds from now."""

    allowed: bool
    limit: int
    remaining: int
    reset_after_s: int


class Verdict(NamedTuple):
    """The answer to Validate. `record` is there for the outcomes that may show who the key is.

    `now_s` is the database's clock, in seconds since 1970.
    """

    outcome: Outcome
    revision: int
    now_s: float = 0.0
    record: KeyRecord | None = None
    rate: RateState | None = None


Rate = tuple[bool, int, int, int]
"""A RateState, with or without its names."""
Judgement = tuple[Outcome, int, float, KeyRecord | None, Rate | None]
"""A Verdict, with or without its names: those that are made for every call are without, as names cost time."""


@dataclass(slots=True, kw_only=True)
class Call:
    """How a management call has come: its method, from which address, with whose certificate, under which id.

    The address and the certificate's subject are empty where there is none. `is_recorded` is set, as the only thing
    that changes, once what the call does is written in the audit trail.
    """

    method: str = ""
    peer: str = ""
    certificate: str = ""
    request_id: str = ""
    is_recorded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who makes a management call: by which secret of which key, or else as which `subject` of the issuer.

    A subject is written `https://issuer#subject`. `answer_by_s` is until when the caller waits for the answer, in
    seconds of CLOCK_BOOTTIME; infinite without an end.
    """

    organization_id: str
    grants: Grants
    key_id: str = ""
    secret_id: int | None = None
    subject: str = ""
    answer_by_s: float = math.inf
    call: Call = field(default_factory=Call, compare=False)

    @property
    def id(self) -> str:
        """The id of the key, or the subject."""
        return self.key_id or self.subject

    @property
    def is_root(self) -> bool:
        """Whether the caller holds a root key."""
        return self.organization_id == ROOT_ORGANIZATION_ID


@dataclass(slots=True, kw_only=True)
class Visitor:
    """Who makes a call whose request itself carries what says who that is: nobody, until the call's use case knows.

    `caller` is set as soon as it does, also where the call is refused then: what it leaves in the audit trail is the
    caller's. `answer_by_s` is as a Caller's.
    """

    client_ip: str
    answer_by_s: float = math.inf
    call: Call = field(default_factory=Call)
    caller: Caller | None = None

    def becomes(self, *, key_id: str, secret_id: int, organization_id: str, grants: Grants) -> Caller:
        """Makes the visitor a known caller."""
        self.caller = Caller(
            key_id=key_id,
            secret_id=secret_id,
            organization_id=organization_id,
            grants=grants,
            answer_by_s=self.answer_by_s,
            call=self.call,
        )
        return self.caller
