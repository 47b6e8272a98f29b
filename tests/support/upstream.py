"""What stands behind a gateway in tests: it says what it was sent."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A server that answers every request with its path, and remembers all headers, their names in lower case.

    Health checks, which ask for /health, are not remembered.
    """

    port: int
    requests: list[dict[str, str]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, str]:
        """The headers of the last request."""
        return self.requests[-1]


@asynccontextmanager
async def sample_upstream() -> AsyncIterator[Upstream]:
    """Serves until the block ends."""
    upstream: Upstream

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path != "/health":
            upstream.requests.append({name.lower(): value for name, value in request.headers.items()})
        return web.Response(text=request.path)

    runner = web.ServerRunner(web.Server(answer, access_log=None, max_line_size=1 << 17, max_field_size=1 << 17))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = Upstream(port=runner.addresses[0][1])
    try:
        yield upstream
    finally:
        await runner.cleanup()


def free_port() -> int:
    """Finds a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
