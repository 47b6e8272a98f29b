"""A worker's membership: its row, its readings of the log of changes, and the wake-ups for them.

The rules are those of latchgate.domain.coherence; here are the statements, in the order that the rules demand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Protocol
from uuid import UUID, uuid4

import structlog

from latchgate.domain.coherence import Change, Coherence, Entity, LogReading, Reading
from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import queries_coherence
from latchgate.storage.link import Link
from latchgate.storage.postgres import Connection, Database

# How often the log is read and the listening connection tried, with no news. With the time that each may take less than
# the second within which a connection that is dead must be known to be.
HEARTBEAT_S = 0.4
RENEWALS_A_LEASE = 5
RETRY_S = 0.2
# More changes than these at once are not read one by one: everything is forgotten instead.
MAX_CHANGES = 1000
CHANGE_KEPT = timedelta(hours=1)
FORGET_ROWS = 1000
CHANNEL = "latchgate_change"
# Of a revision, which is a bigint.
MAX_DIGITS = 19

_log = structlog.get_logger("latchgate.coherence")


class MembershipObserver(Protocol):
    """Is told of what becomes of the membership."""

    def reading(self, result: Reading, changes: int) -> None:
        """The log was read, and so many changes applied."""

    def link_lost(self, link: str) -> None:
        """A connection failed."""


class Membership:
    """Keeps a worker a member for as long as it runs."""

    def __init__(
        self,
        *,
        link: Link,
        listening: Link,
        coherence: Coherence,
        boottime: Callable[[], float],
        observer: MembershipObserver,
    ) -> None:
        """Takes a connection for statements and one for notifications, what the readings are for, and its clock."""
        self._link = link
        self._listening = listening
        self._coherence = coherence
        self._boottime = boottime
        self._observer = observer
        # Set when this worker has acknowledged what it has applied, for who waits for that.
        self.news = asyncio.Event()
        self._wake = asyncio.Event()
        self._incarnation: UUID | None = None
        self._renewal_due_s = 0.0
        self._acknowledged = 0

    @property
    def incarnation(self) -> UUID | None:
        """The id of the worker's row; None while it has none."""
        return self._incarnation

    def poke(self) -> None:
        """Has the log read at once."""
        self._wake.set()

    async def run(self) -> None:
        """Joins, renews, reads and acknowledges until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._listen())

    async def leave(self) -> None:
        """Gives the row up, after the memory: nobody need wait for this worker any more."""
        self._coherence.leave()
        incarnation, self._incarnation = self._incarnation, None
        try:
            if incarnation is not None:
                async with self._link.connection() as connection:
                    await connection.execute(queries_coherence.WORKER_DELETE, incarnation)
        except StorageUnavailableError:
            # Whoever waits for it will find that its lease has ended.
            pass
        finally:
            self._link.cut()
            self._listening.cut()

    async def _follow(self) -> None:
        """Reads the log again and again: at each wake-up, at each heartbeat, and when the lease is to be renewed."""
        is_away = False
        while True:
            self._wake.clear()
            try:
                async with self._link.connection() as connection:
                    await self._keep_up(connection)
            except StorageUnavailableError as error:
                self._observer.link_lost("log")
                if not is_away:
                    _log.warning("log_not_read", problem=error.message, lease_left_s=round(self._lease_left_s(), 2))
                is_away = True
                await asyncio.sleep(RETRY_S)
                continue
            if is_away:
                _log.info("log_read_again")
            is_away = False
            await self._rest()

    async def _rest(self) -> None:
        rest_s = min(HEARTBEAT_S, self._renewal_due_s - self._boottime())
        # Not wait_for: until Python 3.12 it swallows a cancellation that comes together with what it waits for.
        with suppress(TimeoutError):
            async with asyncio.timeout(max(rest_s, 0.0)):
                await self._wake.wait()

    async def _keep_up(self, connection: Connection) -> None:
        if self._incarnation is None:
            await self._join(connection)
        is_renewal = self._boottime() >= self._renewal_due_s
        result = await self._read(connection, is_renewal=is_renewal)
        if result is Reading.EVICTED:
            _log.warning("evicted", hint="this worker was silent for longer than its lease; it joins anew")
            self._incarnation = None
            self._wake.set()
            return
        if result is not Reading.APPLIED and not is_renewal:
            self._renewal_due_s = 0.0
            self._wake.set()
        applied = self._coherence.applied_revision
        if applied != self._acknowledged:
            # Only what is applied may be acknowledged: from here on it is called effective.
            await connection.execute(queries_coherence.WORKER_ACKNOWLEDGE, self._incarnation, applied)
            self._acknowledged = applied
            self.news.set()

    async def _join(self, connection: Connection) -> None:
        """Registers under a new name. The log is read by a later statement: what was committed before is in it."""
        incarnation = uuid4()
        await connection.execute(queries_coherence.WORKER_INSERT, incarnation, self._coherence.terms.length_s)
        self._incarnation = incarnation
        self._renewal_due_s = 0.0
        self._acknowledged = 0

    async def _read(self, connection: Connection, *, is_renewal: bool) -> Reading:
        applied = self._coherence.applied_revision
        statement = queries_coherence.LOG_READ_RENEWING if is_renewal else queries_coherence.LOG_READ
        # Before it is sent: the lease is counted from when the log can not have been read yet.
        sent_s = self._boottime()
        rows = await connection.fetch(statement, self._incarnation, applied, MAX_CHANGES + 1)
        changes = [Change(Entity(row["entity"]), row["entity_id"]) for row in rows if row["entity"] is not None]
        head = rows[0]
        reading = LogReading(
            head=head["head"],
            timeline=head["timeline"],
            now_s=head["now_s"],
            is_member=head["is_member"],
            changes=changes if len(changes) <= MAX_CHANGES else None,
        )
        result = self._coherence.read(reading, sent_s=sent_s, is_renewal=is_renewal)
        self._observer.reading(result, len(changes))
        if is_renewal:
            self._renewal_due_s = sent_s + self._coherence.terms.length_s / RENEWALS_A_LEASE
            self._acknowledged = applied
        if result is Reading.WENT_BACK:
            _log.critical("revision_went_back", applied=applied, head=reading.head, hint=_LOST)
        elif result is Reading.TAKEN_OVER:
            _log.warning("database_taken_over", timeline=reading.timeline, head=reading.head)
        return result

    async def _listen(self) -> None:
        """Turns notifications into wake-ups, and finds out when their connection is dead."""
        while True:
            try:
                async with self._listening.connection() as connection:
                    await connection.add_listener(CHANNEL, self._hear)
                    # What was told before this connection listened was not heard.
                    self._wake.set()
                    while True:
                        await asyncio.sleep(HEARTBEAT_S)
                        await connection.execute("SELECT 1")
            except StorageUnavailableError:
                self._observer.link_lost("listen")
                await asyncio.sleep(RETRY_S)

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        # No coroutine: those would become tasks without an order. A change of this worker's own has mostly been read by
        # the time its notification comes. Anyone may notify, with anything.
        revision = str(payload)
        is_number = revision.isdecimal() and len(revision) <= MAX_DIGITS
        if not is_number or int(revision) > self._coherence.applied_revision:
            self._wake.set()

    def _lease_left_s(self) -> float:
        return self._coherence.lease_left_s


async def forget_changes(database: Database) -> None:
    """Removes changes that are an hour old and that every worker has applied."""
    async with database.connection() as connection:
        more = True
        while more:
            status: str = await connection.execute(queries_coherence.CHANGE_FORGET, CHANGE_KEPT, FORGET_ROWS)
            more = int(status.rsplit(maxsplit=1)[-1]) == FORGET_ROWS


_LOST = "the database has lost changes that were called effective, revocations among them; see docs/operating.md"
