"""The keys that an issuer signs with, as it publishes them (OpenID Connect Discovery 1.0, RFC 7517).

Issuers change their keys without asking anybody, and take back those that were stolen. So the keys are read again every
few minutes, and when a JWT names one that is not known. Where they can not be read, those that are known hold for an
hour, and nobody who is not known is let in after that.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import structlog
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import JWKRegistry, Key, RSAKey

from latchgate.domain.errors import IssuerUnavailableError
from latchgate.oidc.fetching import FetchError

FRESH_S: Final = 300.0
"""How old keys may be before they are read again, though nobody has asked for one that is not known."""
LASTING_S: Final = 3600.0
"""For how long keys hold that can not be read again."""
COOLING_S: Final = 10.0
"""How long after a reading none follows, however many JWTs name keys that are not known."""

# RFC 7518, 3.3.
MIN_RSA_BITS: Final = 2048

_DISCOVERY: Final = "/.well-known/openid-configuration"
# Kinds of keys with a public half. A secret that were published would be none.
_KINDS: Final = frozenset({"RSA", "EC", "OKP"})

_log = structlog.get_logger("latchgate.oidc")


class IssuerKeys:
    """Knows an issuer's keys. Several callers that need them wait for one reading."""

    def __init__(
        self, issuer: str, fetch: Callable[[str], Awaitable[Mapping[str, Any]]], clock: Callable[[], float]
    ) -> None:
        """Takes the issuer's address, what reads a document, and a clock in seconds that goes on in suspension."""
        self._issuer = issuer
        self._fetch = fetch
        self._clock = clock
        self._keys: dict[str | None, Key] = {}
        self._read_s = -LASTING_S
        self._tried_s = -COOLING_S
        self._reading: asyncio.Task[None] | None = None
        self._problem = ""

    @property
    def age_s(self) -> float:
        """How long ago the keys were read, in seconds; infinite if they never were."""
        return self._clock() - self._read_s if self._keys else float("inf")

    async def find(self, key_id: str | None) -> Key | None:
        """Gives a key by its id, or the only one where none is named; None if the issuer has no such key.

        Raises IssuerUnavailableError where the issuer can not be asked and what is known is too old.
        """
        if self.age_s >= LASTING_S or key_id not in self._keys:
            await self._read_soon()
        if self.age_s >= LASTING_S:
            raise IssuerUnavailableError("the issuer's keys can not be read; the service's log says why. Try again")
        return self._keys.get(key_id)

    async def renew(self) -> None:
        """Reads the keys again if they are no longer fresh. Never fails."""
        if self.age_s >= FRESH_S:
            await self._read_soon()

    async def close(self) -> None:
        """Ends the reading under way."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read_soon(self) -> None:
        """Waits for a reading: the one under way, or one that begins, unless the last was a moment ago."""
        if self._reading is None or self._reading.done():
            if self._clock() - self._tried_s < COOLING_S:
                return
            self._tried_s = self._clock()
            self._reading = asyncio.create_task(self._read())
        # Others may wait for it when this caller gives up.
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        begun_s = self._clock()
        try:
            keys = await self._published()
        except FetchError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                _log.warning("issuer_unreachable", issuer=self._issuer, problem=self._problem)
            return
        if self._problem or keys.keys() != self._keys.keys():
            _log.info("issuer_keys_read", issuer=self._issuer, keys=sorted(filter(None, keys)))
        self._problem, self._keys, self._read_s = "", keys, begun_s

    async def _published(self) -> dict[str | None, Key]:
        """Reads the keys from where the issuer says that they are. Raises FetchError."""
        about = await self._fetch(self._issuer.rstrip("/") + _DISCOVERY)
        if about.get("issuer") != self._issuer:
            raise FetchError("LATCHGATE_OIDC_ISSUER is not written as the issuer calls itself in its own document")
        address = about.get("jwks_uri")
        if not isinstance(address, str) or not address.startswith(self._issuer.partition("://")[0] + "://"):
            raise FetchError("the issuer's document names no jwks_uri of the issuer's own scheme")
        published = (await self._fetch(address)).get("keys")
        keys = dict(filter(None, map(_signing_key, published if isinstance(published, list) else [])))
        if not keys:
            raise FetchError(f"{address} has no public key to sign with")
        if len(keys) == 1:
            (keys[None],) = tuple(keys.values())
        return keys


def _signing_key(published: object) -> tuple[str | None, Key] | None:
    """Reads one key; None for what is none, is of an unknown kind or not for signatures, or protects nothing."""
    if not isinstance(published, dict) or published.get("kty") not in _KINDS:
        return None
    if published.get("use", "sig") != "sig":
        return None
    try:
        with warnings.catch_warnings():
            # Of short keys, which are not taken.
            warnings.simplefilter("ignore", SecurityWarning)
            key = JWKRegistry.import_key(published)
        key.ensure_kid()
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    is_weak = isinstance(key, RSAKey) and key.public_key.key_size < MIN_RSA_BITS
    return None if is_weak or key.is_private else (key.kid, key)
