"""The calls of a trial: keys that are made, changed and revoked by way of all workers, and asked for all the time."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Final

import grpc

from cluster.client import Client, HeldKey
from cluster.history import Answer, Change
from cluster.nodes import LEASE_S, READY_S, Cluster, Worker
from support.databases import until

# Deadlines of changes: shorter than a wait for a silent worker's lease, about as long, and long enough for all.
DEADLINES_S: Final = (0.4, 1.5, 5.0)
_PACE_S: Final = 0.015
_PAUSE_S: Final = 0.05
_LIVES: Final = 3
# After its end a key is asked for during so many leases.
_REMEMBERED_LEASES: Final = 1.5
_STEADY: Final = "steady"
_SWITCHED: Final = "switched"


class Load:
    """Calls all workers until it is told to stop."""

    def __init__(self, cluster: Cluster, client: Client, rng: Random) -> None:
        """Takes the workers, who writes the history, and what decides on the order of things."""
        self._cluster = cluster
        self._client = client
        self._rng = rng
        self._keys: list[HeldKey] = []
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Makes calls until the block ends, and then until what was begun is done."""
        suffix = uuid.uuid4().hex[:8]
        for name in (_STEADY, _SWITCHED):
            await self._client.make_organization(self._cluster.workers[0], f"{name}-{suffix}")
        rngs = [Random(self._rng.random()) for _ in range(_LIVES + 1)]  # noqa: S311 - to be repeated
        async with asyncio.TaskGroup() as group:
            for rng in rngs[1:]:
                group.create_task(self._keep_living(rng, f"{_STEADY}-{suffix}"))
            group.create_task(self._keep_switching(rngs[0], f"{_SWITCHED}-{suffix}"))
            try:
                yield
            finally:
                self._stopping.set()

    async def heal(self) -> None:
        """Waits until every worker judges tokens again, and has changes called effective."""
        key = await self._make(self._rng, self._keys[0].organization_id)
        if key is None:
            raise RuntimeError("the trial was stopped before its faults were over")
        switches = itertools.cycle((False, True))
        for worker in self._cluster.workers:

            async def is_healthy(worker: Worker = worker) -> bool:
                if (await self._client.validate(worker, key.tokens[0])).error:
                    return False
                change = await self._client.toggle(worker, key, active=next(switches), deadline_s=DEADLINES_S[-1])
                return change.answer is Answer.EFFECTIVE

            async with asyncio.timeout(READY_S):
                await until(is_healthy)

    async def read_all(self) -> None:
        """Reads every key and token once more, on every worker: all changes from before `heal` must be seen."""
        for key in self._keys:
            reader = self._rng.choice(self._cluster.workers)
            await _until_decided(lambda reader=reader, key=key: self._client.get(reader, key))  # type: ignore[misc]
            for worker in self._cluster.workers:
                for token in key.tokens:
                    await _until_decided(
                        lambda worker=worker, token=token: self._client.validate(worker, token, is_final=True)  # type: ignore[misc]
                    )

    async def _keep_living(self, rng: Random, organization_id: str) -> None:
        while not self._stopping.is_set():
            key = await self._make(rng, organization_id)
            if key is not None:
                async with self._asked_for(key):
                    await self._change(rng, key)

    async def _keep_switching(self, rng: Random, organization_id: str) -> None:
        """Switches an organization off and on."""
        key = await self._make(rng, organization_id)
        if key is None:
            return
        is_active = True
        async with self._asked_for(key):
            while not self._stopping.is_set():
                is_active = not is_active
                await self._insist(
                    rng,
                    lambda worker, deadline_s, active=is_active: self._client.switch(  # type: ignore[misc]
                        worker, organization_id, active=active, deadline_s=deadline_s
                    ),
                )
                await self._pause(rng.uniform(0, LEASE_S))

    async def _make(self, rng: Random, organization_id: str) -> HeldKey | None:
        """Makes a key, however often that takes; None if there is no time any more."""
        request_id = str(uuid.uuid4())
        while not self._stopping.is_set():
            try:
                key = await self._client.make_key(
                    rng.choice(self._cluster.workers), organization_id, request_id, DEADLINES_S[-1]
                )
            except grpc.aio.AioRpcError:
                await self._pause(_PAUSE_S)
            else:
                self._keys.append(key)
                return key
        return None

    async def _change(self, rng: Random, key: HeldKey) -> None:
        """Switches a key off and on, rotates it, and revokes it, with some of these left out."""
        await self._pause(rng.uniform(0, LEASE_S / 2))
        steps = rng.sample(["off", "on", "rotate"], k=rng.randrange(4))
        for step in steps:
            if self._stopping.is_set():
                return
            if step == "rotate":
                await self._rotate(rng, key)
            else:
                await self._insist(
                    rng,
                    lambda worker, deadline_s, step=step: self._client.toggle(  # type: ignore[misc]
                        worker, key, active=step == "on", deadline_s=deadline_s
                    ),
                )
            await self._pause(rng.uniform(0, LEASE_S / 2))
        by_deletion = rng.random() < 0.25
        await self._insist(
            rng,
            lambda worker, deadline_s: self._client.revoke(worker, key, deadline_s=deadline_s, by_deletion=by_deletion),
        )
        await self._pause(_REMEMBERED_LEASES * LEASE_S)

    async def _rotate(self, rng: Random, key: HeldKey) -> None:
        request_id = str(uuid.uuid4())

        async def rotate(worker: Worker, deadline_s: float) -> Change:
            change, _ = await self._client.rotate(worker, key, request_id, deadline_s=deadline_s)
            return change

        await self._insist(rng, rotate)

    async def _insist(self, rng: Random, call: Callable[[Worker, float], Awaitable[Change]]) -> None:
        """Repeats a change until there is an answer to it."""
        while not self._stopping.is_set():
            change = await call(rng.choice(self._cluster.workers), rng.choice(DEADLINES_S))
            if change.answer is not Answer.UNKNOWN:
                return
            await self._pause(_PAUSE_S)

    @asynccontextmanager
    async def _asked_for(self, key: HeldKey) -> AsyncIterator[None]:
        """Asks every worker for every token of a key, again and again until the block ends."""
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for worker in self._cluster.workers:
                group.create_task(self._ask(worker, key, ended))
            try:
                yield
            finally:
                ended.set()

    async def _ask(self, worker: Worker, key: HeldKey, ended: asyncio.Event) -> None:
        while not ended.is_set():
            readings = await asyncio.gather(*(self._client.validate(worker, token) for token in key.tokens))
            await asyncio.sleep(_PAUSE_S if any(reading.error for reading in readings) else _PACE_S)

    async def _pause(self, seconds: float) -> None:
        """Waits, but not beyond the trial's end."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return


async def _until_decided(read: Callable[[], Awaitable[object]]) -> None:
    """Repeats a reading until it is no error."""

    async def is_decided() -> bool:
        return not getattr(await read(), "error", "")

    await until(is_decided)
