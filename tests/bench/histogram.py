"""Histograms as pictures: plain SVG, one panel for each series over one logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 820, 130, 90, 20, 40, 34
BINS_A_DECADE = 16


def draw(series: Mapping[str, Sequence[float]], title: str) -> str:
    """Draws the shares of values, in bins of equal ratios; marks each series' median and 99th percentile."""
    least = math.floor(math.log10(min(map(min, series.values()))) * BINS_A_DECADE)
    most = math.ceil(math.log10(max(map(max, series.values()))) * BINS_A_DECADE) + 1
    step = (WIDTH - LEFT - RIGHT) / (most - least)
    height = TOP + len(series) * (PANEL + GAP) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        '     font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for number, (name, values) in enumerate(series.items()):
        bottom = TOP + number * (PANEL + GAP) + PANEL
        counts = [0] * (most - least)
        for value in values:
            counts[math.floor(math.log10(value) * BINS_A_DECADE) - least] += 1
        parts.append(f'<text x="8" y="{bottom - PANEL / 2}">{escape(name)}</text>')
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
    return "\n".join([*parts, "</svg>", ""])


def _axis(least: int, most: int, step: float, bottom: float) -> list[str]:
    """Draws the axis of a panel, with a mark at 1, 2 and 5 of each decade."""
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="black"/>']
    for decade in range(least // BINS_A_DECADE, most // BINS_A_DECADE + 1):
        for digit in (1, 2, 5):
            place = (decade + math.log10(digit)) * BINS_A_DECADE
            if least <= place <= most:
                x = LEFT + (place - least) * step
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="black"/>'
                    f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{digit * 10.0**decade:g}</text>'
                )
    return parts
