"""Where webhooks may be sent to."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from latchgate.domain.addresses import AddressGuard
from latchgate.domain.errors import InvalidFieldError

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "2002:0808:0808::1", "64:ff9b::808:808"]
REFUSED = [
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "224.0.1.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "0.0.0.0", "::", "::1",  # noqa: S104 - nobody listens here
    "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
    "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001::1", "2001:db8::1", "3fff::1", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1", "100::1", "localhost", "", "1.2.3",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    """A public address is permitted over TLS, and never in plain text."""
    guard = AddressGuard()
    assert (True, False) == (guard.permits(address, is_encrypted=True), guard.permits(address, is_encrypted=False))


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_of_the_inside(address: str) -> None:
    """What is not public is refused: this machine, private and link-local networks, what is shared, reserved or for
    many, a cloud's own servers, and IPv6 addresses that lead to such IPv4 ones.
    """
    assert not AddressGuard().permits(address, is_encrypted=True)


def test_networks_of_the_deployment() -> None:
    """Networks that the deployment names are permitted, in plain text too, also as IPv4 within IPv6; no others are."""
    guard = AddressGuard([ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "fd00::1"):
        assert guard.permits(address, is_encrypted=False), address
    for address in ("10.2.0.1", "127.0.0.1", "169.254.169.254", "::1"):
        assert not guard.permits(address, is_encrypted=True), address
    assert not guard.permits("8.8.8.8", is_encrypted=False)


GOOD = ["https://example.com", "https://example.com:8443/a/b?c=d", "https://8.8.8.8/", "https://[2606:4700::1111]/x"]
BAD = [
    "", "example.com", "http://example.com/", "ftp://example.com/", "https://", "https:///x", "https://user@example.com/",
    "https://user:password@example.com/", "https://example.com/#part", "https://example.com/a b", "https://example.com/\n",
    "https://ex\u00e4mple.com/", "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/",
    "https://0x7f.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://10.0.0.1:8443/", "https://[fe80::1%25eth0]/",
    "https://example.com:0/", "https://example.com:99999/", "https://exa\\mple.com/", "https://[::1",
    f"https://example.com/{'a' * 2048}",
]  # fmt: skip


@pytest.mark.parametrize("url", GOOD)
def test_urls_to_which_may_be_sent(url: str) -> None:
    """An https URL is taken whose host is a name or a public address."""
    AddressGuard().check_url(url)


@pytest.mark.parametrize("url", BAD)
def test_urls_to_which_may_not_be_sent(url: str) -> None:
    """What is no https URL, holds a password, or names an address of the inside in any form, is refused."""
    with pytest.raises(InvalidFieldError) as caught:
        AddressGuard().check_url(url)
    assert ["url"] == [field for field, _ in caught.value.violations]


def test_plain_text_needs_a_network() -> None:
    """An http URL is taken only where the deployment allows networks of its own, and names none but those."""
    guard = AddressGuard([ip_network("127.0.0.0/8")])
    guard.check_url("http://127.0.0.1:8000/")
    guard.check_url("http://receiver.internal/")
    for url in ("http://10.0.0.1/", "http://8.8.8.8/"):
        with pytest.raises(InvalidFieldError):
            guard.check_url(url)
