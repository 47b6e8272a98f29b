"""An issuer's keys: when they are read again, for how long they hold, and which are taken."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from latchgate.domain.errors import IssuerUnavailableError
from latchgate.oidc.fetching import FetchError
from latchgate.oidc.keys import COOLING_S, FRESH_S, LASTING_S, IssuerKeys
from support.issuer import make_key, public_jwk

ISSUER = "https://login.example.com/realms/a"
DISCOVERY = f"{ISSUER}/.well-known/openid-configuration"
JWKS = "https://keys.example.com/jwks"
KEYS = {name: public_jwk(make_key("ES256"), "ES256", name) for name in ("a", "b", "c")}


class Web:
    """What an issuer publishes, and the clock of whoever reads it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.asked: Counter[str] = Counter()
        self.documents: dict[str, Any] = {DISCOVERY: {"issuer": ISSUER, "jwks_uri": JWKS}}
        self.publish("a", "b")
        self.is_away = False
        self.held: asyncio.Event | None = None
        self.begun = asyncio.Event()

    def publish(self, *names: str) -> None:
        """Publishes these keys and no others."""
        self.documents[JWKS] = {"keys": [KEYS[name] for name in names]}

    async def fetch(self, url: str) -> Any:
        """Reads a document."""
        self.asked[url] += 1
        self.begun.set()
        if self.held is not None:
            await self.held.wait()
        if self.is_away or url not in self.documents:
            raise FetchError(f"{url} can not be reached")
        return self.documents[url]

    def keys(self) -> IssuerKeys:
        """Makes what is tested."""
        return IssuerKeys(ISSUER, self.fetch, lambda: self.now_s)


async def knows(keys: IssuerKeys, name: str | None) -> bool:
    """Says whether a key is found, and demands that it is the right one."""
    found = await keys.find(name)
    assert found is None or name in (None, found.kid)
    return found is not None


async def test_read_once() -> None:
    """Keys are read when the first is asked for, and then they are there."""
    web = Web()
    keys = web.keys()
    assert float("inf") == keys.age_s
    assert [True, True, True] == [await knows(keys, name) for name in ("a", "b", "a")]
    assert {DISCOVERY: 1, JWKS: 1} == web.asked
    web.now_s += 7
    assert 7 == keys.age_s


async def test_new_key_is_found_at_once() -> None:
    """A key that is not known is looked for, but not again within some seconds, whoever asks for which."""
    web = Web()
    keys = web.keys()
    assert not await knows(keys, "c")
    web.publish("b", "c")
    assert not await knows(keys, "c")
    web.now_s += COOLING_S - 0.1
    assert [False] * 3 == [await knows(keys, name) for name in ("c", "d", "e")]
    assert 1 == web.asked[JWKS]
    web.now_s += 0.1
    assert [True, True, False] == [await knows(keys, name) for name in ("c", "b", "a")]
    assert 2 == web.asked[JWKS]


async def test_key_that_is_taken_back_is_forgotten() -> None:
    """Keys are read again when they are no longer fresh, and those that are gone are no longer good."""
    web = Web()
    keys = web.keys()
    await keys.renew()
    web.publish("b")
    web.now_s += FRESH_S - 0.1
    await keys.renew()
    assert await knows(keys, "a")
    web.now_s += 0.1
    await keys.renew()
    assert [False, True] == [await knows(keys, name) for name in ("a", "b")]
    assert 2 == web.asked[JWKS]


async def test_issuer_away() -> None:
    """Keys hold for an hour while they can not be read, and not a moment longer; and they are back with the issuer."""
    web = Web()
    keys = web.keys()
    await keys.renew()
    web.is_away = True
    web.now_s += LASTING_S - 0.1
    await keys.renew()
    assert await knows(keys, "a")
    web.now_s += 0.1
    for name in ("a", "c", None):
        with pytest.raises(IssuerUnavailableError):
            await keys.find(name)
    web.is_away = False
    web.now_s += COOLING_S
    assert await knows(keys, "a")


async def test_failed_reading_cools_too() -> None:
    """An issuer that is away is not asked again at once."""
    web = Web()
    web.is_away = True
    keys = web.keys()
    for _ in range(3):
        with pytest.raises(IssuerUnavailableError):
            await keys.find("a")
    assert 1 == web.asked[DISCOVERY]
    web.is_away = False
    web.now_s += COOLING_S
    assert await knows(keys, "a")


async def test_many_wait_for_one_reading() -> None:
    """Callers that come together wait for one reading, also when the first of them gives up."""
    web = Web()
    web.held = asyncio.Event()
    keys = web.keys()
    waiting = [asyncio.create_task(knows(keys, "a")) for _ in range(20)]
    await web.begun.wait()
    waiting[0].cancel()
    await asyncio.sleep(0)
    web.held.set()
    assert [True] * 19 == await asyncio.gather(*waiting[1:])
    assert {DISCOVERY: 1, JWKS: 1} == web.asked


async def test_closed_in_the_middle() -> None:
    """A reading under way ends with its reader."""
    web = Web()
    web.held = asyncio.Event()
    keys = web.keys()
    waiting = asyncio.create_task(keys.renew())
    await web.begun.wait()
    await keys.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"issuer": ISSUER},
        {"issuer": f"{ISSUER}/", "jwks_uri": JWKS},
        {"issuer": "https://elsewhere.example.com", "jwks_uri": JWKS},
        {"issuer": ISSUER, "jwks_uri": "http://keys.example.com/jwks"},
        {"issuer": ISSUER, "jwks_uri": "file:///etc/passwd"},
        {"issuer": ISSUER, "jwks_uri": 7},
    ],
)
async def test_document_that_is_not_the_issuers(about: dict[str, Any]) -> None:
    """What another issuer publishes is not taken, and neither is what leads elsewhere than to where keys are safe."""
    web = Web()
    web.documents[DISCOVERY] = about
    with pytest.raises(IssuerUnavailableError):
        await web.keys().find("a")
    assert {DISCOVERY: 1} == web.asked


async def test_issuer_with_a_slash() -> None:
    """An issuer that ends with a slash is asked where all are, and named as it names itself."""
    web = Web()
    web.documents[DISCOVERY]["issuer"] = f"{ISSUER}/"
    keys = IssuerKeys(f"{ISSUER}/", web.fetch, lambda: web.now_s)
    assert await knows(keys, "a")


@pytest.mark.parametrize(
    "published", [None, {}, {"keys": None}, {"keys": {}}, {"keys": []}, {"keys": ["a", 7, None, []]}]
)
async def test_no_keys(published: Any) -> None:
    """An answer without keys does not take away those that are known."""
    web = Web()
    keys = web.keys()
    await keys.renew()
    web.documents[JWKS] = published or {}
    web.now_s += FRESH_S
    await keys.renew()
    assert await knows(keys, "a")


async def test_keys_that_are_not_for_this() -> None:
    """Of what is published, public keys to sign with are taken, those that protect something; the others are let be."""
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - that is what is tested
    small = public_jwk(short, "RS256", "small")
    private: Any = jwt.get_algorithm_by_name("ES256")
    odd: list[Any] = [
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQ", "kid": "secret"},
        KEYS["b"] | {"use": "enc", "kid": "encrypts"},
        json.loads(private.to_jwk(make_key("ES256"))) | {"kid": "private"},
        KEYS["b"] | {"x": "!", "kid": "broken"},
        KEYS["b"] | {"crv": "P-0", "kid": "curve"},
        KEYS["b"] | {"kid": 7},
        {"kty": "AKP", "kid": "unheard-of"},
        small,
    ]
    web = Web()
    web.documents[JWKS] = {"keys": [*odd, KEYS["a"]]}
    keys = web.keys()
    assert await knows(keys, "a")
    for name in ("secret", "encrypts", "private", "broken", "curve", "unheard-of", "small"):
        assert not await knows(keys, name), name


async def test_no_key_is_named() -> None:
    """A JWT that names no key is read with the issuer's only one, and with none where there are several."""
    web = Web()
    web.publish("a")
    assert await knows(web.keys(), None)
    web.publish("a", "b")
    assert not await knows(web.keys(), None)
