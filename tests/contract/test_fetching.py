"""An issuer's documents over HTTP: what is read, and what is said of what can not be."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator

import pytest
import trustme

from latchgate.oidc.fetching import MAX_BYTES, Fetcher, FetchError
from support.issuer import DISCOVERY, Issuer, issuer


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    """What reads, and gives up soon."""
    made = Fetcher(timeout_s=0.5)
    yield made
    await made.close()


@pytest.fixture
async def login() -> AsyncIterator[Issuer]:
    """An issuer in plain text."""
    async with issuer() as running:
        yield running


async def problem(fetcher: Fetcher, url: str) -> str:
    """Reads what can not be read, and gives what is said of it."""
    with pytest.raises(FetchError) as caught:
        await fetcher.get(url)
    assert url in str(caught.value)
    return str(caught.value)


async def test_document(fetcher: Fetcher, login: Issuer) -> None:
    """A document is read as it is."""
    assert login.url == (await fetcher.get(login.url + DISCOVERY))["issuer"]
    login.answers[DISCOVERY] = json.dumps({"a": "x" * (MAX_BYTES - 100)})
    assert MAX_BYTES - 100 == len((await fetcher.get(login.url + DISCOVERY))["a"])


@pytest.mark.parametrize("answer", ["", "[]", "7", "<html>", "{", "[" * 100_000, json.dumps({"a": "x" * MAX_BYTES})])
async def test_what_is_no_document(fetcher: Fetcher, login: Issuer, answer: str) -> None:
    """What is no JSON object, or is too long, is none."""
    login.answers[DISCOVERY] = answer
    assert "no JSON object" in await problem(fetcher, login.url + DISCOVERY)


@pytest.mark.parametrize("status", [204, 301, 302, 307, 401, 404, 500, 503])
async def test_other_answers(fetcher: Fetcher, login: Issuer, status: int) -> None:
    """Nothing but 200 is an answer; in particular nobody is led elsewhere."""
    login.answers[DISCOVERY] = status
    assert f"status {status}" in await problem(fetcher, login.url + DISCOVERY)
    assert {DISCOVERY: 1} == login.asked


async def test_silence(fetcher: Fetcher, login: Issuer) -> None:
    """Nobody is waited for without end."""
    login.held = asyncio.Event()
    assert "in time" in await problem(fetcher, login.url + DISCOVERY)


async def test_nobody(fetcher: Fetcher, login: Issuer) -> None:
    """Where nobody listens, and where no name leads to, that is said."""
    assert "can not be reached" in await problem(fetcher, "http://127.0.0.1:1/")
    assert "can not be reached" in await problem(fetcher, "http://no-such-name.invalid/")
    assert "can not be reached" in await problem(fetcher, f"https://127.0.0.1:{login.port}/")


async def test_certificates(fetcher: Fetcher) -> None:
    """An issuer is believed if its certificate is."""
    authority = trustme.CA()
    server, trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(trust)
    async with issuer(tls=server) as login:
        assert "not trusted" in await problem(fetcher, login.url + DISCOVERY)
        trusting = Fetcher(timeout_s=2.0, trust=trust)
        try:
            assert login.url == (await trusting.get(login.url + DISCOVERY))["issuer"]
            assert "not trusted" in await problem(trusting, f"https://localhost:{login.port}{DISCOVERY}")
        finally:
            await trusting.close()
