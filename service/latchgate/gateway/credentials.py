"""What a gateway's client has sent: its token, and from where. The same for every way in which gateways ask."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from enum import Enum, IntEnum
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

MAX_NEEDS: Final = 8192
"""Of how many routes, and clients of theirs, it is remembered what they need."""

_SETTINGS: Final = frozenset((PERMISSIONS, COST))
_BEARER: Final = b"bearer"
_SPACE: Final = b" \t"
_PORT: Final = re.compile(r"^(?:\[(.*)\]|([^:]*))(?::\d+)?$")


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
        # By what routes say, and from where their clients come.
        self._needs: dict[tuple[bytes | None, bytes | None, bytes], Need] = {}

    def read(self, settings: Mapping[str, bytes], peer: bytes, forwarded: bytes | None) -> Need:
        """Reads the settings of a route, and the client's address: the peer's, unless further hops are trusted.

        Raises InvalidFieldError for a route that makes no sense: a slip of the pen must not open what it protects.
        """
        permissions, cost = settings.get(PERMISSIONS), settings.get(COST)
        if self._trusted_hops and forwarded:
            peer = _forwarded(forwarded, self._trusted_hops) or peer
        if len(settings) != (permissions is not None) + (cost is not None):
            unknown = min(set(settings) - _SETTINGS)
            raise self._error(unknown, f"is not known; there are {' and '.join(sorted(_SETTINGS))}")
        said = permissions, cost, peer
        need = self._needs.get(said)
        if need is None:
            need = self._need(permissions or b"", cost or b"1", peer)
            if len(self._needs) >= MAX_NEEDS:
                self._needs.clear()
            self._needs[said] = need
        return need

    def __len__(self) -> int:
        return len(self._needs)

    def _need(self, permissions: bytes, cost: bytes, address: bytes) -> Need:
        try:
            names = re.split(r"[\s,]+", permissions.decode())
        except UnicodeDecodeError:
            raise self._error(PERMISSIONS, "must be permissions, such as orders:read,orders:write") from None
        if not cost.isdigit() or len(cost) > len(str(MAX_COST)):
            raise self._error(COST, f"must be a whole number up to {MAX_COST}")
        return Need.of([name for name in names if name], _client_ip(address), int(cost), 0)

    def _error(self, name: str, advice: str) -> InvalidFieldError:
        return InvalidFieldError([(f"{self._place}[{name}]", advice)])


def _forwarded(value: bytes, hops: int) -> bytes:
    """Gives the address that the first of the trusted proxies saw; nothing if they are not all in the list.

    The gateway itself has appended whom it saw, which is the last of the trusted ones.
    """
    addresses = value.split(b",")
    return addresses[-hops - 1].strip() if len(addresses) > hops else b""


def _client_ip(address: bytes) -> str:
    """Gives an address as the rules take it; nothing for what is none, such as the path of a socket."""
    match = _PORT.match(address.decode(errors="replace"))
    text = (match[1] or match[2] or "") if match else address.decode(errors="replace")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return ""
    return text
