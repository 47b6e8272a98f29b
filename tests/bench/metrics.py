"""What the service tells of itself on its metrics port."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from bench.machine import BenchError

SCRAPE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """All samples of one reading."""

    samples: Sequence[Sample]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Reads them from what the metrics port says."""
        return cls(samples=[each for family in text_string_to_metric_families(text) for each in family.samples])

    @classmethod
    async def read(cls, port: int) -> Scrape:
        """Asks the metrics port. Raises OSError if it does not answer."""
        return cls.parse(await asyncio.to_thread(_fetch, f"http://127.0.0.1:{port}/metrics"))

    def total(self, name: str, **labels: str) -> float:
        """Adds up the samples of a name that have these labels. Raises BenchError if the name is not known at all."""
        named = [each for each in self.samples if each.name == name]
        if not named:
            raise BenchError(f"the service does not tell {name}")
        return sum(each.value for each in named if labels.items() <= each.labels.items())

    def by(self, label: str, name: str) -> dict[str, float]:
        """Gives the samples of a name by a label of theirs; none if the service does not tell the name."""
        return {each.labels[label]: each.value for each in self.samples if each.name == name and label in each.labels}


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as answer:  # noqa: S310 - a port of our own
        text: str = answer.read().decode()
    return text
