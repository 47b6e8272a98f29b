"""A breadth-first search through everything that can happen, so that the trace to a violation is a shortest one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from model.protocol import Protocol
from model.state import State, canonical

Check = Callable[[State], str | None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found: how far it went and, if a promise was broken, how."""

    states: int
    transitions: int
    seconds: float
    problem: str | None
    trace: tuple[str, ...]

    def story(self) -> str:
        """The counterexample, one step a line."""
        lines = [f"{number:3}. {action}" for number, action in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"     Then {self.problem}."])


def explore(protocol: Protocol, check: Check) -> Result:
    """Visits every state that can be reached, until `check` finds something wrong with one."""
    started = time.monotonic()
    start = protocol.start()
    # From each state to the one before it; the start comes from itself. What stands for all its likes is visited once.
    before: dict[State, State] = {start: start}
    seen = {canonical(start)}
    transitions = 0
    level = [start]
    while level:
        following = []
        for state in level:
            for step in protocol.steps(state):
                transitions += 1
                likeness = canonical(step.state)
                if likeness in seen:
                    continue
                seen.add(likeness)
                before[step.state] = state
                following.append(step.state)
                problem = check(step.state)
                if problem is not None:
                    trace = _trace(protocol, before, step.state)
                    return Result(
                        states=len(seen),
                        transitions=transitions,
                        seconds=time.monotonic() - started,
                        problem=problem,
                        trace=trace,
                    )
        level = following
    return Result(states=len(seen), transitions=transitions, seconds=time.monotonic() - started, problem=None, trace=())


def _trace(protocol: Protocol, before: dict[State, State], last: State) -> tuple[str, ...]:
    """The steps from the start to a state, in their order."""
    actions = []
    while before[last] != last:
        previous = before[last]
        actions.append(next(step.action for step in protocol.steps(previous) if step.state == last))
        last = previous
    return tuple(reversed(actions))
