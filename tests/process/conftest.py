"""What tests of processes share."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from latchgate.cli import main
from support.folders import quick_folder
from support.processes import SERVE, TRACEBACK

Ending = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the test's own, for an embedded PostgreSQL."""
    with quick_folder("latchgate-process-") as made:
        yield made


@pytest.fixture
def undone() -> Iterator[None]:
    """Puts back what a command in this process changes for the whole of it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    actions = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, action in actions.items():
        signal.signal(number, action)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, undone: None) -> Ending:
    """Runs a command that ends by itself, in this process: quicker than in one of its own.

    Gives its status, and what it wrote to standard output and error. A database that is not named is away.
    """
    del undone
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("LATCHGATE_"):
            monkeypatch.delenv(name)
    defaults: dict[str, str | None] = {**SERVE, "DATABASE_URL": "postgresql://127.0.0.1:1/x"}

    def run(*arguments: str, **variables: str | None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latchgate", *arguments])
        for name, value in (defaults | variables).items():
            if value is not None:
                monkeypatch.setenv(f"LATCHGATE_{name}", value)
        status: object = 0
        # A process that is about to become another one may look for garbage, too. Of a server it would wait for the
        # threads to end, which it does not have.
        gc.disable()
        # A command that goes on instead is told to stop; pytest's own time limit is not heard within its loop.
        watchdog = threading.Timer(30, os.kill, (os.getpid(), signal.SIGTERM))
        watchdog.start()
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        finally:
            gc.enable()
            watchdog.cancel()
        assert isinstance(status, int)
        captured = capsys.readouterr()
        assert TRACEBACK not in captured.out + captured.err
        return status, captured.out, captured.err

    return run
