"""Everything that management calls and validation can refuse with, free of any transport.

The message is for people and says what to do; `details` names what a program may want to branch on. Neither ever holds
a token, a digest or a connection string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType


class LatchgateError(Exception):
    """The root of the tree. Never raised itself."""

    def __init__(self, message: str, **details: str) -> None:
        super().__init__(message)
        self.message = message
        self.details: Mapping[str, str] = MappingProxyType(details)


class InvalidArgumentError(LatchgateError):
    """The caller sent something that no state of the service could accept."""


class MalformedRequestError(InvalidArgumentError):
    """The bytes of the request are not a message of the method."""


class InvalidFieldError(InvalidArgumentError):
    """Fields break rules. `violations` holds pairs of the field's path and what it must be."""

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {description}" for field, description in violations))
        self.violations = tuple(violations)


class PageTokenError(InvalidArgumentError):
    """The page token was not made for this caller, organization and filters."""


class ImportTooLongError(InvalidArgumentError):
    """More rows were sent in one import than one may hold."""


class ScopeUnknownError(InvalidArgumentError):
    """A permission matches nothing in the catalogue."""


class UnauthenticatedError(LatchgateError):
    """The caller is not known."""


class CredentialsMissingError(UnauthenticatedError):
    """The call carries no token."""


class CredentialsInvalidError(UnauthenticatedError):
    """The call's token is not accepted."""


class RefreshTokenInvalidError(UnauthenticatedError):
    """The refresh token is not accepted, for whatever reason."""


class RefreshTokenReusedError(UnauthenticatedError):
    """The refresh token was used up before; its family has ended."""


class DeniedError(LatchgateError):
    """The caller is known and may not do this."""


class OrganizationInactiveError(DeniedError):
    """The caller's organization is inactive."""


class AddressDeniedError(DeniedError):
    """The caller's key may not be used from the caller's address."""


class PermissionMissingError(DeniedError):
    """The caller's key lacks the permission that the method needs."""


class RootRequiredError(DeniedError):
    """Only root may do this."""


class KeyRequiredError(DeniedError):
    """The method acts on the caller's own key, and the caller has presented a JWT."""


class PermissionNotHeldError(DeniedError):
    """The caller would hand out a permission that it lacks."""


class NotFoundError(LatchgateError):
    """What was named does not exist, as far as the caller may know."""


class KeyNotFoundError(NotFoundError):
    """No such key."""


class OrganizationNotFoundError(NotFoundError):
    """No such organization."""


class PlanNotFoundError(NotFoundError):
    """No such plan."""


class WebhookNotFoundError(NotFoundError):
    """No such webhook."""


class DeliveryNotFoundError(NotFoundError):
    """No such delivery, or it is not done yet."""


class AlreadyExistsError(LatchgateError):
    """What was to be made is there already."""


class OrganizationExistsError(AlreadyExistsError):
    """The organization's id is taken."""


class PlanExistsError(AlreadyExistsError):
    """The plan's id is taken."""


class ScopeExistsError(AlreadyExistsError):
    """The catalogue has the scope already."""


class RequestIdReusedError(AlreadyExistsError):
    """The request_id belongs to another request."""


class RequestIdExpiredError(AlreadyExistsError):
    """The request_id is known, but its token is no longer kept."""


class EtagMismatchError(LatchgateError):
    """The resource was changed since it was read."""


class PreconditionError(LatchgateError):
    """The resource is not in a state for this."""


class KeyRevokedError(PreconditionError):
    """The key is revoked."""


class KeyDeletedError(PreconditionError):
    """The key is deleted."""


class KeyExpiredError(PreconditionError):
    """The key has expired."""


class UndeleteExpiredError(PreconditionError):
    """The key was deleted too long ago to be brought back."""


class ScopeInUseError(PreconditionError):
    """Keys have a permission that needs the scope."""


class ScopeNotOwnError(PreconditionError):
    """The scope is not the organization's own."""


class LastRootKeyError(PreconditionError):
    """No lasting root key would be left."""


class RootOrganizationError(PreconditionError):
    """The service's own organization can not be changed like this."""


class RevisionUnknownError(PreconditionError):
    """The revision asked for was never given out."""


class WebhookDisabledError(PreconditionError):
    """The webhook is disabled, and gets nothing."""


class ExhaustedError(LatchgateError):
    """A limit is reached."""


class CallerRateLimitedError(ExhaustedError):
    """The caller's key is over its rate limit."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyLimitReachedError(ExhaustedError):
    """The organization has as many keys as its plan allows."""


class ScopeLimitReachedError(ExhaustedError):
    """The organization has as many scopes of its own as it can have."""


class WebhookLimitReachedError(ExhaustedError):
    """The organization has as many webhooks as there may be."""


class UnavailableError(LatchgateError):
    """The service can not decide now."""


class StorageUnavailableError(UnavailableError):
    """The database does not answer; nothing was changed."""


class WriteUnknownError(UnavailableError):
    """The database went away while a change was being stored; it may or may not hold."""


class IssuerUnavailableError(UnavailableError):
    """The issuer's keys can not be read."""


class LookupBudgetError(UnavailableError):
    """Too many unknown foreign tokens at once."""
