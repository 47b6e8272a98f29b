"""ImportService: each request of a stream is converted, given to one use case, and its answer converted back."""

from __future__ import annotations

import asyncio
from typing import Final

from apikeys.v1 import import_service_pb2 as pb
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.imported import ImportRow, RowOutcome, RowResult
from latchgate.domain.importing import KeyImport, KeyImporter, invalid
from latchgate.domain.model import Caller
from latchgate.rpc import convert
from latchgate.rpc.requests import row_violations

# Checking a row takes some 40 us of the one thread that also answers Validate.
ROWS_A_TURN: Final = 25

_OUTCOME: Final = {
    RowOutcome.CREATED: pb.IMPORT_OUTCOME_CREATED,
    RowOutcome.DUPLICATE: pb.IMPORT_OUTCOME_DUPLICATE,
    RowOutcome.INVALID: pb.IMPORT_OUTCOME_INVALID,
}


class ImportService:
    """Serves apikeys.v1.ImportService."""

    def __init__(self, *, importer: KeyImporter) -> None:
        """Takes what begins imports."""
        self._importer = importer

    def import_keys(self) -> ImportCall:
        """Begins an import."""
        return ImportCall(self._importer.begin())


class ImportCall:
    """One call of ImportKeys."""

    def __init__(self, importing: KeyImport) -> None:
        self._importing = importing

    async def __call__(self, request: pb.ImportKeysRequest, caller: Caller) -> pb.ImportKeysResponse:
        """Stores the rows of one request."""
        rows = []
        for number, each in enumerate(request.keys):
            if number % ROWS_A_TURN == 0:
                await asyncio.sleep(0)
            rows.append(_row(each))
        batch = await self._importing.take(caller, request.organization_id, rows)
        return pb.ImportKeysResponse(
            results=[_result_message(result) for result in batch.results],
            effect=convert.effect_message(batch.effect),
        )


def _row(message: pb.ImportedKey) -> ImportRow | RowResult:
    """Reads a row; or gives as its result what is wrong with it."""
    violations = row_violations(message)
    if violations:
        return invalid(message.row, violations)
    try:
        draft = convert.key_draft(message)
    except InvalidFieldError as error:
        return invalid(message.row, error.violations)
    return ImportRow(
        number=message.row,
        digest=message.digest,
        hint=message.hint,
        active=message.active if message.HasField("active") else True,
        draft=draft,
    )


def _result_message(result: RowResult) -> pb.ImportResult:
    """Writes what became of a row."""
    return pb.ImportResult(
        row=result.number,
        outcome=_OUTCOME[result.outcome],
        key_id=result.key_id,
        differences=result.differences,
        violations=[
            pb.ImportViolation(field=field, description=description) for field, description in result.violations
        ],
    )
