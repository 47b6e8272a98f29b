"""Two loads by turns, a second each: one calls its server while the other is stopped.

Machines change their speed from one minute to the next, and some from one second to the next: two servers that are
called by turns see much the same machine. The turns are not shorter still, because each server finds the processor's
caches as the other has left them; one that answers from memory, until it was asked for each key again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from bench.load import Burst, Feed, Load, Window
from bench.machine import BenchError, grown_s, threads_cpu_s
from bench.servers import Target

SLICE_S = 0.7
"""For how long one is called, and counted, before it is the other's turn."""

GAP_S = 0.015
"""What is given to the calls under way when a load is stopped: until then the other one is not called."""

LEAD_S = 0.3
"""What goes before each slice, and is not counted: the processor's caches are as the other server has left them."""

TOLD_S = 0.07
"""A call that begins later than so long before its load is stopped may be told late: how long it took is not known."""

SETTLING_S = 0.3
STARTING_S = 1.0
"""How long it may take until all is started, on a slow machine; what is left of it is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A server of two that were called by turns.

    `per_s` is how many calls it answered a second, `server_cpu_us` the processor time of one; `load_share` for how much
    of the time the load's cores were busy while it was called, whoever ran on them.
    """

    burst: Burst
    per_s: float
    server_cpu_us: float
    load_share: float

    @property
    def core_share(self) -> float:
        """How much of its core's time the server used while it was called."""
        return self.server_cpu_us * self.per_s / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Some time in which one of the two was called, and what each used of the processor meanwhile, in seconds."""

    window: Window
    used_s: tuple[float, float]
    load_s: float


async def at_rest(targets: Sequence[Target], seconds: float) -> list[float]:
    """Watches servers for so many seconds in which none is called: tells what part of a core each of them uses."""
    before_s = [threads_cpu_s(target.pid) for target in targets]
    start_s = time.monotonic()
    await asyncio.sleep(seconds)
    lasted_s = time.monotonic() - start_s
    after_s = [threads_cpu_s(target.pid) for target in targets]
    return [each / lasted_s for each in map(grown_s, before_s, after_s)]


async def by_turns(
    loads: tuple[Load, Load],
    targets: tuple[Target, Target],
    feeds: Sequence[Feed],
    seconds: float,
    *,
    rests: tuple[float, float] = (0.0, 0.0),
) -> tuple[Called, Called]:
    """Has each load call its target for so many seconds in all. Raises BenchError.

    What a server does while it is not called, it takes from the other, but it is its own: the time is counted as if it
    had done it while it was called. That is not so of what it does at any time, called or not, of which `rests` says
    what part of a core it takes: it does it while it is called as well.
    """
    count = max(1, round(seconds / SLICE_S))
    lasting_s = STARTING_S + SETTLING_S + 2 * count * (LEAD_S + SLICE_S + GAP_S)
    async with AsyncExitStack() as stack:
        until_s = time.monotonic() + lasting_s
        callers = [
            await stack.enter_async_context(load.calling([target.url], feeds, lasting_s))
            for load, target in zip(loads, targets, strict=True)
        ]
        await asyncio.sleep(SETTLING_S)
        for each in callers:
            each.pause()
        await asyncio.sleep(GAP_S)
        slices: tuple[list[Slice], list[Slice]] = ([], [])
        while len(slices[1]) < count and time.monotonic() + 2 * (LEAD_S + SLICE_S + GAP_S) < until_s:
            for own, load, each in zip(slices, loads, callers, strict=True):
                each.resume()
                own.append(await _slice(targets, load))
                each.pause()
                await asyncio.sleep(GAP_S)
        for each in callers:
            each.resume()
        if len(slices[1]) < count / 2:
            raise BenchError("h2load takes so long to start that hardly any time is left to count")
        bursts = [await each.burst([one.window for one in own]) for own, each in zip(slices, callers, strict=True)]
    first, second = (called(number, bursts[number], slices, rests[number]) for number in (0, 1))
    return first, second


async def _slice(targets: tuple[Target, Target], load: Load) -> Slice:
    await asyncio.sleep(LEAD_S)
    begin_s, busy_s, before_s = time.time(), load.busy_s(), [threads_cpu_s(target.pid) for target in targets]
    await asyncio.sleep(SLICE_S)
    end_s, busy_after_s, after_s = time.time(), load.busy_s(), [threads_cpu_s(target.pid) for target in targets]
    first_s, second_s = map(grown_s, before_s, after_s)
    return Slice(
        window=Window(begin_s=begin_s, end_s=end_s, told_s=end_s - TOLD_S),
        used_s=(first_s, second_s),
        load_s=busy_after_s - busy_s,
    )


def called(number: int, burst: Burst, slices: tuple[list[Slice], list[Slice]], rest: float = 0.0) -> Called:
    """Counts what one of the two did, and the time that it took for it. Raises BenchError.

    `rest` is the part of a core that it takes whether it is called or not.
    """
    own, others = slices[number], slices[1 - number]
    window_s = sum(each.window.lasts_s for each in own)
    calls = burst.per_s * window_s
    # What it did in the other's time, less what the other did in its.
    resting_s = rest * sum(each.window.lasts_s for each in others)
    beside_s = max(sum(each.used_s[number] for each in others) - resting_s, 0.0)
    taken_s = sum(each.used_s[1 - number] for each in own)
    if taken_s >= window_s:
        raise BenchError("the server that was not called was at work all the time")
    cpu_s = beside_s + sum(each.used_s[number] for each in own)
    return Called(
        burst=burst,
        per_s=calls / (window_s + beside_s - taken_s),
        server_cpu_us=cpu_s * 1e6 / calls,
        load_share=sum(each.load_s for each in own) / window_s,
    )
