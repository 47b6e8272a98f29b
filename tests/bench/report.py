"""The tables and what is to be said of them, for the terminal and for the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from bench.rounds import Results, ServiceTurn

RATIO_WANTED = 0.6
FLATNESS_WANTED = 0.9
STARVED_SHARE = 0.9

Rows = Sequence[Sequence[str]]

_HEAD = (
    "keys",
    "Validate, calls/s",
    "no-op, calls/s",
    "ratio",
    "p50, ms",
    "p99, ms",
    "server CPU, µs/call",
    "no-op CPU, µs/call",
    "PostgreSQL CPU, µs/call",
    "keys a statement",
)
_ROUNDS_HEAD = ("round", "keys", "Validate, calls/s", "no-op before", "no-op after", "ratio", "calls a statement")


def spread(values: Sequence[float], form: str) -> str:
    """Writes a median with the least and the most."""
    median = format(statistics.median(values), form)
    return median if len(values) == 1 else f"{median} ({min(values):{form}} to {max(values):{form}})"


def summary(results: Results) -> Rows:
    """Gives a row for each number of keys, the head first."""
    return [_HEAD, *(_row(keys, _turns(results, keys)) for keys in results.database_bytes)]


def _turns(results: Results, keys: int) -> list[ServiceTurn]:
    return [turn for turn in results.turns if turn.keys == keys]


def _row(keys: int, turns: list[ServiceTurn]) -> tuple[str, ...]:
    def column(value: Callable[[ServiceTurn], float], form: str) -> str:
        return spread([value(turn) for turn in turns], form)

    postgres = [turn.postgres_cpu_us for turn in turns if turn.postgres_cpu_us is not None]
    return (
        f"{keys:,}",
        column(lambda turn: turn.burst.per_s, ",.0f"),
        column(lambda turn: turn.noop_per_s, ",.0f"),
        column(lambda turn: turn.ratio, ".2f"),
        column(lambda turn: turn.burst.p50_ms, ".1f"),
        column(lambda turn: turn.burst.p99_ms, ".1f"),
        column(lambda turn: turn.server_cpu_us, ".0f"),
        column(lambda turn: turn.before.server_cpu_us, ".0f"),
        spread(postgres, ".0f") if postgres else "not known",
        column(lambda turn: turn.digests_per_statement, ".1f"),
    )


def rounds(results: Results) -> Rows:
    """Gives a row for each turn of Validate, the head first."""
    return [_ROUNDS_HEAD, *(_round_row(turn) for turn in results.turns)]


def _round_row(turn: ServiceTurn) -> tuple[str, ...]:
    rates = (turn.burst.per_s, turn.before.burst.per_s, turn.after.burst.per_s)
    return (
        str(turn.round),
        f"{turn.keys:,}",
        *(f"{rate:,.0f}" for rate in rates),
        f"{turn.ratio:.3f}",
        f"{turn.calls_per_statement:.1f}",
    )


def findings(results: Results) -> list[str]:
    """Compares with what is wanted, one sentence each."""
    said = []
    for keys in results.database_bytes:
        ratios = [turn.ratio for turn in _turns(results, keys)]
        said.append(
            _compared(f"Validate over no-op with {keys:,} {'key' if keys == 1 else 'keys'}", ratios, RATIO_WANTED)
        )
    several = sorted(keys for keys in results.database_bytes if keys > 1)
    if len(several) > 1:
        pairs = zip(_turns(results, several[0]), _turns(results, several[-1]), strict=True)
        flatness = [many.ratio / few.ratio for few, many in pairs]
        said.append(_compared(f"That with {several[-1]:,} keys over {several[0]:,} keys", flatness, FLATNESS_WANTED))
    return said


def _compared(what: str, values: Sequence[float], wanted: float) -> str:
    verdict = "reached" if statistics.median(values) >= wanted else "not reached"
    return f"{what}: {spread(values, '.2f')}; wanted at least {wanted}: {verdict}."


def warnings(results: Results) -> list[str]:
    """Says what speaks against the figures."""
    shares = [share for turn in results.turns for share in (turn.server_share, turn.before.server_share)]
    starved = sum(share < STARVED_SHARE for share in shares)
    if not starved:
        return []
    said = (
        f"In {starved} of {len(shares)} turns the server had less than {STARVED_SHARE:.0%} of its core (least:"
        f" {min(shares):.0%}): it had to wait for the load's core, or something else ran on its own."
        " Figures of such turns are too low; repeat on a machine that has nothing else to do."
    )
    return [said]


def as_text(rows: Rows) -> str:
    """Writes rows for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def as_markdown(rows: Rows) -> str:
    """Writes rows for a page."""
    head, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " ---: |" * len(rows[0]), *others])
