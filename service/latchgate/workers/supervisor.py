"""Several worker processes on one port: started, replaced when they end, and let go one after the other."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import structlog

from latchgate.background import fault
from latchgate.config import CommandError
from latchgate.listening import Role
from latchgate.workers.channel import Found
from latchgate.workers.metrics import FleetMetrics
from latchgate.workers.process import Ending, WorkerEndedError, WorkerProcess
from latchgate.workers.worker import LAST_S

MAX_DEATHS: Final = 5
DEATHS_WINDOW_S: Final = 60.0
LONG_ENOUGH_S: Final = 10.0
"""A worker that was ready for so long has not died of its start."""
RECONNECT_S: Final = 5.0
"""How long clients may take to connect anew when they are told to, and their worker to see that they have."""
METRICS_INTERVAL_S: Final = 5.0
"""How much of what it has counted a worker that is killed takes with it at most, if nobody scrapes."""

MAX_MISSING_SCOPES: Final = 20
"""How many of the scopes that are missing are told of, those that most keys hold first."""

_log = structlog.get_logger("latchgate.workers")


class WorkerError(CommandError):
    """The workers can not serve. The message is one line that says why."""

    def __init__(self, message: str, status: int = 1) -> None:
        """Takes the exit status as well."""
        super().__init__(message)
        self.status = status


@dataclass(slots=True, kw_only=True)
class _Place:
    """A place that one worker after the other fills. `deaths_s` are the times of those that were not ready for long."""

    number: int
    worker: WorkerProcess | None = None
    found: asyncio.Future[Found] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    deaths_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DEATHS))


class Supervisor:
    """Keeps a number of workers at work.

    A worker that ends unasked is replaced at once. The service can not go on when one says at the first start why it
    does not serve, or when one and its successors have ended MAX_DEATHS times within DEATHS_WINDOW_S seconds, none of
    them having been ready for LONG_ENOUGH_S.
    """

    def __init__(
        self,
        *,
        count: int,
        connection_s: float,
        drain_s: float,
        variables: Mapping[str, str],
        metrics: FleetMetrics,
    ) -> None:
        """Takes how many there are to be, how long connections last, how long calls may take, and the environment."""
        self._places = [_Place(number=number) for number in range(1, count + 1)]
        self._retire_s = connection_s + RECONNECT_S
        self._drain_s = drain_s
        self._variables = variables
        self._metrics = metrics
        self._watches: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._is_complete = False
        self._is_stopping = False
        self._polling = asyncio.create_task(self._poll())

    async def start(self) -> list[Found]:
        """Starts the workers, and gives what each has found once all serve. Raises WorkerError."""
        for place in self._places:
            await self._fill(place)
        found = asyncio.gather(*(place.found for place in self._places))
        failure = asyncio.ensure_future(self.failure())
        waits: set[asyncio.Future[Any]] = {found, failure}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                failure.result()
            self._is_complete = True
            founds = await found
            _warn_of_missing_scopes(founds[0])
            return founds
        finally:
            found.cancel()
            failure.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def failure(self) -> NoReturn:
        """Waits until the service can not go on. Raises WorkerError."""
        await asyncio.shield(self._failed)
        raise AssertionError

    async def renew(self) -> None:
        """Replaces all workers, one after the other: a successor when it is ready takes all new connections.

        The worker before is let go when its last connection has ended, or should have of age. If one of the successors
        does not get ready, the workers that are there go on.
        """
        _log.info("renewing_workers")
        for place in self._places:
            successor = await self._start(place)
            if successor is None or not await _is_ready(successor):
                _log.error("workers_not_renewed", hint="a new worker does not start; those that are there go on")
                return
            if place is self._places[0]:
                # All of them read the same scopes file.
                _warn_of_missing_scopes(successor.ready.result())
            before, place.worker = place.worker, successor
            if before is not None:
                await before.retire(self._retire_s)
                await self._let_go(before)
        _log.info("workers_renewed")

    async def stop(self) -> None:
        """Lets all workers go, one after the other, so that clients move to those that are left.

        The next is told when the one before has ended, but not later than its share of the time that calls have.
        """
        self._is_stopping = True
        self._polling.cancel()
        workers = self._metrics.living
        serving = [worker for worker in workers if worker.is_ready]
        going = [asyncio.create_task(self._let_go(worker)) for worker in workers if not worker.is_ready]
        for worker in serving:
            going.append(asyncio.create_task(self._let_go(worker)))
            await asyncio.wait({going[-1]}, timeout=self._drain_s / len(serving))
        await asyncio.gather(*going)
        while self._watches:
            await asyncio.wait(self._watches)
        if self._failed.done():
            self._failed.exception()

    def kill(self) -> None:
        """Ends all workers at once."""
        self._is_stopping = True
        for worker in self._metrics.living:
            worker.kill()

    async def _fill(self, place: _Place) -> None:
        """Puts a worker where there is none, or none any more."""
        while not self._is_stopping and not self._failed.done():
            place.worker = await self._start(place)
            if place.worker is not None:
                return
            self._count_death(place, "it can not be started")

    async def _start(self, place: _Place) -> WorkerProcess | None:
        serves = any(worker.is_open for worker in self._metrics.living)
        try:
            role = Role.SUCCESSOR if serves and self._is_complete else Role.WORKER
            worker = await WorkerProcess.start(place.number, role, self._variables)
        except OSError as error:
            _log.error("worker_not_started", worker=place.number, problem=error.strerror)
            return None
        self._metrics.living.append(worker)
        watch = asyncio.create_task(self._watch(place, worker))
        self._watches.add(watch)
        watch.add_done_callback(self._has_watched)
        if self._is_stopping:
            worker.kill()
        return worker

    def _has_watched(self, watch: asyncio.Task[None]) -> None:
        """Ends the service where a worker would be left without anybody who replaces it."""
        self._watches.discard(watch)
        error = None if watch.cancelled() else watch.exception()
        if error is not None and not self._failed.done():
            self._failed.set_exception(WorkerError(fault(error)))

    async def _watch(self, place: _Place, worker: WorkerProcess) -> None:
        if await _is_ready(worker):
            _log.info("worker_ready", worker=worker.number, pid=worker.pid)
            if not place.found.done():
                place.found.set_result(worker.ready.result())
        ending = await asyncio.shield(worker.ended)
        self._metrics.ended(worker)
        if worker.is_leaving or self._failed.done():
            return
        is_first = not self._is_complete and ending.problem is not None
        if is_first:
            self._failed.set_exception(WorkerError(ending.problem or "", worker.status))
            return
        self._metrics.deaths += 1
        said = {} if ending.problem is None else {"problem": ending.problem}
        _log.error("worker_ended", worker=worker.number, pid=worker.pid, how=ending.how, **said)
        if place.worker is worker:
            self._judge(place, ending)
            await self._fill(place)

    def _judge(self, place: _Place, ending: Ending) -> None:
        """Takes note of a death, and finds that there are too many of them."""
        if ending.ready_s >= LONG_ENOUGH_S:
            place.deaths_s.clear()
        else:
            self._count_death(place, ending.problem or ending.how)

    def _count_death(self, place: _Place, last: str) -> None:
        place.deaths_s.append(time.monotonic())
        if len(place.deaths_s) == MAX_DEATHS and place.deaths_s[-1] - place.deaths_s[0] <= DEATHS_WINDOW_S:
            self._failed.set_exception(
                WorkerError(
                    f"worker {place.number} ended {MAX_DEATHS} times within {DEATHS_WINDOW_S:g} s, the last time with: "
                    f"{last}; the service can not go on"
                )
            )

    async def _let_go(self, worker: WorkerProcess) -> None:
        if not await worker.leave(self._drain_s + LAST_S):
            _log.error("worker_killed", worker=worker.number, pid=worker.pid, hint="it did not end when it was told to")

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(METRICS_INTERVAL_S)
            await self._metrics.refresh()


def _warn_of_missing_scopes(found: Found) -> None:
    for scope, keys in sorted(found.missing_scopes.items(), key=lambda each: -each[1])[:MAX_MISSING_SCOPES]:
        _log.warning("scope_missing", scope=scope, keys=keys, hint="keys hold it, and it is in no catalogue any more")


async def _is_ready(worker: WorkerProcess) -> bool:
    """Waits until a worker serves, or has ended, and says which."""
    try:
        await asyncio.shield(worker.ready)
    except WorkerEndedError:
        return False
    return not worker.ended.done()
