"""Schedules of faults that are made to show one broken rule each, with the wires' help: what must be late is held back.

Each takes a scene, in which worker `a` is the one that may answer from the past and `b` the one that changes things.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import grpc

from cluster.checker import Violation, check
from cluster.client import Client, HeldKey, Token
from cluster.clock import CAN_BE_STEPPED, HOUR_S
from cluster.history import NANOSECONDS, Answer
from cluster.nodes import LEASE_S, READY_S, Cluster, Worker
from cluster.wire import COMMIT, Link, Way
from support.databases import until

WITHIN_S: Final = 30.0
"""Within which a mutant must be caught."""
_PACE_S: Final = 0.005
# For how long to go on looking once a change is effective.
_AFTER_S: Final = 0.3


class Scene:
    """Two workers, and one client of both."""

    def __init__(self, cluster: Cluster) -> None:
        """Takes the workers `a` and `b`."""
        self.cluster = cluster
        self.a, self.b = cluster.workers
        self.client = Client()

    async def prepare(self) -> None:
        """Makes an organization."""
        await self.client.make_organization(self.b, "acme")

    async def known_key(self) -> HeldKey:
        """Makes a key that both workers hold in memory, with both in good standing."""
        await self.until_members(2)
        key = await self.client.make_key(self.b, "acme")
        for worker in (self.a, self.b):
            await self.until_read(worker, key.tokens[0])
            await self.client.validate(worker, key.tokens[0])
        return key

    async def until_read(self, worker: Worker, token: Token) -> None:
        """Waits until a worker can judge a token."""

        async def is_read() -> bool:
            return not (await self.client.validate(worker, token)).error

        await until(is_read)

    async def until_members(self, count: int, *, renewals: int = 0) -> None:
        """Waits until so many workers are registered, and have renewed their leases so often."""
        statement = "SELECT count(*) FILTER (WHERE renewals >= $1) = $2 AND count(*) = $2 FROM worker"
        async with self.cluster.database() as database:

            async def are_members() -> bool:
                return bool(await database.fetchval(statement, renewals, count))

            await until(are_members)

    async def forget_workers(self) -> None:
        """Takes all workers off; they come back as soon as they notice."""
        async with self.cluster.database() as database:
            await database.execute("DELETE FROM worker")

    async def revoke(self, key: HeldKey) -> None:
        """Has `b` revoke a key; comes back when that holds everywhere."""
        change = await self.client.revoke(self.b, key, deadline_s=READY_S)
        assert Answer.EFFECTIVE is change.answer, change

    @asynccontextmanager
    async def watching(self, token: Token) -> AsyncIterator[None]:
        """Has `a` asked for a token again and again, until some time after the block's end."""
        ended = asyncio.Event()

        async def watch() -> None:
            while not ended.is_set():
                await self.client.validate(self.a, token)
                await asyncio.sleep(_PACE_S)

        task = asyncio.create_task(watch())
        try:
            yield
            await asyncio.sleep(_AFTER_S)
        finally:
            ended.set()
            await task


async def hears_nothing(scene: Scene) -> None:
    """A worker has a lease and hears of nothing while a key is revoked."""
    key = await scene.known_key()
    async with scene.watching(key.tokens[0]):
        with scene.a.wire.holding(Link.NEWS):
            await scene.revoke(key)
            await asyncio.sleep(_AFTER_S)


async def clock_is_set_back(scene: Scene) -> None:
    """A worker's wall clock is set back by an hour; then it hears of nothing while a key is revoked."""
    key = await scene.known_key()
    with scene.a.clock.stepped(-HOUR_S):
        async with scene.watching(key.tokens[0]):
            # All links: that for the log is not known by a renewal, of which there may be none.
            with scene.a.wire.holding():
                await scene.revoke(key)
                await asyncio.sleep(_AFTER_S)


async def hears_no_notification(scene: Scene) -> None:
    """A worker renews its lease, but is not woken by the change."""
    key = await scene.known_key()
    async with scene.watching(key.tokens[0]):
        with scene.a.wire.holding(Link.LISTEN):
            await scene.revoke(key)
            await asyncio.sleep(_AFTER_S)


async def is_taken_off(scene: Scene) -> None:
    """A worker is silent for so long that it is taken off, and comes back; it is asked for nothing meanwhile."""
    key = await scene.known_key()
    with scene.a.wire.holding(Link.NEWS):
        await scene.revoke(key)
        await scene.until_members(1)
    # The second renewal is sent when the first is applied.
    await scene.until_members(2, renewals=2)
    async with scene.watching(key.tokens[0]):
        pass


async def hears_slowly(scene: Scene) -> None:
    """A worker's statements on the log are answered late."""
    key = await scene.known_key()
    async with scene.watching(key.tokens[0]):
        with scene.a.wire.delaying(0.15, Link.LOG, Way.TO_CLIENT):
            await scene.revoke(key)
            await asyncio.sleep(_AFTER_S)


async def renewal_is_answered_late(scene: Scene) -> None:
    """A renewal's answer is on its way for a third of a lease, a change comes meanwhile, and then nothing passes."""
    key = await scene.known_key()
    wire = scene.a.wire
    async with scene.watching(key.tokens[0]):
        with wire.holding(Link.LISTEN), wire.holding(Link.LOG, Way.TO_CLIENT) as answer:
            await answer.caught.wait()
            revoking = asyncio.create_task(scene.revoke(key))
            await asyncio.sleep(0.35 * LEASE_S)
            with wire.holding(Link.LOG, Way.TO_SERVER):
                answer.release()
                await revoking
                await asyncio.sleep(_AFTER_S)


async def lookup_is_answered_late(scene: Scene) -> None:
    """A lookup's answer is on its way while the key is revoked."""
    async with _late_lookup(scene):
        pass


async def lookup_is_asked_again(scene: Scene) -> None:
    """A lookup's answer is on its way while the key is revoked; another lookup comes before that answer."""
    async with _late_lookup(scene) as token:
        again = asyncio.create_task(scene.client.validate(scene.a, token))
        # For it to reach the worker.
        await asyncio.sleep(0.05)
    await again


@asynccontextmanager
async def _late_lookup(scene: Scene) -> AsyncIterator[Token]:
    """Holds a lookup's answer back while the key is revoked, and until the end of the block; then asks on."""
    # Another one first, so that the link for lookups stands.
    await scene.known_key()
    key = await scene.client.make_key(scene.b, "acme")
    token = key.tokens[0]
    with scene.a.wire.holding(Link.LOOKUP, Way.TO_CLIENT) as answer:
        first = asyncio.create_task(scene.client.validate(scene.a, token))
        await answer.caught.wait()
        await scene.revoke(key)
        yield token
    await first
    async with scene.watching(token):
        pass


async def joins_before_the_commit(scene: Scene) -> None:
    """A worker joins while a change is about to be committed, and then hears of nothing."""
    key = await scene.known_key()
    with (
        scene.a.wire.holding(Link.LOG) as away,
        scene.b.wire.holding(Link.POOL, Way.TO_SERVER, only=COMMIT) as commit,
    ):
        await scene.forget_workers()
        await scene.until_members(1)
        revoking = asyncio.create_task(scene.revoke(key))
        await commit.caught.wait()
        away.release()
        await scene.until_members(2)
        # It has read the log when it holds something again.
        for _ in range(20):
            await scene.client.validate(scene.a, key.tokens[0])
        async with scene.watching(key.tokens[0]):
            with scene.a.wire.holding(Link.NEWS):
                commit.release()
                await revoking
                await asyncio.sleep(_AFTER_S)


async def registers_late(scene: Scene) -> None:
    """The commit of a worker's registration, where there is one, is on its way for a while."""
    key = await scene.known_key()
    with scene.a.wire.holding(Link.LOG, Way.TO_SERVER, only=COMMIT) as commit:
        await scene.forget_workers()
        with suppress(TimeoutError):
            await asyncio.wait_for(commit.caught.wait(), LEASE_S)
        async with scene.watching(key.tokens[0]):
            await scene.client.validate(scene.a, key.tokens[0])
            await scene.revoke(key)


Provocation = Callable[[Scene], Awaitable[None]]

PROVOKED_BY: Final[dict[str, Provocation]] = {
    "lease_counted_from_the_reply": renewal_is_answered_late,
    "row_cached_without_the_guard": lookup_is_answered_late,
    "joins_a_sent_statement": lookup_is_asked_again,
    "registry_read_before_the_commit": joins_before_the_commit,
    "registers_and_reads_in_one_transaction": registers_late,
    "renews_without_reading": hears_no_notification,
    "acknowledges_before_applying": hears_slowly,
    "lease_never_ends": hears_nothing,
    **({"lease_by_the_wall_clock": clock_is_set_back} if CAN_BE_STEPPED else {}),
    "evicted_keeps_its_memory": is_taken_off,
    "waits_shorter_than_the_lease": hears_nothing,
    "effective_at_once": hears_nothing,
}
"""The mutants of cluster.mutants, and what shows each."""


async def provoke(scene: Scene, provocation: Provocation, *, within_s: float = WITHIN_S) -> tuple[float, Violation]:
    """Repeats a provocation until the checker finds fault. Gives after how many seconds, and with what.

    Raises TimeoutError if that takes too long.
    """
    began_ns = time.monotonic_ns()
    async with asyncio.timeout(within_s):
        while True:
            # What goes wrong in a mutant beside what is looked for is not looked for.
            with suppress(grpc.aio.AioRpcError, AssertionError):
                await provocation(scene)
            if found := [each for each in check(scene.client.history) if each.kind in {"STALE", "REVISION"}]:
                return (found[0].call.returned_ns - began_ns) / NANOSECONDS, found[0]
