"""The page docs/reliability.md."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from bench.machine import cpu_model
from cluster.clock import CAN_BE_STEPPED
from cluster.faults import FAULTS
from cluster.mutants import MUTANTS
from cluster.nodes import LEASE_S
from cluster.outages import BACK_WITHIN_S, REFUSED_WITHIN_S, WAYS, Outage
from cluster.provocations import Provocation
from cluster.trials import Verdict

WIDTH: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """A mutant that was found out, by what, and after how many seconds."""

    mutant: str
    provocation: Provocation
    seconds: float


@dataclass(kw_only=True)
class Results:
    """What a run has shown."""

    seed: int
    verdicts: list[Verdict] = field(default_factory=list)
    caught: list[Caught] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What did not come to a verdict: a cluster that did not recover, a mutant that was not found out."""
    violations_unbroken: int = 0
    """What the provocations led to in the service as it is."""

    @property
    def violations(self) -> int:
        """How many there were."""
        return self.violations_unbroken + sum(verdict.violations for verdict in self.verdicts)


def write(results: Results) -> str:
    """Writes the page."""
    blocks = (
        "# Reliability",
        _paragraph(
            "When RevokeKey, or any other change, is answered with EFFECTIVE, no worker accepts the former state any"
            " more. This page says under what assumptions, and shows what was done to real processes to disprove it."
            " It is written by `make faults`; its figures are those of one run on one machine."
        ),
        "## What is assumed",
        _ASSUMED.strip(),
        "## What is not guaranteed",
        _NOT_GUARANTEED.strip(),
        "## Results",
        _list(_findings(results)),
        "## How it was tried",
        _METHOD.strip(),
        "## Faults, one at a time",
        _faults(results.verdicts),
        "## Rules broken on purpose",
        _paragraph(
            "That the check can fail is shown by mutants: each breaks one rule in the real code, in all workers, and a"
            " schedule of held and delayed messages is repeated until a worker is seen to accept what was revoked."
            f" The same schedules over the unbroken service: {results.violations_unbroken} violations."
        ),
        _table(
            ("mutant", "what is broken", "what shows it", "found out after"),
            [
                (
                    f"`{each.mutant}`",
                    _first_line(MUTANTS[each.mutant].__doc__),
                    _first_line(each.provocation.__doc__),
                    f"{each.seconds:.1f} s",
                )
                for each in results.caught
            ],
        ),
        "## With the database away",
        _outages(results.outages),
        "## What was not tried",
        _NOT_TRIED.format(clock=_CLOCK if CAN_BE_STEPPED else _NO_CLOCK).strip(),
        "## Repeat it",
        _commands(results.seed),
        _paragraph(
            "It starts a PostgreSQL of its own. A violation is printed with its seed, the call, what was allowed, and"
            " the changes that it should have shown. A seed repeats which calls and faults come in which order and to"
            " whom, not how the processes run. `make test` has a short form of it: a few faults, a pair, three mutants."
        ),
    )
    return "\n\n".join(blocks) + "\n"


_ASSUMED: Final = """
- **Rates of clocks.** Within a lease, the clocks of two machines may run apart by 0.5 % of its length; NTP corrects by
  a tenth of that at the most. What the clocks show does not matter: they are never compared.
- **Suspended machines.** CLOCK_BOOTTIME goes on while a machine is suspended, so that a worker that wakes up finds its
  lease ended. A hypervisor that pauses a guest, or moves it, without telling its clock breaks that: for as long as the
  pause lasted, the guest's worker may answer from before a change after it was called effective.
- **One primary.** Workers read and write the primary alone. Two primaries at a time, after a failover that has not shut
  the old one out, can not be told from one by those who reach only one of them.
- **A disk that keeps what it has.** PostgreSQL runs with `fsync = on`, on a disk that does not lie.
"""
_NOT_GUARANTEED: Final = """
- **Asynchronous replication.** A failover to a standby that has not got everything loses acknowledged changes,
  revocations among them. Workers notice a log that is shorter than it was, and say so; they can not bring back what is
  gone.
- **`synchronous_commit = off`** on the server, or for the role, loses acknowledged changes in a crash of PostgreSQL,
  likewise.
- **Two primaries at a time**: what one revokes, the workers of the other accept.
- **Availability.** A worker that can not reach the database says UNAVAILABLE once its lease has ended, and within a
  second where it would have to ask. A change waits for a silent worker's lease to end, or is answered PENDING at its
  caller's deadline.
- **A call that is under way** while a change is made may be answered either way. So may any call between the commit of
  a change and its answer.
"""
_METHOD: Final = """
- Three workers, processes of their own, with leases of 1 s; PostgreSQL with `fsync = on`, over a socket. Each worker
  reaches it through a proxy that tells its links apart (notifications, the log, lookups, the wait for others,
  management) and can cut, refuse, hold, delay or half close each of them, one way or both.
- One client process calls Validate for every token on every worker all the time, also after the token's end. Beside
  that it creates, switches, rotates, revokes and deletes keys, and switches an organization, each call by way of a
  random worker with a deadline of 0.4, 1.5 or 5 s, and repeats what has failed.
- Every call is kept with the times of its invocation and return by one clock, its worker, outcome or error, and
  revision. No Validate may be answered from before a change that was effective when it was invoked (EFFECTIVE had
  returned, or the `max_remaining` of PENDING had passed, or a change of a higher revision was effective), nor with a
  lower revision than that of any such change; nor by an error but UNAVAILABLE, DEADLINE_EXCEEDED and CANCELLED. A
  change of unknown result may come at any time or never.
- After the faults every worker must answer again and have a change called effective; then GetKey and Validate on all
  workers must agree with the last acknowledged changes of every key.
"""
_NOT_TRIED: Final = """
{clock}
- **Failover to a standby**, lossy disks, loss of power, and suspension of the machine.
- **Several machines**: all clocks were one.
"""


_CLOCK: Final = """\
- **Stepping the kernel's clock.** Wall clocks were stepped for a worker's processes, or for PostgreSQL's, by a library
  between them and the C library (libfaketime): all that they read of it, but no timer of the kernel's. Keys with an
  expiry end by the database's clock, hence earlier or later by as much as that is stepped; none had one here."""
_NO_CLOCK: Final = """\
- **Stepping wall clocks.** On this platform libfaketime has no library. A test demands that no module of the service
  reads the wall clock: expiry goes by the database's clock, all else by CLOCK_BOOTTIME and CLOCK_MONOTONIC."""


def _commands(seed: int) -> str:
    return f"""```
make faults                      # writes this page; the same calls and faults again: ARGS="--seed {seed}"
make faults ARGS="--minutes 60"  # longer; with options no page is written, unless --output names a file
make faults ARGS="--only 'database killed & +50 ms' --seed 5"
make faults ARGS="--outages"     # what an outage of the database is like, alone
```"""


def _findings(results: Results) -> Iterable[str]:
    verdicts = results.verdicts
    readings = sum(verdict.readings for verdict in verdicts)
    undecided = sum(verdict.undecided for verdict in verdicts)
    changes = sum(verdict.changes for verdict in verdicts)
    revocations = sum(verdict.revocations for verdict in verdicts)
    alone = sum(len(verdict.faults) == 1 for verdict in verdicts)
    pairs = sum(len(verdict.faults) > 1 for verdict in verdicts)
    yield (
        f"**{results.violations} violations** in {readings:,} calls of Validate and GetKey ({undecided:,} of them not"
        f" decided) and {changes:,} changes, {sum(verdict.pending for verdict in verdicts):,} of them PENDING and"
        f" {sum(verdict.unknown for verdict in verdicts):,} of unknown result."
    )
    yield (
        f"{revocations:,} times something was taken away that was asked for again once that held: keys that were"
        " revoked, deleted or switched off, tokens that were rotated, organizations that were switched off."
    )
    yield f"{alone} faults alone and {pairs} pairs, in {sum(verdict.seconds for verdict in verdicts) / 60:.0f} minutes."
    for title, some in (
        ("without faults", [verdict for verdict in verdicts if not verdict.faults]),
        ("while faults lasted, alone and in pairs", [verdict for verdict in verdicts if verdict.faults]),
    ):
        yield f"From a change's invocation to EFFECTIVE, {title}: {_spread([s for v in some for s in v.effective_s])}."
    for failure in results.failures:
        yield f"**Failed**: {failure}."
    yield f"{cpu_model()}, {os.cpu_count()} cores; {datetime.now(UTC):%Y-%m-%d}; seed {results.seed}."


def _spread(values_s: Sequence[float]) -> str:
    if not values_s:
        return "none"
    ordered = sorted(values_s)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {_time(p50)}, p99 {_time(p99)}, max {_time(ordered[-1])}, of {len(ordered):,}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _faults(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for name in ("", *FAULTS):
        some = [verdict for verdict in verdicts if verdict.faults == ((name,) if name else ())]
        if some:
            effective_s = sorted(value for verdict in some for value in verdict.effective_s)
            rows.append(
                (
                    name or "none",
                    FAULTS[name][0] if name else f"nothing, with leases of {LEASE_S:g} s",
                    f"{sum(verdict.readings for verdict in some):,}",
                    f"{sum(verdict.undecided for verdict in some):,}",
                    f"{sum(verdict.revocations for verdict in some):,}",
                    _time(effective_s[len(effective_s) // 2]) if effective_s else "-",
                    _time(effective_s[-1]) if effective_s else "-",
                    f"{sum(verdict.violations for verdict in some)}",
                )
            )
    columns = (
        "fault",
        "what is done",
        "calls",
        "not decided",
        "revocations",
        "EFFECTIVE, p50",
        "EFFECTIVE, max",
        "violations",
    )
    return _table(columns, rows)


def _outages(outages: Sequence[Outage]) -> str:
    if not outages:
        return "Not measured in this run."
    refused_s = sorted(value for outage in outages for value in outage.refused_s)
    back_s = [value for outage in outages for value in outage.back_s]
    late = sum(value >= REFUSED_WITHIN_S for value in refused_s)
    return "\n\n".join(
        (
            _paragraph(
                f"{len(outages[0].back_s)} workers with leases of {outages[0].lease_s:g} s, the default, each asked all"
                " the time for a key in its memory, one call after the other, while the database was away for somewhat"
                " longer than the leases: for nothing else before they had ended, for a key that it had never looked up"
                " as well from then on. Times are those of the client, which shares the machine's cores with all else."
            ),
            _list(
                (
                    (
                        f"**UNAVAILABLE in under {_time(REFUSED_WITHIN_S)}** once a lease has ended:"
                        f" {len(refused_s) - late:,} of {len(refused_s):,} answers, from the very first on;"
                        f" {_spread(refused_s)}."
                    ),
                    (
                        f"**Full service within {BACK_WITHIN_S:g} s of its return**:"
                        f" {sum(value < BACK_WITHIN_S for value in back_s)} of {len(back_s)} times that a worker"
                        " answered from the database again, for a key that it had not looked up before; the slowest"
                        f" after {_time(max(back_s))}."
                    ),
                )
            ),
            _table(
                (
                    "database",
                    "what is done",
                    "answered from memory for",
                    "refusals",
                    "p50",
                    "p99",
                    "max",
                    "back after, slowest worker",
                    "new connections in the busiest 0.1 s after it",
                    "connections then",
                ),
                [_outage(outage) for outage in outages],
            ),
        )
    )


def _outage(outage: Outage) -> Sequence[str]:
    ordered = sorted(outage.refused_s)
    return (
        outage.way,
        WAYS[outage.way][0],
        f"{min(outage.memory_s):.1f} to {max(outage.memory_s):.1f} s",
        f"{len(ordered):,}",
        _time(ordered[len(ordered) // 2]),
        _time(ordered[int(len(ordered) * 0.99)]),
        _time(ordered[-1]),
        _time(max(outage.back_s)),
        f"{outage.burst}",
        f"{outage.links}",
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0].removesuffix(".")


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _list(texts: Iterable[str]) -> str:
    return "\n".join(
        textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for text in texts
    )
