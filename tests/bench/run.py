"""`make bench`: measures Validate against a no-op RPC of the same size, and writes docs/performance.md.

Exit codes: 0 measured (whatever the figures), 1 the figures can not be had or not be believed, 2 bad arguments,
3 the machine lacks what it takes, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, page, report  # noqa: E402 - found by the line above
from bench.command import counts, positive, say  # noqa: E402 - the same
from bench.rounds import Plan, Results, measure  # noqa: E402 - the same

KEYS = (1000, 1_000_000, 10_000_000)
PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    arguments = _arguments()
    layout = command.one_core_for_the_load()
    plan = Plan(
        keys=arguments.keys,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        processes=arguments.processes,
        in_use=arguments.in_use,
        seed=arguments.seed,
    )
    results = command.run(measure(plan, layout, say))
    _show(results)
    command.write_page(page.write(plan, layout, results, arguments.note), arguments.output, PAGE)
    return 0


def _arguments() -> argparse.Namespace:
    parser = command.arguments("make bench", "Measures Validate against a no-op RPC.", rounds=16, seconds=1.4)
    parser.add_argument("--keys", type=counts, default=KEYS, help=f"numbers of keys ({','.join(map(str, KEYS))})")
    parser.add_argument("--processes", type=positive, default=32, help="calls under way at a time (%(default)s)")
    parser.add_argument("--in-use", type=positive, default=1000, help="how many of them are asked for (%(default)s)")
    command.take_note(parser)
    return parser.parse_args()


def _show(results: Results) -> None:
    say("")
    say(report.as_text(report.summary(results)))
    for line in ("", *report.findings(results), *report.warnings(results)):
        say(line)


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
