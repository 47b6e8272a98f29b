"""The work beside the calls: it survives what can be survived, says so, and is never gone without a word."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
import structlog
from prometheus_client import CollectorRegistry

from latchgate.background import Background, BackgroundError
from latchgate.domain.cache import KeyCache
from latchgate.domain.coherence import Coherence, LeaseTerms
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.model import Lookup
from latchgate.observability import Metrics, configure_logging
from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import make_server
from latchgate.storage.lookups import BatchingKeyReader
from latchgate.storage.probe import DatabaseProbe
from latchgate.watch import DatabaseWatch
from support.databases import connected, until, until_waiting
from support.faults import NOT_SERVING, SERVING, health_changes
from support.records import ManualClock
from support.service import RunningService, run_service

SECRET = "a-row's-content"
PAUSE_S = 0.001


@pytest_asyncio.fixture
async def background() -> AsyncIterator[Background]:
    """Work beside nothing."""
    made = Background()
    yield made
    await asyncio.wait_for(made.close(), 10)


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """What is logged, one JSON object a line."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    configure_logging(level="info", as_json=True)
    yield capsys
    root.handlers[:] = handlers
    structlog.reset_defaults()


def events(log: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """Reads what was logged since the last time."""
    return [json.loads(line) for line in log.readouterr().err.splitlines()]


async def test_fault_does_not_end_repeated_work(background: Background, log: pytest.CaptureFixture[str]) -> None:
    """Work that fails with an error that nobody expected is done again; each failure is counted, and logged as such.

    The log says what and where, and not the error's text.
    """
    done = asyncio.Event()
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1
        if times <= 2:
            raise KeyError(SECRET)
        done.set()

    background.repeat("work", PAUSE_S, work)
    await asyncio.wait_for(done.wait(), 10)

    assert 2 == background.failures["work"]
    logged = events(log)
    assert [("work_failed", "error", "work", "KeyError")] * 2 == [
        (each["event"], each["level"], each["work"], each["error"]) for each in logged
    ]
    assert "test_background.py" in str(logged[0]["where"])
    assert SECRET not in str(logged)


async def test_outage_is_told_once(background: Background, log: pytest.CaptureFixture[str]) -> None:
    """Work that the database is away for is put off, told once however long it takes, and told when it goes on."""
    done = asyncio.Event()
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1
        if times <= 5:
            raise StorageUnavailableError("the database is not available")
        if times == 7:
            done.set()

    background.repeat("work", PAUSE_S, work)
    await asyncio.wait_for(done.wait(), 10)

    assert ["work_put_off", "work_resumed"] == [each["event"] for each in events(log)]
    assert not background.failures


async def test_chance_spreads_what_is_repeated(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two times lies as much of the interval as chance gives: from three quarters of it to all of it."""
    asked: list[tuple[float, float]] = []
    chances = iter([0.0, 0.0, 1.0])

    def chance(least: float, most: float) -> float:
        asked.append((least, most))
        return next(chances)

    monkeypatch.setattr("latchgate.background.random.uniform", chance)
    times = 0
    done = asyncio.Event()

    async def work() -> None:
        nonlocal times
        times += 1
        if times == 2:
            done.set()

    background.repeat("work", 3600.0, work)
    await asyncio.wait_for(done.wait(), 10)
    for _ in range(10):
        await asyncio.sleep(PAUSE_S)

    assert 2 == times
    assert [(0.75, 1)] * 3 == asked


async def test_stop_finishes_what_is_under_way(background: Background) -> None:
    """Repeated work that is under way at the stop is finished, not broken off; and then it is not done again."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    finished = 0

    async def work() -> None:
        nonlocal finished
        begun.set()
        await go_on.wait()
        finished += 1

    background.repeat("work", PAUSE_S, work)
    await asyncio.wait_for(begun.wait(), 10)
    closing = asyncio.create_task(background.close())
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait_for(closing, 10)
    assert 1 == finished


@pytest.mark.parametrize("fault", [None, ValueError(SECRET)])
async def test_end_of_lasting_work_is_death(
    background: Background, log: pytest.CaptureFixture[str], fault: Exception | None
) -> None:
    """Work that should last as long as the service ends it when it ends, and the reason names it and no contents."""

    async def work() -> None:
        if fault is not None:
            raise fault

    background.keep("the thing", work())
    with pytest.raises(BackgroundError, match="the thing") as death:
        await asyncio.wait_for(background.death(), 10)
    assert SECRET not in str(death.value)
    assert ([] if fault is None else ["work_failed"]) == [each["event"] for each in events(log)]


async def test_end_at_the_stop_is_no_death(background: Background) -> None:
    """Work that ends because the service stops is no reason to complain."""
    end = asyncio.Event()
    background.keep("the thing", end.wait())
    background.stop()
    end.set()
    await background.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(background.death(), 0.01)


async def test_server_gone(service: RunningService) -> None:
    """A gRPC server that ends by itself does not leave a process behind that listens no more."""
    await service.running.server.servers[-1].stop(None)
    with pytest.raises(BackgroundError, match="gRPC server"):
        await asyncio.wait_for(service.running.background.death(), 10)


class _BrokenProbe(DatabaseProbe):
    """Fails in a way that no database can be made to."""

    async def is_writable(self) -> bool:
        raise RuntimeError(SECRET)


async def _find_nothing(digests: Sequence[bytes]) -> Mapping[bytes, Lookup]:
    return dict.fromkeys(digests, Lookup(None, 0.0, 0))


async def test_probe_fault_is_not_serving(background: Background, log: pytest.CaptureFixture[str]) -> None:
    """A health watch that fails itself says NOT_SERVING: it does not know better."""
    metrics = Metrics(CollectorRegistry())
    server = make_server(pipeline=Pipeline(metrics, is_validate_open=True), connection_age_s=60)
    coherence = Coherence(terms=LeaseTerms(length_s=1), cache=KeyCache(1), boottime=ManualClock())
    reader = BatchingKeyReader(_find_nothing, observer=metrics, monotonic=ManualClock())
    watch = DatabaseWatch(_BrokenProbe("postgresql://", 1.0), server, metrics, background, coherence, reader)
    await watch.show(is_up=True)
    await watch.look()
    assert 0.0 == metrics.registry.get_sample_value("latchgate_database_up")
    assert ["work_failed", "database_away"] == [each["event"] for each in events(log)]
    assert 1 == background.failures["database watch"]
    await reader.close()


async def test_failing_flush_is_told_and_survived(database_url: str) -> None:
    """Usage that can not be written is an error in log and metrics, and written once they can be again."""
    async with run_service(database_url, usage_flush_seconds=0.02) as service, connected(database_url) as connection:
        await service.create_organization()
        created = await service.create_key()
        await connection.execute("ALTER TABLE last_used RENAME TO last_used_away")

        async def is_told() -> bool:
            # Once more each time: what a failed flush had taken is not its only chance.
            assert "VALID" == await service.outcome(created.token)
            failures = service.running.metrics.registry.get_sample_value(
                "latchgate_background_failures_total", {"work": "writing of usage"}
            )
            return (failures or 0) >= 1

        await until(is_told)
        await connection.execute("ALTER TABLE last_used_away RENAME TO last_used")

        async def is_written() -> bool:
            assert "VALID" == await service.outcome(created.token)
            return (await service.get_key(created.key.id)).HasField("last_used_time")

        await until(is_written)


async def test_flush_under_way_at_the_stop(database_url: str) -> None:
    """Last-used times whose writing is under way when the service is told to stop are written."""
    async with connected(database_url) as connection, AsyncExitStack() as stack:
        service = await stack.enter_async_context(run_service(database_url, usage_flush_seconds=0.02))
        await service.create_organization()
        created = await service.create_key()
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM last_used FOR UPDATE")
            assert "VALID" == await service.outcome(created.token)
            await until_waiting(connection)
            async with health_changes(service.address) as health:
                assert SERVING == await health.get()
                stopping = asyncio.create_task(stack.aclose())
                assert NOT_SERVING == await asyncio.wait_for(health.get(), 10)
        await stopping
        assert 1 == await connection.fetchval(
            "SELECT count(*) FROM last_used u JOIN secret s ON s.id = u.secret_id"
            " WHERE s.key_id = $1 AND u.used_time IS NOT NULL",
            created.key.id,
        )
