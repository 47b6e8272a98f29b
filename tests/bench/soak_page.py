"""The page docs/soak.md and its picture, and the sentences that say whether anything grew."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.curves import Panel, draw
from bench.page import bullets, machine_line, paragraph
from bench.report import Rows, as_markdown
from bench.samples import Sample, Trend, points, trend
from bench.steady import CALLERS, CANCELLED_SHARE, CANCELLED_WITHIN_S, LIFE_S, REVOKED_SHARE, WITNESSES, Tally

WORKERS = 2
KEYS = 1000
CACHE_KEYS = 2000
"""So few that memory is full within the first minutes and drives out old keys: it does not grow by what it holds."""

LEAK_BYTES = 190
"""What grpcio loses of each unary call that its client cancels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """All that was seen. `cancelled_seen` is how many calls the service counted as given up; the clients count more."""

    wanted_s: float
    lasted_s: float
    settling_s: float
    per_s: float
    samples: Sequence[Sample]
    tally: Tally
    cancelled_seen: float
    deaths: float

    @property
    def is_clean(self) -> bool:
        """Whether every answer was right, nothing failed and no worker died."""
        return self.tally.is_clean and not self.deaths

    @property
    def workers(self) -> list[str]:
        """The workers' names."""
        return sorted({each.worker for each in self.samples})

    def trend(self, worker: str, measure: str) -> Trend | None:
        """What became of a worker's measure; None if it was never told."""
        return trend(points(self.samples, worker, measure), self.settling_s)

    def per_hour(self, measure: str) -> float | None:
        """How fast a measure of all workers together grew after it had settled; None if that is not known."""
        slopes = [each.per_hour for worker in self.workers if (each := self.trend(worker, measure))]
        known = [slope for slope in slopes if slope is not None]
        return sum(known) if known and len(known) == len(self.workers) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """How a measure is written."""

    key: str
    name: str
    unit: float
    form: str
    slope_form: str


_MEASURES = (
    _Measure(key="rss_bytes", name="RSS, MB", unit=1e6, form=",.1f", slope_form="+,.2f"),
    _Measure(key="descriptors", name="descriptors", unit=1, form=",.0f", slope_form="+,.1f"),
    _Measure(key="tasks", name="tasks", unit=1, form=",.0f", slope_form="+,.1f"),
    _Measure(key="keys", name="keys in memory", unit=1, form=",.0f", slope_form="+,.0f"),
)


def table(soaked: Soaked) -> Rows:
    """Gives a row for each measure of each worker, the head first."""
    head = ("", "worker", "start", f"after {_minutes(soaked.settling_s)}", "end", "least", "most", "slope an hour")
    return [head, *(_row(soaked, measure, worker) for measure in _MEASURES for worker in soaked.workers)]


def _row(soaked: Soaked, measure: _Measure, worker: str) -> tuple[str, ...]:
    found = soaked.trend(worker, measure.key)
    if found is None:
        return (measure.name, worker, *("not told",) * 6)
    seen = (found.start, found.settled, found.end, found.least, found.most)
    return (
        measure.name,
        worker,
        *("-" if value is None else format(value / measure.unit, measure.form) for value in seen),
        "-" if found.per_hour is None else format(found.per_hour / measure.unit, measure.slope_form),
    )


def findings(soaked: Soaked) -> Iterator[str]:
    """Says what was right and wrong, and what grew, one sentence each."""
    tally = soaked.tally
    verdict = "none was wrong" if not tally.wrong else f"**{tally.wrong:,} were wrong**"
    yield f"{tally.answered:,} answers of Validate were judged: {verdict}."
    failed = ", ".join(f"{count:,} {name}" for name, count in tally.errors.items())
    yield f"Errors but those of calls that the client gave up: {f'**{failed}**' if failed else 'none'}."
    if soaked.deaths:
        yield f"**{soaked.deaths:.0f} workers died and were replaced.**"
    yield (
        f"{tally.changes:,} changes of keys were called, {tally.pending:,} of them PENDING at their answer;"
        f" {tally.revoked:,} keys were revoked EFFECTIVE and asked for at once over {WITNESSES} connections"
        + (": each was refused each time." if tally.revoked and tally.is_clean else ".")
    )
    yield from _growth(soaked)


def _growth(soaked: Soaked) -> Iterator[str]:
    tally = soaked.tally
    hourly = tally.cancelled * 3600 / soaked.lasted_s
    yield (
        f"{tally.cancelled:,} calls were given up by the client in flight ({hourly:,.0f} an hour), of which the service"
        f" itself noticed {soaked.cancelled_seen:,.0f} before it had answered. grpcio loses about {LEAK_BYTES} bytes"
        f" with each call that is cancelled, which makes at most {hourly * LEAK_BYTES / 1e6:.2f} MB an hour in all"
        " workers together."
    )
    grown = soaked.per_hour("rss_bytes")
    if grown is None:
        yield f"The run was too short for slopes: they are of what was seen after {_minutes(soaked.settling_s)}."
    else:
        yield (
            f"Measured: RSS of all workers together grew by {grown / 1e6:+.2f} MB an hour after the first"
            f" {_minutes(soaked.settling_s)}."
        )
    if soaked.workers and all(soaked.trend(worker, "tasks") is None for worker in soaked.workers):
        yield "This version of the service does not tell its number of tasks (`latchgate_tasks`)."


def picture(soaked: Soaked) -> str:
    """Draws memory, descriptors and tasks over the minutes."""
    panels = [
        Panel(
            name=measure.name,
            series={
                f"worker {worker}": [
                    (at_s / 60, value / measure.unit) for at_s, value in points(soaked.samples, worker, measure.key)
                ]
                for worker in soaked.workers
            },
        )
        for measure in _MEASURES[:3]
    ]
    return draw(panels, f"{WORKERS} workers under steady load, over minutes")


def write(soaked: Soaked, picture_name: str, note: str = "") -> str:
    """Writes the page, with a note on how the machine was used besides."""
    blocks = (
        "# An hour of steady load",
        paragraph(
            "Whether a service that is asked for long keeps more and more: memory, files or tasks; and whether it says"
            " anything wrong meanwhile. This page is written by `make soak`; its figures are those of one run on one"
            " machine."
        ),
        *_cut_short(soaked),
        "## Results",
        as_markdown(table(soaked)),
        bullets(findings(soaked)),
        f"![Memory, descriptors and tasks over time]({picture_name})",
        *_told(soaked.tally),
        "## What was done",
        bullets(_method(soaked)),
        "## Machine",
        paragraph(
            f"{machine_line(len(os.sched_getaffinity(0)))} Workers, PostgreSQL and the clients shared its cores. {note}"
        ),
        "## Repeat it",
        "```\nmake soak\n```",
        paragraph(
            f"It takes {_minutes(soaked.wanted_s)}; `make soak ARGS='--minutes 600'` takes longer, and a run with"
            " options writes no page, unless `--output` names a file. Ctrl-C or SIGTERM ends it early, with the page of"
            " what was seen until then. Each sample is in `build/soak.csv` as soon as it is taken."
        ),
    )
    return "\n\n".join(blocks) + "\n"


def _cut_short(soaked: Soaked) -> Iterator[str]:
    # Less than a minute is what ending takes.
    if soaked.lasted_s < soaked.wanted_s:
        yield paragraph(f"**The run was ended after {_minutes(soaked.lasted_s)} of {_minutes(soaked.wanted_s)}.**")


def _told(tally: Tally) -> Iterator[str]:
    if tally.told:
        yield "## What went wrong"
        yield bullets(tally.told)


def _method(soaked: Soaked) -> Iterator[str]:
    tally = soaked.tally
    yield (
        f"`latchgate serve` with {WORKERS} workers on an embedded PostgreSQL, for {_minutes(soaked.lasted_s)}; room for"
        f" {CACHE_KEYS:,} keys in each memory, so that it is full within the first ten minutes and drives out old keys"
        " from then on, and else its default settings."
    )
    yield (
        f"{CALLERS} clients (grpc.aio) asked Validate {soaked.per_s:g} times a second in all, at moments drawn at"
        f" random: for one of {KEYS:,} good keys, or ({REVOKED_SHARE:.0%}) for one that had been revoked. Of the calls"
        f" {CANCELLED_SHARE:.0%} were cancelled by the client within {CANCELLED_WITHIN_S * 1000:g} ms, half of them for"
        " tokens that have to be looked up; some were answered before. Clients"
        f" took a new connection every few minutes, {tally.connections:,} in all."
    )
    yield (
        f"Each {LIFE_S:g} s a key was created, switched off, switched on, rotated and revoked. After each change that"
        f" was called EFFECTIVE its tokens were asked for over {WITNESSES} connections of their own, which the system"
        " spreads over the workers, and every answer was compared with what was due."
    )
    yield (
        "Samples come from the service's own metrics: `process_resident_memory_bytes`, `process_open_fds`,"
        " `latchgate_tasks` and `latchgate_memory_keys` of each worker. Slopes are those of the lines of least squares"
        f" through the samples after the first {_minutes(soaked.settling_s)}."
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g} min"
