"""`make faults`: all faults alone and in seeded pairs, all mutants, and the page docs/reliability.md.

Exit codes: 0 nothing was violated and every mutant was found out, 1 otherwise, 2 bad arguments, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from cluster import page  # noqa: E402 - found by the line above
from cluster.checker import check, explain  # noqa: E402 - the same
from cluster.faults import FAULTS  # noqa: E402 - the same
from cluster.nodes import Cluster, running_cluster  # noqa: E402 - the same
from cluster.outages import LEASE_S, WAYS, measure  # noqa: E402 - the same
from cluster.page import Caught, Results  # noqa: E402 - the same
from cluster.postgres import Postgres  # noqa: E402 - the same
from cluster.provocations import PROVOKED_BY, WITHIN_S, Scene, provoke  # noqa: E402 - the same
from cluster.trials import Verdict, run_trial  # noqa: E402 - the same

PAGE: Final = ROOT / "docs" / "reliability.md"
CALM_S: Final = 6.0
CALM_TRIALS: Final = 4


def main() -> int:
    """Runs everything and gives the exit code."""
    arguments = _arguments()
    try:
        results = asyncio.run(_interruptible(arguments))
    except (KeyboardInterrupt, asyncio.CancelledError):
        _say("stopped")
        return 130
    output = arguments.output or (PAGE if len(sys.argv) == 1 else None)
    if output is not None:
        output.write_text(page.write(results))
        _say(f"written: {output.name}")
    _say(f"{results.violations} violations, {len(results.failures)} failures")
    return 1 if results.violations or results.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make faults", description="Faults over a cluster of real processes.")
    parser.add_argument("--minutes", type=float, default=12.0, help="for how long to go on with pairs (%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the whole run (random)")
    parser.add_argument("--only", metavar="FAULT[&FAULT]", help="one trial, by the seed that it was shown with")
    parser.add_argument("--outages", action="store_true", help="measure alone how long it takes with the database away")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    arguments = parser.parse_args()
    if arguments.only is not None and (unknown := set(_names(arguments.only)) - FAULTS.keys()):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are: {'; '.join(FAULTS)}")
    return arguments


def _names(only: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in only.split("&") if name.strip())


async def _interruptible(arguments: argparse.Namespace) -> Results:
    """Runs everything; SIGTERM ends it in order, as Ctrl-C does."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    results = Results(seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="latchgate-cluster-") as folder:
        postgres = await Postgres.start(Path(folder))
        try:
            if arguments.outages:
                await _outages(postgres, results)
            elif arguments.only is not None:
                await _try_all(postgres, results, iter([(_names(arguments.only), arguments.seed)]))
            else:
                _say(f"seed {arguments.seed}")
                until_s = time.monotonic() + arguments.minutes * 60
                await _mutants(postgres, results)
                await _outages(postgres, results)
                await _try_all(postgres, results, _plan(Random(arguments.seed), until_s))  # noqa: S311 - to be repeated
        finally:
            postgres.stop()
    return results


def _plan(rng: Random, until_s: float) -> Iterator[tuple[tuple[str, ...], int]]:
    """Gives the faults and the seed of each trial: none, each alone, and pairs for as long as there is time."""
    for _ in range(CALM_TRIALS):
        yield (), rng.randrange(1 << 30)
    for name in FAULTS:
        yield (name,), rng.randrange(1 << 30)
    while time.monotonic() < until_s:
        yield tuple(rng.sample(list(FAULTS), k=2)), rng.randrange(1 << 30)


async def _try_all(postgres: Postgres, results: Results, plan: Iterator[tuple[tuple[str, ...], int]]) -> None:
    """Makes the trials, on one cluster for as long as it recovers."""
    async with AsyncExitStack() as stack:
        cluster: Cluster | None = None
        for faults, seed in plan:
            try:
                if cluster is None:
                    cluster = await stack.enter_async_context(running_cluster(postgres))
                verdict = await run_trial(cluster, faults, seed, calm_s=1.0 if faults else CALM_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next trial is to come
                await stack.aclose()
                cluster = None
                results.failures.append(f"seed {seed}, {_title(faults)}: {_text(error)}")
                _say(f"FAILED {results.failures[-1]}")
            else:
                results.verdicts.append(verdict)
                _show(verdict)


def _title(faults: tuple[str, ...]) -> str:
    return " & ".join(faults) or "no faults"


def _text(error: BaseException) -> str:
    """Writes an error, or those in a group, in one line."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_text, error.exceptions))
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__} {error}".strip().partition("\n")[0]
    return f"{text} ({Path(where.filename).name}:{where.lineno})"


def _show(verdict: Verdict) -> None:
    slowest_s = max(verdict.effective_s, default=0.0)
    _say(
        f"{_title(verdict.faults):60} {verdict.seconds:5.1f} s, {verdict.readings:5} calls, "
        f"{verdict.revocations:3} revocations, slowest {slowest_s:.2f} s, {verdict.violations} violations"
    )
    if verdict.violations:
        _say(verdict.account)


async def _outages(postgres: Postgres, results: Results) -> None:
    """Measures what an outage of the database is like for callers, in every way that it can be away."""
    try:
        async with running_cluster(postgres, lease_s=LEASE_S) as cluster:
            for way in WAYS:
                outage = await measure(cluster, way, LEASE_S)
                results.outages.append(outage)
                _say(
                    f"{'database ' + way:60} {max(outage.memory_s):5.1f} s memory, {len(outage.refused_s)} refused, "
                    f"slowest {max(outage.refused_s) * 1000:.0f} ms, back within {max(outage.back_s):.2f} s"
                )
    except Exception as error:  # noqa: BLE001 - whatever it is, the trials are to come
        results.failures.append(f"outages: {_text(error)}")
        _say(f"FAILED {results.failures[-1]}")


async def _mutants(postgres: Postgres, results: Results) -> None:
    """Has every mutant found out, and the provocations tried on the service as it is."""
    for mutant, provocation in PROVOKED_BY.items():
        async with running_cluster(postgres, "ab", mutant) as cluster:
            scene = Scene(cluster)
            await scene.prepare()
            try:
                seconds, _ = await provoke(scene, provocation)
            except TimeoutError:
                results.failures.append(f"mutant {mutant} was not found out within {WITHIN_S:g} s")
                _say(f"FAILED {results.failures[-1]}")
            else:
                results.caught.append(Caught(mutant=mutant, provocation=provocation, seconds=seconds))
                _say(f"{mutant:60} {seconds:5.1f} s, found out")
    async with running_cluster(postgres, "ab") as cluster:
        scene = Scene(cluster)
        await scene.prepare()
        for provocation in dict.fromkeys(PROVOKED_BY.values()):
            await provocation(scene)
        found = check(scene.client.history)
        results.violations_unbroken = len(found)
        _say(f"{'no mutant, all provocations':60} {len(found)} violations")
        for violation in found[:3]:
            _say(explain(violation, scene.client.history))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
