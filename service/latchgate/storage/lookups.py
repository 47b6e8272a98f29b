"""Lookups of digests: those that arrive together go out as one statement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Lookup
from latchgate.storage import queries, rows
from latchgate.storage.postgres import Database, lent

MAX_BATCH = 500

FindMany = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, Lookup]]]


class LookupObserver(Protocol):
    """Is told of every statement."""

    def batch(self, size: int, seconds: float) -> None:
        """A statement for `size` digests was answered after `seconds`."""

    def failed(self, size: int) -> None:
        """A statement for `size` digests was not answered."""


def find_many(database: Database) -> FindMany:
    """Makes the function that asks the database for many digests at once, at one instant."""

    async def find(digests: Sequence[bytes]) -> Mapping[bytes, Lookup]:
        async with lent(database.lookups) as connection:
            found = await connection.fetch(queries.SECRET_FIND, digests)
        now, revision = found[0]["now"], found[0]["revision"]
        missing = Lookup(record=None, now=now, revision=revision)
        lookups = dict.fromkeys(digests, missing)
        for row in found:
            if row["digest"] is not None:
                lookups[row["digest"]] = Lookup(record=rows.key_record(row), now=now, revision=revision)
        return lookups

    return find


class BatchingKeyReader:
    """Implements latchgate.domain.ports.KeyReader over a function that finds many.

    While all `connections` have a statement out, lookups gather; the next free one takes them all. Where they come in
    numbers, statements are kept `spacing_s` apart as well, so that each carries several: a statement costs this process
    about ten times what each digest in it does. A lookup that comes alone waits for nothing.

    A lookup is never answered by a statement that was sent before it came: the answer would be older than the question.
    """

    def __init__(
        self,
        find: FindMany,
        *,
        connections: int,
        observer: LookupObserver,
        monotonic: Callable[[], float],
        spacing_s: float = 0.0,
    ) -> None:
        """Takes how to find many, how many statements may be out at once, and who is told."""
        self._find = find
        self._free = connections
        self._observer = observer
        self._monotonic = monotonic
        self._spacing_s = spacing_s
        self._next_s = 0.0
        self._waiting: dict[bytes, list[asyncio.Future[Lookup]]] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def find(self, digest: bytes) -> Lookup:
        """Waits for the next statement's answer."""
        answer: asyncio.Future[Lookup] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(digest, []).append(answer)
        if self._free:
            self._free -= 1
            task = asyncio.create_task(self._serve())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await answer

    async def close(self) -> None:
        """Ends what is under way; whoever still waits is told that the service is not available."""
        for task in tuple(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._fail(self._take(len(self._waiting)), "the service is stopping")

    async def _serve(self) -> None:
        """Sends statements until nobody waits."""
        try:
            while self._waiting:
                pause_s = self._next_s - self._monotonic()
                if pause_s > 0:
                    await asyncio.sleep(pause_s)
                batch = self._take(MAX_BATCH)
                if sum(map(len, batch.values())) > 1:
                    self._next_s = self._monotonic() + self._spacing_s
                if batch:
                    await self._answer(batch)
        finally:
            self._free += 1

    def _take(self, count: int) -> dict[bytes, list[asyncio.Future[Lookup]]]:
        if len(self._waiting) <= count:
            taken, self._waiting = self._waiting, {}
            return taken
        return {digest: self._waiting.pop(digest) for digest in list(self._waiting)[:count]}

    async def _answer(self, batch: dict[bytes, list[asyncio.Future[Lookup]]]) -> None:
        start_s = self._monotonic()
        try:
            found = await self._find(list(batch))
            lookups = [(found[digest], answers) for digest, answers in batch.items()]
        except StorageUnavailableError as error:
            # Whoever came since would wait for as long and hear the same.
            self._fail(batch, error.message)
            self._fail(self._take(len(self._waiting)), error.message)
        except Exception as error:  # noqa: BLE001 - it is theirs who asked; the next ones are to be served none the less
            self._fail(batch, error)
        except BaseException:
            self._fail(batch, "the lookup was not finished")
            raise
        else:
            self._observer.batch(len(batch), self._monotonic() - start_s)
            for lookup, answers in lookups:
                for answer in answers:
                    if not answer.done():
                        answer.set_result(lookup)

    def _fail(self, batch: dict[bytes, list[asyncio.Future[Lookup]]], problem: str | Exception) -> None:
        if batch:
            self._observer.failed(len(batch))
        for answers in batch.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(StorageUnavailableError(problem) if isinstance(problem, str) else problem)
