"""`make bench`: measures Validate against a no-op RPC of the same size, and writes docs/performance.md.

Exit codes: 0 measured (whatever the figures), 1 the figures can not be had or not be believed, 2 bad arguments,
3 the machine lacks what it takes, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import page, report  # noqa: E402 - found by the line above
from bench.load import h2load_path  # noqa: E402
from bench.machine import BenchError, Layout  # noqa: E402
from bench.rounds import Plan, Results, measure  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    arguments = _arguments()
    try:
        h2load_path()
        layout = Layout.share_out(os.sched_getaffinity(0))
    except BenchError as error:
        return _complain(error, 3)
    # h2load and what feeds it stay on one core; everything that is started inherits it, unless it is given another.
    os.sched_setaffinity(0, {layout.load})
    plan = Plan(
        keys=arguments.keys,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        processes=arguments.processes,
        seed=arguments.seed,
    )
    try:
        results = asyncio.run(_interruptible(plan, layout))
    except BenchError as error:
        return _complain(error, 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _complain("stopped", 130)
    _show(results)
    output = arguments.output or (PAGE if len(sys.argv) == 1 else None)
    if output is not None:
        output.write_text(page.write(plan, layout, results))
        _say(f"written: {output.name}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measures Validate against a no-op RPC.")
    parser.add_argument("--rounds", type=_positive, default=7, help="how many are counted (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn (%(default)s)")
    parser.add_argument("--keys", type=_counts, default=(1000, 1_000_000), help="numbers of keys (1000,1000000)")
    parser.add_argument("--processes", type=_positive, default=32, help="calls under way at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of keys (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(each) for each in text.split(",")}))


async def _interruptible(plan: Plan, layout: Layout) -> Results:
    """Measures; SIGTERM ends it in order, as Ctrl-C does."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measure(plan, layout, _say)


def _show(results: Results) -> None:
    _say("")
    _say(report.as_text(report.summary(results)))
    for line in ("", *report.findings(results), *report.warnings(results)):
        _say(line)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(problem: object, code: int) -> int:
    sys.stderr.write(f"bench: {problem}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
