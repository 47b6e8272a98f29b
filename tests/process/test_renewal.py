"""Workers are replaced while clients are at work: a matter of moments, and so of what else the machine does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from aiohttp import ClientError, ClientSession

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from latchgate.workers.supervisor import RECONNECT_S
from support.databases import until
from support.faults import NOT_SERVING, SERVING, health_changes
from support.fleets import DEADLINE_S, OWN_CONNECTION, Fleet, Samples, clients, fleet, gone_back, total, value
from support.processes import until_gone

WORKERS = (1, 2)
CLIENTS = 6
GATEWAYS = 4
"""Clients that do not wait for an answer before they ask again."""
ANSWERS = 40 * (CLIENTS + GATEWAYS)
CONNECTIONS = 20
NEVER_S = 3600


async def ask(stub: Any) -> None:
    """Asks Validate once."""
    await stub.Validate(keys_pb.ValidateRequest(token="no token"))


async def ask_anew(service: Fleet) -> None:
    """Asks on a connection of its own, and demands an answer in time."""
    async with grpc.aio.insecure_channel(service.address, options=OWN_CONNECTION) as channel:
        await asyncio.wait_for(ask(KeyServiceStub(channel)), DEADLINE_S)


async def test_workers_are_renewed(database_url: str, tmp_path: Path) -> None:
    """At SIGHUP every worker is replaced, and no call fails of clients that move to another connection when they are
    told to, whatever they have under way. No counter goes back meanwhile, and in the end the figures are all there.
    """
    async with fleet(database_url, tmp_path) as service:
        start = await service.counters()
        async with clients(service.address, waiting=CLIENTS, sending=GATEWAYS) as load:
            await load.until_answered(ANSWERS)
            seen: list[Samples] = [await service.counters()]
            service.process.tell(signal.SIGHUP)

            async def scraped_until_renewed() -> bool:
                seen.append(await service.counters())
                return bool(service.events("workers_renewed"))

            await until(scraped_until_renewed, DEADLINE_S)
            await load.until_answered(ANSWERS)
        assert {} == load.failed
        end = await service.counters()
        assert [] == [
            went for before, after in zip(seen, [*seen[1:], end], strict=True) if (went := gone_back(before, after))
        ]
        assert load.answered == total(end, "latchgate_calls_total") - total(start, "latchgate_calls_total")
        assert 0 == value(end, "latchgate_worker_deaths_total")
        assert [2, 2] == [len(set(service.pids(worker))) for worker in WORKERS]
        for worker in WORKERS:
            await until_gone(service.pids(worker)[0])
        await service.stop()


async def test_gateways_over_http_lose_nothing(database_url: str, tmp_path: Path) -> None:
    """Clients that keep their connections over HTTP open are told with an answer to make new ones, and lose none."""
    async with fleet(database_url, tmp_path, HTTP_LISTEN="127.0.0.1:0") as service:
        listen = (await service.process.event("serving"))["http"]
        is_over, answers = asyncio.Event(), Counter[int | str]()

        async def keep_asking() -> None:
            async with ClientSession() as http:
                while not is_over.is_set():
                    try:
                        # Not GET, which this client would repeat by itself.
                        async with http.post(f"http://{listen}/auth") as answer:
                            answers[answer.status] += 1
                    except ClientError as error:
                        answers[type(error).__name__] += 1

        asking = [asyncio.create_task(keep_asking()) for _ in range(CLIENTS)]
        await until(lambda: _have(answers, ANSWERS))
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_renewed")
        so_far = answers.total()
        await until(lambda: _have(answers, so_far + ANSWERS))
        is_over.set()
        await asyncio.gather(*asking)
    assert {401} == set(answers)


async def test_idle_connection_over_http_is_not_cut(database_url: str, tmp_path: Path) -> None:
    """A gateway that keeps a connection which it does not use at the moment may use it for as long as it always may."""
    async with fleet(database_url, tmp_path, WORKERS=1, HTTP_LISTEN="127.0.0.1:0") as service:
        host, _, port = (await service.process.event("serving"))["http"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))

        async def answer() -> bytes:
            writer.write(b"POST /auth HTTP/1.1\r\nHost: gate\r\nContent-Length: 0\r\n\r\n")
            return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)

        first = await answer()
        await reader.readexactly(int(first.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
        service.process.tell(signal.SIGHUP)
        await service.until_event("retiring", connections=1)
        # Longer than connections of gRPC last here.
        await asyncio.sleep(RECONNECT_S + 3)
        second = await answer()
        writer.close()
        await service.until_event("workers_renewed")
    assert [True, True] == [each.startswith(b"HTTP/1.1 401 ") for each in (first, second)]
    assert [False, True] == [b"connection: close" in each.lower() for each in (first, second)]


async def _have(answers: Counter[int | str], count: int) -> bool:
    return answers.total() >= count


async def test_retiring_worker_keeps_its_connections(database_url: str, tmp_path: Path) -> None:
    """New connections go to the successor; who is connected to the worker before is answered by it as long as he is.

    Should it die meanwhile, its clients lose calls: that is told like any death. Nobody has to take its place.
    """
    async with (
        fleet(database_url, tmp_path, WORKERS=1, CONNECTION_AGE_SECONDS=NEVER_S) as service,
        grpc.aio.insecure_channel(service.address, options=OWN_CONNECTION) as channel,
    ):
        stub: Any = KeyServiceStub(channel)
        await ask(stub)
        (old,) = service.pids(1)
        service.process.tell(signal.SIGHUP)
        await service.until_event("retiring", connections=1)
        assert 1 == value(await service.metrics(), "latchgate_workers", state="leaving")
        os.kill(old, signal.SIGSTOP)
        try:
            await asyncio.gather(*(ask_anew(service) for _ in range(CONNECTIONS)))
        finally:
            os.kill(old, signal.SIGCONT)
        await ask(stub)
        assert [] == service.events("workers_renewed")

        os.kill(old, signal.SIGKILL)
        await service.until_event("workers_renewed")
        await ask_anew(service)
        assert 1 == value(await service.metrics(), "latchgate_worker_deaths_total")
        assert ["SIGKILL"] == [event["how"] for event in service.events("worker_ended", pid=old)]
        assert 2 == len(service.pids(1))
        await service.stop()


async def test_stop_does_not_wait_for_connections(database_url: str, tmp_path: Path) -> None:
    """A service that is told to stop stops, though a worker waits for its connections to end."""
    async with (
        fleet(database_url, tmp_path, WORKERS=1, CONNECTION_AGE_SECONDS=NEVER_S) as service,
        grpc.aio.insecure_channel(service.address, options=OWN_CONNECTION) as channel,
    ):
        await ask(KeyServiceStub(channel))
        service.process.tell(signal.SIGHUP)
        await service.until_event("retiring", connections=1)
        await service.stop()


async def test_worker_goes_when_its_time_is_over(database_url: str, tmp_path: Path) -> None:
    """A connection on which a call does not end does not keep a worker for ever."""
    async with (
        fleet(database_url, tmp_path, WORKERS=1) as service,
        health_changes(service.address) as health,
    ):
        assert SERVING == await health.get()
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_renewed")
        assert NOT_SERVING == await health.get()
        assert health.empty()
        await service.stop()
