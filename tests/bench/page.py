"""The page docs/performance.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from bench import report
from bench.alternation import GAP_S, LEAD_S, SLICE_S
from bench.load import TURN_S
from bench.machine import Layout, cpu_model, versions
from bench.report import spread
from bench.rounds import LEAST_LOOKUPS, MOST_LOOKUPS, NICENESS, NOOPS, Plan, Results
from latchgate.rpc.server import SERVERS

WIDTH = 120


def write(plan: Plan, layout: Layout, results: Results, note: str) -> str:
    """Writes the page, with a note on how the machine was used besides."""
    blocks = (
        "# Performance",
        paragraph(
            "What a validation costs beyond the RPC that carries it, and whether it depends on how many keys there are."
            " This page is written by `make bench`; its figures are those of one run on one machine."
        ),
        "## Results",
        report.as_markdown(report.summary(results)),
        bullets(report.findings(results)),
        paragraph(f"Medians of {plan.rounds} rounds, with the least and the most in brackets."),
        *(paragraph(f"**{each}**") for each in report.warnings(results)),
        "## What is compared",
        bullets(_method(plan, results)),
        "## Machine",
        bullets([*_machine(layout, results), *([note] if note else [])]),
        "## Every round",
        "The no-op is the one of them that was called by turns with that server.",
        report.as_markdown(report.rounds(results)),
        "## Repeat it",
        "```\nmake bench\n```",
        paragraph(
            "It needs Linux, two cores, ten gigabytes of disk and `h2load` (on Debian and Ubuntu: `apt-get install"
            " nghttp2-client`), and takes about three quarters of an hour, of which six minutes are for filling the"
            " databases. With `LATCHGATE_DATABASE_URL` it uses a PostgreSQL server of yours: it makes databases of its"
            " own there, and drops them. `python tests/bench/run.py --help` lists what can be varied. A run with"
            " options writes no page, unless `--output` names a file."
        ),
    )
    return "\n\n".join(blocks) + "\n"


def _method(plan: Plan, results: Results) -> Iterator[str]:
    rests = spread([results.rests[name] * 100 for name in results.keys], ".1f")
    asked = " and ".join(f"{results.distinct_keys[keys]:,} of {keys:,}" for keys in results.distinct_keys if keys > 1)
    yield (
        "**Memory**: `latchgate serve` with one worker and else its default settings, which has been asked for every"
        " token once before. **Database**: the same with room for one key in memory, so that every token is looked up."
        " The keys have three permissions, of which a request needs one, a rate limit that is counted and never"
        " reached, and two entries of metadata. Last uses are written."
    )
    yield (
        "**No-op**: a process on the same grpcio, with the same options, as many of grpc's servers on its port"
        f" ({SERVERS}), the same event loop and scheduling, that reads the same requests ({results.request_bytes}"
        " bytes) and gives to all one of the service's own answers"
        f" ({results.answer_bytes} bytes). There are {NOOPS} such processes, because those of the same code may differ"
        " by some percents, each for as long as it runs: a server is compared with one of them for two rounds, in one"
        " of which it goes first, and then with the next. **Another no-op**: one more, measured as if it were another"
        " server. **On a single server**: the same, but for the number of servers. **On default grpc.aio**: the same"
        " handler on grpc.aio and uvloop as they come, on a single server, without the service's choice of options and"
        " scheduling."
    )
    yield (
        f"**Turns**: each server is called by turns with a no-op, {SLICE_S:g} s the one and {SLICE_S:g} s the"
        f" other, until each was called for {plan.seconds:g} s, or for half of that at least where the load was slow"
        " to start; then the next server, in an order drawn anew for each round. Whatever the machine does for"
        f" longer than that, it does to both. Before each such slice nobody is called for {GAP_S * 1000:g} ms, and"
        f" then the one whose turn it is for {LEAD_S * 1000:g} ms that are not counted: until then the processor's"
        " caches are as the other has left them. What a server does while the other is called is charged to it: its"
        " processor time then is added to its own time, and taken off the other's; but for what it does at any time,"
        " called or not, which it has done in its own time as well: that is what each server was seen to take in"
        f" {plan.rest_s:.0f} s in which none was called ({rests} % of the core for each service). A first round is not"
        " counted. All servers run all the time: what those take that are not asked, they take from both alike."
        " Every five seconds a service writes how keys were used, which comes in some turns and in others not; after"
        " its turn it is waited for."
    )
    yield (
        f"**Load**: {plan.processes} processes of `h2load` for each of the two, with one connection and one request"
        f" at a time, and a niceness of {NICENESS}: PostgreSQL comes first where it has to share their core. h2load"
        f" sends one body for ever, but reads it anew from its file for each request, and every {TURN_S * 1000:g} ms"
        f" each file is given another token: drawn at random from those of {plan.in_use:,} keys that lie evenly among"
        " all, or of all keys where there are fewer, so that nothing but the number of keys in the database changes."
        " Servers by whose names more are in use are asked for as many."
        + (f" By the last uses in the database, {asked} keys were asked for." if asked else "")
    )
    yield (
        "**Checked** in every turn: all calls ended with HTTP 200 and a message of full size; the service counted as"
        " many VALID answers as h2load saw, and no others but NOT_FOUND for at most one in a thousand, whose tokens"
        " were read while they were being replaced; before and after, an ordinary client was told the right key"
        " for known tokens, and NOT_FOUND for two that were never made; and the tokens looked up were at most"
        f" {MOST_LOOKUPS:.0%} of the answers from memory, as what has been there for five to ten minutes is looked up"
        f" anew, and at least {LEAST_LOOKUPS:.0%} of those from the database."
    )
    yield (
        "**Measured**: calls a second, and the time from request to answer of those that began early enough in a"
        " slice to be told of in time, both from h2load's log of every call; CPU from `/proc`: the servers' with all"
        " of their threads, PostgreSQL's that of the service's connections to its database; keys a statement from the"
        " service's metrics."
    )


def _machine(layout: Layout, results: Results) -> Iterator[str]:
    yield f"{cpu_model()}, {layout.total} cores; {datetime.now(UTC):%Y-%m-%d}."
    if not results.is_embedded:
        postgres = "PostgreSQL wherever it was started"
    elif layout.load in layout.database:
        postgres = "and PostgreSQL shared that core with it"
    else:
        postgres = "PostgreSQL on the rest"
    validate = [turn.server for turn in results.turns if turn.name in results.keys]
    own = spread([each.core_share * 100 for each in validate], ".0f")
    busy = spread([each.load_share * 100 for each in validate], ".0f")
    yield (
        f"The servers ran on core {layout.server} and on no other, one under load at a time; h2load on core"
        f" {layout.load}, {postgres}. While Validate was measured it used {own} % of its core's time, and h2load's core"
        f" was busy for {busy} % of the time."
    )
    software = ", ".join(f"{name} {number}" for name, number in versions().items())
    kind = "the embedded one" if results.is_embedded else "the one that LATCHGATE_DATABASE_URL names"
    yield (
        f"{software}; PostgreSQL {results.postgres_version}, {kind}, with shared_buffers at {results.shared_buffers}."
    )
    sizes = ", ".join(f"{size / 1e6:,.0f} MB with {keys:,}" for keys, size in results.database_bytes.items())
    yield f"Size of the databases by their keys: {sizes}."


def machine_line(cores: int) -> str:
    """Says on what a benchmark was run, on how many cores, and when."""
    software = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"Machine: {cpu_model()}; {cores} cores; {software}; {datetime.now(UTC):%Y-%m-%d}."


def paragraph(text: str) -> str:
    """Breaks a paragraph into lines."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def bullets(texts: Iterable[str]) -> str:
    """Writes a list, each entry broken into lines."""
    return "\n".join(
        textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for text in texts
    )
