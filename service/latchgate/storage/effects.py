"""The wait until a change is effective: one reader of the workers' rows for all calls of this worker that wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import structlog

from latchgate.domain.coherence import LeaseTerms
from latchgate.domain.effects import Member, longest_wait_s, standing
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Effect
from latchgate.storage import queries_coherence
from latchgate.storage.link import Link
from latchgate.storage.postgres import Connection

# Between two readings: short for a change that was made just now, longer for one that waits for a lease to end.
LEAST_PAUSE_S = 0.002
MOST_PAUSE_S = 0.05
RETRY_S = 0.2

_log = structlog.get_logger("latchgate.coherence")


@dataclass(eq=False, slots=True)
class _Wait:
    """A call that waits. `since_s` is a time when its change was committed already."""

    revision: int
    since_s: float
    remaining_s: float
    ended: asyncio.Future[None]

    def take(self, remaining_s: float) -> None:
        self.remaining_s = remaining_s
        if remaining_s <= 0 and not self.ended.done():
            self.ended.set_result(None)


class EffectPoller:
    """Implements latchgate.domain.ports.EffectWaiter, for workers that answer from memory under a lease."""

    def __init__(
        self, *, link: Link, boottime: Callable[[], float], poke: Callable[[], None], news: asyncio.Event
    ) -> None:
        """Takes a connection of its own, the clock, and how to have this worker read the log at once.

        `news` is set once this worker has acknowledged what it has read, as the others will have about then.
        """
        self._link = link
        self._lock = asyncio.Lock()
        self._boottime = boottime
        self._poke = poke
        self._waits: set[_Wait] = set()
        self._news = news
        self._polling: asyncio.Task[None] | None = None
        # For each row the server's history and how often it had been renewed, and when it was first seen so.
        self._seen: dict[UUID, tuple[str, int, float]] = {}
        # Rows for which a change has waited for long enough, with that change: to be taken off once they were seen to
        # be silent for as long.
        self._overdue: dict[UUID, int] = {}

    async def wait(self, revision: int, until_s: float) -> Effect:
        """Waits until no worker answers from before `revision`, or the clock is `until_s`.

        What time makes sure of is counted from now, when the change is committed: also for one that an earlier call
        made, of which no one knows when that was.
        """
        if not revision:
            return Effect(revision=0)
        now_s = self._boottime()
        wait = _Wait(revision, now_s, longest_wait_s(now_s, now_s), asyncio.get_running_loop().create_future())
        self._waits.add(wait)
        self._poke()
        self._news.set()
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
        try:
            await asyncio.wait({wait.ended}, timeout=None if until_s == math.inf else max(until_s - now_s, 0.0))
        finally:
            self._waits.discard(wait)
        if not wait.ended.done():
            return Effect(revision=revision, max_remaining=timedelta(seconds=wait.remaining_s))
        wait.ended.result()
        return Effect(revision=revision)

    async def sweep(self) -> None:
        """Takes off workers that have been silent for longer than any change would wait for them."""
        async with self._lock, self._link.connection() as connection:
            members, now_s = await self._read(connection)
            for member in members:
                if self._is_silent(member, now_s):
                    await _evict(connection, queries_coherence.WORKER_EVICT_SILENT, member)

    async def close(self) -> None:
        """Ends the reading; calls that still wait are told PENDING at their own time."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        self._link.cut()

    async def _read(self, connection: Connection) -> tuple[Sequence[Member], float]:
        """Reads the rows, and takes note of when each was first seen as it is; gives a time after the reading as well.

        In another history, which a standby that has taken over begins, a row may be one from before renewals of which
        nobody knows any more: there nothing counts that was seen in the former one.
        """
        members, now_s = await _members(connection), self._boottime()
        seen = {}
        for member in members:
            timeline, renewals, seen_s = self._seen.get(member.incarnation, ("", 0, now_s))
            is_same = (timeline, renewals) == (member.timeline, member.renewals)
            seen[member.incarnation] = (member.timeline, member.renewals, seen_s if is_same else now_s)
        self._seen = seen
        return members, now_s

    def _is_silent(self, member: Member, now_s: float) -> bool:
        """Says whether a row has been seen unchanged for so long that no renewal can have given a lease that lasts."""
        _, _, seen_s = self._seen[member.incarnation]
        return now_s - seen_s > LeaseTerms(length_s=member.lease_s).wait_s

    async def _poll(self) -> None:
        """Reads the workers' rows until nobody waits, and nobody is to be taken off."""
        try:
            while self._waits or self._overdue:
                # Those whose changes are committed when the statement is sent; who comes later waits for the next one.
                asked = tuple(self._waits)
                self._news.clear()
                try:
                    pause_s = await self._look(asked)
                except StorageUnavailableError:
                    pause_s = RETRY_S
                    # While the database is away nothing is tried for those alone; the sweep takes them off.
                    self._overdue = {}
                    for wait in asked:
                        wait.take(longest_wait_s(wait.since_s, self._boottime()))
                # Not wait_for, as in latchgate.storage.coherence.
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._news.wait()
        except Exception as error:  # noqa: BLE001 - it is theirs who wait, and they would wait for ever
            for wait in self._waits:
                if not wait.ended.done():
                    wait.ended.set_exception(error)
        finally:
            self._polling = None

    async def _look(self, asked: Sequence[_Wait]) -> float:
        """Reads the rows once, for those who wait; gives how long to pause."""
        async with self._lock, self._link.connection() as connection:
            before = self._seen
            members, now_s = await self._read(connection)
            # Who has renewed meanwhile is well; a change that is still not applied will find it overdue again.
            overdue = {
                name: revision
                for name, revision in self._overdue.items()
                if name in self._seen and self._seen[name] == before.get(name)
            }
            for wait in asked:
                stands = standing(wait.revision, wait.since_s, members, now_s)
                wait.take(stands.remaining_s)
                overdue |= {member.incarnation: wait.revision for member in stands.overdue}
            self._overdue = overdue
            for member in members:
                if member.incarnation in overdue and self._is_silent(member, now_s):
                    await _evict(connection, queries_coherence.WORKER_EVICT, member, overdue.pop(member.incarnation))
        if not asked:
            return MOST_PAUSE_S
        youngest_s = now_s - max(wait.since_s for wait in asked)
        return min(max(youngest_s / 4, LEAST_PAUSE_S), MOST_PAUSE_S)


async def _members(connection: Connection) -> Sequence[Member]:
    return [
        Member(
            incarnation=row["incarnation"],
            applied_revision=row["applied_revision"],
            seen_revision=row["seen_revision"],
            renewals=row["renewals"],
            lease_s=row["lease_s"],
            timeline=row["timeline"],
        )
        for row in await connection.fetch(queries_coherence.WORKER_LIST)
    ]


async def _evict(connection: Connection, statement: str, member: Member, *compared: int) -> None:
    """Takes a worker off whose lease has ended, unless it has come back to life since its row was read."""
    if await connection.fetchval(statement, member.incarnation, member.renewals, *compared):
        _log.warning("worker_evicted", incarnation=str(member.incarnation))
