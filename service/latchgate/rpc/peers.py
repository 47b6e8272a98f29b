"""Addresses of peers, as grpc writes them."""

from __future__ import annotations

from urllib.parse import unquote


def peer_address(peer: str) -> str:
    """Gives the address of a peer such as `ipv4:192.0.2.1:5000` or `ipv6:%5B2001:db8::1%5D:5000`; else nothing."""
    family, _, rest = peer.partition(":")
    if family not in ("ipv4", "ipv6"):
        return ""
    return unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]
