"""Sending rows to ImportKeys, so that a lost connection costs nothing but time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from apikeys.v1 import import_service_pb2 as pb
from apikeys.v1 import key_pb2
from apikeys.v1.import_service_pb2_grpc import ImportServiceStub
from latchgate.config import CommandError
from latchgate.importing.files import FileRow

BATCH_ROWS: Final = 500
# Below what a server takes, whatever the last row adds.
BATCH_BYTES: Final = 1024 * 1024
# Short calls: a gateway between may end long ones, and a server that stops waits for those under way.
CALL_BATCHES: Final = 20
CALL_TIMEOUT_S: Final = 60.0
# How many batches may be under way: the next one is there when one is done.
AHEAD: Final = 2
# Without any answer between them. With the pauses about half a minute, in which a database comes back after a failover.
MAX_FAILURES: Final = 10
FIRST_PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 5.0

_PASSING: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # What grpc makes of a connection that is cut in the middle of an answer.
        grpc.StatusCode.UNKNOWN,
    }
)

CHANNEL_OPTIONS: Final = (
    # A server that is gone without a word is found out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class ImportRefusedError(CommandError):
    """The service does not take what is sent, or can not be reached. What was answered is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of a file, those that are to be sent among them."""

    rows: Sequence[FileRow]
    request: pb.ImportKeysRequest


def batches(rows: Iterator[FileRow], organization_id: str) -> Iterator[Batch]:
    """Puts rows together to requests. Rows that can not be sent come with those around them."""
    taken: list[FileRow] = []
    request = pb.ImportKeysRequest(organization_id=organization_id)
    size = 0
    for row in rows:
        taken.append(row)
        if row.key is not None:
            request.keys.append(row.key)
            size += row.key.ByteSize()
        if len(taken) == BATCH_ROWS or size > BATCH_BYTES:
            yield Batch(rows=taken, request=request)
            taken, size = [], 0
            request = pb.ImportKeysRequest(organization_id=organization_id)
    if taken:
        yield Batch(rows=taken, request=request)


class ImportClient:
    """Sends batches in their order, and those again that were not answered when a call failed.

    By grpc's threads, and not by its event loop's: there a request that can not be sent any more hides why.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        token: str,
        *,
        take: Callable[[Batch, Sequence[pb.ImportResult]], None],
        say: Callable[[str], None],
    ) -> None:
        """Takes an open channel, the caller's token, who is told of results, and who of trouble."""
        # The stubs' types are those for event loops alone.
        self._stub: Any = ImportServiceStub(cast("Any", channel))
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._take = take
        self._say = say
        self._waiting: deque[Batch] = deque()
        self._failures = 0
        # That of the newest response, which holds for all before it.
        self.effect = key_pb2.Effect()

    def send(self, todo: Iterator[Batch]) -> None:
        """Sends all batches. Raises ImportRefusedError."""
        while self._fill(todo):
            call = _Requests(self._waiting, partial(self._fill, todo))
            try:
                self._receive(call)
            except grpc.RpcError as error:
                self._waiting.extendleft(reversed(call.end()))
                self._pause(error)
            finally:
                call.end()
            if call.fault is not None:
                raise call.fault

    def _fill(self, todo: Iterator[Batch]) -> bool:
        """Has the next batch ready that is to be sent; says whether there is one."""
        while not self._waiting:
            batch = next(todo, None)
            if batch is None:
                return False
            if batch.request.keys:
                self._waiting.append(batch)
            else:
                self._take(batch, ())
        return True

    def _receive(self, call: _Requests) -> None:
        """Makes one call, and takes its responses."""
        for response in self._stub.ImportKeys(call, metadata=self._metadata, timeout=CALL_TIMEOUT_S):
            batch = call.answered()
            if [key.row for key in batch.request.keys] != [result.row for result in response.results]:
                raise ImportRefusedError("the service has answered other rows than were sent")
            self._failures = 0
            self.effect = response.effect
            self._take(batch, response.results)
            call.go_on()

    def _pause(self, error: Any) -> None:
        """Waits before another call, if there may be one. Raises ImportRefusedError."""
        status = rpc_status.from_call(error)
        retry = error_details_pb2.RetryInfo()
        is_told = any(detail.Unpack(retry) for detail in status.details) if status else False
        self._failures += 1
        told = f"{error.code().name}: {error.details() or 'no details'}"
        if not (is_told or error.code() in _PASSING) or self._failures > MAX_FAILURES:
            raise ImportRefusedError(told)
        pause_s = min(FIRST_PAUSE_S * 2**self._failures, MAX_PAUSE_S)
        if is_told:
            pause_s = max(pause_s, retry.retry_delay.ToTimedelta().total_seconds())
        self._say(f"{told}; trying again in {pause_s:.1f} s")
        time.sleep(pause_s)


class _Requests:
    """The requests of one call, which grpc asks for on a thread of its own: so many batches and no more."""

    def __init__(self, waiting: deque[Batch], fill: Callable[[], bool]) -> None:
        self._waiting = waiting
        self._fill = fill
        self._left = CALL_BATCHES
        self._room = threading.Semaphore(AHEAD)
        self._under_way: deque[Batch] = deque()
        self._lock = threading.Lock()
        self._is_over = False
        self.fault: Exception | None = None

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> pb.ImportKeysRequest:
        if not self._left:
            raise StopIteration
        self._left -= 1
        self._room.acquire()
        with self._lock:
            try:
                is_there = not self._is_over and self._fill()
            except Exception as error:  # noqa: BLE001 - grpc would take it for a fault of its own
                self.fault = error
                is_there = False
            if not is_there:
                raise StopIteration
            self._under_way.append(self._waiting.popleft())
            return self._under_way[-1].request

    def answered(self) -> Batch:
        """Gives the batch that the next response is for."""
        return self._under_way.popleft()

    def go_on(self) -> None:
        """Lets another batch follow."""
        self._room.release()

    def end(self) -> list[Batch]:
        """Lets none follow, however often grpc asks; gives those that were not answered."""
        with self._lock:
            self._is_over = True
        self._room.release()
        return list(self._under_way)
