"""The HTTP server: its port and its limits."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from latchgate.gateway.answers import COME_BACK, UNDECIDED, Denial
from latchgate.listening import KEEPALIVE_S
from latchgate.web.auth import AuthEndpoint, refusal

MAX_HEADER_BYTES: Final = 128 * 1024
"""Of one header: more than a gateway lets through of all that its client sent."""
MAX_HEADERS: Final = 1024

NAME: Final = "latchgate"
"""What answers name as their server: gateways hand refusals on to clients as they are, whom our libraries' versions do
not concern.
"""

UNREADABLE: Final = Denial("INVALID_ARGUMENT", 400, "MALFORMED_REQUEST", "the request can not be read")


class HttpListenError(Exception):
    """The address can not be listened on. The message names it."""


class _Handler(RequestHandler):
    """Handles one connection. What can not be read is refused in our own words: aiohttp's repeat some of it."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        _exc: BaseException | None = None,
        _message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what failed before it could be answered, and closes the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way, and can not be replaced")
        failed = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        response = refusal(UNDECIDED, COME_BACK) if failed else refusal(UNREADABLE, {})
        response.force_close()
        return _named(response)


class _Server(web.Server):
    """Has connections handled by _Handler: aiohttp takes options for its own class, and no other class."""

    def __call__(self) -> _Handler:
        """Makes what handles a new connection."""
        return _Handler(self, loop=self._loop, **self._kwargs)


class HttpServer:
    """Serves one endpoint on the loop that is there."""

    def __init__(self, endpoint: AuthEndpoint, grace_s: float) -> None:
        """Takes what answers, and how many seconds requests that are under way have to finish at the end."""
        self._endpoint = endpoint
        self._server = _Server(
            self._answer,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            max_headers=MAX_HEADERS,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )
        self._runner = web.ServerRunner(self._server, shutdown_timeout=grace_s)
        self._is_retiring = False
        # 0 until it listens.
        self.port = 0

    async def listen(self, address: str, *, shares_port: bool) -> None:
        """Takes requests on an address, from now on. Raises HttpListenError."""
        host, _, port = address.rpartition(":")
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port), reuse_port=shares_port).start()
        except OSError:
            raise HttpListenError(
                f"{address} can not be listened on: it is in use, or is no address of this machine"
            ) from None
        self.port = int(self._runner.addresses[0][1])

    @property
    def connections(self) -> int:
        """How many are connected."""
        return len(self._server.connections)

    async def retire(self) -> None:
        """Takes no new connections; those that are there end with their next answer, or when their clients end them."""
        self._is_retiring = True
        for site in self._runner.sites:
            await site.stop()

    async def close(self) -> None:
        """Takes no new connections, and lets requests that are under way finish."""
        await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        response = await self._endpoint.answer(request)
        if self._is_retiring:
            response.force_close()
        return _named(response)


def _named(response: web.Response) -> web.Response:
    response.headers[hdrs.SERVER] = NAME
    return response
