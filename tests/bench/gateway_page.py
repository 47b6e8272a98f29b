"""The page docs/gateways/performance.md: what was measured of Envoy, and what is to be said of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.gateways import Guard
from bench.page import bullets, machine_line, paragraph
from bench.report import Rows, as_markdown, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    rounds: int
    seconds: float
    keys: int
    connections: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One guard under load. `busy` is how much of their core Envoy and the service had."""

    round: int
    guard: Guard
    per_s: float
    p50_ms: float
    p99_ms: float
    envoy_us: float
    service_us: float
    busy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured, without the warm-up."""

    plan: Plan
    total_cores: int
    turns: Sequence[Turn]

    def of(self, guard: Guard) -> list[Turn]:
        """The turns of a guard, in the order of the rounds."""
        return [turn for turn in self.turns if turn.guard is guard]


def table(results: Results) -> Rows:
    """Gives a row for each guard, the head first."""
    head = (
        "who says whether a key is good",
        "requests/s",
        "p50, ms",
        "p99, ms",
        "Envoy's CPU, µs",
        "latchgate's CPU, µs",
    )
    return [head, *(_row(guard, results.of(guard)) for guard in Guard)]


def _row(guard: Guard, turns: Sequence[Turn]) -> tuple[str, ...]:
    def column(value: Callable[[Turn], float], form: str) -> str:
        return spread([value(turn) for turn in turns], form)

    return (
        guard.value,
        column(lambda turn: turn.per_s, ",.0f"),
        column(lambda turn: turn.p50_ms, ".1f"),
        column(lambda turn: turn.p99_ms, ".1f"),
        column(lambda turn: turn.envoy_us, ".0f"),
        column(lambda turn: turn.service_us, ".0f") if guard in {Guard.OVER_GRPC, Guard.OVER_HTTP} else "-",
    )


def findings(results: Results) -> Iterator[str]:
    """Says what the figures come to."""
    for guard in (Guard.OVER_GRPC, Guard.OVER_HTTP):
        ratios = _ratios(results, guard, Guard.BUILT_IN)
        yield f"{guard.value}, requests a second over those of Envoy's own filter: {spread(ratios, '.3f')}."
    gains = _ratios(results, Guard.OVER_HTTP, Guard.OVER_GRPC)
    yield f"Over HTTP, requests a second over those over gRPC: {spread(gains, '.2f')}."
    least = min(statistics.median(turn.busy for turn in results.of(guard)) for guard in Guard)
    yield f"Envoy and latchgate had {least:.0%} of their core or more, in the median of each."


def _ratios(results: Results, guard: Guard, other: Guard) -> list[float]:
    return [one.per_s / two.per_s for one, two in zip(results.of(guard), results.of(other), strict=True)]


def write(results: Results) -> str:
    """Writes the page."""
    plan = results.plan
    blocks = [
        "# Performance of gateways",
        paragraph(
            "What it costs Envoy to ask latchgate about every request, beside its own filter for keys, which has them"
            " from its configuration. This page is written by `make bench-gateway`; its figures are those of one run on"
            " one machine, with Envoy and latchgate on one core."
        ),
        "## Results",
        as_markdown(table(results)),
        bullets(findings(results)),
        paragraph(f"Medians of {plan.rounds} rounds, with the least and the most in brackets."),
        paragraph(
            "Where the time goes was looked into by hand: [0008](../decisions/0008-envoy-over-grpc-and-http.md)."
        ),
        "## What is compared",
        bullets(_method(results)),
        "## Machine",
        paragraph(machine_line(results.total_cores)),
    ]
    if plan.note:
        blocks.append(paragraph(plan.note))
    blocks += [
        "## Repeat it",
        "```\nmake bench-gateway\n```",
        paragraph("It needs Linux on x86-64, two cores, `h2load` and `wrk`."),
    ]
    return "\n\n".join(blocks) + "\n"


def _method(results: Results) -> Iterator[str]:
    plan = results.plan
    yield (
        "**Envoy** with one thread and four ports. On each, a good request is answered by Envoy itself: no service"
        " behind it is measured. One port lets all through, one has `envoy.filters.http.api_key_auth` with"
        f" {plan.keys:,} keys, and two ask latchgate, over gRPC (`Check`) and over HTTP (`/auth`). These ask for a"
        " permission as well, of which Envoy's own filter has no notion; it counts no limits, and so no key has one."
    )
    yield f"**latchgate** with one worker, on Envoy's core, with all of {plan.keys:,} keys in memory."
    yield (
        f"**Load**: `wrk` on another core, {plan.connections} connections of HTTP/1.1, one request at a time on each,"
        " and another token each time."
    )
    yield (
        f"**Turns** of {plan.seconds:g} s, one of each in a round, in each round another one first. A first round, in"
        " which every token is seen, is not counted."
    )
    yield (
        "**Checked** in every turn: every request got through, and latchgate judged as many tokens as there were"
        " requests, or none where it was not to be asked."
    )
