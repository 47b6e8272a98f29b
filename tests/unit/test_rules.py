"""What a key may look like."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latchgate.domain.access import CORE_SCOPES, MANAGEMENT_SCOPES
from latchgate.domain.errors import InvalidFieldError, KeyDeletedError, KeyRevokedError, ScopeUnknownError
from latchgate.domain.model import KeyType, Scope, ScopeSource
from latchgate.domain.rules import (
    LATEST_TIME,
    MAX_METADATA_BYTES,
    check_email,
    check_expiry,
    check_known,
    check_metadata,
    check_not_ended,
    check_publishable,
    merge_catalogue,
    normal_cidrs,
)
from support.records import INSTANT, KEY, NOW

CORE_NAMES = {scope.name for scope in CORE_SCOPES}


@st.composite
def ip_networks(draw: st.DrawFn) -> IPv4Network | IPv6Network:
    """Draws networks of either version and any size, but for IPv4 that is mapped into IPv6."""
    address = draw(st.ip_addresses().filter(lambda each: isinstance(each, IPv4Address) or each.ipv4_mapped is None))
    return ip_network((address, draw(st.integers(0, address.max_prefixlen))), strict=False)


@pytest.mark.parametrize(
    ("cidr", "normal"),
    [
        ("203.0.113.0/24", "203.0.113.0/24"),
        ("203.0.113.7", "203.0.113.7/32"),
        ("203.0.113.0/255.255.255.0", "203.0.113.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("2001:0DB8:0:0::/32", "2001:db8::/32"),
        ("::/0", "::/0"),
    ],
)
def test_cidrs_are_normalised(cidr: str, normal: str) -> None:
    """However a network is written, it is stored in one form; a single address is a network of one."""
    assert (normal,) == normal_cidrs([cidr])


@given(networks=st.lists(ip_networks(), max_size=5))
def test_normal_cidrs_mean_what_was_given(networks: list[IPv4Network | IPv6Network]) -> None:
    """Normalising changes neither the networks nor their order, and doing it again changes nothing."""
    normal = normal_cidrs([network.exploded for network in networks])
    assert tuple(dict.fromkeys(str(network) for network in networks)) == normal
    assert normal == normal_cidrs(normal)


@pytest.mark.parametrize(
    ("cidr", "normal"),
    [
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::/95", "::/95"),
        ("::192.0.2.7", "::c000:207/128"),
    ],
)
def test_cidrs_of_mapped_ipv4_are_ipv4(cidr: str, normal: str) -> None:
    """Validation takes mapped addresses as IPv4, so a mapped network has to be stored as IPv4, or it never matches."""
    assert (normal,) == normal_cidrs([cidr])


def test_cidrs_are_named_once() -> None:
    """Two ways to write one network leave one, in the place of the first."""
    assert ("10.0.0.0/8", "192.0.2.1/32") == normal_cidrs(["10.0.0.0/8", "192.0.2.1", "10.0.0.0/8", "192.0.2.1/32"])


@pytest.mark.parametrize(
    ("cidr", "network"),
    [
        ("203.0.113.7/24", "203.0.113.0/24"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("2001:db8::1/32", "2001:db8::/32"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
    ],
)
def test_advice_on_host_bits(cidr: str, network: str) -> None:
    """An address with a prefix length, a frequent slip, is answered with the network that was probably meant."""
    with pytest.raises(InvalidFieldError) as caught:
        normal_cidrs([cidr])
    ((field, advice),) = caught.value.violations
    assert "allowed_cidrs[0]" == field
    assert f"did you mean {network}?" in advice


@pytest.mark.parametrize(
    "cidr",
    [
        "",
        "localhost",
        "203.0.113.0/33",
        "203.0.113.0/-1",
        "203.0.113.0/",
        "203.0.113",
        "203.0.113.07",
        " 203.0.113.7",
        "203.0.113.7\n",
        "203.0.113.7:443",
        "[2001:db8::1]",
        "2001:db8::/129",
        "\N{FULLWIDTH DIGIT ONE}0.0.0.0/8",
    ],
    ids=ascii,
)
def test_advice_on_what_is_no_network(cidr: str) -> None:
    """What can not be read as a network is answered with examples of what can."""
    with pytest.raises(InvalidFieldError) as caught:
        normal_cidrs([cidr])
    ((_, advice),) = caught.value.violations
    assert "203.0.113.0/24" in advice
    assert "did you mean" not in advice


@pytest.mark.parametrize("cidr", ["fe80::1%eth0", "fe80::%eth0/64", "fe80::1%\0", "fe80::1% "], ids=ascii)
def test_zones_are_refused(cidr: str) -> None:
    """A zone means nothing away from its own machine, and its text is free: it is neither matched nor storable."""
    with pytest.raises(InvalidFieldError):
        normal_cidrs([cidr])


def test_every_bad_cidr_is_named() -> None:
    """All that is wrong is said at once, each with its place in the list."""
    with pytest.raises(InvalidFieldError) as caught:
        normal_cidrs(["10.0.0.1/8", "10.0.0.0/8", "nonsense"])
    assert ["allowed_cidrs[0]", "allowed_cidrs[2]"] == [field for field, _ in caught.value.violations]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"a": "b" * (MAX_METADATA_BYTES - 1)},
        {"a" * MAX_METADATA_BYTES: ""},
        {"a": "\N{EURO SIGN}" * 1365},
        {str(number): "x" * 63 for number in range(10, 73)} | {"a": ""},
    ],
    ids=["empty", "value", "name", "three bytes each", "many"],
)
def test_metadata_within_its_size(metadata: dict[str, str]) -> None:
    """Names and values may take 4096 bytes of UTF-8 in all."""
    check_metadata(metadata)


@pytest.mark.parametrize(
    ("metadata", "size"),
    [
        ({"a": "b" * MAX_METADATA_BYTES}, 4097),
        ({"a" * (MAX_METADATA_BYTES + 1): ""}, 4097),
        ({"ab": "\N{EURO SIGN}" * 1365}, 4097),
        ({"\N{PILE OF POO}": "b" * 4093}, 4097),
        ({str(number): "x" * 63 for number in range(10, 74)}, 4160),
    ],
    ids=["value", "name", "three bytes each", "four bytes", "many"],
)
def test_metadata_beyond_its_size(metadata: dict[str, str], size: int) -> None:
    """Metadata of more than 4096 bytes, not characters, is refused, and the answer says how many there are."""
    with pytest.raises(InvalidFieldError) as caught:
        check_metadata(metadata)
    ((field, advice),) = caught.value.violations
    assert "metadata" == field
    assert f"this is {size}" in advice


@pytest.mark.parametrize("ahead", [timedelta(0), -INSTANT, timedelta(days=-1)])
def test_expiry_in_the_past_is_refused(ahead: timedelta) -> None:
    """No key is made that is expired from the start."""
    with pytest.raises(InvalidFieldError) as caught:
        check_expiry(NOW + ahead, NOW)
    assert ["expire_time"] == [field for field, _ in caught.value.violations]


def test_expiry_ahead() -> None:
    """Any later time will do, up to the last that storage tells from infinity, and so does none."""
    check_expiry(NOW + INSTANT, NOW)
    check_expiry(LATEST_TIME, NOW)
    check_expiry(None, NOW)


@pytest.mark.parametrize("expire_time", [LATEST_TIME + INSTANT, datetime.max.replace(tzinfo=UTC)])
def test_expiry_beyond_what_storage_holds(expire_time: datetime) -> None:
    """A time that storage would take for infinity is refused, so that an expiry is never lost."""
    with pytest.raises(InvalidFieldError) as caught:
        check_expiry(expire_time, NOW)
    assert ["expire_time"] == [field for field, _ in caught.value.violations]


def test_length_of_mail_addresses() -> None:
    """A mail address has at most 254 characters."""
    domain = "@example.com"
    check_email("")
    check_email("a" * (254 - len(domain)) + domain)
    with pytest.raises(InvalidFieldError) as caught:
        check_email("a" * (255 - len(domain)) + domain)
    assert ["user_email"] == [field for field, _ in caught.value.violations]


def test_known_permissions() -> None:
    """Scopes of the catalogue, wildcards that match one, and `*` can be given."""
    check_known(["orders:read", "orders:*", "*"], [Scope(name="orders:read")])


def test_unknown_permission_is_named() -> None:
    """A permission that matches nothing is refused by name, also behind others that match."""
    with pytest.raises(ScopeUnknownError) as caught:
        check_known(["orders:read", "ordres:read"], [Scope(name="orders:read")])
    assert {"permission": "ordres:read"} == caught.value.details


@pytest.mark.parametrize("permission", [*MANAGEMENT_SCOPES, "keys:*", "audit:*", "scopes:*", "*:read", "*:*", "*"])
def test_publishable_keys_manage_nothing(permission: str) -> None:
    """A token that anyone may hold never gives access to the management of keys, by no wildcard either."""
    with pytest.raises(InvalidFieldError) as caught:
        check_publishable(KeyType.PUBLISHABLE, ["orders:read", permission])
    assert ["permissions"] == [field for field, _ in caught.value.violations]


def test_what_publishable_keys_may_do() -> None:
    """The application's own permissions can be published."""
    check_publishable(KeyType.PUBLISHABLE, ["orders:read", "orders:*", "read", "keysx:read"])
    check_publishable(KeyType.PUBLISHABLE, [])


def test_secret_keys_may_manage() -> None:
    """The rule for publishable keys leaves secret ones alone."""
    check_publishable(KeyType.SECRET, [*MANAGEMENT_SCOPES, "*"])


def test_catalogue_is_sorted_and_whole() -> None:
    """The catalogue holds the scopes of core, deployment and organization, by name."""
    merged = merge_catalogue(
        [Scope(name="invoices:read", source=ScopeSource.DEPLOYMENT)],
        [Scope(name="zebra"), Scope(name="aardvark")],
    )
    assert sorted({*CORE_NAMES, "invoices:read", "zebra", "aardvark"}) == [scope.name for scope in merged]


def test_catalogue_precedence() -> None:
    """Nobody redefines a core scope, and no organization one of the deployment's."""
    core_name = MANAGEMENT_SCOPES[0]
    merged = {
        scope.name: scope.source
        for scope in merge_catalogue(
            [Scope(name=name, source=ScopeSource.DEPLOYMENT) for name in (core_name, "shared")],
            [Scope(name=name, source=ScopeSource.ORGANIZATION) for name in (core_name, "shared", "own")],
        )
    }
    assert (ScopeSource.CORE, ScopeSource.DEPLOYMENT, ScopeSource.ORGANIZATION) == (
        merged[core_name],
        merged["shared"],
        merged["own"],
    )


def test_ended_keys() -> None:
    """A revoked key can not be changed, and neither can a deleted one, which is told apart."""
    with pytest.raises(KeyRevokedError):
        check_not_ended(replace(KEY, revoke_time=NOW))
    with pytest.raises(KeyDeletedError):
        check_not_ended(replace(KEY, revoke_time=NOW, delete_time=NOW))


def test_keys_that_can_come_back() -> None:
    """Inactive and expired keys can be changed: that is how they come back."""
    check_not_ended(KEY)
    check_not_ended(replace(KEY, active=False))
    check_not_ended(replace(KEY, expire_time=NOW))
