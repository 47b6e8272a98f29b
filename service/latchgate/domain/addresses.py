"""Where webhooks may be sent to: public addresses, and the networks that the deployment names."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import urlsplit

from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.model import Address, Network

MAX_URL_LENGTH: Final = 2048

# IPv4 addresses at the end of IPv6 ones (RFC 6052); 6to4 and mapped ones are told by the library.
_NAT64: Final = IPv6Network("64:ff9b::/96")
# What the library takes for public, and is not: NAT64 of a site's own (RFC 8215), networks for protocols and for
# documentation, and a cloud's own server, which is reached at this address from within it alone (Azure).
_NOT_PUBLIC: Final[Sequence[Network]] = (
    IPv6Network("64:ff9b:1::/48"),
    IPv6Network("3fff::/20"),
    IPv4Network("192.0.0.0/24"),
    IPv4Network("168.63.129.16/32"),
)


class AddressGuard:
    """Tells the addresses to which may be sent from those of this machine and its networks."""

    def __init__(self, private_networks: Sequence[Network] = ()) -> None:
        """Takes the networks that are allowed besides the public ones."""
        self._private_networks = tuple(private_networks)

    @property
    def allows_private(self) -> bool:
        """Whether any address that is not public is allowed."""
        return bool(self._private_networks)

    def permits(self, address: str, *, is_encrypted: bool) -> bool:
        """Says whether may be sent to an address; in plain text only to the deployment's own networks."""
        try:
            found = _meant(ip_address(address.partition("%")[0]))
        except ValueError:
            return False
        if any(found.version == network.version and found in network for network in self._private_networks):
            return True
        return is_encrypted and _is_public(found)

    def check_url(self, url: str) -> None:
        """Demands a URL to which may be sent, as far as can be told without asking for its name's addresses.

        Raises InvalidFieldError.
        """
        problem = self._problem(url)
        if problem:
            raise InvalidFieldError([("url", problem)])

    def _problem(self, url: str) -> str:
        if len(url) > MAX_URL_LENGTH or not url.isascii() or any(sign <= " " or sign == "\x7f" for sign in url):
            return f"must be at most {MAX_URL_LENGTH} printable ASCII characters"
        try:
            parts = urlsplit(url)
            host, has_port = parts.hostname or "", parts.port != 0
        except ValueError:
            host, has_port = "", False
        schemes = ("https", "http") if self.allows_private else ("https",)
        if not host or not has_port or parts.scheme not in schemes:
            return "must be a URL such as https://example.com/hooks"
        if "@" in parts.netloc or "\\" in url or parts.fragment:
            return "must hold neither a user, a password nor a fragment: what is sent is signed"
        if _is_literal(host) and not self.permits(host, is_encrypted=parts.scheme == "https"):
            return "must name a public address"
        return ""


def _is_literal(host: str) -> bool:
    """Says whether a host is an address, in whatever form a system's resolver takes one: `127.1`, `0x7f000001`."""
    last = host.rpartition(".")[2]
    return ":" in host or last.isdigit() or last.lower().startswith("0x")


def _meant(address: Address) -> Address:
    """Gives the IPv4 address within an IPv6 one that leads there."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: Address) -> bool:
    is_ruled_out = address.is_multicast or address.is_reserved or address.is_unspecified
    if isinstance(address, IPv6Address):
        # Teredo too: it leads to an IPv4 address behind someone's router.
        is_ruled_out = is_ruled_out or address.is_site_local or address.teredo is not None
    is_own = any(address.version == network.version and address in network for network in _NOT_PUBLIC)
    return address.is_global and not is_ruled_out and not is_own
