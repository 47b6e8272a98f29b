"""Reading an issuer's documents over HTTPS, within bounds."""

from __future__ import annotations

import json
import ssl
from typing import Any, Final

import aiohttp

TIMEOUT_S: Final = 5.0
MAX_BYTES: Final = 256 * 1024

_HEADERS: Final = {"accept": "application/json", "user-agent": "latchgate"}
_OK: Final = 200


class FetchError(Exception):
    """A document can not be had. The message says which and why, in words for whoever runs the service."""


class Fetcher:
    """Reads JSON objects. Through the proxy of the environment (HTTPS_PROXY), if it names one."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S, trust: ssl.SSLContext | None = None) -> None:
        """Takes how long one reading may take, and whose certificates are trusted. Is made in the loop that uses it."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trust or True, force_close=True),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_HEADERS,
            trust_env=True,
        )

    async def get(self, url: str) -> dict[str, Any]:
        """Reads a JSON object. Raises FetchError."""
        try:
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status != _OK:
                    raise FetchError(f"{url} answers with status {answer.status}")
                content = await _read(answer)
        except TimeoutError:
            raise FetchError(f"{url} does not answer in time") from None
        except aiohttp.ClientConnectorCertificateError:
            raise FetchError(f"{url} has a certificate that is not trusted") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise FetchError(f"{url} can not be reached ({type(error).__name__})") from None
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise FetchError(f"{url} answers with something that is no JSON object of at most {MAX_BYTES} bytes")
        return document

    async def close(self) -> None:
        """Ends what is under way."""
        await self._session.close()


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """Gives an answer's body, and no more of it than is looked at: what is cut off is no JSON."""
    content = bytearray()
    async for part in answer.content.iter_any():
        content += part
        if len(content) > MAX_BYTES:
            answer.close()
            return b""
    return bytes(content)
