"""The tables and what is to be said of them, for the terminal and for the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from bench.rounds import Results, Turn
from bench.servers import ANOTHER, PLAIN, SINGLE, Source

# Validate over the no-op, that with the most keys over that with the least, and over grpc.aio as it comes.
RATIO_WANTED = {Source.MEMORY: 0.95, Source.DATABASE: 0.6}
FLATNESS_WANTED = {Source.MEMORY: 0.95, Source.DATABASE: 0.9}
GAIN_WANTED = 1.3
STARVED_SHARE = 0.9
# So many standard deviations to each side have 95 % of a normal distribution.
NORMAL_95 = 1.96

Rows = Sequence[Sequence[str]]

_HEAD = (
    "server",
    "calls/s",
    "no-op, calls/s",
    "ratio",
    "p50, ms",
    "p99, ms",
    "its CPU, µs/call",
    "no-op CPU, µs/call",
    "PostgreSQL CPU, µs/call",
    "keys a statement",
)
_ROUNDS_HEAD = ("round", "server", "calls/s", "no-op", "its calls/s", "ratio")


def spread(values: Sequence[float], form: str) -> str:
    """Writes a median with the least and the most."""
    median = format(statistics.median(values), form)
    return median if len(values) == 1 else f"{median} ({min(values):{form}} to {max(values):{form}})"


def summary(results: Results) -> Rows:
    """Gives a row for each server, the head first."""
    return [_HEAD, *(_row(name, _turns(results, name)) for name in (*results.keys, ANOTHER, SINGLE, PLAIN))]


def _turns(results: Results, name: str) -> list[Turn]:
    return [turn for turn in results.turns if turn.name == name]


def _row(name: str, turns: list[Turn]) -> tuple[str, ...]:
    def column(value: Callable[[Turn], float], form: str) -> str:
        return spread([value(turn) for turn in turns], form)

    lookups = [turn.lookups for turn in turns if turn.lookups is not None]
    postgres = [each.postgres_cpu_us for each in lookups if each.postgres_cpu_us is not None]
    statements = [each.digests_per_statement for each in lookups if each.digests_per_statement]
    return (
        name,
        column(lambda turn: turn.server.per_s, ",.0f"),
        column(lambda turn: turn.noop.per_s, ",.0f"),
        column(lambda turn: turn.ratio, ".2f"),
        column(lambda turn: turn.server.burst.p50_ms, ".1f"),
        column(lambda turn: turn.server.burst.p99_ms, ".1f"),
        column(lambda turn: turn.server.server_cpu_us, ".0f"),
        column(lambda turn: turn.noop.server_cpu_us, ".0f"),
        spread(postgres, ".0f") if postgres else "-",
        spread(statements, ".1f") if statements else "-",
    )


def rounds(results: Results) -> Rows:
    """Gives a row for each turn, the head first."""
    return [_ROUNDS_HEAD, *(_round_row(turn) for turn in results.turns)]


def _round_row(turn: Turn) -> tuple[str, ...]:
    server, noop = (f"{each.per_s:,.0f}" for each in (turn.server, turn.noop))
    return (str(turn.round), turn.name, server, turn.noop_name, noop, f"{turn.ratio:.3f}")


def findings(results: Results) -> list[str]:
    """Compares with what is wanted, one sentence each."""
    said = []
    for name, source in results.sources.items():
        ratios = [turn.ratio for turn in _turns(results, name)]
        said.append(at_least(f"Validate from {name}, over the no-op", ratios, RATIO_WANTED[source]))
    for source in Source:
        several = [name for name in results.keys if results.sources[name] is source and results.keys[name] > 1]
        alike = [name for name in several if results.in_use[name] <= results.in_use[several[0]]]
        if len(alike) > 1:
            flatness = _over(results, alike[-1], alike[0])
            said.append(at_least(f"From {alike[-1]} over {alike[0]}", flatness, FLATNESS_WANTED[source]))
            # The same is done for each number of keys: of all turns together the median is known best.
            turns = [turn for name in alike for turn in _turns(results, name)]
            ratios = [turn.ratio for turn in turns]
            quarter, _, three_quarters = statistics.quantiles(ratios, n=4)
            together = f"From {source.value} over the no-op, of all these turns together"
            said.append(
                at_least(together, ratios, RATIO_WANTED[source])
                + f" Half of these {len(ratios)} turns lie between {quarter:.2f} and {three_quarters:.2f}."
                + certainty(ratios)
                + f" By the no-op beside them: {_by_noop(turns)}."
            )
        if several[len(alike) :]:
            said.append(
                f"From {several[-1]}, over {alike[-1]}: {spread(_over(results, several[-1], alike[-1]), '.2f')}."
            )
    same = [turn.ratio for turn in _turns(results, ANOTHER)]
    said.append(f"Another process of the no-op, over the no-op: {spread(same, '.2f')}. It does the same.")
    names = [name for name, source in results.sources.items() if source is Source.MEMORY]
    said.append(at_least(f"Validate from {names[0]}, over the {PLAIN}", _over(results, names[0], PLAIN), GAIN_WANTED))
    return said


def certainty(values: Sequence[float]) -> str:
    """Says where the median of any number of such turns would lie; nothing, where there are too few to say.

    By the order of the values alone, whatever their distribution: https://en.wikipedia.org/wiki/Order_statistic.
    """
    found = bounds(values)
    return f" The median of more of them would lie between {found[0]:.2f} and {found[1]:.2f} (95 %)." if found else ""


def bounds(values: Sequence[float]) -> tuple[float, float] | None:
    """Gives the values between which that lies in 95 % of cases; None where there are too few to say."""
    few = math.floor((len(values) - NORMAL_95 * math.sqrt(len(values))) / 2)
    if few < 1:
        return None
    ordered = sorted(values)
    return ordered[few - 1], ordered[-few]


def _by_noop(turns: Sequence[Turn]) -> str:
    """Gives a median for each no-op that the turns were compared with."""
    names = sorted({turn.noop_name for turn in turns})
    medians = (statistics.median(turn.ratio for turn in turns if turn.noop_name == name) for name in names)
    return ", ".join(f"{median:.2f}" for median in medians)


def _over(results: Results, one: str, other: str) -> list[float]:
    """Compares the ratios of two servers, round by round."""
    pairs = zip(_turns(results, one), _turns(results, other), strict=True)
    return [first.ratio / second.ratio for first, second in pairs]


def at_least(what: str, values: Sequence[float], wanted: float, form: str = ".2f") -> str:
    """Says whether the median is as large as is wanted."""
    return _compared(what, values, f"at least {wanted}", form, is_reached=statistics.median(values) >= wanted)


def at_most(what: str, values: Sequence[float], wanted: float) -> str:
    """Says whether the median is as small as is wanted."""
    return _compared(what, values, f"at most {wanted}", ".2f", is_reached=statistics.median(values) <= wanted)


def _compared(what: str, values: Sequence[float], wanted: str, form: str, *, is_reached: bool) -> str:
    verdict = "reached" if is_reached else "not reached"
    return f"{what}: {spread(values, form)}; wanted {wanted}: {verdict}."


def warnings(results: Results) -> list[str]:
    """Says what speaks against the figures."""
    shares = [share for turn in results.turns for share in (turn.server.core_share, turn.noop.core_share)]
    starved = sum(share < STARVED_SHARE for share in shares)
    said = []
    if starved:
        said.append(
            f"In {starved} of {len(shares)} turns the server had less than {STARVED_SHARE:.0%} of its core (least:"
            f" {min(shares):.0%}): it had to wait for the load's core, or something else ran on its own."
            " Figures of such turns are too low; repeat on a machine that has nothing else to do."
        )
    if results.repeated:
        said.append(
            f"{results.repeated} {'turn was' if results.repeated == 1 else 'turns were'} done again: answers came"
            " from elsewhere than they were to. The load had asked for the same keys for too long, so that fewer were"
            " looked up; or what was in memory had reached its age, so that more were."
        )
    return said


def as_text(rows: Rows) -> str:
    """Writes rows for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def as_markdown(rows: Rows) -> str:
    """Writes rows for a page."""
    head, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " ---: |" * len(rows[0]), *others])
