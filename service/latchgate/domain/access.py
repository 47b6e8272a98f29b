"""Who may call what: the rules between a caller and the organizations, keys and permissions that it names."""

from __future__ import annotations

from collections.abc import Iterable

from latchgate.domain.errors import (
    CredentialsInvalidError,
    InvalidFieldError,
    KeyNotFoundError,
    OrganizationNotFoundError,
    PermissionMissingError,
    PermissionNotHeldError,
    RootRequiredError,
)
from latchgate.domain.model import Caller, Key, Outcome, Scope, ScopeSource
from latchgate.domain.ports import Transaction

READ_KEYS = "keys:read"
WRITE_KEYS = "keys:write"
VALIDATE_KEYS = "keys:validate"
READ_AUDIT = "audit:read"
WRITE_SCOPES = "scopes:write"
READ_WEBHOOKS = "webhooks:read"
WRITE_WEBHOOKS = "webhooks:write"

MANAGEMENT_SCOPES = (
    READ_KEYS,
    WRITE_KEYS,
    VALIDATE_KEYS,
    READ_AUDIT,
    WRITE_SCOPES,
    READ_WEBHOOKS,
    WRITE_WEBHOOKS,
)

CORE_SCOPES = tuple(
    Scope(name=name, description=description, source=ScopeSource.CORE)
    for name, description in (
        (READ_KEYS, "Read the organization's keys and scopes."),
        (WRITE_KEYS, "Create, change, rotate, revoke and delete the organization's keys."),
        (VALIDATE_KEYS, "Call Validate where the deployment demands a key for it."),
        (READ_AUDIT, "Read the organization's audit trail."),
        (WRITE_SCOPES, "Add scopes of its own to the organization's catalogue, and remove them."),
        (READ_WEBHOOKS, "Read the organization's webhooks and what was sent to them."),
        (WRITE_WEBHOOKS, "Create, change and delete the organization's webhooks, and have events sent again."),
        ("read", "Read access, as the application behind the gateway understands it."),
        ("write", "Write access, as the application behind the gateway understands it."),
    )
)


def require(caller: Caller, permission: str) -> None:
    """Demands a permission. Raises PermissionMissingError."""
    if not caller.grants.cover(permission):
        raise PermissionMissingError(f"the calling key lacks the permission {permission}", permission=permission)


def require_root(caller: Caller) -> None:
    """Demands a root key. Raises RootRequiredError."""
    if not caller.is_root:
        raise RootRequiredError("only a root key may do this")


def require_held(caller: Caller, permissions: Iterable[str]) -> None:
    """Demands that the caller holds all that it would hand out. Raises PermissionNotHeldError."""
    lacking = caller.grants.lacking(permissions)
    if lacking is not None:
        raise PermissionNotHeldError(
            f"the calling key lacks {lacking}, and so can not give it to a key", permission=lacking
        )


def require_held_to_widen(caller: Caller, key: Key, updated: Key) -> None:
    """Demands that the caller holds a key's permissions if a change lets its token through when it was refused before.

    Whoever has kept a token that is switched off, has expired or is bound to a network must not gain by bringing it
    back what its own key lacks. Raises PermissionNotHeldError.
    """
    is_switched_on = updated.active and not key.active
    ends_later = key.expire_time is not None and (updated.expire_time is None or updated.expire_time > key.expire_time)
    moves = bool(key.allowed_cidrs) and updated.allowed_cidrs != key.allowed_cidrs
    if is_switched_on or ends_later or moves:
        require_held(caller, key.permissions)


async def require_still_in_use(caller: Caller, transaction: Transaction) -> None:
    """Demands that the caller's own key was not ended while its call waited for a lock.

    Whoever has revoked a key must not find its traces afterwards. A JWT can not be ended. Raises
    CredentialsInvalidError.
    """
    if caller.secret_id is not None and not await transaction.is_in_use(caller.secret_id):
        raise CredentialsInvalidError(
            "the calling token was ended while the call was under way; nothing was changed",
            outcome=Outcome.REVOKED.name,
        )


def organization_for(caller: Caller, requested: str) -> str:
    """Gives the organization that a call is about: the caller's, or for root the one it names.

    Raises OrganizationNotFoundError for another's, and InvalidFieldError when root names none: root's own organization
    is never meant by accident.
    """
    if caller.is_root:
        if not requested:
            raise InvalidFieldError([("organization_id", "must be named by a caller with a root key")])
        return requested
    if requested not in ("", caller.organization_id):
        raise organization_not_found(requested)
    return caller.organization_id


def only_organization(caller: Caller | None) -> str:
    """Gives the organization whose tokens a caller may ask about; empty for all, as it is where anyone may ask.

    Raises PermissionMissingError.
    """
    if caller is None:
        return ""
    require(caller, VALIDATE_KEYS)
    return "" if caller.is_root else caller.organization_id


def organization_not_found(organization_id: str) -> OrganizationNotFoundError:
    """Makes the one answer for organizations that are not there and those that are another's."""
    return OrganizationNotFoundError(f"organization {organization_id} does not exist")


def visible(caller: Caller, key: Key | None, key_id: str) -> Key:
    """Gives the key if the caller may know of it. Raises KeyNotFoundError."""
    if key is None or not (caller.is_root or key.organization_id == caller.organization_id):
        raise KeyNotFoundError(f"key {key_id} does not exist")
    return key
