"""Faults built into the service itself, each a rule of docs/coherence.md that is broken.

Each is a function that patches one class or function of the service in a process that has not started it yet.
"""

# ruff: noqa: SLF001 - a mutant reaches into what it breaks

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from cluster.clock import CAN_BE_STEPPED
from latchgate import app
from latchgate.domain.coherence import Coherence, LeaseTerms, LogReading, Reading
from latchgate.domain.effects import standing
from latchgate.domain.model import Effect, Lookup
from latchgate.storage import effects, queries_coherence
from latchgate.storage.coherence import RENEWALS_A_LEASE, Membership
from latchgate.storage.effects import EffectPoller
from latchgate.storage.lookups import BatchingKeyReader
from latchgate.storage.transaction import PostgresTransaction

EARLY_S = 0.01


def lease_counted_from_the_reply() -> None:
    """The lease begins when the renewal's answer is heard, not before it is sent."""
    read = Coherence.read

    def read_late(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
        result = read(self, reading, sent_s=sent_s, is_renewal=is_renewal)
        if is_renewal and result is not Reading.EVICTED:
            self.lease_until_s = self._boottime() + self.terms.usable_s
        return result

    Coherence.read = read_late  # type: ignore[method-assign]


def row_cached_without_the_guard() -> None:
    """Whatever a lookup brings is kept, also if changes were applied since it was read."""

    def is_current(self: Coherence, lookup: Lookup, sent_s: float) -> bool:
        del self, lookup, sent_s
        return True

    Coherence._is_current = is_current  # type: ignore[method-assign]


def joins_a_sent_statement() -> None:
    """A lookup is answered by a statement for the same digest that is on its way already."""
    find = BatchingKeyReader.find
    flying: dict[bytes, asyncio.Future[Lookup]] = {}

    def find_joining(self: BatchingKeyReader, digest: bytes) -> asyncio.Future[Lookup]:
        if digest not in flying:
            flying[digest] = find(self, digest)
            flying[digest].add_done_callback(lambda _: flying.pop(digest, None))
        return asyncio.shield(flying[digest])

    BatchingKeyReader.find = find_joining  # type: ignore[method-assign]


def registry_read_before_the_commit() -> None:
    """A change waits for the workers that were there before it was committed, and for no others."""
    record_change = PostgresTransaction.record_change
    read_members = effects._members
    known: dict[int, set[UUID]] = {}

    async def record_and_read(self: PostgresTransaction, entity: str, entity_id: str) -> int:
        revision = await record_change(self, entity, entity_id)
        known[revision] = {member.incarnation for member in await read_members(self._connection)}
        return revision

    def stands(revision: int, since_s: float, members: Sequence[Any], now_s: float) -> Any:
        asked = [member for member in members if member.incarnation in known.get(revision, set())]
        return standing(revision, since_s, asked, now_s)

    PostgresTransaction.record_change = record_and_read  # type: ignore[method-assign]
    vars(effects)["standing"] = stands


def registers_and_reads_in_one_transaction() -> None:
    """A worker that joins reads the log before its row is committed, and answers from memory at once."""
    keep_up = Membership._keep_up

    async def keep_up_at_once(self: Membership, connection: Any) -> None:
        if self._incarnation is None:
            async with connection.transaction():
                await self._join(connection)
                await self._read(connection, is_renewal=True)
        await keep_up(self, connection)

    Membership._keep_up = keep_up_at_once  # type: ignore[method-assign]


def renews_without_reading() -> None:
    """A renewal raises the row's count and the lease, and leaves the log for later."""
    read = Membership._read

    async def renew_alone(self: Membership, connection: Any, *, is_renewal: bool) -> Reading:
        sent_s = self._boottime()
        # One that is woken by its own timer, which may go off a little early, is to renew.
        is_due = is_renewal or self._renewal_due_s - sent_s < EARLY_S
        if not is_due or self._coherence.lease_left_s == 0:
            return await read(self, connection, is_renewal=is_renewal)
        status = await connection.execute(
            "UPDATE worker SET renewals = renewals + 1 WHERE incarnation = $1", self._incarnation
        )
        if status == "UPDATE 0":
            return await read(self, connection, is_renewal=True)
        self._coherence.lease_until_s = sent_s + self._coherence.terms.usable_s
        self._renewal_due_s = sent_s + self._coherence.terms.length_s / RENEWALS_A_LEASE
        return Reading.APPLIED

    Membership._read = renew_alone  # type: ignore[method-assign]


def acknowledges_before_applying() -> None:
    """A worker says how far the log goes before it has taken in what stands there."""
    read = Membership._read

    async def acknowledge_first(self: Membership, connection: Any, *, is_renewal: bool) -> Reading:
        head = await connection.fetchval("SELECT max(revision) FROM change_log")
        if head is not None and head > self._coherence.applied_revision:
            await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, self._incarnation, head)
        return await read(self, connection, is_renewal=is_renewal)

    Membership._read = acknowledge_first  # type: ignore[method-assign]


def lease_never_ends() -> None:
    """A worker that was given a lease once answers from memory for ever."""
    read = Coherence.read

    def read_for_ever(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
        result = read(self, reading, sent_s=sent_s, is_renewal=is_renewal)
        if is_renewal and result is not Reading.EVICTED:
            self.lease_until_s = float("inf")
        return result

    Coherence.read = read_for_ever  # type: ignore[method-assign]


def lease_by_the_wall_clock() -> None:
    """Leases and waits are counted by the wall clock, which may be stepped."""
    vars(app)["boottime"] = time.time


def evicted_keeps_its_memory() -> None:
    """A worker that was taken off comes back with what it held, and takes the log's head as applied."""
    read = Coherence.read

    evicted: set[Coherence] = set()

    def leave(self: Coherence) -> None:
        self.lease_until_s = float("-inf")
        evicted.add(self)

    def read_on(self: Coherence, reading: LogReading, *, sent_s: float, is_renewal: bool) -> Reading:
        if self in evicted and reading.is_member and is_renewal:
            evicted.discard(self)
            self.applied_revision = reading.head
            self.lease_until_s = sent_s + self.terms.usable_s
            return Reading.APPLIED
        return read(self, reading, sent_s=sent_s, is_renewal=is_renewal)

    Coherence.leave = leave  # type: ignore[method-assign]
    Coherence.read = read_on  # type: ignore[method-assign]


def waits_shorter_than_the_lease() -> None:
    """A change is called effective after a third of the lease that a silent worker may still have."""

    def wait_s(self: LeaseTerms) -> float:
        return self.length_s / 3

    LeaseTerms.wait_s = property(wait_s)  # type: ignore[assignment, method-assign]


def effective_at_once() -> None:
    """A change is called effective as soon as it is committed."""

    async def wait(self: EffectPoller, revision: int, until_s: float) -> Effect:
        del self, until_s
        return Effect(revision=revision)

    EffectPoller.wait = wait  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        lease_counted_from_the_reply,
        row_cached_without_the_guard,
        joins_a_sent_statement,
        registry_read_before_the_commit,
        registers_and_reads_in_one_transaction,
        renews_without_reading,
        acknowledges_before_applying,
        lease_never_ends,
        *((lease_by_the_wall_clock,) if CAN_BE_STEPPED else ()),
        evicted_keeps_its_memory,
        waits_shorter_than_the_lease,
        effective_at_once,
    )
}
