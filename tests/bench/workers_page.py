"""The page docs/workers.md: what was measured of one worker and of two, and what is to be said of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.load import TURN_S, Burst
from bench.machine import UnfitError
from bench.page import bullets, machine_line, paragraph
from bench.report import Rows, as_markdown, at_least, spread

FEW, MANY = 1, 2
KEYS = 1000
RATIO_WANTED = 1.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Who runs on which cores: one worker, two workers, the load."""

    few: tuple[int, ...]
    many: tuple[int, ...]
    load: tuple[int, ...]
    total: int

    @classmethod
    def share_out(cls, available: Iterable[int]) -> Cores:
        """Gives each worker a core and the load the rest; where nothing is left, it shares one with a worker.

        Raises UnfitError if there are no two cores.
        """
        cores = tuple(sorted(available))
        if len(cores) < MANY:
            raise UnfitError("there is only one core, on which two workers can do no more than one; give at least two")
        return cls(few=cores[-FEW:], many=cores[-MANY:], load=cores[:-MANY] or cores[:1], total=len(cores))

    @property
    def is_load_alone(self) -> bool:
        """Whether no worker runs on the load's cores."""
        return not set(self.many) & set(self.load)

    @property
    def turn_s(self) -> float | None:
        """How often the load is given other tokens: on several cores never, where it would read them half-way."""
        return TURN_S if len(self.load) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One service under load. CPU times and calls are by worker, `load_cpu_s` is that of h2load and what feeds it."""

    round: int
    workers: int
    burst: Burst
    lasted_s: float
    load_cpu_s: float
    cpu_s: Mapping[str, float]
    calls: Mapping[str, float]

    @property
    def cpu_us(self) -> float:
        """What a call costs the workers."""
        return sum(self.cpu_s.values()) * 1e6 / sum(self.calls.values())

    @property
    def load_cpu_us(self) -> float:
        """What a call costs the load."""
        return self.load_cpu_s * 1e6 / sum(self.calls.values())

    @property
    def workers_share(self) -> float:
        """The workers' CPU time, in cores."""
        return sum(self.cpu_s.values()) / self.lasted_s

    @property
    def load_share(self) -> float:
        """The load's CPU time, in cores."""
        return self.load_cpu_s / self.lasted_s

    @property
    def largest_share(self) -> float:
        """Which part of all calls came to the worker that was given most."""
        return max(self.calls.values()) / sum(self.calls.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured, without the warm-up."""

    cores: Cores
    turns: Sequence[Turn]
    processes: int
    seconds: float

    def of(self, workers: int) -> list[Turn]:
        """The turns of the service with so many workers, in the order of the rounds."""
        return [turn for turn in self.turns if turn.workers == workers]

    def pairs(self) -> list[tuple[Turn, Turn]]:
        """The turns of one worker and of two, round by round."""
        return list(zip(self.of(FEW), self.of(MANY), strict=True))


def table(results: Results) -> Rows:
    """Gives a row for each service, the head first."""
    head = (
        "workers",
        "calls/s",
        "p50, ms",
        "p99, ms",
        "CPU, µs/call",
        "load's CPU, µs/call",
        "workers, cores busy",
        "load, cores busy",
        "calls of the busiest worker",
    )
    return [head, *(_row(workers, results.of(workers)) for workers in (FEW, MANY))]


def _row(workers: int, turns: list[Turn]) -> tuple[str, ...]:
    def column(value: Callable[[Turn], float], form: str) -> str:
        return spread([value(turn) for turn in turns], form)

    return (
        str(workers),
        column(lambda turn: turn.burst.per_s, ",.0f"),
        column(lambda turn: turn.burst.p50_ms, ".1f"),
        column(lambda turn: turn.burst.p99_ms, ".1f"),
        column(lambda turn: turn.cpu_us, ".0f"),
        column(lambda turn: turn.load_cpu_us, ".0f"),
        column(lambda turn: turn.workers_share, ".2f"),
        column(lambda turn: turn.load_share, ".2f"),
        column(lambda turn: turn.largest_share, ".0%"),
    )


def findings(results: Results) -> Iterator[str]:
    """Compares with what is wanted, and says what the figures can not show."""
    pairs = results.pairs()
    yield at_least(
        "Calls a second of two workers over one",
        [many.burst.per_s / few.burst.per_s for few, many in pairs],
        RATIO_WANTED,
    )
    costs = [many.cpu_us / few.cpu_us for few, many in pairs]
    yield f"CPU time of a call with two workers over that with one: {spread(costs, '.2f')}."
    if results.cores.is_load_alone:
        yield "The load had cores of its own, and the workers one each."
        return
    worker_us = statistics.median(few.cpu_us for few, _ in pairs)
    load_us = statistics.median(few.load_cpu_us for few, _ in pairs)
    yield (
        f"**The load had no core of its own beside two workers**: there are {results.cores.total} cores, and it shared"
        f" one with a worker. A call costs a worker {worker_us:.0f} µs and the load {load_us:.0f} µs, both of which two"
        f" cores have to give then, so that on this machine the ratio of calls can not be above"
        f" {2 * worker_us / (worker_us + load_us):.2f}, however well workers scale. What is left to compare is the CPU"
        " time of a call: workers that have a core each would by that answer"
        f" {spread([MANY / FEW / cost for cost in costs], '.2f')} times the calls of one."
    )


def write(results: Results) -> str:
    """Writes the page."""
    blocks = (
        "# Workers",
        paragraph(
            "What a second worker adds to Validate from memory. This page is written by `make bench-workers`; its"
            " figures are those of one run on one machine."
        ),
        "## Results",
        as_markdown(table(results)),
        bullets(findings(results)),
        paragraph(f"Medians of {len(results.of(FEW))} rounds, with the least and the most in brackets."),
        "## What is compared",
        bullets(_method(results)),
        "## Every round",
        as_markdown(_rounds(results)),
        "## Machine",
        paragraph(machine_line(results.cores.total)),
        "## Repeat it",
        "```\nmake bench-workers\n```",
        paragraph("It needs Linux, two cores and `h2load`; with three cores or more the load has cores of its own."),
    )
    return "\n\n".join(blocks) + "\n"


def _method(results: Results) -> Iterator[str]:
    cores = results.cores
    yield (
        f"`latchgate serve` with `LATCHGATE_WORKERS={FEW}` on core {_names(cores.few)}, and with"
        f" `LATCHGATE_WORKERS={MANY}` on cores {_names(cores.many)}, else with default settings; each worker had been"
        f" asked for all of {KEYS:,} keys before each turn, and holds them in memory."
    )
    yield (
        f"**Turns** of {results.seconds:g} s, one of each service in a round, in each round another one first. A first"
        " round is not counted."
    )
    tokens = "a token of its own" if cores.turn_s is None else "another token each time"
    yield (
        f"**Load**: {results.processes} processes of `h2load` on {'core' if len(cores.load) == 1 else 'cores'}"
        f" {_names(cores.load)}, each with one connection, one request at a time and {tokens}. The system spreads the"
        " connections over the workers as they come (SO_REUSEPORT); `latchgate_worker_calls_total` says how evenly."
    )
    yield (
        "**Checked** in every turn: all calls ended with a message of full size, and the service counted as many VALID"
        " answers as h2load saw, and no others."
    )
    yield (
        "**CPU** of the workers from `process_cpu_seconds_total`; that of the load is h2load's and that of the program"
        " which feeds it. Cores busy: CPU time over the time of the turn, in which h2load starts and ends as well."
    )


def _names(cores: Sequence[int]) -> str:
    return " and ".join(map(str, cores)) if len(cores) <= MANY else f"{cores[0]} to {cores[-1]}"


def _rounds(results: Results) -> Rows:
    head = ("round", "1 worker, calls/s", "2 workers, calls/s", "ratio", "calls by worker")
    return [
        head,
        *(
            (
                str(few.round),
                f"{few.burst.per_s:,.0f}",
                f"{many.burst.per_s:,.0f}",
                f"{many.burst.per_s / few.burst.per_s:.2f}",
                " + ".join(f"{calls:,.0f}" for calls in many.calls.values()),
            )
            for few, many in results.pairs()
        ),
    ]
