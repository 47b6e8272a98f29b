"""The tests of clusters can fail: rules of the protocol that are broken in the real code are found out.

`make faults` does this with all mutants.
"""

from __future__ import annotations

from typing import Final

import pytest

from cluster.checker import check, explain
from cluster.mutants import MUTANTS
from cluster.nodes import running_cluster
from cluster.postgres import Postgres
from cluster.provocations import PROVOKED_BY, Scene, provoke

# Those that are found the soonest.
_QUICK: Final = ("effective_at_once", "row_cached_without_the_guard", "registers_and_reads_in_one_transaction")


def test_every_mutant_has_its_provocation() -> None:
    """No mutant is left out."""
    assert MUTANTS.keys() == PROVOKED_BY.keys()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", _QUICK)
async def test_a_broken_rule_is_found_out(postgres: Postgres, mutant: str) -> None:
    """With the rule broken, a token is accepted after its revocation was called effective, and the checker says so."""
    async with running_cluster(postgres, "ab", mutant) as cluster:
        scene = Scene(cluster)
        await scene.prepare()
        seconds, violation = await provoke(scene, PROVOKED_BY[mutant])
    assert seconds > 0
    assert violation.because is not None


@pytest.mark.timeout(300)
async def test_the_rules_as_they_are_stand_the_provocations(postgres: Postgres) -> None:
    """With nothing broken, no provocation leads to a violation."""
    async with running_cluster(postgres, "ab") as cluster:
        scene = Scene(cluster)
        await scene.prepare()
        for provocation in dict.fromkeys(PROVOKED_BY.values()):
            await provocation(scene)
            found = check(scene.client.history)
            assert not found, f"{provocation.__name__}: {explain(found[0], scene.client.history)}"
