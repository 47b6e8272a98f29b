"""The page docs/flood.md: what was measured quiet and in a flood, and what is to be said of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.load import Burst
from bench.machine import Layout
from bench.page import bullets, machine_line, paragraph
from bench.report import Rows, as_markdown, at_most, spread
from bench.tokens import Kind

KEYS = 1000
P99_WANTED = 2.0
BUDGET_PER_S = 500
"""How many unknown tokens of foreign form a worker looks up a second; as many may come at once after a quiet while."""

LEAD_S = 0.5
"""For how long the flood comes before the first good call, and goes on after the last."""

TURN_S = 0.001
"""How often each connection of the flood is given another token."""

NICENESS = 10
"""By how much the flood's h2load stands back behind that of the good callers, who share its core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flood:
    """Made-up tokens over so many connections."""

    kind: Kind
    connections: int

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.kind.value}, {self.connections} connections"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    floods: Sequence[Flood]
    good: int
    each_per_s: int
    rounds: int
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Good callers under way, alone or in a flood; all counts are of the whole turn.

    `over_budget` are lookups that were not made for want of budget, `refused` calls that ended as UNAVAILABLE, and
    `quiet` the turns before and after, without a flood.
    """

    flood: Flood | None
    good: Burst
    flooded: Burst | None
    lasted_s: float
    statements: float
    digests: float
    over_budget: float
    refused: float
    server_cpu_s: float
    quiet: list[Turn]

    @property
    def is_within_budget(self) -> bool:
        """Whether no more was looked up than is allowed: nothing for tokens that their tag shows to be wrong."""
        if self.flood is None or self.flood.kind is Kind.WRONG_TAG:
            return not self.digests
        return self.digests <= BUDGET_PER_S * (self.lasted_s + 1)

    @property
    def tokens_sent_again(self) -> float:
        """How many calls of the flood came for each token that it had."""
        return self.flooded.started / self.flooded.bodies if self.flooded else 0.0

    def over_quiet(self, value: Callable[[Burst], float]) -> float:
        """Gives what a figure of the good calls is over that around it."""
        return value(self.good) / statistics.mean(value(each.good) for each in self.quiet)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured, without the warm-up; each turn in a flood with the quiet ones beside it."""

    plan: Plan
    layout: Layout
    turns: Sequence[Turn]

    def of(self, flood: Flood) -> list[Turn]:
        """The turns in one kind of flood."""
        return [turn for turn in self.turns if turn.flood == flood]

    def quiet(self) -> list[Turn]:
        """The turns without a flood, each once."""
        return [turn.quiet[-1] for turn in self.turns]


def line(turn: Turn) -> str:
    """Writes a turn in a flood for the terminal."""
    flood = turn.flooded.per_s if turn.flooded else 0.0
    return (
        f"{turn.flood.name if turn.flood else 'quiet':56} flood {flood:6,.0f}/s  good {turn.good.per_s:5,.0f}/s  "
        f"p99 {turn.good.p99_ms:.2f} ms, over quiet {turn.over_quiet(_p99):.2f}  "
        f"lookups {turn.digests / turn.lasted_s:.0f}/s"
    )


def _p50(burst: Burst) -> float:
    return burst.p50_ms


def _p99(burst: Burst) -> float:
    return burst.p99_ms


def table(results: Results) -> Rows:
    """Gives a row for quiet and for each flood, the head first."""
    head = (
        "flood",
        "flood, calls/s",
        "good, calls/s",
        "p50, ms",
        "p99, ms",
        "p99 over quiet",
        "lookups/s",
        "statements/s",
        "refused of the flood",
        "worker, cores busy",
    )
    return [
        head,
        _row("none", results.quiet()),
        *(_row(flood.name, results.of(flood)) for flood in results.plan.floods),
    ]


def _row(name: str, turns: list[Turn]) -> tuple[str, ...]:
    def column(value: Callable[[Turn], float], form: str) -> str:
        return spread([value(turn) for turn in turns], form)

    bursts = [turn.flooded for turn in turns if turn.flooded]
    return (
        name,
        spread([burst.per_s for burst in bursts], ",.0f") if bursts else "-",
        column(lambda turn: turn.good.per_s, ",.0f"),
        column(lambda turn: turn.good.p50_ms, ".2f"),
        column(lambda turn: turn.good.p99_ms, ".2f"),
        column(lambda turn: turn.over_quiet(_p99), ".2f") if bursts else "-",
        column(lambda turn: turn.digests / turn.lasted_s, ".0f"),
        column(lambda turn: turn.statements / turn.lasted_s, ".0f"),
        spread([turn.refused / turn.flooded.started for turn in turns if turn.flooded], ".0%") if bursts else "-",
        column(lambda turn: turn.server_cpu_s / turn.lasted_s, ".2f"),
    )


def findings(results: Results) -> Iterator[str]:
    """Compares with what is wanted, one sentence each."""
    asked = sum(turn.good.succeeded for turn in results.turns)
    yield f"Of {asked:,} calls with good keys amid a flood none was refused: each was answered with VALID."
    for flood in results.plan.floods:
        turns = results.of(flood)
        ratios = [turn.over_quiet(_p99) for turn in turns]
        yield at_most(f"p99 of good keys amid {flood.name}, over quiet", ratios, P99_WANTED)
        over = sum(not turn.is_within_budget for turn in turns)
        allowed = "none" if flood.kind is Kind.WRONG_TAG else f"{BUDGET_PER_S} a second, and {BUDGET_PER_S} at first"
        verdict = "kept" if not over else f"**exceeded in {over} of {len(turns)} turns**"
        lookups = spread([turn.digests / turn.lasted_s for turn in turns], ".0f")
        yield f"Lookups amid {flood.name}: {lookups} a second; allowed: {allowed}: {verdict}."


def write(results: Results) -> str:
    """Writes the page."""
    blocks = (
        "# Made-up tokens",
        paragraph(
            "What callers with good keys notice of a flood of tokens that were never made, and what the database"
            " notices. This page is written by `make bench-flood`; its figures are those of one run on one machine."
        ),
        "## Results",
        as_markdown(table(results)),
        bullets(findings(results)),
        paragraph(f"Medians of {results.plan.rounds} rounds, with the least and the most in brackets."),
        "## What is compared",
        bullets(_method(results)),
        "## Machine",
        paragraph(machine_line(results.layout.total)),
        paragraph(_cores(results.layout)),
        "## Repeat it",
        "```\nmake bench-flood\n```",
        paragraph(
            "It needs Linux, two cores and `h2load`. `python tests/bench/flood.py --help` lists what can be varied."
        ),
    )
    return "\n\n".join(blocks) + "\n"


def _method(results: Results) -> Iterator[str]:
    plan = results.plan
    yield (
        f"**Good callers**: {plan.good} connections, each with {plan.each_per_s} calls a second, one at a time, for a"
        f" key of its own, drawn for each turn from {KEYS:,} that `latchgate serve` with one worker holds in memory."
        " **Quiet** means these alone; the worker is then idle for most of the time."
    )
    yield (
        "**Flood**: connections of their own, each with one call under way and the next as soon as that is answered: as"
        " many calls as the worker can answer beside the good ones. So the flood is bounded by its connections: with n"
        " of them a good call finds at most n calls of the flood before it. More connections mean a longer wait, and no"
        " more calls."
    )
    sent = statistics.median(turn.tokens_sent_again for turn in results.turns)
    yield (
        f"**Tokens** of the flood are random, and every {TURN_S * 1000:g} ms each connection is given another one:"
        f" there were {sent:.1f} calls for each. {Kind.WRONG_TAG.value.capitalize()}: prefix, 40 characters."
        " Of foreign form: 16 to 512 printable characters, another length on each connection."
    )
    yield (
        f"**Turns** of {plan.seconds:g} s: quiet, a flood, quiet, another flood and so on; in each round another flood"
        f" first. A flood begins {LEAD_S:g} s before the good calls that are measured, and goes on after them. Its"
        " figures are compared with the mean of the two quiet turns beside it. A first round is not counted."
    )
    yield (
        "**Checked** in every turn: all calls with good keys ended with HTTP 200 and a message of full size, which an"
        " error has not; the service counted as many VALID answers as there were such calls, and as many NOT_FOUND and"
        " UNAVAILABLE as there were calls of the flood."
    )
    yield (
        "**Measured**: times from h2load's log of every good call, from sending it to its answer; lookups (digests) and"
        " statements from the service's metrics, over the whole time of a turn. A token of foreign form beyond the"
        f" budget of {BUDGET_PER_S} lookups a second is refused with UNAVAILABLE (LOOKUP_BUDGET_EXCEEDED)."
    )


def _cores(layout: Layout) -> str:
    shared = "; PostgreSQL shared that core" if layout.load in layout.database else ""
    return (
        f"The worker had core {layout.server} to itself. Good callers and flood shared core {layout.load}{shared}. The"
        f" flood's h2load ran with a niceness of {NICENESS}, so that what is measured is the service, not how long a"
        " good caller waits for its own core."
    )
