"""`python -m cluster.worker serve`: latchgate's own command line, in a process that can be blocked, or has a mutant."""

from __future__ import annotations

import os
import signal
import time

from cluster.mutants import MUTANTS
from latchgate.cli import main


def _block(*_: object) -> None:
    """Blocks the event loop for two leases, as code that computes for too long would."""
    time.sleep(2 * float(os.environ["LATCHGATE_LEASE_SECONDS"]))


if __name__ == "__main__":
    name = os.environ.pop("CLUSTER_MUTANT", "")
    if name:
        MUTANTS[name]()
    signal.signal(signal.SIGUSR1, _block)
    main()
