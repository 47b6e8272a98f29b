"""Sending to webhooks: to addresses that were looked at, within bounds, and with nothing of this machine's own."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from time import perf_counter
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from latchgate.domain.addresses import AddressGuard
from latchgate.domain.outbox import DeliveryError, Reply

TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 * 1024
# As many names are looked up at once; a name server that does not answer holds one of them for some seconds.
NAME_THREADS: Final = 16

# Of a number of seconds; more is longer than any wait.
MAX_DIGITS: Final = 9

_HEADERS: Final = {"content-type": "application/json", "user-agent": "latchgate-webhooks"}


class AddressRefusedError(OSError):
    """An address is not one to which may be sent."""


class _Resolver(AbstractResolver):
    """Looks names up, and lets none pass of which any address is refused."""

    def __init__(self, guard: AddressGuard, threads: ThreadPoolExecutor, *, is_encrypted: bool) -> None:
        self._guard = guard
        self._threads = threads
        self._is_encrypted = is_encrypted

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Gives the addresses of a name. Raises AddressRefusedError, and OSError for a name that has none."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _look_up, host, port, family)
        for _, _, _, _, address in found:
            if not self._guard.permits(str(address[0]), is_encrypted=self._is_encrypted):
                raise AddressRefusedError
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Has nothing to close: the threads are the sender's."""


def _look_up(host: str, port: int, family: socket.AddressFamily) -> Any:
    return socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)


class WebhookSender:
    """Sends bodies to URLs. One that is sent to is looked up anew each time, and connected to as it was looked up."""

    def __init__(
        self, guard: AddressGuard, *, timeout_s: float = TIMEOUT_S, trust: ssl.SSLContext | None = None
    ) -> None:
        """Takes where may be sent to, how long one sending may take, and whose certificates are trusted.

        Is made in the loop in which it is used.
        """
        self._guard = guard
        self._threads = ThreadPoolExecutor(NAME_THREADS, thread_name_prefix="webhook-names")
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        # One for each: in plain text fewer addresses are permitted.
        self._sessions = {
            scheme: aiohttp.ClientSession(
                connector=self._connector(trust, is_encrypted=scheme == "https"),
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers=_HEADERS,
                trust_env=False,
            )
            for scheme in ("https", "http")
        }

    def _connector(self, trust: ssl.SSLContext | None, *, is_encrypted: bool) -> aiohttp.TCPConnector:
        def open_socket(info: Any) -> socket.socket:
            """Makes the socket for an address: the last look at where it leads, whatever its name was."""
            kind, type_, protocol, _, address = info
            if not self._guard.permits(str(address[0]), is_encrypted=is_encrypted):
                raise AddressRefusedError
            return socket.socket(family=kind, type=type_, proto=protocol)

        return aiohttp.TCPConnector(
            resolver=_Resolver(self._guard, self._threads, is_encrypted=is_encrypted),
            use_dns_cache=False,
            limit=0,
            force_close=True,
            ssl=trust or True,
            socket_factory=open_socket,
        )

    async def send(self, url: str, headers: Mapping[str, str], body: str) -> Reply:
        """Sends a body, and gives what came of it. Never fails."""
        start_s = perf_counter()
        status, error, retry_after_s = 0, None, 0.0
        try:
            session = self._sessions.get(URL(url, encoded=True).scheme)
            if session is None:
                return Reply(error=DeliveryError.ADDRESS_REFUSED)
            async with session.post(
                URL(url, encoded=True), data=body.encode(), headers=headers, allow_redirects=False
            ) as answer:
                status = answer.status
                retry_after_s = _retry_after_s(answer.headers)
                await _let_pass(answer)
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            # What comes after the status does not change it.
            error = None if status else _error(failure)
        return Reply(status=status, error=error, retry_after_s=retry_after_s, duration_s=perf_counter() - start_s)

    async def close(self) -> None:
        """Ends what is under way."""
        for session in self._sessions.values():
            await session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _let_pass(answer: aiohttp.ClientResponse) -> None:
    """Reads an answer's body, so that its sender is not cut off, and keeps nothing; one that is too long is cut off."""
    read = 0
    with suppress(aiohttp.ClientError, TimeoutError):
        async for part in answer.content.iter_any():
            read += len(part)
            if read > MAX_ANSWER_BYTES:
                answer.close()
                return


# What failures are called, the first that fits.
_ERRORS: Final[Sequence[tuple[type[Exception], DeliveryError]]] = (
    (TimeoutError, DeliveryError.TIMEOUT),
    (aiohttp.ClientSSLError, DeliveryError.TLS_FAILED),
    (aiohttp.ClientConnectorDNSError, DeliveryError.NAME_NOT_RESOLVED),
    (aiohttp.InvalidURL, DeliveryError.ADDRESS_REFUSED),
    (aiohttp.ClientConnectionError, DeliveryError.CONNECTION_FAILED),
    (OSError, DeliveryError.CONNECTION_FAILED),
)


def _error(failure: Exception) -> DeliveryError:
    """Says why sending failed, in a word. The text of the failure may name hosts of the inside, and is not told."""
    if isinstance(getattr(failure, "os_error", None), AddressRefusedError):
        return DeliveryError.ADDRESS_REFUSED
    fitting = (error for kind, error in _ERRORS if isinstance(failure, kind))
    return next(fitting, DeliveryError.ANSWER_UNREADABLE)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Reads the header Retry-After (RFC 9110, 10.2.3): seconds, or a date; 0 for none that can be read.

    A date is one of the receiver's clock, and so is compared with when it says that it has answered.
    """
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text[:MAX_DIGITS])
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError):
        # One has a zone and the other none, or either is no date.
        return 0.0
    return max(0.0, wait.total_seconds())
