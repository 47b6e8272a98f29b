"""`python -m cluster.worker`: one worker without a supervisor, which can be blocked by SIGUSR1, and may have a mutant.

It serves as the processes do that `latchgate serve` starts, but is told by its own number what befalls it: a supervisor
would replace a worker that was killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import structlog
import uvloop

from cluster.mutants import MUTANTS
from latchgate import config
from latchgate.app import serving
from latchgate.observability import configure_logging
from latchgate.scheduling import schedule_for_throughput
from latchgate.signals import Signals


def _block(*_: object) -> None:
    """Blocks the event loop for two leases, as code that computes for too long would."""
    time.sleep(2 * float(os.environ["LATCHGATE_LEASE_SECONDS"]))


async def _serve(settings: config.Settings) -> None:
    configure_logging(level=settings.log_level.value, as_json=True)
    signals = Signals()
    async with serving(settings) as running:
        if await signals.unless_stopped(running.ready) is not None:
            structlog.get_logger("cluster").info("serving", listen=running.listen, metrics=running.metrics_listen)
            await signals.unless_stopped(running.background.death())


if __name__ == "__main__":
    name = os.environ.pop("CLUSTER_MUTANT", "")
    if name:
        MUTANTS[name]()
    signal.signal(signal.SIGUSR1, _block)
    schedule_for_throughput()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config.load()))
