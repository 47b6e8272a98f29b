"""The benchmark of revocations, in its smallest form, and its pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench.effective import Fleet, findings
from bench.histogram import draw

RUN = Path(__file__).with_name("effective.py")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.bench
def test_a_run_gives_figures_for_each_number_of_workers(postgres_url: str) -> None:
    """A run measures services of one worker and of several, and demands that each revocation holds everywhere."""
    command = [sys.executable, str(RUN), "--workers", "1,2", "--rounds", "1", "--changes", "3"]
    with subprocess.Popen(
        command,
        env={"PATH": "", "LATCHGATE_DATABASE_URL": postgres_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said, complaints = process.communicate(timeout=100)

    assert ("", 0) == (complaints, process.returncode)
    rows = [line.split()[:2] for line in said.splitlines()[-2:]]
    assert [["1", "3"], ["2", "3"]] == rows


@pytest.mark.parametrize(("slow_ms", "verdict"), [(40.0, "reached"), (60.0, "not reached")])
def test_many_workers_are_held_to_what_is_wanted(slow_ms: float, verdict: str) -> None:
    """What two in a hundred revocations took with 20 workers is compared with what is wanted, and nothing else."""
    few, many = (Fleet(workers=count, stubs=[], took_ms=[1.0] * 98 + [slow_ms] * 2) for count in (4, 20))

    assert [f"p99 with 20 workers, ms: {slow_ms:.2f}; wanted at most 50.0: {verdict}."] == findings([few, many])


def test_picture_has_a_bar_for_each_bin_and_marks_for_each_series() -> None:
    """A picture is well-formed, shows every value of every series, and marks medians and 99th percentiles."""
    root = ET.fromstring(  # noqa: S314 - of our own making
        draw({"few & far": [1.0, 2.01, 2.02], "many": [2.0] * 99 + [400.0]}, "times, ms")
    )

    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert {"few & far", "many", "times, ms", "p50 2.0", "p99 400.0"} <= set(texts)
    tall = [float(each.get("height", 0)) for each in root.iter(f"{SVG}rect") if each.get("fill") == "#4878a8"]
    # Two bins of the first series (2.01 and 2.02 share one), two of the second.
    assert 4 == sum(height > 0 for height in tall)
