"""The keys with which access tokens are verified, for whoever verifies them, as a JWK Set (RFC 7517)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Final

import structlog
from aiohttp import web

from latchgate.background import where
from latchgate.domain.errors import UnavailableError
from latchgate.domain.signing import SigningKey, jwk
from latchgate.gateway.answers import COME_BACK, UNDECIDED
from latchgate.observers import CallObserver

JWKS_PATH: Final = "/.well-known/jwks.json"
METHOD: Final = "HTTP/jwks"
"""What stands for this page among the methods in metrics."""
MAX_AGE_S: Final = 300
"""For how long whoever fetches the keys may keep them. The next key is published a day before it signs."""

_log = structlog.get_logger("latchgate.web")


class JwksPage:
    """Answers with the keys. Until `connect` is called it has none."""

    def __init__(self, calls: CallObserver) -> None:
        """Takes who is told of calls."""
        self._calls = calls
        self._published: Callable[[], Awaitable[Sequence[SigningKey]]] | None = None

    def connect(self, published: Callable[[], Awaitable[Sequence[SigningKey]]]) -> None:
        """Lets requests be answered with what this gives."""
        self._published = published

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """Answers one request."""
        start_s, code = perf_counter(), "OK"
        try:
            if request.method not in {"GET", "HEAD"}:
                code = "INVALID_ARGUMENT"
                return web.Response(status=405, headers={"Allow": "GET, HEAD"}, text="only to be read\n")
            keys = await self._published() if self._published else None
            if keys is None:
                code = UNDECIDED.status
                return web.Response(status=UNDECIDED.http, headers=COME_BACK)
            headers = {"Cache-Control": f"public, max-age={MAX_AGE_S}", "Access-Control-Allow-Origin": "*"}
            return web.json_response({"keys": [jwk(key) for key in keys]}, headers=headers)
        except UnavailableError:
            code = UNDECIDED.status
            return web.Response(status=UNDECIDED.http, headers=COME_BACK)
        except Exception as error:  # noqa: BLE001 - nothing but an answer may get out
            code = "INTERNAL"
            _log.error("http_jwks", error=type(error).__name__, where=where(error))
            return web.Response(status=500)
        finally:
            self._calls.finished(METHOD, code, perf_counter() - start_s)
