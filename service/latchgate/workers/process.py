"""A worker as its supervisor sees it."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from latchgate.listening import Role
from latchgate.workers.channel import Channel, Found, Message
from latchgate.workers.merging import Family, from_message

METRICS_TIMEOUT_S: Final = 1.0


class WorkerEndedError(Exception):
    """A worker has ended before it was ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a worker has ended.

    `problem` is what it said of that itself, if it could, and `ready_s` for how long it was ready.
    """

    status: int
    problem: str | None
    ready_s: float

    @property
    def how(self) -> str:
        """Says it in a few words."""
        if self.status >= 0:
            return f"status {self.status}"
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"


class WorkerProcess:
    """A worker process that was started.

    `ready` is done once it serves, and fails with WorkerEndedError; `ended` is done once it is gone and all that it
    said is read. `families` are the metrics that it told last. One that `is_retiring` takes no new connections. Once it
    `is_leaving` its end is no fault.
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process, channel: Channel) -> None:
        """Takes a process, and the channel to it."""
        self.number = number
        self.pid = process.pid
        self.ready: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        # Whether anybody waits for it or not: that a worker has ended is told by `ended` as well.
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self.families: Sequence[Family] = ()
        self.is_retiring = False
        self.is_leaving = False
        self._process = process
        self._channel = channel
        self._ready_s: float | None = None
        self._problem: str | None = None
        self._status = 1
        self._retired: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._told = asyncio.Condition()
        self.ended = asyncio.create_task(self._follow())

    @classmethod
    async def start(cls, number: int, role: Role, variables: Mapping[str, str]) -> WorkerProcess:
        """Starts a worker in an environment. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    # Nothing is to be imported from the folder that it happens to be started in.
                    "-P",
                    "-m",
                    "latchgate",
                    "worker",
                    str(number),
                    role.value,
                    stdin=theirs.fileno(),
                    env=dict(variables),
                    # Out of reach of what a terminal sends to all processes of its foreground.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return cls(number, process, await Channel.open(ours))

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return self.ready.done() and self._ready_s is not None and not self.ended.done()

    @property
    def is_open(self) -> bool:
        """Whether it takes new connections."""
        return self.is_ready and not (self.is_retiring or self.is_leaving)

    @property
    def status(self) -> int:
        """The exit status that it asks the service to end with."""
        return self._status

    async def tell_metrics(self) -> None:
        """Has it tell its metrics anew; one that does not answer in time keeps those that it told last.

        It tells them by itself as soon as it hears what it is told.
        """
        if self.ended.done() or not self.families:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(METRICS_TIMEOUT_S), self._told:
                self._channel.send({"is": "asked"})
                await self._told.wait()

    async def retire(self, within_s: float) -> None:
        """Has it take no new connections, and waits until it has none, or has ended; not longer than the time."""
        self.is_retiring = True
        self._channel.send({"is": "retire"})
        waits: set[asyncio.Future[Any]] = {self.ended, self._retired}
        await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)

    async def leave(self, within_s: float) -> bool:
        """Tells it to finish what it does and to end; says whether it did. If not within the time, it is ended."""
        self.is_leaving = True
        self._channel.send({"is": "stop"})
        _, late = await asyncio.wait({self.ended}, timeout=within_s)
        if late:
            self.kill()
            await asyncio.wait({self.ended})
        return not late

    def kill(self) -> None:
        """Ends it at once."""
        self.is_leaving = True
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _follow(self) -> Ending:
        while (message := await self._channel.receive()) is not None:
            await self._hear(message)
        status = await self._process.wait()
        await self._channel.close()
        async with self._told:
            self._told.notify_all()
        if not self.ready.done():
            self.ready.set_exception(WorkerEndedError)
        ready_s = 0.0 if self._ready_s is None else time.monotonic() - self._ready_s
        return Ending(status=status, problem=self._problem, ready_s=ready_s)

    async def _hear(self, message: Message) -> None:
        if message["is"] == "ready":
            self._ready_s = time.monotonic()
            self.ready.set_result(Found(**message["found"]))
        elif message["is"] == "retired":
            if not self._retired.done():
                self._retired.set_result(None)
        elif message["is"] == "failed":
            self._problem, self._status = message["problem"], message["status"]
        else:
            self.families = from_message(message["families"])
            async with self._told:
                self._told.notify_all()
