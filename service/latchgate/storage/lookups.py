"""Lookups of digests: those that arrive together go out as one statement."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Lookup
from latchgate.storage import queries, rows
from latchgate.storage.link import Link

MAX_BATCH = 500
STATEMENT_TIMEOUT_S = 1.0
# A statement that failed within this time is sent again, once: it most likely met a connection that was lost before.
RETRIED_WITHIN_S = 0.1
# How often the database is tried while it is away; workers that lost it together come back one after the other.
TRY_PAUSE_S = (0.1, 0.3)

# One plan for every number of digests, made once and kept for as long as the connection lives, be it weeks. It goes by
# the indexes alone, so that it is the right one even if it was made when there was nothing to be found yet.
_LOOKUP_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "statement_timeout": "800ms",
}

FindMany = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, Lookup]]]


class LookupObserver(Protocol):
    """Is told of every statement."""

    def batch(self, size: int, seconds: float) -> None:
        """A statement for `size` digests was answered after `seconds`."""

    def failed(self, size: int) -> None:
        """A statement for `size` digests was not answered."""


def lookup_link(dsn: str) -> Link:
    """Makes the connection for lookups: one of their own, so that management can not starve them."""
    return Link(dsn, timeout_s=STATEMENT_TIMEOUT_S, settings=_LOOKUP_SETTINGS)


def find_many(link: Link, show: rows.Show) -> FindMany:
    """Makes the function that asks the database for many digests at once, at one instant. One call at a time."""

    async def find(digests: Sequence[bytes]) -> Mapping[bytes, Lookup]:
        async with link.connection() as connection:
            found = await connection.fetch(queries.SECRET_FIND, digests)
        now_s, revision = found[0]["now_s"], found[0]["revision"]
        lookups = dict.fromkeys(digests, Lookup(None, now_s, revision))
        for row in found:
            digest = row["digest"]
            if digest is not None:
                lookups[digest] = Lookup(rows.key_record(row, show), now_s, revision)
        return lookups

    return find


class BatchingKeyReader:
    """Implements latchgate.domain.ports.KeyReader over a function that finds many.

    While a statement is out, lookups gather; the next one takes them all. Where they come in numbers, statements are
    kept `spacing_s` apart as well, so that each carries several: a statement costs this process about ten times what
    each digest in it does. A lookup that comes alone waits for nothing, nor do those of `plenty` digests: while the
    database is at work on some, this process is to be at work on others.

    A lookup is never answered by a statement that was sent before it came: the answer would be older than the question.

    When the database does not answer, lookups fail at once, without being sent, until it is found to be back.
    """

    def __init__(
        self,
        find: FindMany,
        *,
        observer: LookupObserver,
        monotonic: Callable[[], float],
        spacing_s: float = 0.0,
        plenty: int = MAX_BATCH,
    ) -> None:
        """Takes how to find many, and who is told."""
        self._find = find
        self._observer = observer
        self._monotonic = monotonic
        self._spacing_s = spacing_s
        self._plenty = plenty
        self._next_s = 0.0
        # What is waited for while statements are kept apart.
        self._due: asyncio.Future[None] | None = None
        self._waiting: dict[bytes, list[asyncio.Future[Lookup]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: asyncio.Task[None] | None = None
        self._problem = ""

    def find(self, digest: bytes) -> asyncio.Future[Lookup]:
        """Gives what the next statement's answer is to be awaited by. Raises StorageUnavailableError."""
        if self._problem:
            self._observer.failed(1)
            raise StorageUnavailableError(self._problem)
        # Kept, because Python asks the system for the process's id each time that it is asked for the loop.
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[Lookup] = self._loop.create_future()
        waiting = self._waiting.get(digest)
        if waiting is None:
            self._waiting[digest] = [answer]
        else:
            waiting.append(answer)
        if self._due is not None and len(self._waiting) >= self._plenty:
            _settle(self._due)
        if self._serving is None:
            self._serve_soon()
        return answer

    def suspect(self) -> None:
        """Has the database tried, with no lookup that waits for it."""
        self._waiting.setdefault(b"", [])
        self._serve_soon()

    async def close(self) -> None:
        """Ends what is under way; whoever still waits is told that the service is not available."""
        self._problem = "the service is stopping"
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self._fail(self._take(len(self._waiting)), self._problem)

    def _serve_soon(self) -> None:
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        """Sends statements until nobody waits; while the database is away, until it is back."""
        try:
            while self._waiting:
                await self._until_due()
                batch = self._take(MAX_BATCH)
                await self._answer(batch)
                if sum(map(len, batch.values())) > 1:
                    # From the answer on: those that it is for come back together, though not in one moment.
                    self._next_s = self._monotonic() + self._spacing_s
                if self._problem:
                    await self._until_back()
        finally:
            self._serving = None

    async def _until_due(self) -> None:
        """Keeps the next statement apart from the last one, unless there is plenty for it."""
        pause_s = self._next_s - self._monotonic()
        if pause_s <= 0 or len(self._waiting) >= self._plenty:
            return
        loop = asyncio.get_running_loop()
        self._due = loop.create_future()
        timer = loop.call_later(pause_s, _settle, self._due)
        try:
            await self._due
        finally:
            timer.cancel()
            self._due = None

    def _take(self, count: int) -> dict[bytes, list[asyncio.Future[Lookup]]]:
        if len(self._waiting) <= count:
            taken, self._waiting = self._waiting, {}
            return taken
        return {digest: self._waiting.pop(digest) for digest in list(self._waiting)[:count]}

    async def _answer(self, batch: dict[bytes, list[asyncio.Future[Lookup]]]) -> None:
        start_s = self._monotonic()
        try:
            found = await self._find_again_if_lost(list(batch))
            lookups = [(found[digest], answers) for digest, answers in batch.items()]
        except StorageUnavailableError as error:
            self._problem = error.message
            self._fail(batch, error.message)
            # Whoever came since would wait for as long and hear the same.
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

    async def _find_again_if_lost(self, digests: Sequence[bytes]) -> Mapping[bytes, Lookup]:
        start_s = self._monotonic()
        try:
            return await self._find(digests)
        except StorageUnavailableError:
            if self._monotonic() - start_s > RETRIED_WITHIN_S:
                raise
        return await self._find(digests)

    async def _until_back(self) -> None:
        """Waits until the database answers."""
        while self._problem:
            await asyncio.sleep(random.uniform(*TRY_PAUSE_S))  # noqa: S311 - to spread, not to hide
            self._problem = await self._tried()

    async def _tried(self) -> str:
        """Says what keeps the database from answering, if anything does."""
        try:
            await self._find(())
        except StorageUnavailableError as error:
            return error.message
        except Exception:  # noqa: BLE001 - an answer, too: those who ask next hear of it
            return ""
        return ""

    def _fail(self, batch: dict[bytes, list[asyncio.Future[Lookup]]], problem: str | Exception) -> None:
        if batch:
            self._observer.failed(len(batch))
        for answers in batch.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(StorageUnavailableError(problem) if isinstance(problem, str) else problem)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
