"""The health check that a container runs."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from latchgate.config import CommandError, Settings

TIMEOUT_S = 3.0


class HealthError(CommandError):
    """The service is not healthy, or not there."""


async def check_health(settings: Settings) -> None:
    """Asks grpc.health.v1 on LATCHGATE_LISTEN. Raises HealthError.

    Where the port speaks TLS, what the metrics say of the database is taken instead: a certificate made for other
    names, or a demand for one of the client's own, would stand between a container and its own health.
    """
    if settings.tls_cert is None:
        await _ask_grpc(reached_from_here(settings.listen))
    else:
        _ask_metrics(reached_from_here(settings.metrics_listen))


def reached_from_here(address: str) -> str:
    """Gives the address at which this machine reaches what listens on all of its addresses."""
    host, _, port = address.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"  # noqa: S104 - compared, not bound


async def _ask_grpc(address: str) -> None:
    # Straight there, whatever proxy is set for the way out.
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # the published stubs leave out its methods
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise HealthError(f"{address} does not answer ({error.code().name})") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise HealthError(f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _ask_metrics(address: str) -> None:
    try:
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with straight.open(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    except (OSError, urllib.error.URLError):
        raise HealthError(f"{address} does not answer") from None
    # One worker that serves is enough for a service that serves; it has more only while others begin or end.
    if not re.search(r"^latchgate_database_up(\{.*\})? 1\.0$", text, re.MULTILINE):
        raise HealthError(f"{address} says that the database is away")
