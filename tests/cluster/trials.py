"""A trial: calls, some faults meanwhile, recovery, and the judgement on all that was answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from cluster.checker import check, explain, revocations_checked
from cluster.client import Client
from cluster.faults import FAULTS
from cluster.history import NANOSECONDS, Answer, History
from cluster.load import Load
from cluster.nodes import LEASE_S, Cluster

TRIAL_S: Final = 240.0
"""How long a trial may take at the most; most take a twentieth of it."""
SHOWN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a trial has shown. `effective_s` has the changes that were made while faults lasted and called effective."""

    faults: tuple[str, ...]
    seed: int
    seconds: float
    readings: int
    undecided: int
    changes: int
    pending: int
    unknown: int
    revocations: int
    effective_s: tuple[float, ...] = field(repr=False)
    violations: int
    account: str = field(repr=False)
    """The first violations with what belongs to them, for people."""


async def run_trial(cluster: Cluster, faults: Sequence[str], seed: int, *, calm_s: float = LEASE_S) -> Verdict:
    """Calls a cluster, has faults come over it, and judges the history. Without faults it is left alone for `calm_s`.

    The seed decides which calls and faults come in which order, and to whom; not how the processes run.
    """
    rng = Random(seed)  # noqa: S311 - to be repeated
    client = Client()
    load = Load(cluster, client, rng)
    began_s = time.monotonic()
    async with asyncio.timeout(TRIAL_S):
        async with load.running():
            await asyncio.sleep(calm_s / 2)
            # With no faults to come, the beginning counts as well.
            from_ns = time.monotonic_ns() if faults else client.history.began_ns
            async with asyncio.TaskGroup() as group:
                for name in faults:
                    group.create_task(_late(cluster, name, Random(rng.random())))  # noqa: S311 - to be repeated
            await asyncio.sleep(calm_s / 2)
            to_ns = time.monotonic_ns()
            await load.heal()
            await asyncio.sleep(calm_s / 2)
        await load.read_all()
    for worker in cluster.workers:
        assert not worker.complaints(), f"worker {worker.name}: {worker.complaints()[0]}"
    return _verdict(client.history, faults, seed, time.monotonic() - began_s, (from_ns, to_ns))


async def _late(cluster: Cluster, name: str, rng: Random) -> None:
    """Begins a fault at some time within a lease."""
    await asyncio.sleep(rng.uniform(0, LEASE_S))
    _, fault = FAULTS[name]
    await fault(cluster, rng)


def _verdict(history: History, faults: Sequence[str], seed: int, seconds: float, span_ns: tuple[int, int]) -> Verdict:
    found = check(history)
    answers = [change.answer for change in history.changes]
    return Verdict(
        faults=tuple(faults),
        seed=seed,
        seconds=seconds,
        readings=len(history.readings),
        undecided=sum(bool(reading.error) for reading in history.readings),
        changes=len(history.changes),
        pending=answers.count(Answer.PENDING),
        unknown=answers.count(Answer.UNKNOWN),
        revocations=revocations_checked(history),
        effective_s=tuple(
            (change.returned_ns - change.invoked_ns) / NANOSECONDS
            for change in history.changes
            if change.answer is Answer.EFFECTIVE and span_ns[0] <= change.invoked_ns <= span_ns[1]
        ),
        violations=len(found),
        account="\n".join(
            [f"seed {seed}, {' and '.join(faults) or 'no faults'}: {len(found)} violations"]
            + [explain(each, history) for each in found[:SHOWN]]
        ),
    )
