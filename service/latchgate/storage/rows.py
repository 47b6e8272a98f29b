"""Rows to domain values. The only module that knows the columns' order and names on the way out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_network
from operator import itemgetter
from sys import intern
from typing import Final

import asyncpg

from latchgate.domain.audit import AuditEvent, ChainedEvent
from latchgate.domain.imported import ImportRow, KnownToken
from latchgate.domain.model import (
    Environment,
    HeldPermission,
    Key,
    KeyDraft,
    KeyIdentity,
    KeyKind,
    KeyRecord,
    KeyType,
    Network,
    Organization,
    Outcome,
    Plan,
    Scope,
    Secret,
)
from latchgate.domain.trail import SuspiciousUse

Row = asyncpg.Record
Show = Callable[[KeyIdentity], bytes]

_KEY_TYPES: Final = {each.value: each for each in KeyType}
_ENVIRONMENTS: Final = {each.value: each for each in Environment}
# PostgreSQL writes jsonb without blanks around it, which json.loads would look for.
_read_json: Final = json.JSONDecoder().raw_decode
_NEVER: Final = math.inf


def key(row: Row) -> Key:
    """Reads a key with its newest secrets."""
    secrets = zip(row["hints"], row["create_times"], row["end_times"], row["used_times"], strict=True)
    return Key(
        id=row["id"],
        organization_id=row["organization_id"],
        name=row["name"],
        key_type=KeyType(row["key_type"]),
        environment=Environment(row["environment"]),
        permissions=tuple(row["permissions"]),
        rate_limit_per_minute=row["rate_limit_per_minute"],
        active=row["active"],
        user_id=row["user_id"],
        user_email=row["user_email"],
        metadata=row["metadata"],
        allowed_cidrs=tuple(row["allowed_cidrs"]),
        created_by=row["created_by"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        expire_time=row["expire_time"],
        revoke_time=row["revoke_time"],
        revoke_reason=row["revoke_reason"],
        delete_time=row["delete_time"],
        last_used_time=row["last_used_time"],
        version=row["version"],
        revision=row["revision"],
        read_time=row["read_time"],
        secrets=tuple(
            Secret(hint=hint, create_time=created, end_time=end, last_used_time=used)
            for hint, created, end, used in secrets
        ),
    )


@lru_cache(maxsize=10_000)
def _network(cidr: str) -> Network:
    return ip_network(cidr)


@lru_cache(maxsize=10_000)
def _kind(words: str) -> KeyKind:
    """Reads a type, an environment and permissions, with blanks between."""
    key_type, environment, *permissions = words.split()
    return KeyKind(_KEY_TYPES[key_type], _ENVIRONMENTS[environment], tuple(permissions))


_found: Final = itemgetter(
    "secret_id", "key_id", "organization_id", "organization_active", "plan_id", "key_name", "kind", "allowed_cidrs",
    "rate_limit_per_minute", "active", "revoked", "expire_s", "secret_end_s", "create_s", "user_id", "user_email",
    "metadata",
)  # fmt: skip


def key_record(row: Row, show: Show) -> KeyRecord:
    """Reads what validation needs of a secret. What many keys have in common they share.

    Each lookup waits for this. So values are taken out at once, and given on by their places: names cost time.
    """
    (
        secret_id, key_id, organization_id, organization_active, plan_id, key_name, words, cidrs,
        rate_limit_per_minute, active, revoked, expire_s, secret_end_s, create_s, user_id, user_email,
        metadata,
    ) = _found(row)  # fmt: skip
    organization_id = intern(organization_id)
    kind = _kind(words)
    # The one infinity, where there is none: of a million records each would have its own.
    expire_s = _NEVER if expire_s == _NEVER else expire_s
    secret_end_s = _NEVER if secret_end_s == _NEVER else secret_end_s
    shown = KeyIdentity(
        key_id,
        organization_id,
        user_id,
        user_email,
        key_name,
        kind,
        create_s,
        min(secret_end_s, expire_s),
        {} if metadata == "{}" else _read_json(metadata)[0],
    )
    return KeyRecord(
        secret_id,
        key_id,
        organization_id,
        organization_active,
        intern(plan_id),
        kind.grants,
        tuple(map(_network, cidrs)) if cidrs else (),
        rate_limit_per_minute,
        active,
        revoked,
        expire_s,
        secret_end_s,
        show(shown),
    )


def imported_json(key_id: str, row: ImportRow) -> dict[str, object]:
    """Writes an imported key as KEY_IMPORT reads it."""
    draft = row.draft
    return {
        "id": key_id,
        "digest": row.digest.hex(),
        "hint": row.hint,
        "name": draft.name,
        "key_type": draft.key_type.value,
        "environment": draft.environment.value,
        "permissions": draft.permissions,
        "rate_limit_per_minute": draft.rate_limit_per_minute,
        "active": row.active,
        "user_id": draft.user_id,
        "user_email": draft.user_email,
        "metadata": draft.metadata,
        "allowed_cidrs": draft.allowed_cidrs,
        "expire_time": draft.expire_time and draft.expire_time.isoformat(),
    }


def known_token(row: Row) -> KnownToken:
    """Reads whose a digest is."""
    return KnownToken(
        digest=row["digest"],
        key_id=row["key_id"],
        organization_id=row["organization_id"],
        hint=row["hint"],
        active=row["active"],
        is_ended=row["is_ended"],
        draft=KeyDraft(
            name=row["name"],
            key_type=KeyType(row["key_type"]),
            environment=Environment(row["environment"]),
            permissions=tuple(row["permissions"]),
            rate_limit_per_minute=row["rate_limit_per_minute"],
            expire_time=row["expire_time"],
            user_id=row["user_id"],
            user_email=row["user_email"],
            metadata=row["metadata"],
            allowed_cidrs=tuple(row["allowed_cidrs"]),
        ),
    )


def scopes(value: Sequence[Mapping[str, str]]) -> tuple[Scope, ...]:
    """Reads an organization's own scopes."""
    return tuple(Scope(name=each["name"], description=each["description"]) for each in value)


def scopes_json(own: Sequence[Scope]) -> list[dict[str, str]]:
    """Writes an organization's own scopes."""
    return [{"name": scope.name, "description": scope.description} for scope in own]


def held_permission(row: Row) -> HeldPermission:
    """Reads a permission that keys hold."""
    return HeldPermission(
        permission=row["permission"], own_scopes=scopes(row["own_scopes"]), key_count=row["key_count"]
    )


def organization(row: Row) -> Organization:
    """Reads an organization with its plan's maximum of keys."""
    return Organization(
        id=row["id"],
        name=row["name"],
        plan_id=row["plan_id"],
        active=row["active"],
        scopes=scopes(row["scopes"]),
        key_count=row["key_count"],
        max_keys=row["max_keys"],
        create_time=row["create_time"],
        update_time=row["update_time"],
    )


def audit_values(event: AuditEvent) -> tuple[object, ...]:
    """Gives an event's values in the order of the columns."""
    return tuple(getattr(event, name) for name in AuditEvent.__slots__)


def audit_event(row: Row) -> ChainedEvent:
    """Reads an event with its hash."""
    return ChainedEvent(
        event=AuditEvent(
            organization_id=row["organization_id"],
            sequence=row["sequence"],
            event_time=row["event_time"],
            actor_key_id=row["actor_key_id"],
            actor_organization_id=row["actor_organization_id"],
            certificate=row["certificate"],
            peer=row["peer"],
            method=row["method"],
            request_id=row["request_id"],
            entity=row["entity"],
            entity_id=row["entity_id"],
            before=row["before_change"],
            after=row["after_change"],
            revision=row["revision"],
            code=row["code"],
            reason=row["reason"],
            actor_subject=row["actor_subject"],
        ),
        hash=row["hash"],
    )


def suspicious_use(row: Row) -> SuspiciousUse:
    """Reads a row of suspicious use."""
    return SuspiciousUse(
        id=row["id"],
        hour=row["hour"],
        source=row["source"],
        outcome=Outcome(row["outcome"]),
        organization_id=row["organization_id"],
        key_id=row["key_id"],
        count=row["count"],
        first_time=row["first_time"],
        last_time=row["last_time"],
    )


def plan(row: Row) -> Plan:
    """Reads a plan."""
    return Plan(
        id=row["id"],
        rate_limit_per_minute=row["rate_limit_per_minute"],
        max_keys=row["max_keys"],
        create_time=row["create_time"],
        update_time=row["update_time"],
    )
