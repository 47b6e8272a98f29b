"""The page docs/workers.md: what was measured of one worker, two, and two services, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.load import TURN_S, Burst
from bench.machine import UnfitError
from bench.page import bullets, machine_line, paragraph
from bench.report import Rows, as_markdown, at_least, spread

FEW, MANY = 1, 2
ONE, TWO, APART = "1 worker", "2 workers", "2 services"
"""Who is compared; the two services have a worker and a database each."""

KEYS = 1000
RATIO_WANTED = 1.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How many calls are under way at a time, and over what."""

    connections: int
    streams: int
    processes: int = 2 * MANY
    """As many for each of two services."""

    @property
    def calls(self) -> int:
        """All of them."""
        return self.processes * self.connections * self.streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Who runs on which cores: one worker, two workers, the load."""

    few: tuple[int, ...]
    many: tuple[int, ...]
    load: tuple[int, ...]
    total: int

    @classmethod
    def share_out(cls, available: Iterable[int]) -> Cores:
        """Gives each worker a core and the load the rest; where nothing is left, it shares theirs with them.

        Raises UnfitError if there are no two cores.
        """
        cores = tuple(sorted(available))
        if len(cores) < MANY:
            raise UnfitError("there is only one core, on which two workers can do no more than one; give at least two")
        return cls(few=cores[-FEW:], many=cores[-MANY:], load=cores[:-MANY] or cores, total=len(cores))

    @property
    def is_load_alone(self) -> bool:
        """Whether no worker runs on the load's cores."""
        return not set(self.many) & set(self.load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A contender under load.

    `calls` are by worker; `load_cpu_s` is what h2load took and what feeds it, `stolen_s` what the hypervisor kept.
    """

    contender: str
    round: int
    burst: Burst
    lasted_s: float
    load_cpu_s: float
    stolen_s: float
    cpu_s: float
    calls: Sequence[float]

    @property
    def cpu_us(self) -> float:
        """What a call costs the workers."""
        return self.cpu_s * 1e6 / sum(self.calls)

    @property
    def load_cpu_us(self) -> float:
        """What a call costs the load."""
        return self.load_cpu_s * 1e6 / sum(self.calls)

    @property
    def workers_share(self) -> float:
        """The workers' CPU time, in cores."""
        return self.cpu_s / self.lasted_s

    @property
    def load_share(self) -> float:
        """The load's CPU time, in cores."""
        return self.load_cpu_s / self.lasted_s

    @property
    def stolen_share(self) -> float:
        """What the hypervisor kept, in cores."""
        return self.stolen_s / self.lasted_s

    @property
    def largest_share(self) -> float:
        """Which part of all calls came to the worker that was given most."""
        return max(self.calls) / sum(self.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured, without the warm-up."""

    cores: Cores
    turns: Sequence[Turn]
    width: Width
    seconds: float

    def of(self, contender: str) -> list[Turn]:
        """The turns of a contender, in the order of the rounds."""
        return [turn for turn in self.turns if turn.contender == contender]

    def over(self, one: str, other: str, value: Callable[[Turn], float]) -> list[float]:
        """What one has over what the other has, round by round."""
        return [value(first) / value(second) for first, second in zip(self.of(one), self.of(other), strict=True)]


def _per_s(turn: Turn) -> float:
    return turn.burst.per_s


def _cpu_us(turn: Turn) -> float:
    return turn.cpu_us


def table(results: Results) -> Rows:
    """Gives a row for each contender, the head first."""
    head = (
        "what",
        "calls/s",
        "CPU, µs/call",
        "load's CPU, µs/call",
        "workers, cores busy",
        "load, cores busy",
        "cores stolen",
        "calls of the busiest worker",
    )
    return [head, *(_row(contender, results.of(contender)) for contender in (ONE, TWO, APART))]


def _row(contender: str, turns: list[Turn]) -> tuple[str, ...]:
    def column(value: Callable[[Turn], float], form: str) -> str:
        return spread([value(turn) for turn in turns], form)

    return (
        contender,
        column(_per_s, ",.0f"),
        column(_cpu_us, ".0f"),
        column(lambda turn: turn.load_cpu_us, ".0f"),
        column(lambda turn: turn.workers_share, ".2f"),
        column(lambda turn: turn.load_share, ".2f"),
        column(lambda turn: turn.stolen_share, ".2f"),
        column(lambda turn: turn.largest_share, ".0%"),
    )


def findings(results: Results) -> Iterator[str]:
    """Compares with what is wanted, and says what the figures can not show."""
    yield at_least("Calls a second of two workers over one", results.over(TWO, ONE, _per_s), RATIO_WANTED)
    # Services that share nothing would do MANY times as much, had they cores enough.
    yield at_least(
        "Calls a second of two workers over those of two services, which share nothing but the machine",
        results.over(TWO, APART, _per_s),
        RATIO_WANTED / MANY,
    )
    workers, services = (spread(results.over(each, ONE, _cpu_us), ".2f") for each in (TWO, APART))
    yield f"CPU time of a call over that with one worker: {workers} with two workers, {services} with two services."
    if results.cores.is_load_alone:
        yield "The load had cores of its own, and the workers one each."
        return
    most = spread(results.over(APART, ONE, _per_s), ".2f")
    most = spread(results.over(APART, ONE, _per_s), ".2f")
    total, most = results.cores.total, spread(results.over(APART, ONE, _per_s), ".2f")
    yield (
        f"**The load had no core of its own beside two workers**: there are {total} cores, which it shared with them."
        " So no two workers can do twice what one does here, which has a core to itself and leaves the load the other."
        " What they could do at most is what two services do that know nothing of each other:"
        f" {most} times the calls of one. With a core for each, those would do {MANY} times as much as one;"
        f" {RATIO_WANTED} times as much is {RATIO_WANTED / MANY:g} of that."
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
        paragraph(f"Medians of {len(results.of(ONE))} rounds, with the least and the most in brackets."),
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
    cores, width = results.cores, results.width
    yield (
        f"`latchgate serve` with `LATCHGATE_WORKERS={FEW}` on core {_names(cores.few)}, with"
        f" `LATCHGATE_WORKERS={MANY}` on cores {_names(cores.many)}, and two of one worker each on those cores, called"
        " at once; each of the four with a database of its own, else with default settings. Each worker had been asked"
        f" for all of {KEYS:,} keys before each turn, and holds them in memory."
    )
    yield (
        f"**Turns** of {results.seconds:g} s, one of each in a round, in an order that is drawn anew. A first round is"
        " not counted."
    )
    on = f"{'core' if len(cores.load) == 1 else 'cores'} {_names(cores.load)}"
    yield (
        f"**Load**: {width.processes} processes of `h2load` on {on}, each with {width.connections} connections,"
        f" {width.streams} calls at a time over each of those ({width.calls} in all) and another token every"
        f" {TURN_S * 1000:g} ms. With so many calls under way no worker waits for the load; how long a call takes says"
        " nothing then, and is not shown. The system spreads the connections over two workers as they come"
        " (SO_REUSEPORT), and `latchgate_worker_calls_total` says how evenly; of two services each is called by half of"
        " the processes."
    )
    yield (
        "**Checked** in every turn: all calls ended with a message of full size, and as many VALID answers were counted"
        " as h2load saw, and no others."
    )
    yield (
        "**CPU** of the workers from `process_cpu_seconds_total`; that of the load is h2load's and that of the program"
        " which feeds it. Cores busy: CPU time over the time of the turn, in which h2load starts and ends as well;"
        " cores stolen: what the hypervisor gave to others while it was wanted here."
    )


def _names(cores: Sequence[int]) -> str:
    return " and ".join(map(str, cores)) if len(cores) <= MANY else f"{cores[0]} to {cores[-1]}"


def _rounds(results: Results) -> Rows:
    head = ("round", *(f"{each}, calls/s" for each in (ONE, TWO, APART)), "2 workers over 1", "calls by worker")
    return [
        head,
        *(
            (
                str(one.round),
                *(f"{each.burst.per_s:,.0f}" for each in (one, two, apart)),
                f"{two.burst.per_s / one.burst.per_s:.2f}",
                " + ".join(f"{calls:,.0f}" for calls in two.calls),
            )
            for one, two, apart in zip(*(results.of(each) for each in (ONE, TWO, APART)), strict=True)
        ),
    ]
