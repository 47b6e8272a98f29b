"""What the benchmarks' command lines have in common: how they speak, how they end, and what they take for arguments."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from bench.load import h2load_path
from bench.machine import BenchError, Layout, UnfitError

T = TypeVar("T")


def exit_code(command: Callable[[], int]) -> int:
    """Does the work and gives its exit code, or what stands for how it failed.

    That is 1 if the figures can not be had or not be believed, 3 if the machine lacks what it takes, and 130 if the
    work was stopped; one line says why.
    """
    try:
        return command()
    except UnfitError as error:
        return _complain(error, 3)
    except BenchError as error:
        return _complain(error, 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _complain("stopped", 130)


def one_core_for_the_load() -> Layout:
    """Shares out the cores, and moves this process to that of the load: h2load and what feeds it stay on one core.

    Everything that is started inherits it, unless it is given another. Raises UnfitError.
    """
    h2load_path()
    layout = Layout.share_out(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {layout.load})
    return layout


def run(work: Coroutine[Any, Any, T]) -> T:
    """Does the work in a loop of its own; SIGTERM ends it in order, as Ctrl-C does."""
    return asyncio.run(_interruptible(work))


async def _interruptible(work: Awaitable[T]) -> T:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def arguments(prog: str, description: str, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """Makes a parser of what every measurement in rounds takes."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--rounds", type=positive, default=rounds, help="how many are counted (%(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a turn (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of keys (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    return parser


def take_note(parser: argparse.ArgumentParser) -> None:
    """Has a command take a note for its page."""
    parser.add_argument("--note", default="", help="what the page is to say of how the machine was used besides")


def write_page(page: str, output: Path | None, usual: Path) -> None:
    """Writes a page where it was asked for; a run with no arguments at all writes its usual page."""
    file = output or (usual if len(sys.argv) == 1 else None)
    if file is not None:
        file.write_text(page)
        say(f"written: {file.name}")


def positive(text: str) -> int:
    """Reads a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def counts(text: str) -> tuple[int, ...]:
    """Reads numbers of at least 1 with commas between; gives each once, in order."""
    return tuple(sorted({positive(each) for each in text.split(",")}))


def say(line: str) -> None:
    """Writes a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(problem: object, code: int) -> int:
    sys.stderr.write(f"bench: {problem}\n")
    return code
