"""Values over time as pictures: one panel for each measure, in it a line for each series."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from bench.picture import LEFT, PANEL, RIGHT, WIDTH, axis_line, bottom_of, document, mark, name_of

COLOURS = ("#4878a8", "#b03030", "#3a8a4a", "#8a5aa0")
MARKS = 8
_STEPS = (1, 2, 5, 10)

Points = Sequence[tuple[float, float]]
"""Times and values, in the order of the times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A measure and its series by their names."""

    name: str
    series: Mapping[str, Points]


def draw(panels: Sequence[Panel], title: str) -> str:
    """Draws all panels over one axis of time, in the unit that the times are in. A panel without points stays empty."""
    times = [time for panel in panels for points in panel.series.values() for time, _ in points]
    last = max(times, default=0) or 1.0
    parts = [part for number, panel in enumerate(panels) for part in _panel(panel, bottom_of(number), last)]
    return document(title, len(panels), parts)


def _panel(panel: Panel, bottom: float, last: float) -> Iterator[str]:
    yield name_of(panel.name, bottom)
    values = [value for points in panel.series.values() for _, value in points]
    # From 0, so that small changes do not look like large ones.
    most = max(values, default=0) * 1.1 or 1.0
    for place, (name, points) in enumerate(panel.series.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(
            f"{LEFT + time / last * (WIDTH - LEFT - RIGHT):.1f},{bottom - value / most * PANEL:.1f}"
            for time, value in points
        )
        yield f'<polyline points="{path}" fill="none" stroke="{colour}"/>'
        yield f'<text x="{LEFT + 8 + 90 * place}" y="{bottom - 6}" fill="{colour}">{escape(name)}</text>'
    yield axis_line(bottom)
    yield f'<line x1="{LEFT}" x2="{LEFT}" y1="{bottom - PANEL}" y2="{bottom}" stroke="black"/>'
    for value in _round_values(most, 3):
        y = bottom - value / most * PANEL
        yield f'<line x1="{LEFT - 4}" x2="{LEFT}" y1="{y:.1f}" y2="{y:.1f}" stroke="black"/>'
        yield f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for time in _round_values(last, MARKS):
        yield mark(LEFT + time / last * (WIDTH - LEFT - RIGHT), bottom, f"{time:g}")


def _round_values(most: float, count: int) -> list[float]:
    """Gives round values at equal distances from 0 up to `most`, about so many."""
    decade = 10.0 ** math.floor(math.log10(most / count))
    step = next((each * decade for each in _STEPS if most / (each * decade) <= count), _STEPS[-1] * decade)
    return [number * step for number in range(int(most / step) + 1)]
