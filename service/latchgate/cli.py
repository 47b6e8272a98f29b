"""The command line: arguments, exit statuses, and one line for whatever goes wrong.

What a command needs is imported once it is known which it is: a wrong setting is told, and a health check made, without
waiting for the whole service to load.
"""

# ruff: noqa: PLC0415 - as said above

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latchgate import config
from latchgate.config import CommandError


def main() -> None:
    """Runs the command that the arguments name. Exits with 2 for bad settings or arguments, 1 for other failures."""
    # Until a command listens for it itself, Ctrl-C ends the process like any other: there is nothing to be undone.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = argparse.ArgumentParser(
        prog="latchgate",
        description="API keys for gateways over gRPC. All settings are environment variables: LATCHGATE_...",
    )
    parser.add_argument("--version", action="version", version=version("latchgate"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="serve on this machine for a try, and show a key's life first")
    commands.add_parser("serve", help="serve")
    commands.add_parser("migrate", help="bring the database's schema up to date, and stop")
    commands.add_parser("health", help="exit with 0 if the service on LATCHGATE_LISTEN is healthy, else with 1")
    audit = commands.add_parser("audit", help="look after the audit trail: audit verify")
    auditing = audit.add_subparsers(dest="audit_command", required=True, metavar="COMMAND")
    verify = auditing.add_parser(
        "verify", help="find what was changed or removed; exit with 0 if it is whole, else with 1"
    )
    verify.add_argument("--organization", default="", metavar="ID", help="this one's alone")
    _add_import(commands.add_parser("import", help="take over keys of another system, by the digests of their tokens"))
    # Not listed: the first two start it.
    worker = commands.add_parser("worker")
    worker.add_argument("number", type=int)
    worker.add_argument("role")
    arguments = parser.parse_args()
    try:
        work = _work(arguments)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(work)
    except CommandError as error:
        sys.exit(_complaint(str(error), error.status))
    except ImportError as error:
        sys.exit(_complaint(f"this installation is not complete: {error}; install it anew", 1))
    except Exception as error:  # noqa: BLE001 - the last to hear of it; a traceback could show what no one should see
        from latchgate.background import fault

        sys.exit(_complaint(fault(error), 1))
    if status:
        sys.exit(status)


def _work(arguments: argparse.Namespace) -> Coroutine[Any, Any, int | None]:
    command = arguments.command
    if command == "worker":
        from latchgate.workers import worker

        return worker.work(worker.supervisors_end(), arguments.number, arguments.role)
    if command == "import":
        return _importing(arguments)
    if command == "health":
        settings = config.load()
        from latchgate.health import check_health

        return check_health(settings)
    if command == "run":
        from latchgate import demo

        settings = demo.settings()
    else:
        settings = config.load()
    from latchgate import commands

    if command == "audit":
        return commands.verify_audit(settings, arguments.organization)
    return {"run": commands.run, "serve": commands.serve, "migrate": commands.migrate}[command](settings)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Imports keys from a file. The token of a key with keys:write, or a root token, is taken from LATCHGATE_TOKEN. "
        "Exits with 0 if the keys of all rows are there, with 1 if some were refused or the service did not take them, "
        "with 2 if the arguments or the file can not be used."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV with a header, or one JSON object a line (.jsonl)")
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT", help="where the service listens")
    parser.add_argument(
        "--organization", default="", metavar="ID", help="the owner; with a root token it must be named"
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM of the authority of the service's certificate")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM of an own certificate, for mutual TLS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key")
    parser.add_argument("--plaintext", action="store_true", help="send the token in plain text to another machine")
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="write what became of each row")


def _importing(arguments: argparse.Namespace) -> Coroutine[Any, Any, int]:
    from latchgate.importing import command

    return command.run(
        command.ImportOrder(
            file=arguments.file,
            address=arguments.address,
            organization=arguments.organization,
            token=os.environ.get("LATCHGATE_TOKEN", ""),
            tls_ca=arguments.tls_ca,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            is_plaintext_allowed=arguments.plaintext,
            results=arguments.results,
        )
    )


def _complaint(message: str, status: int) -> int:
    for line in message.splitlines():
        print(f"latchgate: {line}", file=sys.stderr)
    return status
