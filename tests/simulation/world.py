# ruff: noqa: SLF001 - what asyncio documents for those who make loops and tasks begins with an underscore
"""Simulated time: event loops that never sleep, and the one place that says which of them goes on, and when.

Each worker has a loop of its own, so that one can stand still (stopped, suspended, starved) while time goes on for the
others. Within a loop everything runs in asyncio's order; whatever asyncio and the system leave open is drawn from the
seed: which loop is next, and in which order a loop hears of what has come while it was busy.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

# Timers are due when they are this near: what is computed from a clock and back is not exact.
RESOLUTION_S: Final = 1e-9


class World:
    """True time, what is to happen in it, and the loops that live in it."""

    def __init__(self, seed: int) -> None:
        """Takes what everything random is drawn from."""
        self.random = random.Random(seed)  # noqa: S311 - to repeat, not to hide
        self.now_s = 0.0
        self.loops: list[WorkerLoop] = []
        self.trace: list[tuple[float, tuple[object, ...]]] = []
        # What went wrong first. Kept and not raised: the code under test may catch anything.
        self.failure = ""
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def note(self, *what: object) -> None:
        """Puts something into the trace."""
        self.trace.append((self.now_s, what))

    def fail(self, problem: str) -> None:
        """Takes note that something has happened that must not; the world stops."""
        self.note("FAILED", problem)
        self.failure = self.failure or problem

    def at(self, time_s: float, happen: Callable[..., object], *args: object) -> None:
        """Has something happen at a time, outside all loops."""
        heapq.heappush(self._events, (time_s, next(self._numbers), happen, args))

    def chance(self, probability: float) -> bool:
        """Says yes with a probability."""
        return self.random.random() < probability

    def run(self, until_s: float) -> None:
        """Lets everything happen up to a time. Called by a loop that stands still, it runs all others."""
        while not self.failure:
            next_times_s = [loop.next_s() for loop in self.loops]
            ready = [loop for loop, next_s in zip(self.loops, next_times_s, strict=True) if next_s <= self.now_s]
            if ready:
                (self.random.choice(ready) if len(ready) > 1 else ready[0]).step()
                continue
            next_s = min(next_times_s)
            if self._events:
                next_s = min(next_s, self._events[0][0])
            if next_s == float("inf") and not any(loop.is_stopped for loop in self.loops):
                self.fail("nothing is left that could ever happen")
                return
            self.now_s = max(self.now_s, min(next_s, until_s))
            if next_s > until_s:
                return
            while self._events and self._events[0][0] <= self.now_s:
                _, _, happen, args = heapq.heappop(self._events)
                happen(*args)


class WorkerLoop(asyncio.BaseEventLoop):
    """An event loop whose clock runs at a rate of its own, and which runs when the world says so."""

    # What asyncio's own call_soon and call_at fill.
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, world: World, *, rate: float) -> None:
        """Takes how many seconds its clock counts in a true one."""
        super().__init__()
        self._world = world
        self._rate = rate
        self._offset_s = world.random.uniform(0, 1e5)
        self._inbox: list[asyncio.Handle] = []
        # In the order of their making, unlike asyncio's own set of them.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self.set_task_factory(self._make_task)
        # Until when it stands still; for ever once its worker is gone.
        self._still_until_s = 0.0
        # Whether it stands still in the midst of a step.
        self.is_stopped = False
        world.loops.append(self)

    def time(self) -> float:
        """The worker's clock."""
        return self._offset_s + self._world.now_s * self._rate

    def next_s(self) -> float:
        """When, in true time, there is next something to do."""
        if self.is_stopped:
            return float("inf")
        if self._ready or self._inbox:
            return self._still_until_s
        while self._scheduled and self._scheduled[0].cancelled():
            heapq.heappop(self._scheduled)
        if not self._scheduled:
            return float("inf")
        due_s = (self._scheduled[0].when() - self._offset_s) / self._rate
        return max(due_s - RESOLUTION_S, self._still_until_s)

    def step(self) -> None:
        """Runs once what is ready: timers that are due, and what has come from outside."""
        due: list[asyncio.Handle] = []
        now_s = self.time() + 2 * RESOLUTION_S
        while self._scheduled and self._scheduled[0].when() <= now_s:
            due.append(heapq.heappop(self._scheduled))
        if self._inbox:
            came, self._inbox = self._inbox, []
            self._world.random.shuffle(came)
            due = due + came if self._world.chance(0.5) else came + due
        self._ready.extend(due)
        asyncio._set_running_loop(self)
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()
        asyncio._set_running_loop(None)

    def stand_still(self, seconds: float) -> None:
        """Stops in the midst of whatever runs now, as a system may do with a process; the others go on."""
        task = asyncio.current_task(self)
        if task is not None:
            _leave_task(self, task)
        self.is_stopped = True
        self._world.run(self._world.now_s + seconds)
        self.is_stopped = False
        if task is not None:
            _enter_task(self, task)
        asyncio._set_running_loop(self)

    def pause(self, until_s: float) -> None:
        """Runs nothing until a time."""
        self._still_until_s = max(self._still_until_s, until_s)

    def end(self) -> None:
        """Runs nothing any more, once the step is done that it is in."""
        self._still_until_s = float("inf")

    def deliver(self, callback: Callable[..., object], *args: object) -> None:
        """Has the loop hear of something from outside."""
        self._inbox.append(asyncio.Handle(callback, args, self))

    def close(self) -> None:
        """Ends all tasks, at an end where nothing is looked at any more."""
        self._inbox.clear()
        self._scheduled.clear()
        while self._tasks or self._ready:
            for task in list(self._tasks):
                task.cancel()
            self.step()
        super().close()

    def call_exception_handler(self, context: Mapping[str, Any]) -> None:
        """Nothing may fail unseen."""
        self._world.fail(f"{context.get('message')}: {context.get('exception')!r}")

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **more: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **more)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task
