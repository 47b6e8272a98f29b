"""The benchmark of gateways, in its smallest form."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("gateway.py")

pytestmark = [
    pytest.mark.skipif(
        shutil.which("wrk") is None or shutil.which("h2load") is None,
        reason="wrk or h2load is not installed (Debian, Ubuntu: apt-get install wrk nghttp2-client)",
    ),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="the benchmark needs two cores"),
]


@pytest.mark.bench
def test_every_guard_is_measured(postgres_url: str, tmp_path: Path) -> None:
    """Envoy alone, its own filter, and latchgate over gRPC and HTTP let good requests through, and are on the page."""
    output = tmp_path / "page.md"
    arguments = ("--rounds", "1", "--seconds", "1", "--keys", "200", "--connections", "4", "--output", str(output))
    done = subprocess.run(
        [sys.executable, str(RUN), *arguments],
        env=os.environ | {"LATCHGATE_DATABASE_URL": postgres_url},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    page = output.read_text()
    for guard in ("Envoy alone", "Envoy's own api_key_auth", "ext_authz over gRPC", "ext_authz over HTTP"):
        assert guard in page
