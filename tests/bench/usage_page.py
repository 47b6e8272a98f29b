"""The page of what counting usage takes."""

from __future__ import annotations

import os

from bench.history import DAYS_OF_ALL, DAYS_OF_BUSY
from bench.page import machine_line, paragraph
from bench.report import Rows, as_markdown
from latchgate.domain.usage import MAX_EXAMINED
from latchgate.storage.usage import FLUSH_ROWS, FLUSH_SECRETS, FLUSHES


def write(keys: int, tables: tuple[Rows, Rows, Rows], *, compared: int, sizes: str, note: str) -> str:
    """Writes the page, of a comparison over `compared` keys, flushes and queries."""
    notes, flushes, queries = tables
    blocks = (
        "# What counting usage takes",
        paragraph(
            "[Usage](usage.md) says what is counted, and how. This page is written by `make bench-usage`; its figures"
            " are medians of one run on one machine, with the least and the most in brackets."
        ),
        "## What an answer takes",
        as_markdown(notes),
        paragraph(
            "Processor time, in rounds that alternate within one process, each over"
            f" {compared:,} keys. It is all that an answer takes for usage: nothing else is done until the flush."
        ),
        "## What a flush takes",
        as_markdown(flushes),
        paragraph(
            f"One worker's writing, with {keys:,} keys in the database, of so many keys at random that were answered"
            f" with VALID: their times, counts and their organizations' counts, {FLUSH_ROWS} keys in a transaction."
            f" More than {FLUSH_SECRETS:,} are written by up to {FLUSHES} flushes, one after the other; the seconds are"
            " those of all of them. PostgreSQL is on the same machine, and its time is in the figures. A piece of work"
            " is what the worker does at a stretch, in processor time: for so long nobody else is answered."
        ),
        "## What it takes to tell",
        as_markdown(queries),
        paragraph(
            f"On the same database, through the storage layer as UsageService asks it. {sizes} Every key was used in"
            f" one hour of each of {DAYS_OF_ALL} days; the keys that are asked for, in each hour of {DAYS_OF_BUSY}"
            f" days. A page of unused keys looks at {MAX_EXAMINED:,} keys at most."
        ),
        *([paragraph(note)] if note else []),
        paragraph(machine_line(len(os.sched_getaffinity(0)))),
        "## Repeat it",
        "```\nmake bench-usage\n```",
    )
    return "\n\n".join(blocks) + "\n"
