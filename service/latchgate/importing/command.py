"""What `latchgate import` does."""

# ruff: noqa: T201 - it speaks to the terminal

from __future__ import annotations

import ipaddress
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TextIO

import grpc
from tqdm import tqdm

from apikeys.v1 import key_pb2
from apikeys.v1.import_service_pb2 import ImportResult
from latchgate.config import CommandError
from latchgate.importing.client import CHANNEL_OPTIONS, Batch, ImportClient, ImportRefusedError, batches
from latchgate.importing.files import FileRow, KeyFile
from latchgate.importing.report import Report

# Between two lines of progress, where there is no terminal for a bar.
LINE_INTERVAL_S: Final = 5.0


class UsageError(CommandError):
    """What was asked for makes no sense. The message says what to do."""

    status = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOrder:
    """What was asked for on the command line, and the caller's token."""

    file: Path
    address: str
    organization: str
    token: str
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    is_plaintext_allowed: bool
    results: Path | None


class Progress(Protocol):
    """Shows how far an import has come."""

    def reach(self, rows: int, said: str) -> None:
        """Shows that so many rows have a result."""

    def say(self, text: str) -> None:
        """Writes a line."""

    def close(self) -> None:
        """Ends the showing."""


class _Bar:
    """A bar on a terminal."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit=" rows", unit_scale=False, file=sys.stderr, dynamic_ncols=True)

    def reach(self, rows: int, said: str) -> None:
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(rows - self._bar.n)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A line now and then, for files and pipes."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._said_s = time.monotonic()

    def reach(self, rows: int, said: str) -> None:
        if time.monotonic() - self._said_s >= LINE_INTERVAL_S:
            self._said_s = time.monotonic()
            self.say(f"{rows} of {self._total} rows: {said}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


async def run(order: ImportOrder) -> int:
    """Imports a file, and gives the exit status: 0 if every row's key is there, 1 if not. Raises CommandError.

    The file is read once before anything is sent, so that one that can not be read leaves nothing half done.
    """
    if not order.token:
        raise UsageError(
            "LATCHGATE_TOKEN is not set: give the token of a key with keys:write, or a root token, in the environment"
        )
    file = KeyFile.named(order.file)
    credentials = _credentials(order)
    total = file.count()
    with ExitStack() as stack:
        report = Report(stack.enter_context(_opened(order.results)) if order.results else None)
        progress: Progress = _Bar(total) if sys.stderr.isatty() else _Lines(total)
        stack.callback(progress.close)
        start_s = time.monotonic()
        effect = _send(order, file.rows(), report, progress, credentials)
        seconds = time.monotonic() - start_s
    if report.rows != total:
        raise CommandError(
            f"{order.file} was changed while it was imported: {total} rows were counted and {report.rows} read; run "
            "the same command again"
        )
    print(f"{total} rows: {report.said()}, in {seconds:.1f} s")
    _tell_refusals(order, report)
    if effect.state == key_pb2.EFFECT_STATE_PENDING:
        longest_s = effect.max_remaining.ToTimedelta().total_seconds()
        print(f"Workers that do not answer may not know the last keys for up to {longest_s:.0f} s.")
    return 0 if report.is_good else 1


def _send(
    order: ImportOrder,
    rows: Iterator[FileRow],
    report: Report,
    progress: Progress,
    credentials: grpc.ChannelCredentials | None,
) -> key_pb2.Effect:
    """Sends all rows. Raises ImportRefusedError, which says how far it came."""
    with _channel(order.address, credentials) as channel:

        def take(batch: Batch, results: Sequence[ImportResult]) -> None:
            report.take(batch, results)
            progress.reach(report.rows, report.said())

        client = ImportClient(channel, order.token, take=take, say=progress.say)
        try:
            client.send(batches(rows, order.organization))
        except ImportRefusedError as error:
            raise ImportRefusedError(
                f"{error}. Of the rows before, {report.said()}. Run the same command again to go on: rows that are "
                "there are found, and make no second keys"
            ) from None
        except OSError as error:
            raise CommandError(f"{order.results}: {error.strerror}") from None
    return client.effect


def _tell_refusals(order: ImportOrder, report: Report) -> None:
    lines = report.lines()
    if lines:
        print("Refused:", *lines, sep="\n")
        if order.results is None:
            print("With --results FILE.jsonl every row is written down.")


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if credentials is not None:
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    # Straight there, whatever proxy is set for the way out: a token in plain text goes nowhere else.
    return grpc.insecure_channel(address, options=[*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)])


def _credentials(order: ImportOrder) -> grpc.ChannelCredentials | None:
    """Gives what TLS needs; None for plain text. Raises UsageError."""
    if order.tls_ca is None:
        if order.tls_cert or order.tls_key:
            raise UsageError("--tls-cert and --tls-key need --tls-ca, which says whom to trust")
        if not (order.is_plaintext_allowed or _is_this_machine(order.address)):
            raise UsageError(
                f"--address {order.address} is not this machine: give --tls-ca FILE, or --plaintext if the token may "
                "be read on the way"
            )
        return None
    if (order.tls_cert is None) != (order.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together")
    return grpc.ssl_channel_credentials(
        root_certificates=_read(order.tls_ca),
        private_key=_read(order.tls_key) if order.tls_key else None,
        certificate_chain=_read(order.tls_cert) if order.tls_cert else None,
    )


def _is_this_machine(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
