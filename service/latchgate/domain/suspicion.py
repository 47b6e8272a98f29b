"""Suspicious use: tokens that nobody has, that are ended, or come from where they may not, counted by who sends them.

Not recorded one by one: whoever tries tokens by the million must not fill anything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

from latchgate.domain.model import KeyRecord, Outcome

# What stands for all sources beyond those that are told apart within an hour.
OTHERS: Final = "others"
MAX_SOURCES: Final = 1000
# Whoever has one address of IPv6 has a whole network of this size (RFC 6177).
_NETWORK_V6: Final = 64
_HOUR_S: Final = 3600.0


class Suspect(NamedTuple):
    """What is counted together: where it came from, what was wrong, and whose key it was, where there is one."""

    source: str
    outcome: Outcome
    organization_id: str
    key_id: str


class SuspicionCounter:
    """Implements latchgate.domain.ports.SuspicionRecorder: counts in memory, until `take` gives what has gathered.

    Of sources that are not known yet no more than `max_sources` are told apart within an hour.
    """

    def __init__(self, monotonic: Callable[[], float], max_sources: int = MAX_SOURCES) -> None:
        """Takes a clock in seconds that never goes back."""
        self._monotonic = monotonic
        self._max_sources = max_sources
        self._counts: dict[Suspect, int] = {}
        self._seen: set[Suspect] = set()
        self._renewed_s = monotonic()

    def suspect(self, client_ip: str, outcome: Outcome, record: KeyRecord | None) -> None:
        """Counts one try."""
        organization_id, key_id = (record.organization_id, record.key_id) if record else ("", "")
        self._add(Suspect(_source(client_ip), outcome, organization_id, key_id), 1)

    def take(self) -> list[tuple[Suspect, int]]:
        """Gives what has gathered, and begins anew."""
        counts, self._counts = self._counts, {}
        return sorted(counts.items(), key=lambda item: (item[0].source, item[0].outcome.value, item[0].key_id))

    def put_back(self, counts: list[tuple[Suspect, int]]) -> None:
        """Takes back what could not be written."""
        for suspect, count in counts:
            self._add(suspect, count)

    def _add(self, suspect: Suspect, count: int) -> None:
        if suspect not in self._seen:
            now_s = self._monotonic()
            if now_s - self._renewed_s > _HOUR_S:
                self._seen.clear()
                self._renewed_s = now_s
            if len(self._seen) >= self._max_sources:
                suspect = Suspect(OTHERS, suspect.outcome, "", "")
            else:
                self._seen.add(suspect)
        self._counts[suspect] = self._counts.get(suspect, 0) + count


@lru_cache(maxsize=8192)
def _source(client_ip: str) -> str:
    """Gives an address in its normal form, of IPv6 its network; nothing for what is no address."""
    try:
        address = ipaddress.ip_address(client_ip)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), _NETWORK_V6), strict=False))
