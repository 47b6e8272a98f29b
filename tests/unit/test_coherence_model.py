"""The coherence protocol, searched exhaustively in a small world; `make model` searches a larger one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from model.deviations import Mutant, Variant
from model.explore import explore
from model.protocol import Protocol
from model.state import NONE, Bounds, Phase, Stage, State

SMALL = Bounds(workers=1, keys=1, changes=2)
WORLDS = [
    Bounds(workers=1, keys=2, changes=2),
    Bounds(workers=1, keys=1, changes=2, lookups=2),
    Bounds(workers=2, keys=2, changes=1),
]


def _served_new(state: State) -> bool:
    """A answers from memory with what change 1 made, and change 1 is EFFECTIVE."""
    worker = state.workers[0]
    return worker.lease != NONE and worker.cached == 1 and state.changes[0].phase is Phase.EFFECTIVE


def _served_old_while_waiting(state: State) -> bool:
    """A still answers from memory with what was before change 1, whose wait has begun."""
    worker = state.workers[0]
    return worker.lease != NONE and worker.cached == 0 and bool(state.changes) and state.changes[0].phase > 0


def _evicted_with_cache(state: State) -> bool:
    """A has lost its row and does not know; its cache is full."""
    worker = state.workers[0]
    return worker.stage is Stage.JOINED and worker.row == NONE and worker.cached != NONE


def _old_row_under_way(state: State) -> bool:
    """A has joined, and has applied more than a row that is still under way to it shows."""
    worker = state.workers[0]
    return worker.stage is Stage.JOINED and worker.applied == 2 and worker.lookups == (1,)


def _acknowledged_between_renewals(state: State) -> bool:
    """A has acknowledged more than the answer to its last renewal tells: a wake-up told it."""
    worker = state.workers[0]
    return NONE != worker.answer < worker.row


def _acknowledged_late(state: State) -> bool:
    """A has applied more than its row says, with a lease that may outlive the wait."""
    worker = state.workers[0]
    return NONE != worker.row < worker.applied and worker.lease == 0


def _leaving(state: State) -> bool:
    """A has dropped its lease, and still has its row."""
    return state.workers[0].stage is Stage.LEAVING


@pytest.mark.parametrize("bounds", WORLDS, ids=str)
def test_no_stale_answer_after_effective(bounds: Bounds) -> None:
    """Whatever happens in whatever order, no Validate that comes after EFFECTIVE is answered from before the change,
    and no row says that its worker applied more than it did.
    """
    protocol = Protocol(bounds)
    result = explore(protocol, protocol.violation)
    assert None is result.problem, result.story()


@pytest.mark.parametrize("mutant", Mutant, ids=lambda mutant: mutant.name.lower())
def test_mutant_gives_stale_answer(mutant: Mutant) -> None:
    """Each rule of the protocol is needed: without it, the search finds a stale answer."""
    protocol = Protocol(SMALL, mutant)
    assert None is not explore(protocol, protocol.stale_answer).problem, mutant.value


@pytest.mark.parametrize("variant", Variant, ids=lambda variant: variant.name.lower())
def test_variant_is_as_good(variant: Variant) -> None:
    """What the model calls no mistake keeps the promise."""
    protocol = Protocol(SMALL, variant)
    result = explore(protocol, protocol.violation)
    assert None is result.problem, result.story()


@pytest.mark.parametrize("mutant", [Mutant.ACKNOWLEDGED_BEFORE_APPLYING, Mutant.ACKNOWLEDGED_LATER_HEAD])
def test_row_that_says_too_much_is_seen(mutant: Mutant) -> None:
    """A row that says more than its worker applied is a violation by itself, before anybody is answered wrongly."""
    protocol = Protocol(SMALL, mutant)
    problem = explore(protocol, protocol.violation).problem
    assert problem is not None
    assert problem.startswith("the row of A says")


@pytest.mark.parametrize(
    "situation",
    [
        _served_new,
        _served_old_while_waiting,
        _evicted_with_cache,
        _old_row_under_way,
        _acknowledged_between_renewals,
        _acknowledged_late,
        _leaving,
    ],
)
def test_search_meets_the_situations_that_matter(situation: Callable[[State], bool]) -> None:
    """The protocol does not hold for want of trying: the search gets to where it could go wrong."""
    found = explore(Protocol(SMALL), lambda state: "met" if situation(state) else None)
    assert "met" == found.problem


def test_counterexample_can_be_followed() -> None:
    """A trace leads, step by step, from the start to the stale answer, and is told in words."""
    protocol = Protocol(SMALL, Mutant.LEASE_FROM_REPLY)
    result = explore(protocol, protocol.stale_answer)
    state = protocol.start()
    for action in result.trace:
        assert None is protocol.stale_answer(state)
        state = next(step.state for step in protocol.steps(state) if step.action == action)
    assert result.problem == protocol.stale_answer(state)
    assert "  1. A registers\n  2. A renews\n" in result.story()
    assert result.story().endswith("though change 1 of x is EFFECTIVE.")
