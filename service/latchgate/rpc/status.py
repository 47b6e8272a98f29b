"""One table: from domain errors to gRPC codes and the reasons that clients branch on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeGuard

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from apikeys.v1 import error_reason_pb2
from latchgate.domain import errors

DOMAIN: Final = "latchgate"
REASON_PREFIX: Final = "ERROR_REASON_"

# A status travels in headers, and clients refuse those beyond 8 KiB: they would see another error than the one that was
# meant. These bounds keep every status below, with what base64 and percent signs add.
MAX_MESSAGE_BYTES: Final = 1024
MAX_VIOLATIONS_BYTES: Final = 2048
MAX_FIELD_BYTES: Final = 200
# The ids of ten keys fit. Errors with metadata name no violations.
MAX_METADATA_BYTES: Final = 400
MAX_DESCRIPTION_BYTES: Final = 400

# Clients log what they are told. A token that stood in a wrong field, and would be named with it, is not sent back.
_TOKEN_BODY: Final = re.compile(r"_[0-9A-Za-z]{40,}")
_JWT: Final = re.compile(r"eyJ[\w-]{10,}\.[\w-]*(\.[\w-]*)?")

_Reason = error_reason_pb2.ErrorReason

_TABLE: Final[dict[type[errors.LatchgateError], tuple[grpc.StatusCode, error_reason_pb2.ErrorReason.ValueType]]] = {
    errors.MalformedRequestError: (grpc.StatusCode.INVALID_ARGUMENT, _Reason.ERROR_REASON_MALFORMED_REQUEST),
    errors.InvalidFieldError: (grpc.StatusCode.INVALID_ARGUMENT, _Reason.ERROR_REASON_INVALID_FIELD),
    errors.PageTokenError: (grpc.StatusCode.INVALID_ARGUMENT, _Reason.ERROR_REASON_PAGE_TOKEN_INVALID),
    errors.ScopeUnknownError: (grpc.StatusCode.INVALID_ARGUMENT, _Reason.ERROR_REASON_SCOPE_UNKNOWN),
    errors.ImportTooLongError: (grpc.StatusCode.INVALID_ARGUMENT, _Reason.ERROR_REASON_IMPORT_TOO_LONG),
    errors.CredentialsMissingError: (grpc.StatusCode.UNAUTHENTICATED, _Reason.ERROR_REASON_CREDENTIALS_MISSING),
    errors.CredentialsInvalidError: (grpc.StatusCode.UNAUTHENTICATED, _Reason.ERROR_REASON_CREDENTIALS_INVALID),
    errors.RefreshTokenInvalidError: (grpc.StatusCode.UNAUTHENTICATED, _Reason.ERROR_REASON_REFRESH_TOKEN_INVALID),
    errors.RefreshTokenReusedError: (grpc.StatusCode.UNAUTHENTICATED, _Reason.ERROR_REASON_REFRESH_TOKEN_REUSED),
    errors.OrganizationInactiveError: (grpc.StatusCode.PERMISSION_DENIED, _Reason.ERROR_REASON_ORGANIZATION_INACTIVE),
    errors.AddressDeniedError: (grpc.StatusCode.PERMISSION_DENIED, _Reason.ERROR_REASON_ADDRESS_DENIED),
    errors.PermissionMissingError: (grpc.StatusCode.PERMISSION_DENIED, _Reason.ERROR_REASON_PERMISSION_MISSING),
    errors.RootRequiredError: (grpc.StatusCode.PERMISSION_DENIED, _Reason.ERROR_REASON_ROOT_REQUIRED),
    errors.PermissionNotHeldError: (grpc.StatusCode.PERMISSION_DENIED, _Reason.ERROR_REASON_PERMISSION_NOT_HELD),
    errors.KeyRequiredError: (grpc.StatusCode.PERMISSION_DENIED, _Reason.ERROR_REASON_KEY_REQUIRED),
    errors.CallerRateLimitedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _Reason.ERROR_REASON_CALLER_RATE_LIMITED),
    errors.KeyNotFoundError: (grpc.StatusCode.NOT_FOUND, _Reason.ERROR_REASON_KEY_NOT_FOUND),
    errors.OrganizationNotFoundError: (grpc.StatusCode.NOT_FOUND, _Reason.ERROR_REASON_ORGANIZATION_NOT_FOUND),
    errors.PlanNotFoundError: (grpc.StatusCode.NOT_FOUND, _Reason.ERROR_REASON_PLAN_NOT_FOUND),
    errors.OrganizationExistsError: (grpc.StatusCode.ALREADY_EXISTS, _Reason.ERROR_REASON_ORGANIZATION_EXISTS),
    errors.PlanExistsError: (grpc.StatusCode.ALREADY_EXISTS, _Reason.ERROR_REASON_PLAN_EXISTS),
    errors.ScopeExistsError: (grpc.StatusCode.ALREADY_EXISTS, _Reason.ERROR_REASON_SCOPE_EXISTS),
    errors.RequestIdReusedError: (grpc.StatusCode.ALREADY_EXISTS, _Reason.ERROR_REASON_REQUEST_ID_REUSED),
    errors.RequestIdExpiredError: (grpc.StatusCode.ALREADY_EXISTS, _Reason.ERROR_REASON_REQUEST_ID_EXPIRED),
    errors.EtagMismatchError: (grpc.StatusCode.ABORTED, _Reason.ERROR_REASON_ETAG_MISMATCH),
    errors.KeyRevokedError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_KEY_REVOKED),
    errors.KeyDeletedError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_KEY_DELETED),
    errors.KeyExpiredError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_KEY_EXPIRED),
    errors.UndeleteExpiredError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_UNDELETE_EXPIRED),
    errors.ScopeInUseError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_SCOPE_IN_USE),
    errors.ScopeNotOwnError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_SCOPE_NOT_OWN),
    errors.LastRootKeyError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_LAST_ROOT_KEY),
    errors.RootOrganizationError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_ROOT_ORGANIZATION),
    errors.RevisionUnknownError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_REVISION_UNKNOWN),
    errors.KeyLimitReachedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _Reason.ERROR_REASON_KEY_LIMIT_REACHED),
    errors.ScopeLimitReachedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _Reason.ERROR_REASON_SCOPE_LIMIT_REACHED),
    errors.WebhookNotFoundError: (grpc.StatusCode.NOT_FOUND, _Reason.ERROR_REASON_WEBHOOK_NOT_FOUND),
    errors.DeliveryNotFoundError: (grpc.StatusCode.NOT_FOUND, _Reason.ERROR_REASON_DELIVERY_NOT_FOUND),
    errors.WebhookDisabledError: (grpc.StatusCode.FAILED_PRECONDITION, _Reason.ERROR_REASON_WEBHOOK_DISABLED),
    errors.WebhookLimitReachedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _Reason.ERROR_REASON_WEBHOOK_LIMIT_REACHED),
    errors.StorageUnavailableError: (grpc.StatusCode.UNAVAILABLE, _Reason.ERROR_REASON_STORAGE_UNAVAILABLE),
    errors.WriteUnknownError: (grpc.StatusCode.UNAVAILABLE, _Reason.ERROR_REASON_WRITE_UNKNOWN),
    errors.IssuerUnavailableError: (grpc.StatusCode.UNAVAILABLE, _Reason.ERROR_REASON_ISSUER_UNAVAILABLE),
    errors.LookupBudgetError: (grpc.StatusCode.UNAVAILABLE, _Reason.ERROR_REASON_LOOKUP_BUDGET_EXCEEDED),
}


def is_listed(error: Exception) -> TypeGuard[errors.LatchgateError]:
    """Says whether an error is one that clients are told of."""
    return type(error) in _TABLE


def code_and_reason(error: errors.LatchgateError) -> tuple[grpc.StatusCode, str]:
    """Gives the gRPC code and the reason of an error."""
    code, reason = _TABLE[type(error)]
    return code, _Reason.Name(reason).removeprefix(REASON_PREFIX)


def reason_of(status: status_pb2.Status) -> str:
    """Reads the reason of a status."""
    info = error_details_pb2.ErrorInfo()
    return info.reason if any(detail.Unpack(info) for detail in status.details) else ""


def status_of(error: errors.LatchgateError) -> status_pb2.Status:
    """Gives the status that a client is sent: code, message, reason, and the details that go with it."""
    code, reason = code_and_reason(error)
    status = make_status(code, error.message, reason, dict(error.details))
    if isinstance(error, errors.InvalidFieldError):
        _attach(status, _bad_request(error))
    if isinstance(error, errors.CallerRateLimitedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        _attach(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _bad_request(error: errors.InvalidFieldError) -> error_details_pb2.BadRequest:
    """Names the fields that break rules, the first ones if there are too many for a status."""
    bad_request = error_details_pb2.BadRequest()
    for field, description in error.violations:
        bad_request.field_violations.add(
            field=told(field, MAX_FIELD_BYTES), description=told(description, MAX_DESCRIPTION_BYTES)
        )
        if bad_request.ByteSize() > MAX_VIOLATIONS_BYTES:
            del bad_request.field_violations[-1]
            break
    return bad_request


def told(text: str, max_bytes: int) -> str:
    """Gives a text as it may be told: without tokens, and no longer than `max_bytes`."""
    text = _JWT.sub("eyJ...", _TOKEN_BODY.sub("_...", text))
    encoded = text.encode()
    return text if len(encoded) <= max_bytes else encoded[: max_bytes - 4].decode(errors="ignore") + " ..."


def internal_status(incident: str) -> status_pb2.Status:
    """Gives the status for a fault of the service: nothing of it but the number under which the log has it."""
    return make_status(
        grpc.StatusCode.INTERNAL,
        f"the service failed; its log has the details under incident {incident}",
        _Reason.Name(_Reason.ERROR_REASON_INTERNAL).removeprefix(REASON_PREFIX),
        {"incident": incident},
    )


def make_status(code: grpc.StatusCode, message: str, reason: str, metadata: Mapping[str, str]) -> status_pb2.Status:
    """Puts a status together, with what programs read of it."""
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=told(message, MAX_MESSAGE_BYTES))
    shown = {name: told(value, MAX_METADATA_BYTES) for name, value in metadata.items()}
    _attach(status, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=shown))
    return status


def _attach(
    status: status_pb2.Status,
    detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
