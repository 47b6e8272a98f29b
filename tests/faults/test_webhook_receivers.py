"""Sending to receivers that are slow, dead, lying, or somewhere where they should not be."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import pytest
import trustme
from aiohttp import web

from latchgate.domain.addresses import AddressGuard
from latchgate.domain.outbox import DeliveryError, Reply
from latchgate.outbound import sender as sender_module
from latchgate.outbound.sender import MAX_ANSWER_BYTES, WebhookSender
from support.webhooks import Receiver, raw_receiver, receiver

LOOPBACK = AddressGuard([ip_network("127.0.0.0/8")])
TIMEOUT_S = 0.3


@pytest.fixture
async def sender() -> AsyncIterator[WebhookSender]:
    """A sender that may send to this machine, and does not wait for long."""
    made = WebhookSender(LOOPBACK, timeout_s=TIMEOUT_S)
    yield made
    await made.close()


@pytest.fixture
async def strict() -> AsyncIterator[WebhookSender]:
    """A sender as it is without settings, but that it does not wait for long."""
    made = WebhookSender(AddressGuard(), timeout_s=5 * TIMEOUT_S)
    yield made
    await made.close()


@pytest.fixture
async def listener() -> AsyncIterator[Receiver]:
    """A receiver of webhooks."""
    async with receiver() as running:
        yield running


async def send(sender: WebhookSender, url: str) -> Reply:
    """Sends something."""
    return await sender.send(url, {"webhook-id": "evt_1"}, '{"ä": 1}')


async def test_status_is_what_counts(sender: WebhookSender, listener: Receiver) -> None:
    """The answer's status is given as it is, with how long it took; the body has arrived as it was given."""
    listener.answers.extend([200, 500])
    replies = [await send(sender, listener.url) for _ in range(2)]
    assert [(200, None), (500, None)] == [(each.status, each.error) for each in replies]
    assert all(0 < each.duration_s < TIMEOUT_S for each in replies)
    assert '{"ä": 1}' == listener.received[0].body
    assert "evt_1" == listener.received[0].headers["webhook-id"]


async def test_slow_receiver(sender: WebhookSender, listener: Receiver) -> None:
    """A receiver that does not answer in time has not answered."""

    async def never(_: web.BaseRequest) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    listener.answers.append(never)
    reply = await send(sender, listener.url)
    assert (0, DeliveryError.TIMEOUT) == (reply.status, reply.error)
    assert TIMEOUT_S <= reply.duration_s < 5


async def test_receiver_that_drips(sender: WebhookSender, listener: Receiver) -> None:
    """A receiver that goes on with its answer for ever is not listened to for longer; its status counts."""

    async def drip(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b".")
            await asyncio.sleep(0.01)
        return response

    listener.answers.append(drip)
    reply = await send(sender, listener.url)
    assert (200, None) == (reply.status, reply.error)
    assert reply.duration_s < 5


async def test_receiver_that_answers_too_much(sender: WebhookSender, listener: Receiver) -> None:
    """Of an answer 64 KB are read, and not more: the connection is closed."""
    written = 0

    async def flood(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b"." * MAX_ANSWER_BYTES)
            written += MAX_ANSWER_BYTES
        return response

    listener.answers.append(flood)
    reply = await send(sender, listener.url)
    assert (200, None) == (reply.status, reply.error)
    assert written < 500 * MAX_ANSWER_BYTES


async def test_redirects_are_not_followed(sender: WebhookSender, listener: Receiver) -> None:
    """Who answers with another address, be it one of the inside, is not followed there."""

    async def elsewhere(_: web.BaseRequest) -> web.Response:
        return web.Response(status=302, headers={"location": f"{listener.url}/elsewhere"})

    listener.answers.append(elsewhere)
    assert 302 == (await send(sender, listener.url)).status
    assert ["/hooks"] == [each.path for each in listener.received]


async def test_nothing_is_remembered(
    sender: WebhookSender, listener: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cookies are not given back, and a proxy of the environment is not asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    async def give_cookie(_: web.BaseRequest) -> web.Response:
        return web.Response(headers={"set-cookie": "session=1; Path=/"})

    listener.answers.extend([give_cookie, give_cookie])
    assert [200, 200] == [(await send(sender, listener.url)).status for _ in range(2)]
    assert all("cookie" not in each.headers for each in listener.received)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", DeliveryError.CONNECTION_FAILED),
        (b"SSH-2.0-OpenSSH_9.9\r\n", DeliveryError.ANSWER_UNREADABLE),
        (b"HTTP/1.1 abc\r\n\r\n", DeliveryError.ANSWER_UNREADABLE),
        (b"HTTP/1.1 200 OK\r\n" + b"a: " + b"b" * 100_000, DeliveryError.ANSWER_UNREADABLE),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc", None),
    ],
)
async def test_what_is_answered_is_no_http(sender: WebhookSender, answer: bytes, error: DeliveryError | None) -> None:
    """Whatever is answered, it is an error or a status, and never a fault."""
    async with raw_receiver(answer) as url:
        reply = await send(sender, url)
    assert (error, 0 if error else 200) == (reply.error, reply.status)


async def test_dead_receiver(sender: WebhookSender) -> None:
    """Where nobody listens, nobody is reached; a name that is none has no address."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert DeliveryError.CONNECTION_FAILED == (await send(sender, f"http://127.0.0.1:{port}/")).error


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        ("0", 0.0),
        ("Wed, 21 Oct 2026 07:30:00 GMT", 120.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2026 06:00:00 GMT", 0.0),
        ("Wed, 21 Oct 2026 07:30:00", 0.0),
        ("-1", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("9" * 400, 999_999_999.0),
    ],
)
async def test_retry_after(sender: WebhookSender, listener: Receiver, text: str, seconds: float) -> None:
    """What a receiver asks for is read where it is seconds, or a date by the clock that it says it has, and let pass
    where it is neither.
    """

    async def ask(_: web.BaseRequest) -> web.Response:
        return web.Response(status=429, headers={"retry-after": text, "date": "Wed, 21 Oct 2026 07:28:00 GMT"})

    listener.answers.append(ask)
    reply = await send(sender, listener.url)
    assert (429, seconds) == (reply.status, reply.retry_after_s)


def names(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Has all names lead to these addresses, and remembers which were looked up."""
    asked: list[str] = []

    def look_up(host: str, port: int, _: Any) -> Any:
        asked.append(host)
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    monkeypatch.setattr(sender_module, "_look_up", look_up)
    return asked


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("169.254.169.254",),
        ("::1",),
        ("::ffff:10.0.0.1",),
        ("8.8.8.8", "10.0.0.1"),
    ],
)
async def test_names_that_lead_inside(
    strict: WebhookSender, listener: Receiver, monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    """A name of which any address is not public is not connected to, whatever it was when the webhook was made."""
    asked = names(monkeypatch, *addresses)
    reply = await send(strict, f"https://rebound.example:{listener.port}/")
    assert (DeliveryError.ADDRESS_REFUSED, ["rebound.example"]) == (reply.error, asked)
    assert [] == listener.received


async def test_name_that_leads_inside_as_well(
    sender: WebhookSender, listener: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One address that is refused is enough, though another, to which may be sent, comes first and answers."""
    names(monkeypatch, "127.0.0.1", "10.0.0.1")
    reply = await send(sender, f"http://receiver.example:{listener.port}/")
    assert DeliveryError.ADDRESS_REFUSED == reply.error
    assert [] == listener.received


async def test_name_is_looked_up_once(
    sender: WebhookSender, listener: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was looked at is what is connected to: a name is asked for once for each sending, and anew for the next."""
    asked = names(monkeypatch, "127.0.0.1")
    url = f"http://receiver.example:{listener.port}/"
    assert [204, 204] == [(await send(sender, url)).status for _ in range(2)]
    assert ["receiver.example"] * 2 == asked
    assert f"receiver.example:{listener.port}" == listener.received[0].headers["host"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost"]
)
async def test_addresses_that_lead_inside(strict: WebhookSender, listener: Receiver, host: str) -> None:
    """An address of this machine is not connected to, in whatever form it is written."""
    reply = await send(strict, f"https://{host}:{listener.port}/")
    assert DeliveryError.ADDRESS_REFUSED == reply.error
    assert [] == listener.received


async def test_plain_text_stays_inside(strict: WebhookSender, sender: WebhookSender, listener: Receiver) -> None:
    """Nothing is sent in plain text but to networks that the deployment names."""
    assert DeliveryError.ADDRESS_REFUSED == (await send(strict, listener.url)).error
    assert DeliveryError.ADDRESS_REFUSED == (await send(sender, "http://8.8.8.8/")).error
    assert 204 == (await send(sender, listener.url)).status


@pytest.mark.parametrize(
    ("name", "is_trusted", "expected"),
    [
        ("127.0.0.1", True, (204, None)),
        ("other.example", True, (0, DeliveryError.TLS_FAILED)),
        ("127.0.0.1", False, (0, DeliveryError.TLS_FAILED)),
    ],
)
async def test_certificates(name: str, is_trusted: bool, expected: tuple[int, DeliveryError | None]) -> None:
    """Over TLS the receiver must show a certificate for its own name, of an authority that is trusted."""
    authority = trustme.CA()
    served, trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(served)
    authority.configure_trust(trust)
    async with receiver(served) as secure:
        sender = WebhookSender(LOOPBACK, timeout_s=5, trust=trust if is_trusted else None)
        reply = await send(sender, secure.url)
        await sender.close()
    assert expected == (reply.status, reply.error)
