"""Real processes under load and under faults: a revocation that was called effective is never forgotten.

`make faults` does the same with all faults, alone and in pairs, and for longer.
"""

from __future__ import annotations

import os
from random import Random
from typing import Final

import pytest

from cluster.faults import FAULTS
from cluster.nodes import running_cluster
from cluster.postgres import Postgres
from cluster.trials import run_trial

SEED: Final = int(os.environ.get("CLUSTER_SEED", "12"))
_TOO_LONG: Final = {"worker stopped, 10 leases", "rolling restart", "half-open, server gone"}
_ALONE: Final = 2


@pytest.mark.timeout(600)
async def test_no_worker_answers_from_before_an_effective_change(postgres: Postgres) -> None:
    """Whatever becomes of workers, of PostgreSQL and of the wires between: no token is accepted after its end was
    called effective, no change that was acknowledged is lost, no error is given but that it can not be decided, and
    afterwards all is as it was.
    """
    rng = Random(SEED)  # noqa: S311 - to be repeated
    names = rng.sample(sorted(FAULTS.keys() - _TOO_LONG), k=_ALONE + 2)
    trials = [(), *((name,) for name in names[:_ALONE]), tuple(names[_ALONE:])]
    async with running_cluster(postgres) as cluster:
        for faults in trials:
            verdict = await run_trial(cluster, faults, rng.randrange(1 << 30))
            assert 0 == verdict.violations, f"CLUSTER_SEED={SEED}\n{verdict.account}"
            assert verdict.revocations, "nothing was revoked"
