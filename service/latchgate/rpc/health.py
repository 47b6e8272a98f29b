"""grpc.health.v1: what the service says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """Answers health checks; NOT_SERVING until told otherwise.

    Not grpcio's own servicer: it holds a lock while it writes to a watcher, so that one client that reads nothing keeps
    every change from being told and the server from stopping; and its watches last as long as the grace of a stop.
    """

    def __init__(self, services: Iterable[str]) -> None:
        """Takes the full names of the services; the empty name stands for the whole server."""
        self._services = frozenset(("", *services))
        self._status: int = _NOT_SERVING
        self._is_stopping = False
        self._changed = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """Whether the service can answer."""
        return self._status == _SERVING

    def set_serving(self, *, is_serving: bool) -> None:
        """Tells checks and watchers whether the service can answer. Once it is stopping, it can not."""
        self._status = _SERVING if is_serving and not self._is_stopping else _NOT_SERVING
        # Each change has an event of its own: whoever waits for it wakes once, and waits for the next one.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def stop(self) -> None:
        """Says NOT_SERVING for good, and ends watches once they were told."""
        self._is_stopping = True
        self.set_serving(is_serving=False)

    async def Check(  # noqa: N802 - named by the protocol
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Answers once; a service that is not served here is NOT_FOUND."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service is served here")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def List(self, _request: Any, _context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802 - as above
        """Answers once, for all services."""
        messages: Any = health_pb2  # the published types do not have those of List
        status = health_pb2.HealthCheckResponse(status=self._status)
        return messages.HealthListResponse(statuses=dict.fromkeys(self._services, status))

    async def Watch(  # noqa: N802 - as above
        self, request: health_pb2.HealthCheckRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answers at once, and again whenever the answer has changed. What a slow reader has missed is left out."""
        told = None
        while True:
            changed, is_last = self._changed, self._is_stopping
            status = self._status if request.service in self._services else _UNKNOWN
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            if is_last:
                return
            # Set already if the answer changed while it was written.
            await changed.wait()
