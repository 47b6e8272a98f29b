# ruff: noqa: SLF001 - mutants are made of inner parts
"""Faults put into the real code, each of which the simulation must notice: by what name, and what is replaced by what.

The first seven are those that the design names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, cast
from unittest import mock
from uuid import UUID

from latchgate.domain.cache import KeyCache
from latchgate.domain.coherence import Coherence, DatabaseClock, LeaseTerms, LogReading, Reading
from latchgate.domain.effects import Member
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Lookup
from latchgate.storage import effects as effects_module
from latchgate.storage import queries_coherence
from latchgate.storage.coherence import Membership
from latchgate.storage.effects import EffectPoller
from latchgate.storage.lookups import BatchingKeyReader
from simulation.database import CHANGE
from simulation.network import Connection

_read = Coherence.read
_find = BatchingKeyReader.find
_answer = BatchingKeyReader._answer
_keep_up = Membership._keep_up
_members = effects_module._members
_open = Connection.open
_fetch = Connection.fetch
_fetchval = Connection.fetchval
_look = EffectPoller._look


def _lease_from_reply(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
    result = _read(self, reading, sent_s=sent_s, is_renewal=is_renewal)
    if is_renewal and reading.is_member:
        self.lease_until_s = self._boottime() + self.terms.usable_s
    return result


def _no_revision_guard(self: Coherence, lookup: Lookup, sent_s: float) -> bool:
    del lookup
    return sent_s >= self._kept_from_s


async def _find_joining(self: BatchingKeyReader, digest: bytes) -> Lookup:
    sent = getattr(self, "sent", {})
    if digest not in sent:
        return await _find(self, digest)
    answer: asyncio.Future[Lookup] = asyncio.get_running_loop().create_future()
    sent[digest].append(answer)
    return await answer


async def _answer_joined(self: BatchingKeyReader, batch: dict[bytes, list[asyncio.Future[Lookup]]]) -> None:
    cast("Any", self).sent = batch
    try:
        await _answer(self, batch)
    finally:
        cast("Any", self).sent = {}


async def _open_with_registry(self: Connection) -> Connection:
    cast("Any", self).registry = set(self.database.state.workers)
    return await _open(self)


async def _fetchval_after_registry(self: Connection, query: str, *args: object) -> Any:
    result = await _fetchval(self, query, *args)
    if query == CHANGE:
        cast("Any", self.loop).registry = cast("Any", self).registry
    return result


async def _members_of_registry(connection: Any) -> Sequence[Member]:
    registry = getattr(connection.loop, "registry", None)
    return [each for each in await _members(connection) if registry is None or each.incarnation in registry]


async def _members_taken_off(connection: Any) -> Sequence[Member]:
    members = await _members(connection)
    for member in members:
        if member.applied_revision < connection.database.head:
            await connection.execute(queries_coherence.WORKER_DELETE, member.incarnation)
    return members


class _OneTransaction:
    """A connection in a transaction: it alone sees that the worker is registered."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def fetch(self, _: str, *args: object) -> list[dict[str, Any]]:
        read_s = self._connection.path.world.now_s
        rows = await self._connection.fetch(queries_coherence.LOG_READ, *args)
        self._connection.path.renewed_s = read_s
        return [row | {"is_member": True} for row in rows]


async def _join_in_one_transaction(self: Membership, connection: Any) -> None:
    if self._incarnation is None:
        self._incarnation, self._renewal_due_s, self._acknowledged = (
            UUID(int=connection.path.world.random.getrandbits(128)),
            0.0,
            0,
        )
        await self._read(cast("Any", _OneTransaction(connection)), is_renewal=True)
        await connection.execute(queries_coherence.WORKER_INSERT, self._incarnation, self._coherence.terms.length_s)
    await _keep_up(self, connection)


def _renewal_unread(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
    if is_renewal and reading.is_member and self._timeline:
        self.lease_until_s = sent_s + self.terms.usable_s
        return Reading.APPLIED
    return _read(self, reading, sent_s=sent_s, is_renewal=is_renewal)


async def _fetch_acknowledging(self: Connection, query: str, *args: object) -> list[dict[str, Any]]:
    rows = await _fetch(self, query, *args)
    if query in {queries_coherence.LOG_READ, queries_coherence.LOG_READ_RENEWING}:
        await self.execute(queries_coherence.WORKER_ACKNOWLEDGE, args[0], rows[0]["head"])
    return rows


def _clock_from_reply(self: DatabaseClock, now_s: float, *, sent_s: float, heard_s: float) -> None:
    del sent_s
    self.ahead_s = now_s - heard_s


def _endless_lease(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
    result = _read(self, reading, sent_s=sent_s, is_renewal=is_renewal)
    if is_renewal and reading.is_member:
        self.lease_until_s = float("inf")
    return result


def _eviction_unheeded(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
    return _read(self, reading, sent_s=sent_s, is_renewal=is_renewal) if reading.is_member else Reading.EVICTED


def _takeover_unheeded(self: Coherence, reading: LogReading) -> Reading:
    del self, reading
    return Reading.APPLIED


async def _look_once(self: EffectPoller, asked: Any) -> float:
    try:
        return await _look(self, asked)
    except StorageUnavailableError:
        return float("1e9")


def _forget_unsaid(self: KeyCache, organization: Any) -> None:
    self._organizations.pop(organization.id, None)
    self._plans.pop(organization.plan_id, None)


def _drop_newest_alone(self: KeyCache, key_id: str) -> None:
    for entry in tuple(self._of_key(key_id))[:1]:
        self._remove(entry)


Replacement = tuple[object, str, object]

MUTANTS: Final[dict[str, Sequence[Replacement]]] = {
    "lease counted from the reply": [(Coherence, "read", _lease_from_reply)],
    "row kept without the revision guard": [(Coherence, "_is_current", _no_revision_guard)],
    "lookup joins a statement that was sent": [
        (BatchingKeyReader, "find", _find_joining),
        (BatchingKeyReader, "_answer", _answer_joined),
    ],
    "registry read before the commit": [
        (Connection, "open", _open_with_registry),
        (Connection, "fetchval", _fetchval_after_registry),
        (effects_module, "_members", _members_of_registry),
    ],
    "registration and log read in one transaction": [(Membership, "_keep_up", _join_in_one_transaction)],
    "renewal without reading the log": [(Coherence, "read", _renewal_unread)],
    "acknowledged before it is applied": [(Connection, "fetch", _fetch_acknowledging)],
    "lease never ends": [(Coherence, "read", _endless_lease)],
    "evicted worker keeps its memory": [(Coherence, "read", _eviction_unheeded)],
    "wait shorter than the lease": [(LeaseTerms, "wait_s", property(lambda terms: terms.length_s * 0.8))],
    "takeover of a standby unheeded": [(Coherence, "_judge", _takeover_unheeded)],
    "laggard taken off while it has a lease": [(effects_module, "_members", _members_taken_off)],
    "database's clock counted from the reply": [(DatabaseClock, "hear", _clock_from_reply)],
    "wait given up while the database is away": [(EffectPoller, "_look", _look_once)],
    "second secret of a key kept": [(KeyCache, "drop_key", _drop_newest_alone)],
    "records go on with an organization that is let go of": [(KeyCache, "_forget", _forget_unsaid)],
}


# Where to begin with those that need a rare schedule, so that a test is short; found from 0 on. None needs to be right.
FIRST_SEEDS: Final[dict[str, int]] = {
    "registry read before the commit": 210,
    "registration and log read in one transaction": 265,
    "takeover of a standby unheeded": 150,
}


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Has the code run with a fault in it."""
    with ExitStack() as stack:
        for place, what, substitute in MUTANTS[name]:
            stack.enter_context(mock.patch.object(place, what, substitute))
        yield
