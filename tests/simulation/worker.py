"""A simulated worker: the real parts, on a loop, a clock and a network of its own."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from latchgate.domain.cache import KeyCache
from latchgate.domain.coherence import CLOCK_DRIFT, Coherence, LeaseTerms, Reading
from latchgate.domain.floods import ForeignLookupBudget, Patience
from latchgate.domain.model import NO_USES, KeyIdentity, KeyRecord, Lookup, Outcome, Uses
from latchgate.domain.suspicion import SuspicionCounter
from latchgate.domain.validation import Validator
from latchgate.storage.coherence import Membership
from latchgate.storage.effects import EffectPoller
from latchgate.storage.link import Link
from latchgate.storage.lookups import BatchingKeyReader, find_many, lookup_link
from simulation.database import FORMAT, Database
from simulation.network import Path
from simulation.world import WorkerLoop, World
from support.limits import CountingAlone

LINK_TIMEOUT_S: Final = 0.5


class _NotingReader:
    """Notes which calls were not answered from memory."""

    def __init__(self, reader: BatchingKeyReader) -> None:
        self._reader = reader
        self.asked: set[asyncio.Task[Any] | None] = set()

    async def find(self, digest: bytes) -> Lookup:
        """Asks."""
        self.asked.add(asyncio.current_task())
        return await self._reader.find(digest)


class Worker:
    """The real parts of a worker, put together as latchgate.app does."""

    def __init__(self, world: World, database: Database, *, name: str, lease_s: float) -> None:
        """Takes what it lives in."""
        self.name = name
        self._world = world
        random = world.random
        self.loop = WorkerLoop(world, rate=1 + random.uniform(-CLOCK_DRIFT, CLOCK_DRIFT))
        self.path = Path(world, database)
        self.stops = 0.0
        self.coherence = Coherence(
            terms=LeaseTerms(length_s=lease_s), cache=KeyCache(random.choice((2, 100))), boottime=self.boottime
        )
        self.membership = Membership(
            link=Link(name, timeout_s=LINK_TIMEOUT_S),
            listening=Link(name, timeout_s=LINK_TIMEOUT_S),
            coherence=self.coherence,
            boottime=self.boottime,
            observer=self,
        )
        self.effects = EffectPoller(
            link=Link(name, timeout_s=LINK_TIMEOUT_S),
            boottime=self.boottime,
            poke=self.membership.poke,
            news=self.membership.news,
        )
        self.lookups = BatchingKeyReader(
            find_many(lookup_link(name), _show), observer=self, monotonic=self.loop.time, spacing_s=0.004, plenty=3
        )
        self.reader = _NotingReader(self.lookups)
        self.validator = Validator(
            tokens=FORMAT,
            keys=self.reader,
            memory=self.coherence,
            limiter=CountingAlone(self.loop.time),
            usage=self,
            foreign=ForeignLookupBudget(self.loop.time),
            patience=Patience(self.loop.time),
            suspicion=SuspicionCounter(self.loop.time),
        )
        self.is_leaving = False
        self.heard_timeline = ""
        self._running: asyncio.Task[None] | None = None
        self.loop.deliver(self._start)

    def boottime(self) -> float:
        """The worker's clock. The system may stop the process just before it is read, or just after."""
        if self._world.chance(self.stops):
            self.loop.stand_still(self._world.random.uniform(0, 1.5))
        now_s = self.loop.time()
        if self._world.chance(self.stops):
            self.loop.stand_still(self._world.random.uniform(0, 1.5))
        return now_s

    def _start(self) -> None:
        self._running = self.loop.create_task(self.membership.run())
        self._running.add_done_callback(self._has_ended)

    def _has_ended(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled():
            self._world.fail(f"{self.name}'s membership ended: {running.exception()!r}")

    async def leave(self) -> None:
        """Stops in good order, as latchgate.app does."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self.effects.close()
        await self.membership.leave()
        await self.lookups.close()
        self.loop.end()

    def reading(self, result: Reading, changes: int) -> None:
        """Is told that the log was read."""
        self.heard_timeline = self.path.heard_timeline
        if result is Reading.APPLIED and not changes:
            return
        self._world.note(self.name, result.value, changes, self.coherence.applied_revision)
        if result is not Reading.APPLIED and len(self.coherence.cache):
            self._world.fail(f"{self.name} was told {result.value} and still holds records")
        if result is Reading.EVICTED and self.coherence.lease_left_s:
            self._world.fail(f"{self.name} was evicted and still has a lease")

    def link_lost(self, link: str) -> None:
        """Is told that a connection failed."""
        self._world.note(self.name, "lost", link)

    def batch(self, size: int, seconds: float) -> None:
        """Is told of a lookup."""

    def failed(self, size: int) -> None:
        """Is told of a lookup that failed."""

    def used(self, _record: KeyRecord, _now_s: float) -> Uses:
        """Is told of a use."""
        return NO_USES

    def refused(self, record: KeyRecord, outcome: Outcome, now_s: float) -> None:
        """Is told of a refusal."""


def _show(identity: KeyIdentity) -> bytes:
    return identity.key_name.encode()
