"""Suspicious use: what is counted together, and how much of it is kept."""

from __future__ import annotations

import pytest

from latchgate.domain.model import Outcome
from latchgate.domain.suspicion import OTHERS, Suspect, SuspicionCounter
from support.records import KEY_RECORD, ManualClock


def unknown(source: str) -> Suspect:
    """What is counted of tokens that nobody has."""
    return Suspect(source, Outcome.NOT_FOUND, "", "")


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("", ""),
        ("no address", ""),
        ("x" * 100_000, ""),
    ],
)
def test_sources(address: str, source: str) -> None:
    """An address is one source in whatever form it is given; of IPv6 it is the network; what is none is no source."""
    counter = SuspicionCounter(ManualClock())
    counter.suspect(address, Outcome.NOT_FOUND, None)
    assert [(unknown(source), 1)] == counter.take()


def test_counts() -> None:
    """What has the same source, outcome and key is one count; what was taken is not given again, but for what is put
    back.
    """
    counter = SuspicionCounter(ManualClock())
    for _ in range(3):
        counter.suspect("192.0.2.7", Outcome.NOT_FOUND, None)
    counter.suspect("192.0.2.7", Outcome.REVOKED, KEY_RECORD)
    taken = counter.take()
    revoked = Suspect("192.0.2.7", Outcome.REVOKED, KEY_RECORD.organization_id, KEY_RECORD.key_id)
    assert [(unknown("192.0.2.7"), 3), (revoked, 1)] == taken
    assert [] == counter.take()
    counter.put_back(taken)
    counter.suspect("192.0.2.7", Outcome.NOT_FOUND, None)
    assert [(unknown("192.0.2.7"), 4), (revoked, 1)] == counter.take()


def test_many_sources() -> None:
    """Beyond so many sources within an hour all new ones are one; those that are known are told apart still, and after
    the hour new ones are again.
    """
    clock = ManualClock()
    counter = SuspicionCounter(clock, max_sources=2)
    for number in (1, 2, 3, 4, 1):
        counter.suspect(f"192.0.2.{number}", Outcome.NOT_FOUND, None)
    assert [(unknown("192.0.2.1"), 2), (unknown("192.0.2.2"), 1), (unknown(OTHERS), 2)] == counter.take()
    counter.suspect("192.0.2.5", Outcome.NOT_FOUND, None)
    assert [(unknown(OTHERS), 1)] == counter.take()
    clock.advance(3601)
    counter.suspect("192.0.2.5", Outcome.NOT_FOUND, None)
    assert [(unknown("192.0.2.5"), 1)] == counter.take()
