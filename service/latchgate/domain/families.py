"""What access tokens say, and when refresh tokens give further ones: pure rules.

A family is all that comes of one exchange of a key: refresh tokens, each of which takes the place of the one before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import Final
from uuid import UUID

from latchgate.domain.audit import AuditEntry
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.permissions import Grants
from latchgate.domain.refresh import RefreshToken

MAX_ACCESS: Final = timedelta(hours=1)
"""The longest that a deployment may let access tokens live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """What a deployment says of its tokens. `audience` is that of tokens for which none was asked."""

    issuer: str
    audience: str
    access: timedelta
    refresh: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A key, and one of its secrets, as tokens are given out for them, at `read_time` of the database's clock.

    `is_ended` says of the secret that a rotation has ended it for good; `secret_end_time` when one ends it.
    """

    key_id: str
    secret_id: int
    organization_id: str
    organization_active: bool
    active: bool
    revoked: bool
    expire_time: datetime | None
    is_ended: bool
    secret_end_time: datetime | None
    permissions: tuple[str, ...]
    allowed_cidrs: tuple[str, ...]
    key_type: KeyType
    environment: Environment
    user_id: str
    read_time: datetime

    @property
    def is_good(self) -> bool:
        """Whether the key may be used now, by this secret."""
        ends = (self.expire_time, self.secret_end_time)
        is_over = any(end is not None and end <= self.read_time for end in ends)
        return self.organization_active and self.active and not (self.revoked or self.is_ended or is_over)

    def may_be_at(self, client_ip: str) -> bool:
        """Whether the key may be used from an address, which may be any text."""
        if not self.allowed_cidrs:
            return True
        try:
            address = ip_address(client_ip)
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in ip_network(cidr) for cidr in self.allowed_cidrs)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFamily:
    """A family that is about to be stored, with its first token."""

    id: str
    key_id: str
    secret_id: int
    audience: str
    permissions: tuple[str, ...]
    expire_time: datetime
    token: RefreshToken


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is kept of a family.

    `token_digest` is that of the one token that is to be used next. The others are of the use before: which token it
    was, by which request, and what it was given, as long as that is kept for a retry.
    """

    id: str
    key_id: str
    secret_id: int
    audience: str
    permissions: tuple[str, ...]
    expire_time: datetime
    token_digest: bytes
    used_digest: bytes | None
    request_digest: bytes | None
    sealed_token: bytes | None


class Use(Enum):
    """What it means that a token of a family is presented."""

    FIRST = "first"
    """It is the one to be used next."""
    RETRY = "retry"
    """It is that of the use before, by the same request, whose answer may have been lost."""
    LATE = "late"
    """The same, but what the answer was is not kept any more."""
    REUSE = "reuse"
    """It was used up, and whoever presents it is not the one who did so, or has moved on since."""


def use_of(family: Family, token: RefreshToken, request_id: UUID | None) -> Use:
    """Says what it means that a token of the family, which carries a right tag, is presented."""
    presented = token.digest
    if presented == family.token_digest:
        return Use.FIRST
    is_same_request = request_id is not None and family.request_digest == request_digest(family.id, request_id)
    if presented != family.used_digest or not is_same_request:
        return Use.REUSE
    return Use.LATE if family.sealed_token is None else Use.RETRY


def request_digest(family_id: str, request_id: UUID) -> bytes:
    """Gives what is stored of a request's id: the id itself opens the token that is kept."""
    return hashlib.sha256(f"{family_id}\n{request_id}".encode()).digest()


def access_end(holder: Holder, family_end: datetime, terms: TokenTerms) -> datetime:
    """Gives when an access token ends that is given out now: never after its key, its secret or its family.

    In whole seconds, as tokens have it, rounded down.
    """
    ends = (holder.read_time + terms.access, family_end, holder.expire_time, holder.secret_end_time)
    return min(end for end in ends if end is not None).replace(microsecond=0)


def still_held(permissions: Sequence[str], holder: Holder) -> tuple[str, ...]:
    """Gives those of the permissions that the key has now."""
    grants = Grants(holder.permissions)
    return tuple(each for each in permissions if grants.cover(each))


def claims(
    token_id: str, holder: Holder, audience: str, permissions: Sequence[str], end: datetime, issuer: str
) -> Mapping[str, object]:
    """Gives what an access token says (RFC 9068): nothing that only the key's owner is to know."""
    said: dict[str, object] = {
        "iss": issuer,
        "sub": holder.key_id,
        "aud": audience,
        "client_id": holder.key_id,
        "iat": int(holder.read_time.timestamp()),
        "exp": int(end.timestamp()),
        "jti": token_id,
        "scope": " ".join(permissions),
        "organization_id": holder.organization_id,
        "environment": holder.environment.value,
        "key_type": holder.key_type.value,
    }
    if holder.user_id:
        said["user_id"] = holder.user_id
    return said


def family_entry(
    organization_id: str,
    family: NewFamily | Family,
    before: Mapping[str, object] | None,
    after: Mapping[str, object] | None,
) -> AuditEntry:
    """Makes the entry of the audit trail for what was done with a family."""
    return AuditEntry(
        organization_id=organization_id, entity="token_family", entity_id=family.id, before=before, after=after
    )


def family_snapshot(family: NewFamily | Family) -> dict[str, object]:
    """Gives what the trail shows of a family."""
    return {
        "key_id": family.key_id,
        "audience": family.audience,
        "permissions": list(family.permissions),
        "expire_time": family.expire_time.isoformat(timespec="microseconds"),
    }
