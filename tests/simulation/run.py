# ruff: noqa: T201 - it reports to the terminal
"""Runs simulated deployments: `python tests/simulation/run.py --seeds 5000 --first 0`; one alone with `--trace`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulation.deployment import Simulation


def main() -> int:
    """Says which seeds failed, and how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--trace", action="store_true", help="tell what happened, also where nothing is wrong")
    arguments = parser.parse_args()
    begun_s, failed, answers, hits = time.monotonic(), 0, 0, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        simulation = Simulation(seed)
        failure = simulation.run()
        answers += simulation.answers
        hits += simulation.from_memory
        if arguments.trace:
            print(simulation.story())
        if failure:
            failed += 1
            print(f"seed {seed}: {failure}")
    took_s = time.monotonic() - begun_s
    print(f"{arguments.seeds} seeds, {failed} failed, {answers} answers, {hits} from memory, {took_s:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
