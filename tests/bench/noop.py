"""The yardstick: a gRPC server that reads a ValidateRequest, and answers every one with the same bytes.

It runs on the same grpcio with the same options, as many of grpc's servers on its port, the same event loop and the
same scheduling as the service, and does nothing else. Its arguments are the port to listen on, a file that holds the
answer, and choices that differ from that:

- `plain`: what grpc.aio and uvloop are without the service's options and scheduling, and with a single server
- `servers=NUMBER`: so many of grpc's servers
- `policy`: the system's usual scheduling policy
- `asyncio`: asyncio's own event loop
- `bytes`: requests and answers are not read and written, but passed on as bytes
- `registered`: health and reflection beside it, as generated code adds them: their methods are registered with grpc
- `coroutine`: the handler says that it is a coroutine, as the service's does
- `NAME=NUMBER`: an option of grpc
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from types import CoroutineType
from typing import Any, Final

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from apikeys.v1 import key_service_pb2 as pb
from latchgate.rpc.server import KEY_SERVICE, SERVERS, options
from latchgate.scheduling import schedule_for_throughput

CONNECTION_AGE_S: Final = 60
"""As of the service, if nothing else is set."""


class _SaidToBeACoroutine:
    """A handler that grpc need not look into."""

    # As in latchgate.rpc.pipeline.
    __class__ = CoroutineType  # type: ignore[assignment]

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def __call__(self, _request: Any, _context: Any) -> Any:
        return self._answer


async def serve(port: int, written: bytes, choices: Collection[str]) -> None:
    """Serves until SIGTERM or SIGINT."""
    is_raw = "bytes" in choices
    answer = written if is_raw else pb.ValidateResponse.FromString(written)

    async def validate(_request: Any, _context: Any) -> Any:
        return answer

    handler = grpc.unary_unary_rpc_method_handler(
        _SaidToBeACoroutine(answer) if "coroutine" in choices else validate,
        request_deserializer=None if is_raw else pb.ValidateRequest.FromString,
        response_serializer=None if is_raw else pb.ValidateResponse.SerializeToString,
    )
    is_plain = "plain" in choices
    if not is_plain and "policy" not in choices:
        schedule_for_throughput()
    changed = {name: int(number) for name, _, number in (each.partition("=") for each in choices) if number}
    count = 1 if is_plain else changed.pop("servers", SERVERS)
    chosen = () if is_plain else tuple((dict(options(CONNECTION_AGE_S)) | changed).items())
    servers = [grpc.aio.server(options=chosen) for _ in range(count)]
    for server in servers:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(KEY_SERVICE.full_name, {"Validate": handler}),)
        )
        if "registered" in choices:
            health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
            reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
        server.add_insecure_port(f"127.0.0.1:{port}")
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    for server in servers:
        await server.start()
    await stopping.wait()
    await asyncio.gather(*(server.stop(0) for server in servers))


if __name__ == "__main__":
    loop_factory = None if "asyncio" in sys.argv[3:] else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), sys.argv[3:]))
