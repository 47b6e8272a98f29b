"""Who is calling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from latchgate.domain.callers import caller_of
from latchgate.domain.errors import (
    AddressDeniedError,
    CallerRateLimitedError,
    CredentialsInvalidError,
    LatchgateError,
    OrganizationInactiveError,
)
from latchgate.domain.model import Outcome, RateState, Verdict
from support.records import KEY_RECORD, NOW_S, granting

RECORD = granting(KEY_RECORD, "keys:read")
VERDICT = Verdict(outcome=Outcome.VALID, revision=1, now_s=NOW_S, record=RECORD)


def test_a_valid_token_makes_a_caller() -> None:
    """A caller is the key of its token, with that key's organization and permissions."""
    caller = caller_of(VERDICT)
    assert (RECORD.key_id, RECORD.organization_id) == (caller.key_id, caller.organization_id)
    assert caller.grants.cover("keys:read")
    assert not caller.grants.cover("keys:write")
    assert not caller.is_root


def test_a_root_key_makes_a_root_caller() -> None:
    """A key of the service's own organization makes its holder root."""
    assert caller_of(VERDICT._replace(record=replace(RECORD, organization_id="org_root"))).is_root


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome.NOT_FOUND, CredentialsInvalidError),
        (Outcome.REVOKED, CredentialsInvalidError),
        (Outcome.EXPIRED, CredentialsInvalidError),
        (Outcome.INACTIVE, CredentialsInvalidError),
        (Outcome.ORGANIZATION_INACTIVE, OrganizationInactiveError),
        (Outcome.ADDRESS_DENIED, AddressDeniedError),
        (Outcome.RATE_LIMITED, CallerRateLimitedError),
    ],
)
def test_any_other_outcome_makes_none(outcome: Outcome, error: type[LatchgateError]) -> None:
    """A token that is not valid, for whatever reason, makes no caller, and says why, also if a record is there."""
    for verdict in (VERDICT._replace(outcome=outcome), Verdict(outcome=outcome, revision=1)):
        with pytest.raises(error) as caught:
            caller_of(verdict)
        assert type(caught.value) is error


def test_every_outcome_is_decided() -> None:
    """No outcome but VALID makes a caller, those that are added later included."""
    for outcome in set(Outcome) - {Outcome.VALID}:
        with pytest.raises(LatchgateError):
            caller_of(VERDICT._replace(outcome=outcome))


def test_a_verdict_without_record_makes_none() -> None:
    """Without a key there is no caller, whatever the outcome says."""
    with pytest.raises(CredentialsInvalidError):
        caller_of(VERDICT._replace(record=None))


def test_rate_limited_callers_are_told_when_to_come_back() -> None:
    """A caller over its limit hears for how long to wait."""
    rate = RateState(allowed=False, limit=60, remaining=0, reset_after_s=17)
    with pytest.raises(CallerRateLimitedError) as caught:
        caller_of(VERDICT._replace(outcome=Outcome.RATE_LIMITED, rate=rate))
    assert 17.0 == caught.value.retry_after_s


def test_a_caller_is_known_to_wait() -> None:
    """A caller is held to its own deadline; one that named none waits for as long as it takes."""
    assert 17.5 == caller_of(VERDICT, 17.5).answer_by_s
    assert math.inf == caller_of(VERDICT).answer_by_s
