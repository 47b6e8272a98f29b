"""How well limits are kept, by the times of what was admitted."""

from __future__ import annotations

import pytest

from bench.limits import _part


def test_part_of_a_limit() -> None:
    """Bursts, and an even flow, of just the limit are all of it; half of it is half; too short a time is nothing."""
    bursts = [60.5 * minute + 0.01 * call for minute in range(6) for call in range(600)]
    assert pytest.approx(1, abs=0.02) == _part(600, bursts)
    assert pytest.approx(1, abs=0.01) == _part(600, [0.1 * call for call in range(3600)])
    assert pytest.approx(0.5, abs=0.01) == _part(600, [0.2 * call for call in range(1800)])
    assert 0 == _part(600, [0.1 * call for call in range(700)])
