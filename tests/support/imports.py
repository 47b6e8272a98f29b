"""Rows to import, and the calls that do it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from apikeys.v1 import import_service_pb2 as pb
from apikeys.v1.import_service_pb2_grpc import ImportServiceStub
from support.service import Metadata, RunningService


def foreign_token() -> str:
    """Makes a token as another system would, never twice the same."""
    return f"sk_live_{secrets.token_urlsafe(24)}"


def sha256(token: str) -> bytes:
    """Gives what is imported of a token."""
    return hashlib.sha256(token.encode()).digest()


def row(number: int, token: str, **fields: Any) -> pb.ImportedKey:
    """Makes a row that keeps all rules, unless the fields say otherwise."""
    values: dict[str, Any] = {"digest": sha256(token), "hint": token[:12], "name": f"key {number}"}
    return pb.ImportedKey(row=number, **(values | fields))


def new_rows(count: int, **fields: Any) -> list[pb.ImportedKey]:
    """Makes rows of tokens that nobody ever saw."""
    return [row(number, foreign_token(), **fields) for number in range(1, count + 1)]


def import_call(channel: grpc.aio.Channel, requests: Any, caller: Metadata, timeout_s: float | None = None) -> Any:
    """Starts a call of ImportKeys."""
    stub: Any = ImportServiceStub(channel)
    return stub.ImportKeys(requests, metadata=caller, timeout=timeout_s)


async def import_requests(
    service: RunningService,
    requests: Sequence[pb.ImportKeysRequest],
    caller: Metadata | None = None,
    timeout_s: float | None = None,
) -> list[pb.ImportKeysResponse]:
    """Sends requests in one call, and gives all responses."""

    async def each() -> AsyncIterator[pb.ImportKeysRequest]:
        for request in requests:
            yield request

    call = import_call(service.channel, each(), service.root if caller is None else caller, timeout_s)
    return [response async for response in call]


async def import_rows(
    service: RunningService,
    organization_id: str,
    rows: Sequence[pb.ImportedKey],
    caller: Metadata | None = None,
    timeout_s: float | None = None,
) -> pb.ImportKeysResponse:
    """Sends rows in one request, as root if no caller is given."""
    request = pb.ImportKeysRequest(organization_id=organization_id, keys=rows)
    (response,) = await import_requests(service, [request], caller, timeout_s)
    return response


def outcomes(response: pb.ImportKeysResponse) -> list[str]:
    """Gives the names of what became of the rows: `CREATED`, `DUPLICATE` ..."""
    names = [pb.ImportOutcome.Name(result.outcome) for result in response.results]
    return [name.removeprefix("IMPORT_OUTCOME_") for name in names]


def violations(result: pb.ImportResult) -> dict[str, str]:
    """Gives what is wrong with a row, by field."""
    return {each.field: each.description for each in result.violations}
