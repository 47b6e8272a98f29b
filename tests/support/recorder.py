"""A gRPC service of any kind, which remembers what it was sent: in latchgate's place, or behind a gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf import empty_pb2


class Recorder(grpc.GenericRpcHandler):
    """A service that answers every call with an empty message, and remembers what came with it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []

    def service(self, details: Any) -> Any:
        """Gives the handler of any method."""

        async def answer(_request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            remaining_s: float | None = context.time_remaining()
            if not details.method.startswith("/grpc.health"):
                self.calls.append(
                    {"path": details.method, "remaining_s": str(remaining_s)}
                    | {name: str(value) for name, value in context.invocation_metadata() or ()}
                )
            return empty_pb2.Empty().SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def recorder() -> AsyncIterator[tuple[Recorder, str]]:
    """Serves until the block ends; gives the service, and its address."""
    server = grpc.aio.server()
    handler = Recorder()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield handler, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
