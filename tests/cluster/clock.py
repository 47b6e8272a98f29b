"""Wall clocks that can be stepped while the processes that read them run: libfaketime, put before the C library.

Each machine (a worker, PostgreSQL) has a clock of its own: a file that says by how much it is ahead of the real one.
What is stepped is CLOCK_REALTIME, for all that asks the C library for it: Python's `time.time` and `datetime.now`, the
C and C++ below it, all of PostgreSQL's processes. CLOCK_MONOTONIC and CLOCK_BOOTTIME are left alone, as they are by a
step of a real clock.

Not covered: the kernel's own uses of the wall clock, above all timers with an absolute time of CLOCK_REALTIME that are
set past the C library, and times of files. libfaketime's wheel has a library for Linux on x86-64; elsewhere nothing is
stepped, and the faults of clocks are left out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

HOUR_S: Final = 3600


def _library() -> Path | None:
    found = importlib.util.find_spec("libfaketime")
    if found is None or found.origin is None:
        return None
    library = Path(found.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return library if library.exists() else None


_LIBRARY: Final = _library()
CAN_BE_STEPPED: Final = _LIBRARY is not None
"""Whether the library is there."""


class Clock:
    """The wall clock of one machine."""

    def __init__(self, path: Path, *, is_read_each_time: bool) -> None:
        """Takes a file for it, which its processes must be able to read.

        A step holds at once if the file is read at each reading of the clock, within a second otherwise. PostgreSQL
        reads its clock in handlers of signals, where files should be opened as seldom as may be.
        """
        self._path = path
        self._is_read_each_time = is_read_each_time
        self.set(0)

    def set(self, ahead_s: int) -> None:
        """Sets it to so many seconds ahead of the real one; behind, if they are negative."""
        written = self._path.with_suffix(".new")
        written.write_text(f"{ahead_s:+05}\n")
        written.chmod(0o644)
        written.replace(self._path)

    @contextmanager
    def stepped(self, ahead_s: int) -> Iterator[None]:
        """Steps it, and steps it back when the block ends."""
        self.set(ahead_s)
        try:
            yield
        finally:
            self.set(0)

    def variables(self) -> dict[str, str]:
        """Gives what the environment of a process must have for it to live by this clock."""
        if _LIBRARY is None:
            return {}
        return {
            "LD_PRELOAD": str(_LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": str(int(self._is_read_each_time)),
            # Read when the second has changed.
            "FAKETIME_CACHE_DURATION": "0",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "NO_FAKE_STAT": "1",
        }

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Has processes that are started in the block, with this one's environment, live by this clock."""
        variables = self.variables()
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def forget_killed(pid: int) -> None:
    """Removes what libfaketime keeps in memory for a process, and tidies up only if that ends in order."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        with suppress(OSError):
            (Path("/dev/shm") / name).unlink()  # noqa: S108 - where the C library puts it
