"""The benchmark of rate limits, in its smallest form."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import database
from bench.limits import LIMITS, _load, _overload, another_process


@pytest.mark.bench
async def test_loads_and_overload_are_measured(
    monkeypatch: pytest.MonkeyPatch, postgres_url: str, tmp_path: Path
) -> None:
    """A load is told by what it asked for; under overload something is admitted, and no more than is allowed."""
    monkeypatch.setenv("LATCHGATE_DATABASE_URL", postgres_url)
    async with database.cluster([0]) as cluster, cluster.seeded(100, tokens=100) as seeded:
        with another_process() as beside:
            load = await _load(cluster, seeded, (100, 500, 600), 1.5, beside)
        head, *rows = await _overload(seeded, [0, 1], tmp_path, 4.0)

    keys, limit, rate, statements, in_each, _, waited, worker_us, _ = load
    assert ("100", "600") == (keys, limit)
    assert 500 == pytest.approx(float(rate), rel=0.2)
    # Each key is asked for five times a second, and a tick comes 20 times a second.
    assert 1 < float(statements)
    assert 1 <= float(in_each) <= 100
    assert 0 <= float(waited.rstrip("%")) < 50
    # Counting takes something, and far less than the call's whole pace.
    assert 0 < float(worker_us) < 1000
    assert len(head) == 4
    assert [f"{each:,}" for each in LIMITS] == [row[0] for row in rows]
    for _, most, allowed, _ in rows:
        assert 0 < int(most.replace(",", "")) <= int(allowed.replace(",", ""))
