"""The benchmark of Validate and a no-op on the same server: what it counts, and in its smallest form as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine import BenchError
from bench.same_server import LEAD_S, PAIRS, Slice, check, ratios_of, read
from bench.test_bench_smoke import needs_h2load, needs_two_cores

RUN = Path(__file__).with_name("same_server.py")
SMALLEST = ("--rounds", "1", "--seconds", "5", "--in-use", "20,50", "--processes", "4")


def turns(pairs: int) -> list[Slice]:
    """Turns of 30 ms by Validate, and of 40 by the no-op."""
    return [
        Slice(is_own=is_own, begin_s=number + 0.1, end_s=number + (0.13 if is_own else 0.14))
        for number in range(pairs)
        for is_own in (True, False)
    ]


def test_calls_a_second_are_compared() -> None:
    """Of turns that differ in length, without what is not counted of each; what is left over makes no ratio."""
    slices = turns(2 * PAIRS + 1)
    counted = [9 if each.is_own else 20 for each in slices]
    per_s = 9 / (0.03 - LEAD_S), 20 / (0.04 - LEAD_S)
    assert [pytest.approx(per_s[0] / per_s[1])] * 2 == ratios_of(slices, counted)
    with pytest.raises(BenchError, match="turns only"):
        ratios_of(slices[: 2 * PAIRS - 1], counted[: 2 * PAIRS - 1])
    with pytest.raises(BenchError, match="nothing"):
        ratios_of(slices, [9 if each.is_own else 0 for each in slices])


@pytest.mark.parametrize(("valid", "is_right"), [(981, True), (1019, True), (979, False), (1021, False)])
def test_validate_is_answered_in_its_own_turns(*, valid: int, is_right: bool) -> None:
    """A service that has answered in the no-op's turns, or left its own to it, is found out."""
    if is_right:
        check("a service", 1000, valid)
    else:
        with pytest.raises(BenchError, match=f"a service has counted {valid}"):
            check("a service", 1000, valid)


def test_server_that_takes_no_turns_is_found_out(tmp_path: Path) -> None:
    """Then nothing could be compared."""
    with pytest.raises(BenchError, match="has not begun"):
        read(tmp_path / "slices")


@needs_h2load
@needs_two_cores
@pytest.mark.bench
def test_figures_come_out(tmp_path: Path, postgres_url: str) -> None:
    """A row for each number of keys, of a service that was called by turns."""
    page = tmp_path / "page.md"
    ended = subprocess.run(
        [sys.executable, str(RUN), *SMALLEST, "--output", str(page)],
        env=os.environ | {"LATCHGATE_DATABASE_URL": postgres_url},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (0, "") == (ended.returncode, ended.stderr)
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith(("| 20 ", "| 50 "))]
    assert 2 == len(rows)
    for _, _, ratio, count, *_ in rows:
        assert 0.3 < float(ratio.split()[0]) < 1.5
        assert int(count) >= 2
