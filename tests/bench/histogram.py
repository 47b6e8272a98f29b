"""Histograms as pictures: plain SVG, one panel for each series over one logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.picture import LEFT, PANEL, RIGHT, WIDTH, axis_line, bottom_of, document, mark, name_of

BINS_A_DECADE = 16


def draw(series: Mapping[str, Sequence[float]], title: str) -> str:
    """Draws the shares of values, in bins of equal ratios; marks each series' median and 99th percentile."""
    least = math.floor(math.log10(min(map(min, series.values()))) * BINS_A_DECADE)
    most = math.ceil(math.log10(max(map(max, series.values()))) * BINS_A_DECADE) + 1
    step = (WIDTH - LEFT - RIGHT) / (most - least)
    parts = []
    for number, (name, values) in enumerate(series.items()):
        bottom = bottom_of(number)
        counts = [0] * (most - least)
        for value in values:
            counts[math.floor(math.log10(value) * BINS_A_DECADE) - least] += 1
        parts.append(name_of(name, bottom))
        for place, count in enumerate(counts):
            tall = PANEL * count / max(counts)
            parts.append(
                f'<rect x="{LEFT + place * step:.1f}" y="{bottom - tall:.1f}" width="{step - 1:.1f}"'
                f' height="{tall:.1f}" fill="#4878a8"/>'
            )
        ordered = sorted(values)
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            value = ordered[min(int(len(ordered) * share), len(ordered) - 1)]
            x = LEFT + (math.log10(value) * BINS_A_DECADE - least) * step
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom - PANEL}" y2="{bottom}" stroke="#b03030"/>'
                f'<text x="{x + 3:.1f}" y="{bottom - PANEL + 11}" fill="#b03030">{label} {value:.1f}</text>'
            )
        parts += _axis(least, most, step, bottom)
    return document(title, len(series), parts)


def _axis(least: int, most: int, step: float, bottom: float) -> list[str]:
    """Draws the axis of a panel, with a mark at 1, 2 and 5 of each decade."""
    parts = [axis_line(bottom)]
    for decade in range(least // BINS_A_DECADE, most // BINS_A_DECADE + 1):
        for digit in (1, 2, 5):
            place = (decade + math.log10(digit)) * BINS_A_DECADE
            if least <= place <= most:
                parts.append(mark(LEFT + (place - least) * step, bottom, f"{digit * 10.0**decade:g}"))
    return parts
