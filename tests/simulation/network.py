"""The way between workers and the database: what is sent takes its time, or never arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import asyncpg

from latchgate.storage import queries_coherence
from simulation.database import Database
from simulation.world import WorkerLoop, World

UP: Final = "up"
DOWN: Final = "down"
MOST_DELAY_S: Final = 1.5


class Path:
    """One worker's way to the database, in true time. Both directions fail for themselves."""

    def __init__(self, world: World, database: Database) -> None:
        """Takes where time is, and what is at the other end."""
        self.world = world
        self.database = database
        # How likely something sent is late, or is the last that its connection ever carries.
        self.late = 0.0
        self.lost = 0.0
        self.frozen_until_s = {UP: 0.0, DOWN: 0.0}
        self.connections: list[Connection] = []
        # When, in true time, the log was last read by a statement that gave a lease; and whose log was read last.
        self.renewed_s = float("-inf")
        self.heard_timeline = ""

    def delay_s(self, direction: str) -> float:
        """Draws how long something sent now is under way; infinite if it is lost."""
        random, frozen_s = self.world.random, self.frozen_until_s[direction] - self.world.now_s
        if self.world.chance(self.lost) or (frozen_s > 0 and self.world.chance(0.5)):
            return float("inf")
        delay_s = random.uniform(0.0001, 0.002) + max(frozen_s, 0.0)
        if self.world.chance(self.late):
            # Most often by a little: so that what comes later overtakes it, and nobody gives up.
            delay_s += random.uniform(0, random.choice((0.05, 0.05, MOST_DELAY_S)))
        return delay_s

    def work_s(self) -> float:
        """Draws how long the server is at one step of a statement."""
        if self.world.chance(self.late / 2):
            return self.world.random.uniform(0, 0.1)
        return self.world.random.uniform(0.00005, 0.0005)


class Connection:
    """What asyncpg.connect gives, as far as latchgate.storage.link and its users know it.

    An answer or a notification that does not arrive is the last that is ever heard: TCP gives nothing out of order.
    """

    def __init__(self, path: Path, loop: WorkerLoop, timeout_s: float) -> None:
        """Takes its way, who listens at this end, and how long a statement may take."""
        self.path = path
        self.loop = loop
        self._timeout_s = timeout_s
        self.database = path.database
        self._start = 0
        self._is_open = False
        self._is_mute = False
        self._answer: asyncio.Future[list[dict[str, Any]]] | None = None
        path.connections.append(self)

    async def open(self) -> Connection:
        """Connects."""
        self._is_open = True
        self._start = -1
        await self._ask("", ())
        return self

    def is_closed(self) -> bool:
        """Says whether the connection is known to have ended."""
        return not self._is_open

    def terminate(self) -> None:
        """Ends the connection at this end. What was sent may be done all the same."""
        self._is_open = False
        if self in self.path.connections:
            self.path.connections.remove(self)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(asyncpg.ConnectionDoesNotExistError("the connection was lost"))

    async def fetch(self, query: str, *args: object) -> list[dict[str, Any]]:
        """Gives all rows."""
        return await self._ask(query, args)

    async def fetchval(self, query: str, *args: object) -> Any:
        """Gives the first value, or None."""
        rows = await self._ask(query, args)
        return next(iter(rows[0].values())) if rows else None

    async def execute(self, query: str, *args: object) -> str:
        """Gives nothing that anyone looks at."""
        await self._ask(query, args)
        return ""

    async def add_listener(self, channel: str, callback: Callable[..., object]) -> None:  # noqa: ARG002 - the one
        """Listens."""
        await self._ask("LISTEN", (callback,))

    async def _ask(self, query: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        if not self._is_open:
            raise asyncpg.InterfaceError("the connection is closed")
        self._answer = self.loop.create_future()
        self._send(UP, self._arrive, query, args, self._answer)
        async with asyncio.timeout(self._timeout_s):
            return await self._answer

    def _send(self, direction: str, arrive: Callable[..., None], *args: object) -> None:
        delay_s = float("inf") if self._is_mute else self.path.delay_s(direction)
        if delay_s == float("inf"):
            self._is_mute = True
        else:
            self.path.world.at(self.path.world.now_s + delay_s, arrive, *args)

    def _later(self, step: Callable[..., None], *args: object) -> None:
        self.path.world.at(self.path.world.now_s + self.path.work_s(), step, *args)

    def _is_served(self) -> bool:
        """Says whether the server still knows the connection; one that does not ends it, if that is heard."""
        if self.database.is_up and self._start == self.database.starts:
            return True
        self._send(DOWN, lambda: self.loop.deliver(self.terminate))
        return False

    def _arrive(self, query: str, args: tuple[Any, ...], answer: asyncio.Future[list[dict[str, Any]]]) -> None:
        if self._start < 0:
            self._start = self.database.starts
        if self._is_served():
            # A statement's time is taken before its snapshot.
            self._later(self._read, query, args, answer, self.database.wall_s())

    def _read(
        self, query: str, args: tuple[Any, ...], answer: asyncio.Future[list[dict[str, Any]]], now_s: float
    ) -> None:
        if self._is_served():
            rows = self.database.read(query, args, now_s)
            self._later(self._write, query, args, answer, rows, self.path.world.now_s)

    def _write(
        self,
        query: str,
        args: tuple[Any, ...],
        answer: asyncio.Future[list[dict[str, Any]]],
        rows: list[dict[str, Any]],
        read_s: float,
    ) -> None:
        if not self._is_served():
            return
        rows = self.database.write(query, args, rows)
        if query == "LISTEN":
            callback = args[0]
            self.database.listeners.append(lambda revision: self._notify(callback, revision))
        if query == queries_coherence.LOG_READ_RENEWING and rows[0]["is_member"]:
            self.path.renewed_s = read_s
        self._send(DOWN, lambda: self.loop.deliver(self._hear, answer, rows))

    def _notify(self, callback: Callable[..., object], revision: int) -> None:
        if self._is_open:
            self._send(DOWN, lambda: self.loop.deliver(self._tell, callback, revision))

    def _tell(self, callback: Callable[..., object], revision: int) -> None:
        if self._is_open:
            callback(self, 0, "", str(revision))

    def _hear(self, answer: asyncio.Future[list[dict[str, Any]]], rows: list[dict[str, Any]]) -> None:
        if self._is_open and not answer.done():
            if rows and "timeline" in rows[0]:
                self.path.heard_timeline = rows[0]["timeline"]
            answer.set_result(rows)
