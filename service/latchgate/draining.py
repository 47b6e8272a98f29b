"""Stopping so that no call which has arrived is lost."""

from __future__ import annotations

import asyncio
from typing import Final

from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import RpcServer

# Long enough for grpc's own threads to read what has arrived on a busy machine, short for whoever waits.
QUIET_S: Final = 0.02
MAX_HOLD_S: Final = 0.1


async def drain(server: RpcServer, pipeline: Pipeline, grace_s: float) -> None:
    """Says NOT_SERVING, takes no new calls, and gives those that have come `grace_s` to finish.

    When grpc is told to stop, it lets the calls finish that have reached their handlers, and kills those that have come
    and were not fetched yet: their clients see CANCELLED, which none repeats by itself. So all calls are fetched and
    held first, which takes a moment, because who waits for an answer asks for nothing more. Only then is the server
    told to stop, and then they are answered. What can still be lost is what a client sends on an open connection before
    it hears that the server stops.
    """
    await server.set_serving(is_serving=False)
    pipeline.hold()
    await _quiet(pipeline)
    stopped = asyncio.create_task(server.stop(grace_s))
    # One turn of the loop, in which the stop reaches grpc.
    await asyncio.sleep(0)
    pipeline.release()
    await stopped


async def _quiet(pipeline: Pipeline) -> None:
    """Waits until no more calls come; not for long, because others may send without waiting for answers."""
    for _ in range(round(MAX_HOLD_S / QUIET_S)):
        before = pipeline.held
        await asyncio.sleep(QUIET_S)
        if pipeline.held == before:
            return
