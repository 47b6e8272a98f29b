"""The soak in its smallest form: that it judges, samples and ends in order; and how it evaluates."""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

import grpc
import pytest

from apikeys.v1 import key_service_pb2 as pb
from bench import soak_page
from bench.curves import Panel, draw
from bench.machine import BenchError
from bench.metrics import Scrape
from bench.samples import Sample, SampleFile, taken, trend
from bench.soak_page import Soaked
from bench.steady import Tally

RUN = Path(__file__).with_name("soak.py")
SVG = "{http://www.w3.org/2000/svg}"
METRICS = """
process_resident_memory_bytes{worker="supervisor"} 9e+06
process_resident_memory_bytes{worker="1"} 1e+07
process_resident_memory_bytes{worker="2"} 2e+07
process_open_fds{worker="1"} 11.0
process_open_fds{worker="2"} 22.0
latchgate_memory_keys{worker="1"} 5.0
latchgate_memory_keys{worker="2"} 6.0
latchgate_worker_calls_total{worker="1"} 100.0
latchgate_worker_calls_total{worker="2"} 200.0
"""


@contextmanager
def _soak(folder: Path, postgres_url: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a soak that writes into a folder; one that has not ended by the end of the block is killed."""
    files = ("--samples", str(folder / "soak.csv"), "--output", str(folder / "soak.md"))
    with subprocess.Popen(
        [sys.executable, str(RUN), "--every", "0.5", "--settling-minutes", "0.01", *files, *arguments],
        env={"PATH": "", "LATCHGATE_DATABASE_URL": postgres_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "soak.csv").read_text())))


@pytest.mark.bench
def test_a_soak_ends_by_itself_and_says_what_it_saw(postgres_url: str, tmp_path: Path) -> None:
    """A soak ends after its time, with samples of both workers, a page, a picture, and no wrong answer."""
    with _soak(tmp_path, postgres_url, "--minutes", "0.06") as process:
        said, complaints = process.communicate(timeout=100)

    assert ("", 0) == (complaints, process.returncode), said
    rows = _rows(tmp_path)
    assert {"1", "2"} == {row["worker"] for row in rows}
    assert all(float(row["rss_bytes"]) > 1e7 and int(row["descriptors"]) > 0 for row in rows)
    assert int(rows[-1]["answered"]) > 100
    assert int(rows[-1]["changes"]) > 0
    page = " ".join((tmp_path / "soak.md").read_text().split())
    assert "none was wrong" in page
    assert "each was refused each time" in page
    assert "The run was ended after" not in page
    assert "![Memory, descriptors and tasks over time](soak.svg)" in page
    assert (tmp_path / "soak.svg").read_text().startswith("<svg")


@pytest.mark.bench
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_soak_that_is_stopped_tells_what_it_has(postgres_url: str, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C end a soak in order, with the samples and the page of what was seen until then."""
    with _soak(tmp_path, postgres_url, "--minutes", "60") as process:
        assert process.stdout is not None
        while "answered" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        said, complaints = process.communicate(timeout=60)

    assert ("", 0) == (complaints, process.returncode), said
    assert _rows(tmp_path)
    assert "**The run was ended after" in (tmp_path / "soak.md").read_text()


def test_each_worker_is_sampled_and_the_supervisor_is_not() -> None:
    """What the metrics tell of each worker is taken; what they do not tell is absent, and no error."""
    first, second = taken(Scrape.parse(METRICS), 1.0)

    values = {"rss_bytes": 1e7, "descriptors": 11.0, "keys": 5.0, "calls": 100.0}
    assert Sample(at_s=1.0, worker="1", values=values) == first
    assert "2" == second.worker
    more = Scrape.parse(METRICS + 'latchgate_tasks{worker="1"} 7.0\n')
    assert 7.0 == taken(more, 1.0)[0].values["tasks"]


def test_a_figure_that_the_service_does_not_tell_is_no_zero() -> None:
    """Asking for a counter by a name that the service does not have is an error; labels that never came are none."""
    scrape = Scrape.parse(METRICS)

    assert 300.0 == scrape.total("latchgate_worker_calls_total")
    assert 0.0 == scrape.total("latchgate_worker_calls_total", worker="3")
    with pytest.raises(BenchError, match="does not tell latchgate_renamed_total"):
        scrape.total("latchgate_renamed_total")


def test_samples_are_in_the_file_at_once() -> None:
    """Each sample is a line with all columns of the head; a measure that was not told is left empty."""
    text = io.StringIO()
    SampleFile(text, ("answered",)).write([Sample(at_s=1.0, worker="1", values={"rss_bytes": 1e7, "keys": 5.0})], (42,))

    assert "at_s,worker,rss_bytes,descriptors,tasks,keys,calls,answered\n1.0,1,10000000,,,5,,42\n" == text.getvalue()


def test_slope_is_that_after_settling() -> None:
    """The slope is of what was seen after settling, in units an hour; the rest of a trend is of all that was seen."""
    found = trend([(0.0, 50.0), (10.0, 100.0), (20.0, 101.0), (30.0, 102.0)], settling_s=10.0)

    assert found is not None
    assert (50.0, 100.0, 102.0, 50.0, 102.0) == (found.start, found.settled, found.end, found.least, found.most)
    assert pytest.approx(360.0) == found.per_hour


def test_a_slope_needs_points() -> None:
    """Of nothing there is no trend, and of two points no slope."""
    assert trend([], settling_s=0.0) is None
    found = trend([(0.0, 1.0), (1.0, 2.0)], settling_s=0.0)
    assert found is not None
    assert found.per_hour is None


def _soaked(tally: Tally, *, deaths: float = 0) -> Soaked:
    samples = [
        Sample(at_s=at_s, worker=worker, values={"rss_bytes": 1e8 + at_s * 100, "keys": 5.0})
        for at_s in (0.0, 600.0, 1200.0, 1800.0)
        for worker in ("1", "2")
    ]
    return Soaked(
        wanted_s=3600.0,
        lasted_s=1800.0,
        settling_s=600.0,
        per_s=300.0,
        samples=samples,
        tally=tally,
        cancelled_seen=3.0,
        deaths=deaths,
    )


def test_growth_is_related_to_what_grpcio_loses() -> None:
    """The growth of all workers together stands beside what grpcio loses of the cancelled calls in that time."""
    said = " ".join(soak_page.findings(_soaked(Tally(cancelled=5000))))

    # 10,000 an hour, of 190 bytes each; and two workers of 100 bytes a second.
    assert "at most 1.90 MB an hour" in said
    assert "+0.72 MB an hour" in said


def test_what_went_wrong_is_said() -> None:
    """A wrong answer, an error and a worker's death each make a run one that failed, and are on the page."""
    tally = Tally()
    assert _soaked(tally).is_clean
    assert not _soaked(tally, deaths=1).is_clean
    assert not _soaked(Tally(errors=Counter({"UNAVAILABLE (Validate)": 2}))).is_clean

    tally.judge(pb.ValidateResponse(outcome=pb.OUTCOME_VALID), pb.OUTCOME_REVOKED, "a key just revoked")
    tally.failed(
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "away"), "Validate"
    )

    assert not _soaked(tally).is_clean
    page = " ".join(soak_page.write(_soaked(tally), "soak.svg", "Tests ran beside it.").split())
    for line in (
        "**1 were wrong**",
        "**1 UNAVAILABLE (Validate)**",
        "a key just revoked was answered with OUTCOME_VALID, not OUTCOME_REVOKED",
        "Validate failed: UNAVAILABLE: away",
        "does not tell its number of tasks",
        "the clients shared its cores. Tests ran beside it.",
    ):
        assert line in page


def test_picture_has_a_line_for_each_series() -> None:
    """A picture is well-formed, with a line for each series of each panel, also where a panel has no points."""
    panels = [
        Panel(name="RSS & more", series={"worker 1": [(0.0, 1.0), (60.0, 2.0)], "worker 2": [(0.0, 3.0), (60.0, 3.0)]}),
        Panel(name="tasks", series={"worker 1": []}),
    ]
    root = ET.fromstring(draw(panels, "over time"))  # noqa: S314 - of our own making

    lines = [each.get("points") for each in root.iter(f"{SVG}polyline")]
    assert 3 == len(lines)
    assert 2 == len((lines[0] or "").split())
    assert {"RSS & more", "tasks", "over time", "worker 2", "60"} <= {each.text for each in root.iter(f"{SVG}text")}
