"""The wall clock of a worker's machine can be set as one likes: nothing that decides reads it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest

import latchgate
from cluster.clock import CAN_BE_STEPPED
from cluster.faults import FAULTS

_PACKAGE: Final = Path(latchgate.__file__).parent
_READS: Final = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
_CLOCKS: Final = {"CLOCK_REALTIME", "CLOCK_REALTIME_COARSE", "CLOCK_TAI"}


def _reads(source: str) -> set[str]:
    """Lists what a source has of names that read the wall clock."""
    names = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    names |= {
        f"{node.module}.{each.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }
    return {
        name
        for name in names
        if name in _READS or ".".join(name.split(".")[-2:]) in _READS or name.split(".")[-1] in _CLOCKS
    }


def test_no_module_reads_the_wall_clock() -> None:
    """Leases, expiry and waits go by CLOCK_BOOTTIME and by the database's clock alone."""
    found = {str(path.relative_to(_PACKAGE)): _reads(path.read_text()) for path in sorted(_PACKAGE.rglob("*.py"))}
    assert {} == {path: reads for path, reads in found.items() if reads}


def test_a_reading_of_the_wall_clock_is_found() -> None:
    """The search above finds each way to read it."""
    sources = ("import time\ntime.time()", "from time import time", "import datetime\ndatetime.datetime.now()")
    assert all(map(_reads, sources))
    assert {"time.CLOCK_REALTIME"} == _reads("import time\ntime.clock_gettime(time.CLOCK_REALTIME)")


@pytest.mark.skipif(not CAN_BE_STEPPED, reason="libfaketime has no library for this platform")
def test_clocks_are_among_the_faults() -> None:
    """Where clocks can be stepped, they are."""
    assert 4 == sum("clock" in name for name in FAULTS)
