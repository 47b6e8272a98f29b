"""`latchgate serve` whose Validate is by turns the service's own and a no-op: two RPCs on the same grpcio server.

It is called as `latchgate` would be. Its workers begin with the turns when they are sent SIGUSR1. Then the file that
BENCH_ANSWER names is read for what the no-op answers, and a line is added to the one that BENCH_SLICES names after each
turn: `own` or `noop`, and from when to when it was, in seconds since 1970.

Whoever calls notices nothing: connections, servers, event loop and process are the same, and so is all that the service
does beside the calls.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from apikeys.v1 import key_service_pb2 as pb
from latchgate.scheduling import schedule_for_throughput

SLICE_S = 0.03
"""How long a turn is."""


class Turning(grpc.GenericRpcHandler):
    """The handlers of KeyService, of which that of Validate changes."""

    def __init__(self, own: grpc.GenericRpcHandler, method: str) -> None:
        """Takes the service's own handlers, and the path of Validate."""
        self._others = own
        self._method = method
        self._own = self._handler = own.service(_Details(method))
        self._noop = self._own
        self._begin_s = 0.0
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._begin)

    def service(self, handler_call_details: Any) -> Any:
        """Finds the handler of a call."""
        if handler_call_details.method == self._method:
            return self._handler
        return self._others.service(handler_call_details)

    def _begin(self) -> None:
        answer = pb.ValidateResponse.FromString(Path(os.environ["BENCH_ANSWER"]).read_bytes())

        # As in noop.py.
        async def validate(_request: Any, _context: Any) -> Any:
            return answer

        self._noop = grpc.unary_unary_rpc_method_handler(
            validate,
            request_deserializer=pb.ValidateRequest.FromString,
            response_serializer=pb.ValidateResponse.SerializeToString,
        )
        self._begin_s = time.time()
        asyncio.get_running_loop().call_later(SLICE_S, self._turn)

    def _turn(self) -> None:
        is_own = self._handler is self._own
        self._handler = self._noop if is_own else self._own
        now_s = time.time()
        with Path(os.environ["BENCH_SLICES"]).open("a", encoding="ascii") as file:
            file.write(f"{'own' if is_own else 'noop'} {self._begin_s:.6f} {now_s:.6f}\n")
        self._begin_s = time.time()
        asyncio.get_running_loop().call_later(SLICE_S, self._turn)


@dataclass(slots=True)
class _Details:
    """What a call is looked up by."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()


def _have_workers_turn() -> None:
    """Has this process, which is to be a worker, bind Validate twofold."""
    # Before grpc's threads are there, as a worker does.
    schedule_for_throughput()
    from latchgate.rpc import server  # noqa: PLC0415 - not in the supervisor

    bind = server._bind  # noqa: SLF001 - the one place where handlers are made

    def bind_twofold(service: Any, *others: Any) -> Any:
        bound = bind(service, *others)
        return Turning(bound, f"/{service.full_name}/Validate") if service is server.KEY_SERVICE else bound

    server._bind = bind_twofold  # type: ignore[assignment]  # noqa: SLF001 - the same


def _have_workers_started_so() -> None:
    """Has this process, which is to be a supervisor, start its workers as this script."""
    start = asyncio.create_subprocess_exec

    async def start_so(executable: str, *arguments: str, **more: Any) -> asyncio.subprocess.Process:
        ours = [__file__ if each == "latchgate" else each for each in arguments if each != "-m"]
        return await start(executable, *ours, **more)

    asyncio.create_subprocess_exec = start_so  # type: ignore[assignment]  # it has no more arguments here


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        _have_workers_turn()
    else:
        _have_workers_started_so()
    from latchgate.cli import main

    main()
