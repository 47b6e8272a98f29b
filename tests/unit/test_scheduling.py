"""How the operating system is asked to run a worker."""

from __future__ import annotations

import os
import threading

from latchgate.scheduling import schedule_for_throughput


def test_threads_that_are_started_after_it_take_long_turns() -> None:
    """The thread that asks, and those that it starts, are scheduled for throughput; others are left as they are."""
    policies: list[int] = []
    before = os.sched_getscheduler(0)

    def ask() -> None:
        schedule_for_throughput()
        started = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        started.start()
        started.join()
        policies.append(os.sched_getscheduler(0))

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()

    assert [os.SCHED_BATCH] * 2 == policies
    assert before == os.sched_getscheduler(0)
