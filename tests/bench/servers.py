"""The servers that are measured: the service, alone on its core or of several workers, and a no-op beside it."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import grpc

from apikeys.v1 import key_service_pb2 as pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from bench.database import MAX_TOKENS, TAG_KEY, Seeded
from bench.machine import BenchError, free_port, pinned
from bench.metrics import Scrape

ANOTHER = "another no-op"
PLAIN = "no-op on default grpc.aio"
SINGLE = "no-op on a single server"
METHOD = "/apikeys.v1.KeyService/Validate"
NEEDED_PERMISSION = "orders:read"
CLIENT_IP = "203.0.113.7"
BATCH = 100
ROOT_TOKEN = "root-token-of-the-benchmark-0123456789abcdef"
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0
# How often it is looked whether a service has written all, and how often at most.
LOOK_S = 0.5
MAX_LOOKS = 240

AS_ROOT = (("authorization", f"Bearer {ROOT_TOKEN}"),)
"""The metadata of a call that manages keys."""

# A connection for each channel, though all lead to the same address.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
# Connections that are made, one after the other, until each worker was reached: for two, some are enough.
MAX_WARMING = 100


def request(token: str) -> pb.ValidateRequest:
    """What a gateway asks of one token."""
    return pb.ValidateRequest(token=token, required_permissions=[NEEDED_PERMISSION], client_ip=CLIENT_IP)


def body(token: str) -> bytes:
    """Gives the body of a call: one gRPC message, not compressed."""
    message = request(token).SerializeToString()
    return struct.pack(">BI", 0, len(message)) + message


class Source(Enum):
    """Where a service finds its answers."""

    MEMORY = "memory"
    DATABASE = "database"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that can be loaded. `answer` is what it says of a known token."""

    name: str
    pid: int
    port: int
    answer: pb.ValidateResponse

    @property
    def url(self) -> str:
        """The address of Validate."""
        return f"http://{self.address}{METHOD}"

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(Target):
    """The service on one database, and the tokens that it is asked for, with a body for each."""

    source: Source
    tokens: Sequence[str]
    metrics_port: int
    seeded: Seeded
    bodies: Sequence[bytes]

    async def figures(self) -> Figures:
        """Reads the counters."""
        return Figures.of(await Scrape.read(self.metrics_port))

    async def warm(self) -> None:
        """Asks for every token once, so that a service that answers from memory has it there."""
        await _ask_for_all(self.address, self.tokens)

    async def written(self) -> None:
        """Waits until it has written how keys were used. Raises BenchError if it does not come to an end."""
        for _ in range(MAX_LOOKS):
            if not (await Scrape.read(self.metrics_port)).total("latchgate_last_used_pending"):
                return
            await asyncio.sleep(LOOK_S)
        raise BenchError(f"{self.name} does not come to an end with writing how keys were used")

    async def check_answers(self) -> None:
        """Asks for some tokens by an ordinary client. Raises BenchError unless each is answered as it must be."""
        async with grpc.aio.insecure_channel(self.address, options=OWN_CONNECTION) as channel:
            for token, key_id in self.seeded.sample.items():
                answer = await _ask(channel, token)
                if (answer.outcome, answer.key_id) != (pb.OUTCOME_VALID, key_id):
                    raise BenchError(f"a good token of {key_id} was answered with {pb.Outcome.Name(answer.outcome)}")
            # One that the tag shows to be wrong, and one that only the database can tell.
            for token in (next(iter(self.seeded.sample))[:-1] + "-", "another-system-1234567890"):
                answer = await _ask(channel, token)
                if answer.outcome != pb.OUTCOME_NOT_FOUND:
                    raise BenchError(f"a token that was never made was answered with {pb.Outcome.Name(answer.outcome)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Counters of the service, or what they have grown by."""

    outcomes: Mapping[str, float]
    statements: float
    digests: float

    @classmethod
    def of(cls, scrape: Scrape) -> Figures:
        """Finds them among all that the service tells."""
        return cls(
            outcomes=scrape.by("outcome", "latchgate_outcomes_total"),
            statements=scrape.total("latchgate_lookup_batch_size_count"),
            digests=scrape.total("latchgate_lookup_batch_size_sum"),
        )

    def since(self, before: Figures) -> Figures:
        """Gives the growth; outcomes that did not grow are left out."""
        growth = {name: count - before.outcomes.get(name, 0) for name, count in self.outcomes.items()}
        return Figures(
            outcomes={name: count for name, count in growth.items() if count},
            statements=self.statements - before.statements,
            digests=self.digests - before.digests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet(Target):
    """A service of several workers on one database; `pid` is their supervisor's."""

    workers: int
    metrics_port: int
    seeded: Seeded

    async def scrape(self) -> Scrape:
        """Reads all that its workers tell. Raises OSError if it does not answer."""
        return await Scrape.read(self.metrics_port)

    async def ask(self, tokens: Sequence[str]) -> None:
        """Asks one of its workers for tokens, once for each."""
        await _ask_for_all(self.address, tokens)

    async def warm(self) -> None:
        """Asks every worker for every token, over as many connections as that takes. Raises BenchError."""
        for _ in range(MAX_WARMING):
            await self.ask(self.seeded.tokens)
            held = (await self.scrape()).by("worker", "latchgate_memory_keys")
            if len(held) == self.workers and min(held.values()) >= len(self.seeded.tokens):
                return
        raise BenchError(f"not every worker has all {len(self.seeded.tokens)} keys in memory")


async def _ask_for_all(address: str, tokens: Sequence[str]) -> None:
    """Asks for tokens over one connection, so that the worker it leads to has them in memory."""
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        stub: KeyServiceStub[pb.BatchValidateResponse] = KeyServiceStub(channel)  # type: ignore[type-arg]
        for first in range(0, len(tokens), BATCH):
            requests = [request(token) for token in tokens[first : first + BATCH]]
            await stub.BatchValidate(pb.BatchValidateRequest(requests=requests), timeout=START_DEADLINE_S)


async def _ask(channel: grpc.aio.Channel, token: str) -> pb.ValidateResponse:
    stub: KeyServiceStub[pb.ValidateResponse] = KeyServiceStub(channel)  # type: ignore[type-arg]
    answer: pb.ValidateResponse = await stub.Validate(request(token), wait_for_ready=True, timeout=START_DEADLINE_S)
    return answer


@asynccontextmanager
async def service(
    seeded: Seeded,
    source: Source,
    core: int,
    folder: Path,
    settings: Mapping[str, str] | None = None,
    *,
    in_use: int = MAX_TOKENS,
    beside: str = "",
    program: Sequence[str] = ("-m", "latchgate"),
) -> AsyncIterator[Service]:
    """Runs `latchgate serve` with its own defaults, but for these settings, and one worker, until the block ends.

    One that is to look up every token has room for a single one in its memory. Of all tokens `in_use` are asked for,
    evenly spread; its name says so if that is said in `beside`. Another `program` is for Python to run in its place.
    """
    tokens = seeded.tokens[:: max(1, len(seeded.tokens) // in_use)][:in_use]
    port, metrics_port = free_port(), free_port()
    environment = _environment(seeded, port, metrics_port, workers=1) | dict(settings or {})
    if source is Source.DATABASE:
        environment["LATCHGATE_CACHE_KEYS"] = "1"
    log = folder / f"service-{seeded.keys}-{source.value}-{len(tokens)}.log"
    async with _process([*program, "serve"], cores=[core], environment=environment, log=log) as process:
        answer = await _first_answer(process, port, next(iter(seeded.sample)), log)
        yield Service(
            name=f"{source.value}, {seeded.keys:,} {'key' if seeded.keys == 1 else 'keys'}{beside}",
            source=source,
            # What serves is the worker.
            pid=_child(process.pid),
            port=port,
            answer=answer,
            metrics_port=metrics_port,
            seeded=seeded,
            tokens=tokens,
            bodies=[body(token) for token in tokens],
        )


@asynccontextmanager
async def noop(
    answer: pb.ValidateResponse,
    core: int,
    folder: Path,
    *,
    name: str = "no-op",
    choices: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Target]:
    """Runs the yardstick with an answer of the service, until the block ends; `choices` are those of noop.py."""
    port = free_port()
    script, file, log = Path(__file__).with_name("noop.py"), folder / f"answer-{port}", folder / f"noop-{port}.log"
    file.write_bytes(answer.SerializeToString())
    arguments, variables = [str(script), str(port), str(file), *choices], os.environ | dict(environment or {})
    async with _process(arguments, cores=[core], environment=variables, log=log) as process:
        given = await _first_answer(process, port, "", log)
        if given != answer:
            raise BenchError("the no-op answers with something else than it was told")
        yield Target(name=name, pid=process.pid, port=port, answer=given)


def another_noop(answer: pb.ValidateResponse, core: int, folder: Path) -> AbstractAsyncContextManager[Target]:
    """Runs the no-op once more, to be called by turns with the others as if it were another server."""
    return noop(answer, core, folder, name=ANOTHER)


def single_noop(answer: pb.ValidateResponse, core: int, folder: Path) -> AbstractAsyncContextManager[Target]:
    """Runs the no-op on one of grpc's servers, where the service has several on its port."""
    return noop(answer, core, folder, name=SINGLE, choices=["servers=1"])


def plain_noop(answer: pb.ValidateResponse, core: int, folder: Path) -> AbstractAsyncContextManager[Target]:
    """Runs the no-op on grpc.aio as it comes: without the service's choice of options, scheduling and servers."""
    # What the service chooses for grpc has come into the environment with its package; empty, nothing is chosen.
    return noop(answer, core, folder, name=PLAIN, choices=["plain"], environment={"GRPC_EXPERIMENTS": ""})


@asynccontextmanager
async def fleet(
    seeded: Seeded, workers: int, cores: Sequence[int], folder: Path, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Fleet]:
    """Runs `latchgate serve` with so many workers on these cores, and with these settings, until the block ends."""
    port, metrics_port = free_port(), free_port()
    environment = _environment(seeded, port, metrics_port, workers=workers) | dict(settings or {})
    log = folder / f"fleet-{workers}-{port}.log"
    async with _process(["-m", "latchgate", "serve"], cores=cores, environment=environment, log=log) as process:
        answer = await _first_answer(process, port, next(iter(seeded.sample)), log)
        deadline_s = time.monotonic() + START_DEADLINE_S + workers
        while b"serving" not in log.read_bytes():
            if time.monotonic() > deadline_s:
                raise BenchError(f"{workers} workers do not start: {_last_line(log)}")
            await asyncio.sleep(0.1)
        yield Fleet(
            name=f"{workers} {'worker' if workers == 1 else 'workers'}",
            pid=process.pid,
            port=port,
            answer=answer,
            workers=workers,
            metrics_port=metrics_port,
            seeded=seeded,
        )


def _environment(seeded: Seeded, port: int, metrics_port: int, *, workers: int) -> dict[str, str]:
    """Gives what a service needs beside its defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LATCHGATE_")} | {
        "LATCHGATE_DATABASE_URL": seeded.url,
        "LATCHGATE_LISTEN": f"127.0.0.1:{port}",
        "LATCHGATE_METRICS_LISTEN": f"127.0.0.1:{metrics_port}",
        "LATCHGATE_TAG_KEY": TAG_KEY,
        "LATCHGATE_ROOT_TOKEN": ROOT_TOKEN,
        "LATCHGATE_DRAIN_SECONDS": "1",
        "LATCHGATE_WORKERS": str(workers),
    }


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@asynccontextmanager
async def _process(
    arguments: list[str], *, cores: Sequence[int], environment: Mapping[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs Python on some cores, in a session of its own, so that a Ctrl-C is ours to pass on."""
    with log.open("wb") as output, pinned(cores):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env=environment,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        await asyncio.shield(end(process))


async def end(process: asyncio.subprocess.Process) -> None:
    """Ends a process that was started: asks it to, and kills it if it does not within STOP_DEADLINE_S."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_DEADLINE_S)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _first_answer(process: asyncio.subprocess.Process, port: int, token: str, log: Path) -> pb.ValidateResponse:
    """Waits until the server answers Validate, or has ended, or START_DEADLINE_S have passed."""
    ended = asyncio.create_task(process.wait())
    asked = asyncio.create_task(_ask_until_answered(port, token))
    try:
        await asyncio.wait({ended, asked}, timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not asked.cancelled():
            return asked.result()
    finally:
        ended.cancel()
        asked.cancel()
    raise BenchError(f"{log.stem} does not start: {_last_line(log)}")


def _last_line(log: Path) -> str:
    return log.read_text().strip().rpartition("\n")[2] or "it says nothing"


async def _ask_until_answered(port: int, token: str) -> pb.ValidateResponse:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        while True:
            try:
                return await _ask(channel, token)
            except grpc.aio.AioRpcError as error:
                # It listens before its database is prepared.
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.1)
