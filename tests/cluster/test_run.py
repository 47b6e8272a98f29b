"""`make faults` as a command, and the page that it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import page
from cluster.outages import Outage
from cluster.page import Caught, Results
from cluster.provocations import PROVOKED_BY
from cluster.trials import Verdict

RUN = Path(__file__).with_name("run.py")


def _verdict(*faults: str, **fields: Any) -> Verdict:
    values: dict[str, Any] = {
        "faults": faults,
        "seed": 5,
        "seconds": 60.0,
        "readings": 1000,
        "undecided": 10,
        "changes": 50,
        "pending": 3,
        "unknown": 4,
        "revocations": 20,
        "effective_s": (0.01, 0.02, 1.5),
        "violations": 0,
        "account": "",
    }
    return Verdict(**(values | fields))


def unfolded(text: str) -> str:
    """Puts the lines of a text one behind the other."""
    return " ".join(text.split())


def test_the_page_says_what_was_found() -> None:
    """Violations, failures, times to EFFECTIVE with and without faults, each fault and each mutant are on the page."""
    results = Results(
        seed=5,
        verdicts=[_verdict(effective_s=(0.01,)), _verdict("+50 ms"), _verdict("+50 ms", "partition", violations=2)],
        caught=[
            Caught(mutant=name, provocation=provocation, seconds=1.25) for name, provocation in PROVOKED_BY.items()
        ],
        outages=[
            Outage(
                way="frozen",
                lease_s=10.0,
                memory_s=(9.1, 9.7),
                refused_s=(*([0.002] * 98), 0.003, 0.08),
                back_s=(0.2, 0.3),
                burst=4,
                links=10,
            )
        ],
        failures=["seed 6, partition: TimeoutError"],
    )
    written = page.write(results)
    assert "**2 violations** in 3,000 calls" in written
    assert "1 faults alone and 1 pairs, in 3 minutes" in written
    assert "without faults: p50 10 ms, p99 10 ms, max 10 ms, of 1." in written
    assert "| +50 ms | all of a worker's traffic with the database 50 ms later each way | 1,000 | 10 | 20 |" in written
    assert "**Failed**: seed 6, partition: TimeoutError" in written
    assert "99 of 100 answers, from the very first on; p50 2 ms, p99 80 ms, max 80 ms, of 100." in unfolded(written)
    assert "of its return**: 2 of 2 times that a worker answered" in unfolded(written)
    assert (
        "| frozen | SIGSTOP of all of PostgreSQL's processes | 9.1 to 9.7 s | 100 | 2 ms | 80 ms | 80 ms |" in written
    )
    assert all(f"| `{name}` | " in written for name in PROVOKED_BY)
    assert max(map(len, written.partition("## Faults")[0].splitlines())) <= page.WIDTH


def test_a_fault_that_is_not_known_is_refused() -> None:
    """A slip of the pen is told in one line, before anything is started."""
    ended = subprocess.run(
        [sys.executable, str(RUN), "--only", "+50 ms & no such fault"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 2 == ended.returncode
    assert "no such fault: no such fault; there are: worker killed" in ended.stderr
