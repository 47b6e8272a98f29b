"""Simulated deployments: thousands of schedules that no real machine would show in a year.

SIM_SEEDS and SIM_FIRST say how many and from which on; `python tests/simulation/run.py` runs more of them.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.deployment import Simulation
from simulation.mutants import FIRST_SEEDS, MUTANTS, mutated
from simulation.world import WorkerLoop, World

SEEDS = int(os.environ.get("SIM_SEEDS", "150"))
FIRST = int(os.environ.get("SIM_FIRST", "0"))
BLOCK = 50
MOST_SEEDS = 500
RUN = Path(__file__).with_name("run.py")


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, BLOCK))
def test_every_schedule_keeps_the_promises(first: int) -> None:
    """Whatever is late, lost, cut, stopped, crashed or taken over: what was called effective is, leases end, and nobody
    waits for ever.
    """
    for seed in range(first, min(first + BLOCK, FIRST + SEEDS)):
        simulation = Simulation(seed)
        if failure := simulation.run():
            print(simulation.story())  # noqa: T201 - pytest shows it with the failure
            pytest.fail(f"seed {seed}: {failure}", pytrace=False)


def test_schedules_meet_what_they_are_for() -> None:
    """Memory answers, workers are evicted, standbys take over, changes get lost and calls end as pending: none of the
    checks is idle.
    """
    met: set[object] = set()
    from_memory = 0
    for seed in range(80):
        simulation = Simulation(seed)
        simulation.run()
        from_memory += simulation.from_memory
        met.update(each for _, what in simulation.world.trace for each in what if isinstance(each, str))
    assert from_memory > 1000
    assert {"effective", "pending", "evicted", "worker_evicted", "taken_over", "went_back", "taken over"} <= met


def test_the_same_seed_gives_the_same_story() -> None:
    """A failing seed fails again, step by step, in another process."""
    stories = [
        subprocess.run(
            [sys.executable, RUN, "--seeds", "3", "--first", "11", "--trace"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout.splitlines()[:-1]
        for hash_seed in ("1", "2")
    ]
    assert len(stories[0]) > 100
    assert stories[0] == stories[1]


def test_a_wait_that_nothing_can_end_is_found() -> None:
    """A task that waits while nothing is left that could ever happen is a failure, and no end."""
    world = World(0)
    loop = WorkerLoop(world, rate=1.0)
    loop.deliver(lambda: loop.create_task(asyncio.Event().wait()))
    world.run(10.0)
    loop.close()
    assert world.failure == "nothing is left that could ever happen"


@pytest.mark.parametrize("name", MUTANTS)
def test_faults_in_the_code_are_noticed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The simulation can fail: each fault put into the real code is noticed within a bounded number of schedules."""
    first = FIRST_SEEDS.get(name, 0)
    with mutated(name):
        for seed in range(first, first + MOST_SEEDS):
            if failure := Simulation(seed).run():
                with capsys.disabled():
                    print(f"\n{name}: {seed - first + 1} seeds; {failure[:90]}")  # noqa: T201 - how sharp it is
                return
    pytest.fail(f"not noticed in {MOST_SEEDS} schedules")
