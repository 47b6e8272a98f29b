"""A database that lives in simulated time: what it holds, what it can lose, and the statements that it understands.

It does what the statements of latchgate.storage promise, and as little beyond that as PostgreSQL promises: each
reads one snapshot, writes later, and a crash may take back what was committed with synchronous_commit off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import UUID

from latchgate.domain.coherence import Entity
from latchgate.domain.model import Environment, KeyType, Outcome
from latchgate.domain.token import TokenFormat, digest
from latchgate.storage import queries, queries_coherence

# The one statement that stands for all that management commits; see Change.
CHANGE: Final = "a change"

FORMAT: Final = TokenFormat(bytes(range(32)))
# Tokens by key. Key 0 has two, as after a rotation; key 1 has one of a foreign format; key 2 expires.
_OWN = [FORMAT.mint(KeyType.SECRET, Environment.LIVE).token for _ in range(4)]
TOKEN_KEYS: Final = {_OWN[0]: 0, _OWN[1]: 0, "imported_from_elsewhere_0123456789": 1, _OWN[2]: 2, _OWN[3]: 3}
UNKNOWN_TOKENS: Final = (FORMAT.mint(KeyType.SECRET, Environment.LIVE).token, "invented_by_someone_0123456789")
EXPIRING_KEY: Final = 2
_BY_DIGEST: Final = {digest(token): key for token, key in TOKEN_KEYS.items()}

Row = Mapping[str, Any]
# What a token is worth: the outcome, and for VALID which changes of key, organization and plan the answer shows.
View = tuple[Outcome, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a management call asks for. `number` is its own and never that of another: it tells what an answer shows."""

    number: int
    entity: Entity
    index: int
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    organization: int
    stamp: int = 0
    active: bool = True
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Organization:
    plan: int
    stamp: int = 0
    active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """A worker's row."""

    lease_s: float
    applied_revision: int = 0
    seen_revision: int = 0
    renewals: int = 0


@dataclass(slots=True)
class State:
    """All that is stored."""

    keys: list[_Key] = field(default_factory=lambda: [_Key(organization=each % 2) for each in range(4)])
    organizations: list[_Organization] = field(default_factory=lambda: [_Organization(plan=0), _Organization(plan=1)])
    plans: list[int] = field(default_factory=lambda: [0, 0, 0])
    log: list[Change] = field(default_factory=list)
    workers: dict[UUID, WorkerRow] = field(default_factory=dict)

    def name(self, key: int) -> str:
        """Gives what a key's answers show of the changes that they have seen."""
        organization = self.organizations[self.keys[key].organization]
        return f"{self.keys[key].stamp}.{organization.stamp}.{self.plans[organization.plan]}"

    def view(self, key: int) -> View:
        """Says what a key's tokens are worth, apart from time."""
        stored = self.keys[key]
        if stored.revoked:
            return Outcome.REVOKED, ""
        if not stored.active:
            return Outcome.INACTIVE, ""
        if not self.organizations[stored.organization].active:
            return Outcome.ORGANIZATION_INACTIVE, ""
        return Outcome.VALID, self.name(key)

    def change(self, change: Change) -> None:
        """Does what a management call asks for; the change's revision is its place in the log."""
        index, number = change.index, change.number
        if change.entity is Entity.PLAN:
            self.plans[index] = number
        elif change.entity is Entity.ORGANIZATION:
            organization = replace(self.organizations[index], stamp=number)
            if change.action == "toggle":
                organization = replace(organization, active=not organization.active)
            elif change.action == "move":
                organization = replace(organization, plan=(organization.plan + 1) % 3)
            self.organizations[index] = organization
        else:
            key = replace(self.keys[index], stamp=number)
            if change.action == "toggle":
                key = replace(key, active=not key.active)
            elif change.action == "revoke":
                # Or brought back, as a key that was only deleted can be.
                key = replace(key, revoked=not key.revoked)
            self.keys[index] = key
        self.log.append(change)


class Database:
    """A server, and what becomes of it."""

    def __init__(self, time_s: Callable[[], float], draw: Callable[[], int]) -> None:
        """Takes true time, and what draws a large number."""
        self._time_s = time_s
        self._draw = draw
        self._wal: list[Callable[[State], object]] = []
        self._durable = 0
        self.state = State()
        self.is_up = True
        # How often it has started: connections do not outlive a start.
        self.starts = 0
        self.timeline = 1
        self.wall_offset_s = 1.9e9
        self.expire_s = math.inf
        # By revision: what each token is worth.
        self.history: list[list[View]] = [self._views()]
        self.listeners: list[Callable[[int], None]] = []

    def wall_s(self) -> float:
        """The server's clock."""
        return self.wall_offset_s + self._time_s()

    @property
    def timeline_name(self) -> str:
        """Which history the server is on, as PostgreSQL names it."""
        return f"{self.timeline:08X}"

    @property
    def head(self) -> int:
        """The newest revision."""
        return len(self.state.log)

    def restart(self, keep: float) -> None:
        """Comes up again, with that part of what was not safe on disk when it crashed."""
        kept = self._durable + round((len(self._wal) - self._durable) * keep)
        self._come_up(self._wal[:kept])

    def fail_over(self, lost: int) -> None:
        """Is taken over by a standby that has not seen the last `lost` writes."""
        self.timeline += 1
        self._come_up(self._wal[: max(len(self._wal) - lost, 0)])
        del self.history[self.head + 1 :]

    def unsafe(self) -> int:
        """Tells how many writes are not safe on disk."""
        return len(self._wal) - self._durable

    def _come_up(self, wal: list[Callable[[State], object]]) -> None:
        self._wal, self._durable = wal, len(wal)
        self.state = State()
        for write in wal:
            write(self.state)
        self.listeners.clear()
        self.starts += 1
        self.is_up = True

    def read(self, query: str, args: Sequence[Any], now_s: float) -> list[dict[str, Any]]:
        """Does what a statement reads, in one snapshot."""
        if query == queries.SECRET_FIND:
            return self._find(args[0], now_s)
        if query in {queries_coherence.LOG_READ, queries_coherence.LOG_READ_RENEWING}:
            return self._read_log(args[0], args[1], args[2], now_s)
        if query == queries_coherence.WORKER_LIST:
            return [
                {
                    "incarnation": incarnation,
                    "applied_revision": row.applied_revision,
                    "seen_revision": row.seen_revision,
                    "renewals": row.renewals,
                    "lease_s": row.lease_s,
                    "timeline": self.timeline_name,
                }
                for incarnation, row in self.state.workers.items()
            ]
        return []

    def write(self, query: str, args: Sequence[Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Does what a statement writes, after its snapshot, and gives what it answers."""
        workers = self.state.workers
        row = workers.get(args[0]) if args and isinstance(args[0], UUID) else None
        if query == CHANGE:
            return [{"revision": self._change(args[0])}]
        if query == queries_coherence.WORKER_INSERT:
            self._commit(_set(args[0], WorkerRow(lease_s=args[1])), is_safe=True)
        elif query == queries_coherence.WORKER_DELETE:
            self._commit(_drop(args[0]), is_safe=True)
        elif query in {queries_coherence.WORKER_EVICT, queries_coherence.WORKER_EVICT_SILENT}:
            if row is None or self.has_come_back(query, row, *args[1:]):
                return []
            self._commit(_drop(args[0]), is_safe=True)
            return [{"bool": True}]
        elif query == queries_coherence.WORKER_ACKNOWLEDGE and row is not None:
            self._commit(_set(args[0], replace(row, applied_revision=args[1])), is_safe=_is_safe(query))
        elif query == queries_coherence.LOG_READ_RENEWING:
            if row is None or not rows[0]["is_member"]:
                return [each | {"is_member": False} for each in rows]
            head = rows[0]["head"]
            row = replace(
                row,
                applied_revision=min(args[1], head) if "least($2" in query else args[1],
                seen_revision=head,
                renewals=row.renewals + (self._draw() if "random()" in query else 1),
            )
            self._commit(_set(args[0], row), is_safe=_is_safe(query))
        return rows

    def has_come_back(self, query: str, row: WorkerRow, renewals: int, revision: int = 0) -> bool:
        """Says whether a worker is not to be taken off: it has renewed its row since, or the change is lost."""
        is_lost = revision > len(self.state.log)
        if query == queries_coherence.WORKER_EVICT and (row.seen_revision >= revision or is_lost):
            return True
        return row.renewals != renewals

    def _commit(self, write: Callable[[State], object], *, is_safe: bool) -> None:
        self._wal.append(write)
        write(self.state)
        if is_safe:
            # What is written before it is on disk with it.
            self._durable = len(self._wal)

    def revision_of(self, change: Change) -> int:
        """Gives a change's revision, 0 if it is not stored."""
        return next((at for at, each in enumerate(self.state.log, 1) if each is change), 0)

    def _change(self, change: Change) -> int:
        """Commits a change, unless it is a repetition."""
        if not self.revision_of(change):
            self._commit(lambda state: state.change(change), is_safe=True)
            self.history.append(self._views())
            for tell in tuple(self.listeners):
                tell(self.revision_of(change))
        return self.revision_of(change)

    def _views(self) -> list[View]:
        return [self.state.view(key) for key in range(len(self.state.keys))]

    def _read_log(self, incarnation: UUID, after: int, limit: int, now_s: float) -> list[dict[str, Any]]:
        head = {
            "head": self.head,
            "timeline": self.timeline_name,
            "now_s": now_s,
            "is_member": incarnation in self.state.workers,
        }
        changes = self.state.log[after : after + limit]
        if not changes:
            return [head | {"entity": None, "entity_id": None}]
        return [head | {"entity": each.entity.value, "entity_id": _id(each.entity, each.index)} for each in changes]

    def _find(self, digests: Sequence[bytes], now_s: float) -> list[dict[str, Any]]:
        head = {"now_s": now_s, "revision": self.head}
        found = [head | self._record(each, _BY_DIGEST[each]) for each in digests if each in _BY_DIGEST]
        return found or [head | {"digest": None}]

    def _record(self, token_digest: bytes, key: int) -> dict[str, Any]:
        stored = self.state.keys[key]
        organization = self.state.organizations[stored.organization]
        return {
            "digest": token_digest,
            "secret_id": 1,
            "key_id": _id(Entity.KEY, key),
            "organization_id": _id(Entity.ORGANIZATION, stored.organization),
            "organization_active": organization.active,
            "plan_id": _id(Entity.PLAN, organization.plan),
            "key_name": self.state.name(key),
            "kind": f"{KeyType.SECRET.value} {Environment.LIVE.value} ",
            "allowed_cidrs": [],
            "rate_limit_per_minute": 0,
            "active": stored.active,
            "revoked": stored.revoked,
            "expire_s": self.expire_s if key == EXPIRING_KEY else math.inf,
            "secret_end_s": math.inf,
            "create_s": 0.0,
            "user_id": "",
            "user_email": "",
            "metadata": "{}",
        }


def _id(entity: Entity, index: int) -> str:
    return f"{entity.value}-{index}"


def _is_safe(query: str) -> bool:
    """Says whether a statement is on disk when it is answered."""
    return "'synchronous_commit', 'off'" not in query


def _set(incarnation: UUID, row: WorkerRow) -> Callable[[State], object]:
    return lambda state: state.workers.update({incarnation: row})


def _drop(incarnation: UUID) -> Callable[[State], object]:
    return lambda state: state.workers.pop(incarnation, None)
