"""The benchmarks of workers, floods and memory in their smallest form, and what they make of their figures."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from apikeys.v1 import key_service_pb2 as pb
from bench import flood_page, memory, tokens, workers_page
from bench.database import TAG_KEY
from bench.flood import check_counts
from bench.flood_page import Flood, Plan
from bench.load import Burst
from bench.machine import BenchError, Layout
from bench.memory import Held
from bench.settings import GROUPS, VALIDATES
from bench.tokens import Kind
from bench.workers_page import Cores
from latchgate.domain.token import Form, TokenFormat

BENCH = Path(__file__).parent
FRAME_BYTES = 5
BURST = Burst(per_s=100.0, p50_ms=1.0, p99_ms=2.0, started=104, succeeded=100, failed=0, data_bytes=0, bodies=52)

needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None,
    reason="h2load is not installed (Debian, Ubuntu: apt-get install nghttp2-client)",
)
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="the benchmark needs two cores")


def _page(name: str, postgres_url: str, folder: Path, *arguments: str) -> str:
    """Runs a benchmark, demands that it ends well, and gives its page in one line."""
    output = folder / "page.md"
    with subprocess.Popen(
        [sys.executable, str(BENCH / name), *arguments, "--output", str(output)],
        env={"PATH": os.environ["PATH"], "LATCHGATE_DATABASE_URL": postgres_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said, complaints = process.communicate(timeout=110)
        finally:
            process.kill()
    assert ("", 0) == (complaints, process.returncode), said
    return " ".join(output.read_text().split())


@pytest.mark.bench
@needs_h2load
@needs_two_cores
def test_workers_are_compared(postgres_url: str, tmp_path: Path) -> None:
    """One worker, two, and two services take turns, and the page has a row for each, what is wanted, and whose cores
    they were.
    """
    page = _page(
        "workers.py", postgres_url, tmp_path, "--rounds", "1", "--seconds", "2", "--connections", "3", "--streams", "2"
    )

    for name in ("1 worker", "2 workers", "2 services"):
        assert f"| {name} | " in page
    assert "each with 3 connections, 2 calls at a time over each of those (24 in all)" in page
    assert "Calls a second of two workers over one: " in page
    assert ("The load had no core of its own" in page) == (len(os.sched_getaffinity(0)) == 2)


@pytest.mark.bench
@needs_h2load
@needs_two_cores
def test_settings_are_compared(postgres_url: str, tmp_path: Path) -> None:
    """Validate and every setting are compared with a no-op beside them, and the page has a row for each."""
    page = _page("settings.py", postgres_url, tmp_path, "--rounds", "1", "--seconds", "1", "--note", "Others ran.")

    for name in (*VALIDATES, *(setting.name for group in GROUPS for setting in group)):
        assert f"| {name} | " in page
    for name in VALIDATES:
        assert f"{name}: " in page
    assert "Others ran." in page


@pytest.mark.bench
@needs_h2load
@needs_two_cores
def test_floods_are_measured(postgres_url: str, tmp_path: Path) -> None:
    """Floods of both kinds are compared with quiet, no good key is refused, and wrong tags cost no lookup."""
    page = _page("flood.py", postgres_url, tmp_path, "--rounds", "1", "--seconds", "1", "--flood", "2", "--good", "4")

    for kind in Kind:
        assert f"| {kind.value}, 2 connections | " in page
        assert f"p99 of good keys amid {kind.value}, 2 connections, over quiet: " in page
    assert "none was refused" in page
    assert "Lookups amid tokens of our form with a wrong tag, 2 connections: 0 a second; allowed: none: kept." in page


@pytest.mark.bench
def test_memory_is_measured(postgres_url: str, tmp_path: Path) -> None:
    """Workers with different numbers of keys are measured, and the page says what a key takes."""
    page = _page("memory.py", postgres_url, tmp_path, "--keys", "100,2000")

    for kind in memory.Kind:
        assert f"| 100 | {kind.value} | " in page
        assert f"| 2,000 | {kind.value} | " in page
        assert f"A key in memory {kind.value} takes " in page


def test_slope_of_memory_is_that_of_a_key() -> None:
    """What a worker takes with any number of keys is not counted as theirs."""
    held = [
        Held(kind=kind, keys=keys, empty_bytes=1e8, rss_bytes=1.5e8 + each * keys)
        for kind, each in zip(memory.Kind, (900, 700), strict=True)
        for keys in (1000, 100_000)
    ]

    assert [pytest.approx(900), pytest.approx(700)] == [memory.bytes_a_key(held, kind) for kind in memory.Kind]
    assert memory.bytes_a_key(held[:1], memory.Kind.LIMITED) is None


@pytest.mark.parametrize("kind", Kind)
def test_made_up_tokens_are_what_they_are_called(kind: Kind) -> None:
    """Each body is another request, as long as those before it, with a token of the kind that the flood is named by."""
    form = {Kind.WRONG_TAG: Form.IMPOSSIBLE, Kind.FOREIGN: Form.FOREIGN}[kind]
    format_ = TokenFormat(TAG_KEY.encode())
    for feed in tokens.feeds(kind, 4, random.Random(1)):  # noqa: S311 - an example
        bodies = {feed() for _ in range(50)}
        requests = [pb.ValidateRequest.FromString(body[FRAME_BYTES:]) for body in bodies]
        assert 50 == len(bodies)
        assert 1 == len({len(body) for body in bodies})
        assert {form} == {format_.recognise(request.token) for request in requests}
        assert {"203.0.113.7"} == {request.client_ip for request in requests}


def test_foreign_tokens_are_of_all_lengths() -> None:
    """The shortest and the longest that may be looked up are among them."""
    bodies = [feed() for feed in tokens.feeds(Kind.FOREIGN, 3, random.Random(1))]  # noqa: S311 - an example
    lengths = [len(pb.ValidateRequest.FromString(body[FRAME_BYTES:]).token) for body in bodies]

    assert [16, 264, 512] == lengths


@pytest.mark.parametrize(
    ("outcomes", "refused"),
    [
        ({"VALID": 99, "NOT_FOUND": 100}, 0),
        ({"VALID": 100, "NOT_FOUND": 99}, 0),
        ({"VALID": 100, "NOT_FOUND": 100}, 5),
        ({"VALID": 100, "NOT_FOUND": 99, "REVOKED": 1}, 0),
        ({}, 0),
    ],
)
def test_a_flood_that_is_not_counted_as_such_is_refused(outcomes: dict[str, float], refused: float) -> None:
    """A turn in which a good call may have been refused, or one of the flood was not, is no measurement."""
    with pytest.raises(BenchError, match="the service counted"):
        check_counts(BURST, BURST, outcomes, refused)


def test_an_agreeing_flood_is_taken() -> None:
    """The good calls are VALID and those of the flood NOT_FOUND or refused; a quiet turn has no others."""
    check_counts(BURST, BURST, {"VALID": 104, "NOT_FOUND": 40}, 60)
    check_counts(BURST, None, {"VALID": 100}, 0)


def _turn(flood: Flood | None, p99_ms: float, digests: float, quiet: list[flood_page.Turn]) -> flood_page.Turn:
    return flood_page.Turn(
        flood=flood,
        good=replace(BURST, p99_ms=p99_ms),
        flooded=BURST if flood else None,
        lasted_s=4.0,
        statements=digests,
        digests=digests,
        over_budget=0,
        refused=0,
        server_cpu_s=2.0,
        quiet=quiet,
    )


@pytest.mark.parametrize(
    ("kind", "digests", "verdict"),
    [
        (Kind.WRONG_TAG, 0, "kept"),
        (Kind.WRONG_TAG, 1, "exceeded"),
        (Kind.FOREIGN, 2500, "kept"),
        (Kind.FOREIGN, 2501, "exceeded"),
    ],
)
def test_lookups_are_held_against_the_budget(kind: Kind, digests: float, verdict: str) -> None:
    """Wrong tags may cost no lookup, foreign tokens as many as the budget has for the time and at its beginning."""
    flood = Flood(kind=kind, connections=8)
    quiet = [_turn(None, 1.0, 0, []), _turn(None, 2.0, 0, [])]
    plan = Plan(floods=[flood], good=4, each_per_s=50, rounds=1, seconds=3.0, seed=1)
    layout = Layout.share_out({0, 1})
    results = flood_page.Results(plan=plan, layout=layout, turns=[_turn(flood, 3.0, digests, quiet)])

    said = " ".join(flood_page.findings(results))

    assert verdict in said
    # 3 over the mean of 1 and 2.
    assert "over quiet: 2.00; wanted at most 2.0: reached" in said
    assert pytest.approx(2.0) == results.turns[0].tokens_sent_again


@pytest.mark.parametrize(
    ("available", "cores", "is_load_alone"),
    [
        ({0, 1}, Cores(few=(1,), many=(0, 1), load=(0, 1), total=2), False),
        ({0, 1, 2}, Cores(few=(2,), many=(1, 2), load=(0,), total=3), True),
        ({0, 1, 2, 3}, Cores(few=(3,), many=(2, 3), load=(0, 1), total=4), True),
    ],
)
def test_each_worker_has_a_core(available: set[int], cores: Cores, *, is_load_alone: bool) -> None:
    """Workers have a core each and the load what is left; where nothing is, it shares theirs, and that is known."""
    shared = Cores.share_out(available)

    assert cores == shared
    assert is_load_alone == shared.is_load_alone


def _workers_turns(**per_s: float) -> list[workers_page.Turn]:
    """Gives a turn of one worker, of two, and of two services."""
    names = {"one": workers_page.ONE, "two": workers_page.TWO, "apart": workers_page.APART}
    return [
        workers_page.Turn(
            contender=name,
            round=1,
            burst=replace(BURST, per_s=per_s[short]),
            lasted_s=1.0,
            load_cpu_s=0.25,
            stolen_s=0.0,
            cpu_s=1.1 if short == "two" else 1.0,
            calls=[10000.0] if short == "one" else [5000.0] * 2,
        )
        for short, name in names.items()
    ]


WIDTH = workers_page.Width(connections=8, streams=2)


@pytest.mark.parametrize(("per_s", "verdict"), [(13_500.0, "0.90; wanted at least 0.85: reached"), (12_000.0, "0.80;")])
def test_what_two_cores_can_not_show_is_said(per_s: float, verdict: str) -> None:
    """Where the load shares a core with a worker, the page says so, and compares with two services, which share
    nothing: what they do is the most that can be done on that machine.
    """
    turns = _workers_turns(one=10_000.0, two=per_s, apart=15_000.0)
    results = workers_page.Results(cores=Cores.share_out({0, 1}), turns=turns, width=WIDTH, seconds=1.0)

    said = " ".join(workers_page.findings(results))

    assert f"over one: {per_s / 10_000.0:.2f}; wanted at least 1.7: not reached" in said
    assert f"which share nothing but the machine: {verdict}" in said
    assert "1.10 with two workers, 1.00 with two services" in said
    assert "know nothing of each other: 1.50 times the calls of one" in said


def test_a_load_with_cores_of_its_own_is_said() -> None:
    """Where there are cores enough, nothing is taken off the figures."""
    turns = _workers_turns(one=10_000.0, two=18_000.0, apart=20_000.0)
    results = workers_page.Results(cores=Cores.share_out(range(4)), turns=turns, width=WIDTH, seconds=1.0)

    said = " ".join(workers_page.findings(results))

    assert "over one: 1.80; wanted at least 1.7: reached" in said
    assert "The load had cores of its own" in said
    assert "on cores 0 and 1, each with 8 connections" in " ".join(workers_page.write(results).split())
