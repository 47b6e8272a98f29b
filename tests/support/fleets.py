"""A service of several worker processes, seen from outside: who they are, what they count, what their clients see."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from prometheus_client.parser import text_string_to_metric_families

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from support.databases import until
from support.processes import SERVE, Latchgate, environment, latchgate
from support.service import ROOT_TOKEN, TAG_KEY

DEADLINE_S: Final = 60.0
"""How long is waited for processes to start and to end, on a machine that does much else."""

PAUSE_S: Final = 0.003

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

# A connection for each channel, though all lead to the same address.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A process that serves, with the addresses that it has."""

    process: Latchgate
    address: str
    metrics_address: str

    def events(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """Gives the log lines of an event, so far, whose fields are as wanted."""
        lines = [json.loads(line) for line in self.process.err if line.startswith("{")]
        return [line for line in lines if line["event"] == name and wanted.items() <= line.items()]

    def pids(self, worker: int) -> list[int]:
        """Gives the process numbers that a worker has had, each once it was ready."""
        return [event["pid"] for event in self.events("worker_ready", worker=worker)]

    async def until_ready(self, worker: int, count: int) -> int:
        """Waits until a worker was ready for the `count`th time, and gives its process number."""
        await self.until_event("worker_ready", count, worker=worker)
        return self.pids(worker)[count - 1]

    async def until_event(self, name: str, count: int = 1, **wanted: Any) -> None:
        """Waits until an event was logged for the `count`th time."""

        async def is_there() -> bool:
            if self.process.has_ended:
                raise AssertionError(self.process.text)
            return len(self.events(name, **wanted)) >= count

        await until(is_there, DEADLINE_S)

    async def metrics(self) -> Samples:
        """Scrapes it."""
        text = await asyncio.to_thread(self._scrape)
        return {
            (each.name, tuple(sorted(each.labels.items()))): each.value
            for family in text_string_to_metric_families(text)
            for each in family.samples
        }

    async def counters(self) -> Samples:
        """Scrapes it, and gives what may only grow."""
        text = await asyncio.to_thread(self._scrape)
        return {
            (each.name, tuple(sorted(each.labels.items()))): each.value
            for family in text_string_to_metric_families(text)
            if family.type in {"counter", "histogram"}
            for each in family.samples
            if not each.name.endswith("_created")
        }

    async def stop(self) -> None:
        """Tells it to stop, and demands that it does in good order."""
        self.process.tell(signal.SIGTERM)
        assert 0 == await self.process.ended()
        assert [] == self.events("worker_killed")

    def _scrape(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=20) as answer:
            content: bytes = answer.read()
        return content.decode()


@asynccontextmanager
async def fleet(database_url: str, folder: Path, **variables: Any) -> AsyncIterator[Fleet]:
    """Serves a database by several processes until the block ends. The root token is ROOT_TOKEN.

    Connections live a second, and workers that wait for them to end not much longer.
    """
    settings = {"DATABASE_URL": database_url, "ROOT_TOKEN": ROOT_TOKEN, "TAG_KEY": TAG_KEY, "CONNECTION_AGE_SECONDS": 1}
    async with latchgate("serve", folder, environment(**(dict(SERVE) | settings | variables))) as process:
        serving = await process.event("serving")
        yield Fleet(process=process, address=serving["listen"], metrics_address=serving["metrics"])


def value(samples: Samples, name: str, **labels: str) -> float:
    """Gives one sample."""
    return samples[name, tuple(sorted(labels.items()))]


def total(samples: Samples, name: str) -> float:
    """Adds up the samples of a name."""
    return sum(each for (found, _), each in samples.items() if found == name)


def gone_back(before: Samples, after: Samples) -> dict[Any, tuple[float, float | None]]:
    """Lists what has become less, or is gone."""
    return {
        key: (count, after.get(key)) for key, count in before.items() if after.get(key, float("-inf")) < count - 1e-9
    }


@dataclass(slots=True, kw_only=True)
class Clients:
    """Clients that ask again and again, and go on when they are refused."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    async def until_answered(self, more: int) -> None:
        """Waits until so many more calls were answered."""
        goal = self.answered + more

        async def is_reached() -> bool:
            return self.answered >= goal

        await until(is_reached, DEADLINE_S)

    async def keep_asking(self, address: str) -> None:
        """Asks Validate on a connection of its own, as an ordinary client that waits for each answer."""
        async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
            while not self.is_over:
                if not await self._ask(KeyServiceStub(channel)):
                    # No more than some hundred a second, if all fail.
                    await asyncio.sleep(PAUSE_S)

    async def keep_sending(self, address: str) -> None:
        """Asks Validate on a connection of its own some hundred times a second, as a gateway that others ask."""
        async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel, asyncio.TaskGroup() as calls:
            while not self.is_over:
                calls.create_task(self._ask(KeyServiceStub(channel)))
                await asyncio.sleep(PAUSE_S)

    async def _ask(self, stub: Any) -> bool:
        try:
            await stub.Validate(keys_pb.ValidateRequest(token="no token"))
        except grpc.aio.AioRpcError as error:
            self.failed[f"{error.code().name}: {error.details()}"] += 1
            return False
        self.answered += 1
        return True


@asynccontextmanager
async def clients(address: str, *, waiting: int, sending: int = 0) -> AsyncIterator[Clients]:
    """Lets clients ask until the block ends, some of either kind; no call is cut off."""
    at_work = Clients()
    tasks = [asyncio.create_task(at_work.keep_asking(address)) for _ in range(waiting)]
    tasks += [asyncio.create_task(at_work.keep_sending(address)) for _ in range(sending)]
    try:
        yield at_work
    finally:
        at_work.is_over = True
        await asyncio.gather(*tasks)
