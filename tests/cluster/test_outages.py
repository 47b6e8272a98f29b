"""What an outage of the database is like for callers, measured on real processes. `make faults` does so at length."""

from __future__ import annotations

from typing import Final

import pytest

from cluster.nodes import running_cluster
from cluster.outages import measure
from cluster.postgres import Postgres

LEASE_S: Final = 2.0


@pytest.mark.timeout(300)
async def test_an_outage_is_measured(postgres: Postgres) -> None:
    """Each worker answers from memory for less than a lease, then only refuses, and answers again after the database's
    return, without more connections than it needs.
    """
    async with running_cluster(postgres, "ab", lease_s=LEASE_S) as cluster:
        outage = await measure(cluster, "black hole", LEASE_S)
    assert all(0 < memory_s < LEASE_S for memory_s in outage.memory_s)
    assert len(outage.refused_s) > len(outage.memory_s)
    assert 2 == len(outage.back_s)
    assert 0 < outage.links


@pytest.mark.timeout(300)
async def test_a_lease_that_does_not_end_is_found_out(postgres: Postgres) -> None:
    """A worker that goes on answering from memory when its lease has ended fails the measurement."""
    async with running_cluster(postgres, "a", "lease_never_ends", LEASE_S) as cluster:
        with pytest.raises(AssertionError, match="answered from memory 2"):
            await measure(cluster, "black hole", LEASE_S)
