"""Several workers on one PostgreSQL, each a process of its own behind a wire of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
import grpc

from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from cluster.clock import Clock, forget_killed
from cluster.postgres import Postgres
from cluster.wire import Wire
from support.processes import Latchgate, children, environment, tell_each, until_gone
from support.service import ROOT_TOKEN, TAG_KEY

LEASE_S: Final = 1.0
READY_S: Final = 60.0
"""How long to wait for what must come; far longer than it takes."""

_COMPLAINT: Final = re.compile(r'"level": "critical"|"event": "work_failed"|"code": "INTERNAL"|Traceback')
_TESTS: Final = Path(__file__).parents[1]
# A worker that comes back is to be found at once, and a call that fails is to be seen to fail.
_CHANNEL: Final = (("grpc.enable_retries", 0), ("grpc.initial_reconnect_backoff_ms", 100))


class Worker:
    """A worker: a process that may come and go, its wire, and the stubs for its present address."""

    def __init__(
        self, name: str, wire: Wire, clock: Clock, database_url: str, mutant: str, lease_s: float, *, is_prepared: bool
    ) -> None:
        """Takes its name, wire, clock, database, mutant (or none) and lease, and whether SIGUSR1 is to block it."""
        self.name = name
        self.wire = wire
        self.clock = clock
        # For one fault of the process at a time.
        self.lock = asyncio.Lock()
        self.keys: Any = None
        self.organizations: Any = None
        self._database_url = database_url
        self._is_prepared = is_prepared
        self._mutant = mutant
        self._lease_s = lease_s
        self._process: Latchgate | None = None
        self._channel: grpc.aio.Channel | None = None
        self._old: list[grpc.aio.Channel] = []

    @property
    def process(self) -> Latchgate:
        """The process that runs, or ran last."""
        if self._process is None:
            raise RuntimeError(f"worker {self.name} was never started")
        return self._process

    async def start(self) -> None:
        """Starts the process, and comes back when it serves."""
        variables = environment(
            DATABASE_URL=self.wire.url(self._database_url),
            LISTEN="127.0.0.1:0",
            METRICS_LISTEN="127.0.0.1:0",
            LOG_FORMAT="json",
            ROOT_TOKEN=ROOT_TOKEN,
            TAG_KEY=TAG_KEY,
            LEASE_SECONDS=self._lease_s,
            WORKERS=1,
            POOL_SIZE=5,
            DRAIN_SECONDS=2,
        )
        variables |= self.clock.variables()
        if self._is_prepared:
            path = os.pathsep.join(map(str, (_TESTS, _TESTS / "cluster" / "prepared")))
            variables |= {"PYTHONPATH": path, "CLUSTER_MUTANT": self._mutant}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "latchgate",
            "serve",
            env=variables,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._process = Latchgate(process)
        address = await self._process.address()
        if self._channel is not None:
            # Calls may be under way on it: closed at the end.
            self._old.append(self._channel)
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL)
        self.keys = KeyServiceStub(self._channel)
        self.organizations = OrganizationServiceStub(self._channel)

    def complaints(self) -> list[str]:
        """Lists what the process has written that no fault excuses: critical lines, failed work, stack traces."""
        return [line for line in (*self.process.out, *self.process.err) if _COMPLAINT.search(line)]

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal to the supervisor and to the worker under it, which is in a session of its own."""
        tell_each(self._pids(), number)

    async def kill(self) -> None:
        """Ends all of its processes without a word."""
        pids = self._pids()
        # The supervisor may not see the worker die, nor the worker the supervisor.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            tell_each(pids, number)
        await self.process.kill()
        for pid in pids:
            await until_gone(pid)
            forget_killed(pid)

    def _pids(self) -> list[int]:
        return [self.process.pid, *children(self.process.pid)]

    async def end(self) -> None:
        """Ends the process in order."""
        self.process.tell(signal.SIGTERM)
        await self.process.ended()

    async def close(self) -> None:
        """Ends whatever is left."""
        if self._process is not None:
            await self.kill()
        await self.wire.close()
        for channel in (*self._old, self._channel):
            if channel is not None:
                await channel.close()


class Cluster:
    """The workers and their database."""

    def __init__(self, postgres: Postgres, database_url: str, workers: Sequence[Worker]) -> None:
        """Takes what runs."""
        self.postgres = postgres
        self.workers = tuple(workers)
        self._database_url = database_url

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Connects to the database past all wires."""
        connection = await asyncpg.connect(self._database_url)
        try:
            yield connection
        finally:
            await connection.close()


@asynccontextmanager
async def running_cluster(
    postgres: Postgres, names: str = "abc", mutant: str = "", lease_s: float = LEASE_S
) -> AsyncIterator[Cluster]:
    """Runs a worker for each letter on a new database, until the block ends.

    The last one is prepared; with a mutant, which all have, they all are.
    """
    database_url = await postgres.make_database()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-clocks-")))
        workers = []
        for name in names:
            wire = Wire(postgres.url)
            await wire.start()
            clock = Clock(folder / name, is_read_each_time=True)
            is_prepared = bool(mutant) or name == names[-1]
            worker = Worker(name, wire, clock, database_url, mutant, lease_s, is_prepared=is_prepared)
            stack.push_async_callback(worker.close)
            workers.append(worker)
        # One after the other would take longer, and migrations wait for each other.
        async with asyncio.timeout(READY_S), asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker.start())
        yield Cluster(postgres, database_url, workers)
