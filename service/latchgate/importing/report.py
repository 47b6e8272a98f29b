"""What becomes of a file's rows: counted, grouped by reason, and written down."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final, TextIO

from apikeys.v1 import import_service_pb2 as pb
from latchgate.importing.client import Batch
from latchgate.importing.files import FileRow

# Of one reason, and of reasons; the file of results has all.
SHOWN_LINES: Final = 20
SHOWN_REASONS: Final = 20


class Report:
    """Counts rows by what became of them. `results` is written to, a line of JSON for each row."""

    def __init__(self, results: TextIO | None) -> None:
        self._results = results
        self.counts: Counter[str] = Counter()
        self._refused: defaultdict[str, list[int]] = defaultdict(list)
        self._refusals: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """How many rows there is a result for."""
        return self.counts.total()

    @property
    def is_good(self) -> bool:
        """Whether every row's key is there, as the row says."""
        return not self._refusals

    def take(self, batch: Batch, results: Sequence[pb.ImportResult]) -> None:
        """Takes note of a batch, with the results of those of its rows that were sent."""
        answered = iter(results)
        for row in batch.rows:
            if row.key is None:
                self._refuse(row, row.faults)
            else:
                self._take_result(row, next(answered))
        if self._results is not None:
            self._results.flush()

    def _take_result(self, row: FileRow, result: pb.ImportResult) -> None:
        outcome = pb.ImportOutcome.Name(result.outcome).removeprefix("IMPORT_OUTCOME_")
        if result.outcome == pb.IMPORT_OUTCOME_INVALID:
            self._refuse(row, [(each.field, each.description) for each in result.violations])
            return
        facts: dict[str, object] = {"key_id": result.key_id} if result.key_id else {}
        kind = "created"
        if result.outcome == pb.IMPORT_OUTCOME_DUPLICATE:
            kind = "there already"
            if not result.key_id:
                kind = "taken"
                self._group("digest: is that of another organization's key", row.line)
            elif result.differences:
                kind = "different"
                facts["differences"] = list(result.differences)
                self._group(f"there already, but with another {', '.join(result.differences)}", row.line)
        self.counts[kind] += 1
        self._write(row, outcome, facts)

    def _refuse(self, row: FileRow, faults: Sequence[tuple[str, str]]) -> None:
        self.counts["refused"] += 1
        for field, advice in faults:
            self._group(f"{field}: {advice}" if field else advice, row.line)
        violations = [{"field": field, "description": advice} for field, advice in faults]
        self._write(row, "INVALID", {"violations": violations})

    def _group(self, reason: str, line: int) -> None:
        self._refusals[reason] += 1
        if len(self._refused[reason]) < SHOWN_LINES:
            self._refused[reason].append(line)

    def _write(self, row: FileRow, outcome: str, facts: dict[str, object]) -> None:
        if self._results is not None:
            self._results.write(json.dumps({"line": row.line, "outcome": outcome} | facts, ensure_ascii=False) + "\n")

    def said(self) -> str:
        """Gives the counts in words."""
        refused = self.counts["refused"] + self.counts["taken"] + self.counts["different"]
        return f"{self.counts['created']} imported, {self.counts['there already']} there already, {refused} refused"

    def lines(self) -> list[str]:
        """Gives the reasons of refusals, the most frequent first, with the lines of the file."""
        told = []
        for reason, count in self._refusals.most_common(SHOWN_REASONS):
            shown = ", ".join(map(str, self._refused[reason]))
            more = f" and {count - SHOWN_LINES} more" if count > SHOWN_LINES else ""
            told.append(f"  {reason}\n    line{'s' if count > 1 else ''} {shown}{more}")
        if len(self._refusals) > SHOWN_REASONS:
            told.append(f"  and {len(self._refusals) - SHOWN_REASONS} other reasons")
        return told
