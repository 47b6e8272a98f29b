"""The client of ImportKeys: which rows it sends again when a call fails, and when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from apikeys.v1 import import_service_pb2 as pb
from latchgate.config import CommandError
from latchgate.importing import client
from latchgate.importing.client import Batch, ImportClient, ImportRefusedError
from latchgate.importing.files import FileRefusedError, FileRow


class Service:
    """Answers requests, and ends calls with errors as it is told: after so many requests, each time a number."""

    def __init__(self, *failures: tuple[int, grpc.StatusCode]) -> None:
        self._failures = list(failures)
        self.seen: list[int] = []
        self.calls = 0

    async def answer(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Answers one call."""
        self.calls += 1
        left, code = self._failures.pop(0) if self._failures else (1_000_000, grpc.StatusCode.OK)
        if left == 0:
            await context.abort(code)
        async for request in requests:
            self.seen += [key.row for key in request.keys]
            results = [pb.ImportResult(row=key.row, outcome=pb.IMPORT_OUTCOME_CREATED) for key in request.keys]
            await context.write(pb.ImportKeysResponse(results=results))
            left -= 1
            if left == 0:
                await context.abort(code)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[tuple[ImportClient, list[int], list[str]]]:
    """Serves, and gives a client, the rows that it was told results of, and what it has said."""
    told: list[int] = []
    said: list[str] = []

    def take(batch: Batch, results: Sequence[pb.ImportResult]) -> None:
        assert [key.row for key in batch.request.keys] == [result.row for result in results]
        told.extend(row.line for row in batch.rows)

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        service.answer,
        request_deserializer=pb.ImportKeysRequest.FromString,
        response_serializer=pb.ImportKeysResponse.SerializeToString,
    )
    name = "apikeys.v1.ImportService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"ImportKeys": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield ImportClient(channel, "a-token", take=take, say=said.append), told, said
    await server.stop(0)


def made(count: int, faulty: Sequence[int] = ()) -> Iterator[Batch]:
    """Makes batches of one row each; those of `faulty` rows have nothing to send."""
    for number in range(1, count + 1):
        if number in faulty:
            yield Batch(rows=[FileRow(line=number, faults=(("", "wrong"),))], request=pb.ImportKeysRequest())
        else:
            key = pb.ImportedKey(row=number)
            yield Batch(rows=[FileRow(line=number, key=key)], request=pb.ImportKeysRequest(keys=[key]))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short."""
    monkeypatch.setattr(client, "MAX_PAUSE_S", 0.001)
    monkeypatch.setattr(client, "CALL_BATCHES", 7)


async def test_rows_go_by_several_calls() -> None:
    """A call takes so many batches and no more; all rows are sent once, in their order, and rows that can not be sent
    are told among them.
    """
    service = Service()
    async with serving(service) as (importer, told, said):
        await asyncio.to_thread(importer.send, made(30, faulty=[1, 8, 9, 30]))
    assert list(range(1, 31)) == sorted(told)
    assert [row for row in range(1, 30) if row not in {1, 8, 9}] == service.seen
    assert (4, []) == (service.calls, said)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 6, 7])
async def test_only_what_was_not_answered_is_sent_again(after: int) -> None:
    """Whenever calls fail for a while, every row is told of once, in its order, and with its own answer."""
    codes = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED] * 2
    service = Service(*((after, code) for code in codes))
    async with serving(service) as (importer, told, said):
        await asyncio.to_thread(importer.send, made(50))
    assert list(range(1, 51)) == told
    assert len(codes) == len(said)
    assert all("trying again in" in line for line in said)


async def test_gives_up() -> None:
    """Without an answer between them, so many failures are the last; an answer begins the count anew."""
    failures = [(0, grpc.StatusCode.UNAVAILABLE)] * client.MAX_FAILURES
    service = Service(*failures, (1, grpc.StatusCode.UNAVAILABLE), *failures)
    async with serving(service) as (importer, told, _):
        with pytest.raises(ImportRefusedError, match=r"^UNAVAILABLE"):
            await asyncio.to_thread(importer.send, made(3))
    assert [1] == told
    assert len(failures) * 2 + 1 == service.calls


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED])
async def test_what_does_not_pass_is_not_tried_again(code: grpc.StatusCode) -> None:
    """An error that another try would meet as well ends it at once."""
    service = Service((2, code))
    async with serving(service) as (importer, told, said):
        with pytest.raises(ImportRefusedError, match=f"^{code.name}"):
            await asyncio.to_thread(importer.send, made(9))
    assert (1, [1, 2], []) == (service.calls, told, said)


async def test_file_that_breaks_off_is_no_end() -> None:
    """A file that can not be read any more, as it changed under the command, is an error and not the end of it."""

    def breaking() -> Iterator[Batch]:
        yield from made(3)
        raise FileRefusedError("keys.csv: line 4 is not UTF-8")

    async with serving(Service()) as (importer, told, _):
        with pytest.raises(CommandError, match=r"line 4"):
            await asyncio.to_thread(importer.send, breaking())
    assert [1, 2, 3] == told
