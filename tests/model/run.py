"""`make model`: searches everything that the coherence protocol can do, and everything that its mutants can.

Exit codes: 0 the protocol holds and every mutant was caught, 1 not so, 2 bad arguments, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from model.deviations import Mutant, Variant  # noqa: E402 - found by the line above
from model.explore import Result, explore  # noqa: E402
from model.protocol import Protocol  # noqa: E402
from model.state import Bounds  # noqa: E402

# The widest first: each of the others goes further in one direction.
FULL = (
    Bounds(workers=2, keys=2, changes=2),
    Bounds(workers=1, keys=2, changes=3),
    Bounds(workers=1, keys=2, changes=2, lookups=2),
    Bounds(workers=3, keys=1, changes=1),
)
# What the service does is searched as far as what the protocol says.
BUILT = Variant.EVICTION_BY_COMMIT
VARIANTS = (Bounds(workers=1, keys=2, changes=2), Bounds(workers=2, keys=2, changes=1))
# The first in which a mutant is caught will do.
MUTANTS = (Bounds(changes=1), Bounds(changes=2))


def main() -> int:
    """Runs all searches and gives the exit code."""
    parser = argparse.ArgumentParser(prog="make model", description="Checks the model of the coherence protocol.")
    parser.add_argument("--traces", action="store_true", help="print how each mutant breaks the promise")
    traces = parser.parse_args().traces
    try:
        sound = [_holds("the protocol", bounds, None) for bounds in FULL]
        sound += [_holds(BUILT.value, bounds, BUILT) for bounds in FULL]
        sound += [_holds(variant.value, bounds, variant) for variant in set(Variant) - {BUILT} for bounds in VARIANTS]
        caught = [_caught(mutant, traces=traces) for mutant in Mutant]
    except KeyboardInterrupt:
        return 130
    _say(f"\n{sum(sound)} of {len(sound)} searches without a violation, {sum(caught)} of {len(caught)} mutants caught")
    return 0 if all(sound) and all(caught) else 1


def _holds(name: str, bounds: Bounds, deviation: Variant | None) -> bool:
    protocol = Protocol(bounds, deviation)
    result = explore(protocol, protocol.violation)
    _say(f"{'holds' if result.problem is None else 'BROKEN'}: {name}\n        {_size(bounds, result)}")
    if result.problem is not None:
        _say(result.story())
    return result.problem is None


def _caught(mutant: Mutant, *, traces: bool) -> bool:
    for bounds in MUTANTS:
        protocol = Protocol(bounds, mutant)
        result = explore(protocol, protocol.stale_answer)
        if result.problem is not None:
            _say(f"caught: {mutant.value}\n        {_size(bounds, result)}, {len(result.trace)} steps")
            if traces:
                _say(result.story())
            return True
    _say(f"SURVIVES: {mutant.value}\n        {_size(bounds, result)}")
    return False


def _size(bounds: Bounds, result: Result) -> str:
    world = ", ".join(f"{count} {name}" for name, count in bounds._asdict().items())
    return f"{world}: {result.states:,} states, {result.transitions:,} transitions, {result.seconds:.1f} s"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
