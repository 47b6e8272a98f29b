"""Runs the command line: `python -m latchgate`."""

from latchgate.cli import main

main()
