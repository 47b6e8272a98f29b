"""Reading files of keys: line by line, whatever their size, and with the number of the line for whatever is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from apikeys.v1.import_service_pb2 import ImportedKey
from latchgate.config import CommandError
from latchgate.importing.fields import PLAINTEXT_FIELDS, READERS, REQUIRED, read_fields

# Far more than any row that keeps to the rules.
MAX_LINE_BYTES: Final = 1024 * 1024
_BOM: Final = b"\xef\xbb\xbf"
_PAGE: Final = "docs/importing.md"

_Content = Mapping[str, Any] | str
"""The values of a row by their fields, or what is wrong with the row as a whole."""


class FileRefusedError(CommandError):
    """The file as a whole can not be imported: nothing of it is sent. The message names the line."""

    status = 2


class Format(Enum):
    """How a file is written."""

    CSV = "csv"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    """A row of a file, which begins on `line`: its key, or what is wrong with it, as pairs of field and advice."""

    line: int
    key: ImportedKey | None = None
    faults: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """A file of keys."""

    path: Path
    format: Format

    @classmethod
    def named(cls, path: Path) -> KeyFile:
        """Tells the format by the name. Raises FileRefusedError."""
        format_ = {".csv": Format.CSV, ".jsonl": Format.JSONL, ".ndjson": Format.JSONL}.get(path.suffix.lower())
        if format_ is None:
            raise FileRefusedError(f"{path}: the name must end in .csv or .jsonl, which says how the file is written")
        return cls(path=path, format=format_)

    def rows(self) -> Iterator[FileRow]:
        """Reads the rows, one after the other. Raises FileRefusedError."""
        for line, content in self._contents():
            if isinstance(content, str):
                yield FileRow(line=line, faults=(("", content),))
                continue
            read = read_fields(line, content)
            yield FileRow(line=line, faults=tuple(read)) if isinstance(read, list) else FileRow(line=line, key=read)

    def count(self) -> int:
        """Reads the whole file once, but for the values, and gives the number of its rows. Raises FileRefusedError."""
        return sum(1 for _ in self._contents())

    def _contents(self) -> Iterator[tuple[int, _Content]]:
        try:
            with self.path.open("rb") as file:
                lines = self._lines(file)
                yield from self._csv_contents(lines) if self.format is Format.CSV else self._jsonl_contents(lines)
        except OSError as error:
            raise FileRefusedError(f"{self.path}: {error.strerror}") from None

    def _lines(self, file: Any) -> Iterator[str]:
        """Decodes the lines, with their ends. A byte order mark at the beginning is passed over."""
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise self._refused(number, f"is longer than {MAX_LINE_BYTES} bytes")
            if number == 1 and raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
            try:
                text: str = raw.decode()
            except UnicodeDecodeError:
                raise self._refused(number, "is not UTF-8; save the file in that encoding") from None
            if "\0" in text:
                raise self._refused(number, "holds the character U+0000; save the file as text in UTF-8")
            yield text

    def _csv_contents(self, lines: Iterator[str]) -> Iterator[tuple[int, _Content]]:
        reader = csv.reader(lines, strict=True)
        header: Sequence[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise self._refused(line, f"is not CSV: {error}") from None
            if not any(values):
                continue
            if header is None:
                header = self._header(line, values)
            elif len(values) != len(header):
                yield line, f"must have {len(header)} columns, and has {len(values)}"
            else:
                yield line, dict(zip(header, values, strict=True))
        if header is None:
            raise FileRefusedError(f"{self.path} is empty; the first line must name the columns")

    def _header(self, line: int, names: Sequence[str]) -> Sequence[str]:
        header = [name.strip() for name in names]
        self._check_names(line, header, "column")
        for number, name in enumerate(header, start=1):
            if name not in READERS:
                raise self._refused(line, f"column {number} has no name that is known; there are {', '.join(READERS)}")
            if header.count(name) > 1:
                raise self._refused(line, f"has two columns {name}")
        for name in REQUIRED:
            if name not in header:
                raise self._refused(line, f"must name a column {name}; there are {', '.join(READERS)}")
        return header

    def _jsonl_contents(self, lines: Iterator[str]) -> Iterator[tuple[int, _Content]]:
        for line, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                yield line, "must be one JSON object on a line of its own"
                continue
            self._check_names(line, values, "field")
            # Those beyond are not named: they may be anything.
            is_known = values.keys() <= READERS.keys()
            yield line, values if is_known else f"must have no other fields than {', '.join(READERS)}"

    def _check_names(self, line: int, names: Sequence[str] | Mapping[str, Any], kind: str) -> None:
        """Demands that no field is one of plain tokens."""
        for name in names:
            if name.strip().lower() in PLAINTEXT_FIELDS:
                raise self._refused(
                    line,
                    f"has a {kind} {name.strip().lower()!r}. Tokens in plain text are not imported, and were not sent: "
                    f"give the SHA-256 of each in {kind} 'digest' instead, and delete this file safely ({_PAGE})",
                )

    def _refused(self, line: int, what: str) -> FileRefusedError:
        return FileRefusedError(f"{self.path}: line {line} {what}")
