"""What the pictures of the benchmarks have in common: plain SVG, panels one below the other."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 820, 130, 90, 20, 40, 34


def document(title: str, panels: int, parts: Iterable[str]) -> str:
    """Writes a picture of so many panels."""
    height = TOP + panels * (PANEL + GAP) + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        '     font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    )
    return "\n".join([*head, *parts, "</svg>", ""])


def bottom_of(panel: int) -> int:
    """Gives where a panel's axis lies; panels are counted from 0."""
    return TOP + panel * (PANEL + GAP) + PANEL


def name_of(text: str, bottom: float) -> str:
    """Writes a panel's name beside it."""
    return f'<text x="8" y="{bottom - PANEL / 2}">{escape(text)}</text>'


def axis_line(bottom: float) -> str:
    """Draws a panel's horizontal axis."""
    return f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="black"/>'


def mark(x: float, bottom: float, label: str) -> str:
    """Draws a mark on a horizontal axis, with what it stands for below."""
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="black"/>'
        f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
    )
