"""How the operating system is asked to run a worker's threads."""

from __future__ import annotations

import os
from contextlib import suppress


def schedule_for_throughput() -> None:
    """Asks for longer turns of this thread and those that it starts, where the system can be asked (SCHED_BATCH).

    A worker's event loop and grpc's poller wake each other for every call. Under the default policy each wake-up takes
    the processor from the one that woke: two switches a call more than needed. Any process may ask for this.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
