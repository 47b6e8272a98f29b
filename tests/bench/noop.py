"""The yardstick: a gRPC server that reads a ValidateRequest, and answers every one with the same bytes.

It runs on the same grpcio with the same options, the same event loop and the same scheduling as the service, and does
nothing else; with `plain` on what grpc.aio and uvloop are without all that. Its arguments are the port to listen on, a
file that holds the answer, and `tuned` or `plain`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import uvloop

from apikeys.v1 import key_service_pb2 as pb
from latchgate.rpc.server import KEY_SERVICE, OPTIONS
from latchgate.scheduling import schedule_for_throughput


async def serve(port: int, answer: pb.ValidateResponse, *, is_plain: bool) -> None:
    """Serves until SIGTERM or SIGINT."""

    async def validate(_request: pb.ValidateRequest, _context: Any) -> pb.ValidateResponse:
        return answer

    handler = grpc.unary_unary_rpc_method_handler(
        validate,
        request_deserializer=pb.ValidateRequest.FromString,
        response_serializer=pb.ValidateResponse.SerializeToString,
    )
    if not is_plain:
        schedule_for_throughput()
    server = grpc.aio.server(options=() if is_plain else OPTIONS)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(KEY_SERVICE.full_name, {"Validate": handler}),)
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await server.start()
    await stopping.wait()
    await server.stop(0)


if __name__ == "__main__":
    fixed = pb.ValidateResponse.FromString(Path(sys.argv[2]).read_bytes())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]), fixed, is_plain=sys.argv[3:] == ["plain"]))
