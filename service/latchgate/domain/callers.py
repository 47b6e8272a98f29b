"""Who is calling: from the verdict on the caller's own token to a caller, or to why there is none."""

from __future__ import annotations

import math

from latchgate.domain.errors import (
    AddressDeniedError,
    CallerRateLimitedError,
    CredentialsInvalidError,
    LatchgateError,
    OrganizationInactiveError,
)
from latchgate.domain.model import Call, Caller, Outcome, Verdict


def caller_of(verdict: Verdict, answer_by_s: float = math.inf, call: Call | None = None) -> Caller:
    """Gives the caller whose token was judged, who waits until `answer_by_s`, and whose call it is.

    Raises an UnauthenticatedError, a DeniedError or an ExhaustedError.
    """
    record = verdict.record
    if verdict.outcome is not Outcome.VALID or record is None:
        raise _refusal(verdict)
    return Caller(
        key_id=record.key_id,
        secret_id=record.secret_id,
        organization_id=record.organization_id,
        grants=record.grants,
        answer_by_s=answer_by_s,
        call=call or Call(),
    )


def _refusal(verdict: Verdict) -> LatchgateError:
    match verdict.outcome:
        case Outcome.ORGANIZATION_INACTIVE:
            return OrganizationInactiveError("the calling key's organization is inactive")
        case Outcome.ADDRESS_DENIED:
            return AddressDeniedError("the calling key may not be used from this address")
        case Outcome.RATE_LIMITED:
            retry_after_s = verdict.rate.reset_after_s if verdict.rate else 60.0
            return CallerRateLimitedError("the calling key is over its rate limit", retry_after_s=retry_after_s)
        case outcome:
            return CredentialsInvalidError(
                f"the calling token is not accepted: {outcome.name}; give that of a key which is in use",
                outcome=outcome.name,
            )
