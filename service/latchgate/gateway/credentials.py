"""What a gateway's client has sent: its token, and from where. The same for every way in which gateways ask."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, IntEnum
from functools import lru_cache, partial
from typing import Final

from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.validation import MAX_COST, Need

AUTHORIZATION: Final = "authorization"
API_KEY: Final = "x-api-key"
FORWARDED_FOR: Final = "x-forwarded-for"

IDENTITY_PREFIX: Final = "x-latchgate-"
"""Headers that begin so are the service's own: what a client sends under such a name never gets further."""

PERMISSIONS: Final = "required_permissions"
COST: Final = "cost"

MAX_ROUTES: Final = 1024
"""Of how many kinds of routes it is remembered what they need."""
MAX_PERMISSIONS_BYTES: Final = 12_000
"""More than the permissions of any request take."""
MAX_ADDRESS_BYTES: Final = 64
MAX_NAME: Final = 30

_SETTINGS: Final = (COST, PERMISSIONS)
_BEARER: Final = b"bearer"
_SPACE: Final = b" \t"
_SEVERAL: Final = re.compile(rb",[ \t]*bearer[ \t]", re.IGNORECASE)
_PORT: Final = re.compile(r"^(?:\[(.*)\]|([^:]*))(?::\d+)?$")

# What the class itself does, without a call of Python's own for each.
_need = partial(tuple.__new__, Need)


class Carrier(IntEnum):
    """In which headers the token came."""

    NONE = 0
    BEARER = 1
    KEY = 2
    BOTH = 3


class Problem(Enum):
    """Why there is no token to judge."""

    MISSING = "missing"
    CONFLICT = "conflict"


def find_token(authorization: bytes | None, key: bytes | None) -> tuple[bytes, Carrier, Problem | None]:
    """Finds the token: of `Authorization: Bearer` (RFC 6750), else of X-API-Key.

    A header that was sent twice is there once, with both values and a comma between them, which no token has.
    """
    token, carrier = b"", Carrier.NONE
    if authorization is not None:
        if b"," in authorization and _SEVERAL.search(authorization):
            return b"", Carrier.BEARER, Problem.CONFLICT
        scheme, _, rest = authorization.strip(_SPACE).replace(b"\t", b" ").partition(b" ")
        if scheme.lower() == _BEARER:
            token, carrier = rest.strip(b" "), Carrier.BEARER
    if key is not None:
        key = key.strip(_SPACE)
        if key:
            if token and token != key:
                return b"", Carrier.BOTH, Problem.CONFLICT
            token, carrier = key, Carrier.BOTH if carrier is Carrier.BEARER else Carrier.KEY
    if not token:
        return b"", carrier, Problem.MISSING
    return (b"", carrier, Problem.CONFLICT) if b"," in token else (token, carrier, None)


class Needs:
    """Reads what routes need, and remembers it."""

    def __init__(self, place: str, trusted_hops: int) -> None:
        """Takes where gateways write it, for errors, and how many proxies before the gateway are trusted.

        Those are trusted to have appended to x-forwarded-for whom they saw, as the gateway itself has.
        """
        self._place = place
        self._trusted_hops = trusted_hops
        # By what routes say.
        self._routes: dict[tuple[bytes | None, bytes | None], Need] = {}

    def read(self, settings: Mapping[str, bytes], peer: bytes, forwarded: bytes | None) -> Need:
        """Reads the settings of a route, and the client's address: the peer's, unless further hops are trusted.

        Raises InvalidFieldError for a route that makes no sense: a slip of the pen must not open what it protects.
        """
        permissions, cost = settings.get(PERMISSIONS), settings.get(COST)
        if len(settings) != (permissions is not None) + (cost is not None):
            raise self._error(
                min(set(settings).difference(_SETTINGS)), f"is not known; there are {' and '.join(_SETTINGS)}"
            )
        said = permissions, cost
        need = self._routes.get(said) or self._learn(said)
        if self._trusted_hops and forwarded:
            peer = _forwarded(forwarded, self._trusted_hops) or peer
        return _need((need.permissions, _client_ip(peer), need.cost, 0)) if len(peer) <= MAX_ADDRESS_BYTES else need

    def __len__(self) -> int:
        return len(self._routes)

    def _learn(self, said: tuple[bytes | None, bytes | None]) -> Need:
        permissions, cost = said
        names: list[str] = []
        if permissions is not None:
            with suppress(UnicodeDecodeError):
                names = permissions[:MAX_PERMISSIONS_BYTES].decode().replace(",", " ").split()
            if not names or len(permissions) > MAX_PERMISSIONS_BYTES:
                raise self._error(PERMISSIONS, "must be permissions, such as orders:read,orders:write")
        if cost is not None and not (cost.isdigit() and len(cost) <= len(str(MAX_COST))):
            raise self._error(COST, f"must be a whole number up to {MAX_COST}")
        need = Need.of(names, "", 1 if cost is None else int(cost), 0)
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[said] = need
        return need

    def _error(self, name: str, advice: str) -> InvalidFieldError:
        # A name that nobody knows may be anything, a token as well.
        told = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
        return InvalidFieldError([(f"{self._place}[{told}]", advice)])


def _forwarded(value: bytes, hops: int) -> bytes:
    """Gives the address that the first of the trusted proxies saw; nothing if they are not all in the list.

    The gateway itself has appended whom it saw, which is the last of the trusted ones.
    """
    addresses = value.split(b",")
    return addresses[-hops - 1].strip() if len(addresses) > hops else b""


@lru_cache(maxsize=8192)
def _client_ip(address: bytes) -> str:
    """Gives an address as the rules take it; nothing for what is none, such as the path of a socket."""
    match = _PORT.match(address.decode(errors="replace"))
    text = (match[1] or match[2] or "") if match else address.decode(errors="replace")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return ""
    return text
