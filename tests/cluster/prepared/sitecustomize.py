"""Runs at the start of every Python process of a worker, however it comes to be: puts in a mutant, makes it blockable.

Python imports this module by itself where this folder is in PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import time


def _block(*_: object) -> None:
    """Blocks the event loop for two leases, as code that computes for too long would."""
    time.sleep(2 * float(os.environ["LATCHGATE_LEASE_SECONDS"]))


signal.signal(signal.SIGUSR1, _block)
_NAME = os.environ.get("CLUSTER_MUTANT", "")
if _NAME:
    from cluster.mutants import MUTANTS

    MUTANTS[_NAME]()
