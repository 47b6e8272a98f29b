"""How long a limiter waits for the store before it counts as away: by real loops, of both kinds."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence

import pytest
import uvloop

from latchgate.domain.ports import RateAnswer, RateAsk
from latchgate.limiting import PATIENCE_S, SharedLimiter


class Store:
    """Has this process stand still, and answers meanwhile over a socket, unless it is silent."""

    def __init__(self, near: socket.socket, far: socket.socket, *, is_silent: bool) -> None:
        self.is_silent = is_silent
        self.near, self.far = near, far

    async def exchange(self, asks: Sequence[RateAsk]) -> RateAnswer:
        """Answers; at once where nothing is asked."""
        if not asks:
            return RateAnswer(1, {})
        loop = asyncio.get_running_loop()
        come = asyncio.Event()
        loop.add_reader(self.near, come.set)
        loop.call_soon(self._stand_still)
        try:
            await come.wait()
        finally:
            loop.remove_reader(self.near)
        return RateAnswer(1, {})

    def _stand_still(self) -> None:
        if not self.is_silent:
            self.far.send(b"an answer")
        time.sleep(PATIENCE_S * 1.5)


class Unobserved:
    """Is told of statements, and does not care."""

    def exchanged(self, keys: int, seconds: float) -> None:
        """Nothing."""

    def not_exchanged(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("is_silent", [False, True])
def test_answer_that_came_while_the_process_stood_still_is_read(
    make_loop: Callable[[], asyncio.AbstractEventLoop], is_silent: bool
) -> None:
    """A store that has answered in time is not away because its answer was read late; one that has not, is."""

    async def ask(store: Store) -> SharedLimiter:
        limiter = SharedLimiter(store=store, clock=time.monotonic, observer=Unobserved())
        running = asyncio.create_task(limiter.run())
        await limiter.wait("key_1", 10, 1)
        running.cancel()
        return limiter

    near, far = socket.socketpair()
    with near, far, asyncio.Runner(loop_factory=make_loop) as runner:
        limiter = runner.run(ask(Store(near, far, is_silent=is_silent)))

    assert is_silent is limiter.allotments.is_alone
