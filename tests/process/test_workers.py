"""Several workers serve one port: calls and figures are those of one service, whoever of them comes or goes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import trustme
from aiohttp import ClientSession, TCPConnector

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from latchgate.storage.postgres import Connection
from latchgate.storage.queries import MIGRATION_LOCK
from support.databases import connected, until
from support.fleets import DEADLINE_S, OWN_CONNECTION, Fleet, fleet, gone_back, total, value
from support.processes import SERVE, environment, is_running, latchgate, postmaster, run_latchgate, until_gone

WORKERS = (1, 2)
UNKNOWN = "no token"
CONNECTIONS = 40
"""So many that they do not all land on the same of two workers, but once in a million of millions of times."""


async def ask(address: str, token: str = UNKNOWN) -> None:
    """Asks Validate once, on a connection of its own, after waiting for one if need be."""
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        stub: Any = KeyServiceStub(channel)
        await stub.Validate(keys_pb.ValidateRequest(token=token), wait_for_ready=True, timeout=30)


async def is_waiting_for_advisory_lock(connection: Connection) -> bool:
    """Says whether a worker waits to bring the schema up to date."""
    waiting: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'advisory')"
    )
    return waiting


async def is_waiting_for_lock(connection: Connection) -> bool:
    """Says whether somebody waits until the table of secrets can be read."""
    waiting: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'secret'::regclass)"
    )
    return waiting


async def test_workers_share_the_port_for_gateways(database_url: str, tmp_path: Path) -> None:
    """Gateways that ask over HTTP reach all workers by one port, which nobody else can have."""
    async with fleet(database_url, tmp_path, HTTP_LISTEN="127.0.0.1:0", LOG_LEVEL="info") as service:
        listen = (await service.process.event("serving"))["http"]

        async def ask_over_http() -> int:
            connector = TCPConnector(force_close=True)
            async with ClientSession(connector=connector) as http, http.get(f"http://{listen}/auth") as answer:
                return answer.status

        async def all_have_some() -> bool:
            assert {401} == set(await asyncio.gather(*(ask_over_http() for _ in range(CONNECTIONS))))
            metrics = await service.metrics()
            return all(value(metrics, "latchgate_worker_calls_total", worker=str(worker)) for worker in WORKERS)

        await until(all_have_some)
        status, _, complaint = await run_latchgate(
            "serve", tmp_path, environment(**(dict(SERVE) | {"DATABASE_URL": database_url, "HTTP_LISTEN": listen}))
        )
        assert (1, True) == (status, "LATCHGATE_HTTP_LISTEN" in complaint[-1])
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_renewed")
        assert 401 == await ask_over_http()


async def test_workers_share_the_port(database_url: str, tmp_path: Path) -> None:
    """Connections are spread over all workers; the figures add up to those of one service.

    Those of processes and gauges are shown by worker, and nothing that is counted is counted twice.
    """
    async with fleet(database_url, tmp_path) as service:
        before = await service.metrics()
        await asyncio.gather(*(ask(service.address) for _ in range(CONNECTIONS)))
        after = await service.metrics()

        by_worker = [value(after, "latchgate_worker_calls_total", worker=str(worker)) for worker in WORKERS]
        assert all(by_worker), by_worker
        assert CONNECTIONS == sum(by_worker) - total(before, "latchgate_worker_calls_total")
        for name in ("latchgate_calls_total", "latchgate_call_seconds_count", "latchgate_outcomes_total"):
            assert CONNECTIONS == total(after, name) - total(before, name), name
        for name in ("latchgate_database_up", "process_resident_memory_bytes", "process_open_fds"):
            assert all(value(after, name, worker=str(worker)) > 0 for worker in WORKERS), name
        assert value(after, "process_resident_memory_bytes", worker="supervisor") > 0
        assert 2 == value(after, "latchgate_workers", state="ready")
        assert value(after, "latchgate_last_used_pending") >= 0
        assert 2 == len({*service.pids(1), *service.pids(2)})
        await service.stop()


async def test_worker_that_dies_is_replaced(database_url: str, tmp_path: Path) -> None:
    """A worker that is killed is replaced at once, and the log says how it ended; calls go on; no counter goes back."""
    async with fleet(database_url, tmp_path) as service:
        await asyncio.gather(*(ask(service.address) for _ in range(CONNECTIONS)))
        before = await service.counters()
        (killed,) = service.pids(1)
        os.kill(killed, signal.SIGKILL)
        await until_gone(killed)
        await asyncio.gather(*(ask(service.address) for _ in range(CONNECTIONS)))
        assert killed != await service.until_ready(1, 2)
        assert ["SIGKILL"] == [event["how"] for event in service.events("worker_ended", pid=killed)]

        await asyncio.gather(*(ask(service.address) for _ in range(CONNECTIONS)))
        after = await service.counters()
        assert {} == gone_back(before, after)
        assert total(before, "latchgate_calls_total") + CONNECTIONS <= total(after, "latchgate_calls_total")
        assert 1 == value(after, "latchgate_worker_deaths_total")
        assert 1 == len(service.pids(2))
        await service.stop()


async def test_successor_takes_no_calls_before_it_is_ready(database_url: str, tmp_path: Path) -> None:
    """While a successor waits for its database, connections go to those who serve: no call is answered by it."""
    async with (
        fleet(database_url, tmp_path) as service,
        connected(database_url) as connection,
        connection.transaction(),
    ):
        (killed,) = service.pids(1)
        await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        os.kill(killed, signal.SIGKILL)
        await service.until_event("worker_ended", pid=killed)
        await until(lambda: is_waiting_for_advisory_lock(connection), DEADLINE_S)
        await asyncio.gather(*(ask(service.address) for _ in range(CONNECTIONS)))
        assert 1 == len(service.pids(1))


async def test_workers_that_die_again_and_again(database_url: str, tmp_path: Path) -> None:
    """Where a worker dies again and again soon after its start, the service ends, with one line that says so."""
    async with fleet(database_url, tmp_path) as service:
        for count in range(1, 6):
            os.kill(await service.until_ready(1, count), signal.SIGKILL)
        (other,) = service.pids(2)
        assert 1 == await service.process.ended()
    assert not is_running(other)
    complaints = [line for line in service.process.err if not line.startswith("{")]
    assert 1 == len(complaints), complaints
    assert complaints[0].startswith("latchgate: worker 1 ended 5 times within 60 s")
    assert "SIGKILL" in complaints[0]


async def test_renewal_that_fails(database_url: str, tmp_path: Path) -> None:
    """When the new workers do not start, at SIGHUP, those that are there go on, and the log says why."""
    scopes = tmp_path / "scopes.toml"
    scopes.write_text('[scopes]\n"orders:read" = "Read orders."\n')
    async with fleet(database_url, tmp_path, SCOPES_FILE=scopes) as service:
        scopes.write_text("")
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_not_renewed")
        await service.until_event("worker_ended")
        assert "LATCHGATE_SCOPES_FILE" in service.events("worker_ended")[0]["problem"]
        await ask(service.address)
        assert all(is_running(service.pids(worker)[0]) for worker in WORKERS)
        scopes.write_text('[scopes]\n"orders:write" = "Write orders."\n')
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_renewed")
        await service.stop()


async def test_supervisor_is_killed(database_url: str, tmp_path: Path) -> None:
    """When the supervisor is killed, its workers stop by themselves, in good order: what is under way is finished."""
    async with (
        fleet(database_url, tmp_path) as service,
        connected(database_url) as connection,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        pids = [service.pids(worker)[0] for worker in WORKERS]
        stub: Any = KeyServiceStub(channel)
        await stub.Validate(keys_pb.ValidateRequest(token="another-systems-token"))
        async with connection.transaction():
            await connection.execute("LOCK secret IN ACCESS EXCLUSIVE MODE")
            under_way = asyncio.ensure_future(stub.Validate(keys_pb.ValidateRequest(token="yet-another-systems-token")))
            await until(lambda: is_waiting_for_lock(connection))
            service.process.tell(signal.SIGKILL)
        assert keys_pb.OUTCOME_NOT_FOUND == (await under_way).outcome
        for pid in pids:
            await until_gone(pid)
        assert [] == service.events("worker_killed")


async def test_second_signal_ends_all(database_url: str, tmp_path: Path) -> None:
    """The second signal ends the workers at once as well, also such as do not heed their supervisor any more."""
    async with fleet(database_url, tmp_path, DRAIN_SECONDS=3600) as service:
        pids = [service.pids(worker)[0] for worker in WORKERS]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            service.process.tell(signal.SIGTERM)
            await service.process.event("stopping")
            service.process.tell(signal.SIGTERM)
            assert 1 == await service.process.ended()
            for pid in pids:
                await until_gone(pid)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


async def test_worker_that_hangs(database_url: str, tmp_path: Path) -> None:
    """A worker that does nothing any more neither keeps the figures of all from being read, nor the service from
    stopping.
    """
    async with fleet(database_url, tmp_path, DRAIN_SECONDS=0) as service:
        await ask(service.address)
        before = await service.counters()
        os.kill(service.pids(1)[0], signal.SIGSTOP)
        assert {} == gone_back(before, await service.counters())
        service.process.tell(signal.SIGTERM)
        assert 0 == await service.process.ended()
        assert [1] == [event["worker"] for event in service.events("worker_killed")]


async def test_health_behind_tls(database_url: str, tmp_path: Path) -> None:
    """`health` of a port that speaks TLS finds in the metrics of several workers that they serve."""
    authority = trustme.CA()
    issued = authority.issue_cert("gate.example.com")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    tls = {"TLS_CERT": tmp_path / "cert.pem", "TLS_KEY": tmp_path / "key.pem"}
    async with fleet(database_url, tmp_path, **tls) as service:
        variables = environment(LISTEN=service.address, METRICS_LISTEN=service.metrics_address, **tls)
        assert (0, [], []) == await run_latchgate("health", tmp_path, variables)
        await service.stop()


async def test_embedded_database_outlives_the_workers(folder: Path) -> None:
    """The embedded PostgreSQL is started once, for all workers and their successors, and is stopped after them."""
    variables = environment(**(dict(SERVE) | {"USAGE_FLUSH_SECONDS": "3600"}))
    async with latchgate("serve", folder, variables) as process:
        serving = await process.event("serving")
        service = Fleet(process=process, address=serving["listen"], metrics_address=serving["metrics"])
        database = postmaster(folder / ".latchgate")
        await ask(service.address)
        service.process.tell(signal.SIGHUP)
        await service.until_event("workers_renewed")
        assert database == postmaster(folder / ".latchgate")
        # The root token's use is written by a worker that stops, so the database is there until it has.
        token = (await process.line(r"^lk_[0-9A-Za-z]{40}$"))[0]
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub: Any = KeyServiceStub(channel)
            await stub.Validate(keys_pb.ValidateRequest(token=token))
        await service.stop()
        assert [] == service.events("usage_lost")
        assert not is_running(database)


async def test_taken_port(database_url: str, tmp_path: Path) -> None:
    """A second service on the port is told that it is taken, though the first shares it among its own workers."""
    async with fleet(database_url, tmp_path) as service:
        variables = environment(**(dict(SERVE) | {"LISTEN": service.address, "DATABASE_URL": database_url}))
        status, out, err = await run_latchgate("serve", tmp_path, variables)
        assert (1, [], 1) == (status, out, len(err)), err
        assert err[0].startswith(f"latchgate: LATCHGATE_LISTEN: {service.address} can not be listened on")
        await service.stop()


async def test_supervisor_is_without_grpc() -> None:
    """Who only supervises workers has not loaded what it takes to be one: it can start others safely, and is small."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys, latchgate.commands; print(*sorted({'grpc', 'alembic', 'sqlalchemy'} & set(sys.modules)))",
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert b"" == out.strip()


async def test_worker_is_not_started_by_hand(tmp_path: Path) -> None:
    """Who starts a worker by hand is told how it is done."""
    status, out, err = await run_latchgate("worker 1 worker", tmp_path, environment())
    assert (1, []) == (status, out)
    assert ["latchgate: a worker is started by `latchgate serve`, not by hand"] == err
