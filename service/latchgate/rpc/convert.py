"""Messages to domain values and back: pure, and nothing but that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID

from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

from apikeys.v1 import (
    import_service_pb2,
    key_pb2,
    key_service_pb2,
    organization_service_pb2,
    usage_service_pb2,
)
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.keys import KeyChanges
from latchgate.domain.model import (
    Effect,
    Environment,
    Key,
    KeyDraft,
    KeyFilter,
    KeyIdentity,
    KeyKind,
    KeyState,
    KeyType,
    Organization,
    Outcome,
    Plan,
    Scope,
    ScopeSource,
    Secret,
)
from latchgate.domain.organizations import OrganizationChanges, PlanChanges
from latchgate.domain.usage import UsageBucket, UsageSpan, UsageStep, total

KEY_FIELDS: Final = ("name", "permissions", "rate_limit_per_minute", "expire_time", "metadata", "allowed_cidrs")
ORGANIZATION_FIELDS: Final = ("name", "plan_id", "active", "scopes")
PLAN_FIELDS: Final = ("rate_limit_per_minute", "max_keys")

_KEY_TYPE: Final = {
    KeyType.SECRET: key_pb2.KEY_TYPE_SECRET,
    KeyType.PUBLISHABLE: key_pb2.KEY_TYPE_PUBLISHABLE,
}
_ENVIRONMENT: Final = {
    Environment.LIVE: key_pb2.ENVIRONMENT_LIVE,
    Environment.TEST: key_pb2.ENVIRONMENT_TEST,
}
_STATE: Final = {
    KeyState.ACTIVE: key_pb2.KEY_STATE_ACTIVE,
    KeyState.INACTIVE: key_pb2.KEY_STATE_INACTIVE,
    KeyState.EXPIRED: key_pb2.KEY_STATE_EXPIRED,
    KeyState.REVOKED: key_pb2.KEY_STATE_REVOKED,
    KeyState.DELETED: key_pb2.KEY_STATE_DELETED,
}
OUTCOME: Final = {
    Outcome.VALID: key_service_pb2.OUTCOME_VALID,
    Outcome.NOT_FOUND: key_service_pb2.OUTCOME_NOT_FOUND,
    Outcome.REVOKED: key_service_pb2.OUTCOME_REVOKED,
    Outcome.INACTIVE: key_service_pb2.OUTCOME_INACTIVE,
    Outcome.EXPIRED: key_service_pb2.OUTCOME_EXPIRED,
    Outcome.ORGANIZATION_INACTIVE: key_service_pb2.OUTCOME_ORGANIZATION_INACTIVE,
    Outcome.PERMISSION_DENIED: key_service_pb2.OUTCOME_PERMISSION_DENIED,
    Outcome.ADDRESS_DENIED: key_service_pb2.OUTCOME_ADDRESS_DENIED,
    Outcome.RATE_LIMITED: key_service_pb2.OUTCOME_RATE_LIMITED,
}
_SOURCE: Final = {
    ScopeSource.CORE: key_service_pb2.SCOPE_SOURCE_CORE,
    ScopeSource.DEPLOYMENT: key_service_pb2.SCOPE_SOURCE_DEPLOYMENT,
    ScopeSource.ORGANIZATION: key_service_pb2.SCOPE_SOURCE_ORGANIZATION,
}
_FROM_KEY_TYPE: Final = {number: value for value, number in _KEY_TYPE.items()}
_FROM_ENVIRONMENT: Final = {number: value for value, number in _ENVIRONMENT.items()}
_FROM_STATE: Final = {number: value for value, number in _STATE.items()}
_FROM_STEP: Final = {
    usage_service_pb2.USAGE_STEP_HOUR: UsageStep.HOUR,
    usage_service_pb2.USAGE_STEP_DAY: UsageStep.DAY,
}


def timestamp_message(time: datetime | None) -> timestamp_pb2.Timestamp | None:
    """Writes a time, or nothing."""
    if time is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def moment(message: timestamp_pb2.Timestamp, field: str) -> datetime:
    """Reads a time. Raises InvalidFieldError for one that the calendar has not."""
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidFieldError([(field, "must be a time from the year 1 to the year 9999")]) from None


def duration_message(span: timedelta) -> duration_pb2.Duration:
    """Writes a span of time."""
    message = duration_pb2.Duration()
    message.FromTimedelta(span)
    return message


@contextmanager
def fields_of(message: str) -> Iterator[None]:
    """Writes the paths of bad fields as they stand within `message` of the request."""
    try:
        yield
    except InvalidFieldError as error:
        raise InvalidFieldError([(f"{message}.{field}", advice) for field, advice in error.violations]) from None


def request_id(text: str) -> UUID | None:
    """Reads a request_id whose form was checked."""
    return UUID(text) if text else None


def environment(number: key_pb2.Environment.ValueType) -> Environment:
    """Reads an environment; live if unspecified."""
    return _FROM_ENVIRONMENT.get(number, Environment.LIVE)


def key_draft(request: key_service_pb2.CreateKeyRequest | import_service_pb2.ImportedKey) -> KeyDraft:
    """Reads the key that a caller asks for. One that is imported is secret."""
    key_type = request.key_type if isinstance(request, key_service_pb2.CreateKeyRequest) else key_pb2.KEY_TYPE_SECRET
    return KeyDraft(
        name=request.name,
        key_type=_FROM_KEY_TYPE.get(key_type, KeyType.SECRET),
        environment=environment(request.environment),
        permissions=tuple(request.permissions),
        rate_limit_per_minute=request.rate_limit_per_minute,
        expire_time=moment(request.expire_time, "expire_time") if request.HasField("expire_time") else None,
        user_id=request.user_id,
        user_email=request.user_email,
        metadata=dict(sorted(request.metadata.items())),
        allowed_cidrs=tuple(request.allowed_cidrs),
    )


def key_filter(request: key_service_pb2.ListKeysRequest) -> KeyFilter:
    """Reads which keys to list."""
    return KeyFilter(
        organization_id=request.organization_id,
        key_type=_FROM_KEY_TYPE.get(request.key_type),
        environment=_FROM_ENVIRONMENT.get(request.environment),
        state=_FROM_STATE.get(request.state),
        user_id=request.user_id,
        show_deleted=request.show_deleted,
    )


def changed_fields(mask: field_mask_pb2.FieldMask, known: tuple[str, ...], given: Iterable[str]) -> set[str]:
    """Gives the fields to change: those the mask names, or without one those that are given."""
    unknown = sorted(set(mask.paths) - {*known, "*"})
    if unknown:
        raise InvalidFieldError(
            [("update_mask", f"must name only {', '.join(known)}; {', '.join(unknown)} can not be changed")]
        )
    if "*" in mask.paths:
        return set(known)
    fields = set(mask.paths) or set(known) & set(given)
    if not fields:
        raise InvalidFieldError([("update_mask", f"must name a field to change: {', '.join(known)}")])
    return fields


def key_changes(request: key_service_pb2.UpdateKeyRequest) -> KeyChanges:
    """Reads which fields of a key to change, and their new values."""
    key = request.key
    given = (descriptor.name for descriptor, _ in key.ListFields())
    fields = changed_fields(request.update_mask, KEY_FIELDS, given)
    changes: KeyChanges = {}
    if "name" in fields:
        changes["name"] = key.name
    if "permissions" in fields:
        changes["permissions"] = tuple(key.permissions)
    if "rate_limit_per_minute" in fields:
        changes["rate_limit_per_minute"] = key.rate_limit_per_minute
    if "expire_time" in fields:
        changes["expire_time"] = moment(key.expire_time, "key.expire_time") if key.HasField("expire_time") else None
    if "metadata" in fields:
        changes["metadata"] = dict(key.metadata)
    if "allowed_cidrs" in fields:
        changes["allowed_cidrs"] = tuple(key.allowed_cidrs)
    return changes


def scopes(definitions: Iterable[organization_service_pb2.ScopeDefinition]) -> tuple[Scope, ...]:
    """Reads an organization's own scopes."""
    return tuple(Scope(name=each.name, description=each.description) for each in definitions)


def organization_changes(request: organization_service_pb2.UpdateOrganizationRequest) -> OrganizationChanges:
    """Reads which fields of an organization to change, and their new values."""
    organization = request.organization
    given = (descriptor.name for descriptor, _ in organization.ListFields())
    fields = changed_fields(request.update_mask, ORGANIZATION_FIELDS, given)
    changes: OrganizationChanges = {}
    if "name" in fields:
        changes["name"] = organization.name
    if "plan_id" in fields:
        changes["plan_id"] = organization.plan_id
    if "active" in fields:
        changes["active"] = organization.active
    if "scopes" in fields:
        changes["scopes"] = scopes(organization.scopes)
    return changes


def plan_changes(request: organization_service_pb2.UpdatePlanRequest) -> PlanChanges:
    """Reads which fields of a plan to change, and their new values."""
    plan = request.plan
    given = (descriptor.name for descriptor, _ in plan.ListFields())
    fields = changed_fields(request.update_mask, PLAN_FIELDS, given)
    changes: PlanChanges = {}
    if "rate_limit_per_minute" in fields:
        changes["rate_limit_per_minute"] = plan.rate_limit_per_minute
    if "max_keys" in fields:
        changes["max_keys"] = plan.max_keys
    return changes


def _secret_message(secret: Secret) -> key_pb2.Secret:
    return key_pb2.Secret(
        prefix=secret.hint,
        create_time=timestamp_message(secret.create_time),
        expire_time=timestamp_message(secret.end_time),
        last_used_time=timestamp_message(secret.last_used_time),
    )


def key_message(key: Key) -> key_pb2.Key:
    """Writes a key."""
    return key_pb2.Key(
        id=key.id,
        organization_id=key.organization_id,
        name=key.name,
        prefix=key.secrets[0].hint,
        key_type=_KEY_TYPE[key.key_type],
        environment=_ENVIRONMENT[key.environment],
        permissions=key.permissions,
        rate_limit_per_minute=key.rate_limit_per_minute,
        state=_STATE[key.state],
        user_id=key.user_id,
        user_email=key.user_email,
        metadata=key.metadata,
        allowed_cidrs=key.allowed_cidrs,
        create_time=timestamp_message(key.create_time),
        update_time=timestamp_message(key.update_time),
        expire_time=timestamp_message(key.expire_time),
        revoke_time=timestamp_message(key.revoke_time),
        last_used_time=timestamp_message(key.last_used_time),
        etag=key.etag,
        created_by=key.created_by,
        revoke_reason=key.revoke_reason,
        secrets=[_secret_message(secret) for secret in key.secrets],
        purge_time=timestamp_message(key.purge_time),
    )


def effect_message(effect: Effect) -> key_pb2.Effect:
    """Writes whether a change holds everywhere."""
    if effect.max_remaining is None:
        return key_pb2.Effect(state=key_pb2.EFFECT_STATE_EFFECTIVE, revision=effect.revision)
    return key_pb2.Effect(
        state=key_pb2.EFFECT_STATE_PENDING,
        revision=effect.revision,
        max_remaining=duration_message(effect.max_remaining),
    )


def scope_message(scope: Scope) -> key_service_pb2.Scope:
    """Writes an entry of the catalogue."""
    return key_service_pb2.Scope(name=scope.name, description=scope.description, source=_SOURCE[scope.source])


def organization_message(organization: Organization) -> organization_service_pb2.Organization:
    """Writes an organization."""
    return organization_service_pb2.Organization(
        id=organization.id,
        name=organization.name,
        plan_id=organization.plan_id,
        active=organization.active,
        scopes=[
            organization_service_pb2.ScopeDefinition(name=scope.name, description=scope.description)
            for scope in organization.scopes
        ],
        key_count=organization.key_count,
        create_time=timestamp_message(organization.create_time),
        update_time=timestamp_message(organization.update_time),
    )


def plan_message(plan: Plan) -> organization_service_pb2.Plan:
    """Writes a plan."""
    return organization_service_pb2.Plan(
        id=plan.id,
        rate_limit_per_minute=plan.rate_limit_per_minute,
        max_keys=plan.max_keys,
        create_time=timestamp_message(plan.create_time),
        update_time=timestamp_message(plan.update_time),
    )


def usage_span(request: usage_service_pb2.GetUsageRequest) -> UsageSpan:
    """Reads from when until when to count; by the hour if unspecified."""
    return UsageSpan(
        start_time=moment(request.start_time, "start_time") if request.HasField("start_time") else None,
        end_time=moment(request.end_time, "end_time") if request.HasField("end_time") else None,
        step=_FROM_STEP.get(request.step, UsageStep.HOUR),
    )


def usage_message(buckets: Sequence[UsageBucket]) -> usage_service_pb2.GetUsageResponse:
    """Writes what was counted, and the sums of it."""
    return usage_service_pb2.GetUsageResponse(
        buckets=[
            usage_service_pb2.UsageBucket(
                start_time=timestamp_message(bucket.start_time), counts=_counts(bucket.counts)
            )
            for bucket in buckets
        ],
        totals=_counts(total(buckets)),
    )


def _counts(counts: Mapping[Outcome, int]) -> list[usage_service_pb2.OutcomeCount]:
    """Writes counts in the order of the contract's outcomes."""
    numbered = sorted((OUTCOME[outcome], count) for outcome, count in counts.items())
    return [usage_service_pb2.OutcomeCount(outcome=outcome, count=count) for outcome, count in numbered]


def unused_message(
    keys: Sequence[key_pb2.Key], next_page_token: str, unused_since: datetime
) -> usage_service_pb2.ListUnusedKeysResponse:
    """Writes a page of unused keys."""
    return usage_service_pb2.ListUnusedKeysResponse(
        keys=keys, next_page_token=next_page_token, unused_since_time=timestamp_message(unused_since)
    )


def identity(key: KeyIdentity) -> bytes:
    """Writes what a ValidateResponse shows of a key."""
    (
        key_id, organization_id, user_id, user_email, key_name, kind, create_s, end_s, told,
    ) = key  # fmt: skip
    # One by one, which takes half as long as all at once by their names.
    message = key_service_pb2.ValidateResponse()
    message.key_id = key_id
    message.organization_id = organization_id
    message.user_id = user_id
    message.user_email = user_email
    message.key_name = key_name
    _set_seconds(message.create_time, create_s)
    if end_s != math.inf:
        _set_seconds(message.expire_time, end_s)
    metadata = message.metadata
    for name, value in told.items():
        metadata[name] = value
    return message.SerializeToString() + _kind(kind)


@lru_cache(maxsize=10_000)
def _kind(kind: KeyKind) -> bytes:
    """Writes what many keys have in common: written once, it is a part of the message of each."""
    return key_service_pb2.ValidateResponse(
        key_type=_KEY_TYPE[kind.key_type],
        environment=_ENVIRONMENT[kind.environment],
        permissions=kind.permissions,
    ).SerializeToString()


def _set_seconds(message: timestamp_pb2.Timestamp, seconds: float) -> None:
    """Sets a time, in seconds since 1970, to the microsecond that PostgreSQL has."""
    microseconds = round(seconds * 1_000_000)
    message.seconds, rest = divmod(microseconds, 1_000_000)
    message.nanos = rest * 1000
