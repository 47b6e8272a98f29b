"""What a key may look like: rules that do not depend on who asks."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from latchgate.domain.access import CORE_SCOPES, MANAGEMENT_SCOPES
from latchgate.domain.errors import (
    InvalidFieldError,
    KeyDeletedError,
    KeyRevokedError,
    ScopeUnknownError,
    UndeleteExpiredError,
)
from latchgate.domain.model import DELETED_KEPT, INSTANT, Key, KeyState, KeyType, Scope
from latchgate.domain.permissions import Grants, is_known

MAX_METADATA_BYTES = 4096
MAX_EMAIL_LENGTH = 254
MAPPED_PREFIX_LENGTH = 96
LATEST_TIME = datetime(9999, 12, 31, tzinfo=UTC)


def check_expiry(expire_time: datetime | None, now: datetime) -> None:
    """Demands that an expiry lies ahead, by the database's clock. Raises InvalidFieldError.

    It must not lie in the calendar's last day either: storage takes the last moment of it for infinity.
    """
    if expire_time is None:
        return
    if expire_time <= now:
        raise InvalidFieldError(
            [("expire_time", f"must lie in the future; now is {now.isoformat(timespec='seconds')}")]
        )
    if expire_time > LATEST_TIME:
        raise InvalidFieldError([("expire_time", f"must not lie beyond {LATEST_TIME.isoformat()}; leave it out")])


def check_email(email: str) -> None:
    """Demands that a mail address keeps to the length that one can have (RFC 5321). Raises InvalidFieldError."""
    if len(email) > MAX_EMAIL_LENGTH:
        raise InvalidFieldError([("user_email", f"must be at most {MAX_EMAIL_LENGTH} characters")])


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Demands that metadata keeps to its size. Raises InvalidFieldError."""
    size = sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
    if size > MAX_METADATA_BYTES:
        raise InvalidFieldError([("metadata", f"must be at most {MAX_METADATA_BYTES} bytes in all; this is {size}")])


def normal_cidrs(cidrs: Sequence[str]) -> tuple[str, ...]:
    """Gives networks in their normal form; a single address becomes a network of one. Raises InvalidFieldError.

    IPv4 networks that are mapped into IPv6 become IPv4, as addresses do when they are matched.
    """
    normal, violations = [], []
    for index, cidr in enumerate(cidrs):
        try:
            normal.append(str(_network(cidr)))
        except ValueError:
            violations.append((f"allowed_cidrs[{index}]", _cidr_advice(cidr)))
    if violations:
        raise InvalidFieldError(violations)
    return tuple(dict.fromkeys(normal))


def _network(cidr: str, *, strict: bool = True) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Reads a network. Raises ValueError, also for a zone (`%eth0`): it means nothing away from its own machine."""
    if "%" in cidr:
        raise ValueError("zones are not matched")
    network = ipaddress.ip_network(cidr, strict=strict)
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= MAPPED_PREFIX_LENGTH:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - MAPPED_PREFIX_LENGTH))
    return network


def _cidr_advice(cidr: str) -> str:
    try:
        network = _network(cidr, strict=False)
    except ValueError:
        return "must be a network such as 203.0.113.0/24 or 2001:db8::/32, or an address"
    return f"must not have bits set beyond its prefix length; did you mean {network}?"


def check_known(permissions: Iterable[str], catalogue: Iterable[Scope]) -> None:
    """Demands that permissions match the catalogue. Raises ScopeUnknownError."""
    names = [scope.name for scope in catalogue]
    for permission in permissions:
        if not is_known(permission, names):
            raise ScopeUnknownError(
                f"permission {permission} matches no scope of the organization's catalogue; see ListScopes",
                permission=permission,
            )


def check_publishable(key_type: KeyType, permissions: Iterable[str]) -> None:
    """Demands that a publishable key can not manage keys: anyone may hold its token. Raises InvalidFieldError."""
    if key_type is not KeyType.PUBLISHABLE:
        return
    grants = Grants(permissions)
    for scope in MANAGEMENT_SCOPES:
        if grants.cover(scope):
            raise InvalidFieldError(
                [("permissions", f"must not give {scope} to a publishable key: its token is public")]
            )


def merge_catalogue(deployment: Iterable[Scope], organization: Iterable[Scope]) -> tuple[Scope, ...]:
    """Gives the whole catalogue by name; core wins over the deployment's, and those over the organization's."""
    scopes = {scope.name: scope for scope in (*organization, *deployment, *CORE_SCOPES)}
    return tuple(scopes[name] for name in sorted(scopes))


def check_not_ended(key: Key) -> None:
    """Demands a key that is neither revoked nor deleted. Raises KeyDeletedError and KeyRevokedError."""
    if key.state is KeyState.DELETED:
        raise KeyDeletedError(f"key {key.id} is deleted; UndeleteKey brings back what was deleted in error")
    if key.state is KeyState.REVOKED:
        raise KeyRevokedError(f"key {key.id} is revoked for good; create another")


def check_undeletable(key: Key) -> None:
    """Demands a key that was not revoked, and if it was deleted, not too long ago.

    Raises KeyRevokedError and UndeleteExpiredError.
    """
    if key.delete_time is None:
        if key.revoke_time is not None:
            raise KeyRevokedError(f"key {key.id} is revoked for good; create another")
    elif not key.is_deleted_alone:
        raise KeyRevokedError(f"key {key.id} was not only deleted, but revoked for good; create another")
    elif key.delete_time + DELETED_KEPT <= key.read_time:
        raise UndeleteExpiredError(
            f"key {key.id} was deleted more than {DELETED_KEPT.days} days ago, and can not come back; create another"
        )


def apart_from(other: datetime | None, time: datetime) -> datetime:
    """Gives `time`, or the next instant if it is `other`: by their being the same it is told why a key was ended."""
    return time + INSTANT if time == other else time


def check_scope_name(name: str) -> None:
    """Demands a name for a scope of an organization's own that is none of those kept for the service.

    Raises InvalidFieldError. Whatever begins like a permission for management may be one in a later release; keys that
    an organization had given it to its own ends would manage something then.
    """
    kept = sorted({scope.partition(":")[0] for scope in MANAGEMENT_SCOPES})
    if name.partition(":")[0] in kept:
        names = ", ".join(f"{each}:" for each in kept)
        raise InvalidFieldError([("name", f"must not begin with {names}; these are kept for the service's own scopes")])
