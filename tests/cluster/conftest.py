"""One PostgreSQL for all tests of clusters."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.postgres import Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that writes to disk what it says it has."""
    with tempfile.TemporaryDirectory(prefix="latchgate-cluster-") as folder:
        server = asyncio.run(Postgres.start(Path(folder)))
        try:
            yield server
        finally:
            server.stop()
