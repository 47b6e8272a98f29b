"""Retries: what makes two requests the same."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import timedelta
from uuid import UUID

import pytest

from latchgate.domain.model import Environment, KeyDraft, KeyType
from latchgate.domain.permissions import Grants
from latchgate.domain.requests import Retry
from support.records import DRAFT, NOW, caller

CALLER = caller("keys:write")
REQUEST_ID = UUID("0f0e0d0c-0b0a-4908-8706-050403020100")
BODY = ("acme", DRAFT)
RETRY = Retry.of(CALLER, "create", REQUEST_ID, BODY)

OTHER_VALUES: dict[str, object] = {
    "name": "shipping",
    "key_type": KeyType.PUBLISHABLE,
    "environment": Environment.TEST,
    "permissions": ("orders:read",),
    "rate_limit_per_minute": 1,
    "expire_time": NOW,
    "user_id": "u-1",
    "user_email": "ann@example.com",
    "metadata": {"team": "orders"},
    "allowed_cidrs": ("192.0.2.0/24",),
}


def test_the_same_request_is_recognised() -> None:
    """A retry, made anew from equal values, finds what the first try left."""
    again = Retry.of(
        replace(CALLER),
        "create",
        UUID(str(REQUEST_ID)),
        ("acme", KeyDraft(name="billing", metadata={"team": "payments"})),
    )
    assert RETRY == again


@pytest.mark.parametrize(
    "other",
    [
        Retry.of(replace(CALLER, key_id="key_01jv5s7kqd0000000000000003"), "create", REQUEST_ID, BODY),
        Retry.of(CALLER, "rotate", REQUEST_ID, BODY),
        Retry.of(CALLER, "create", UUID("0f0e0d0c-0b0a-4908-8706-050403020101"), BODY),
    ],
    ids=["caller", "method", "request_id"],
)
def test_slots_are_apart(other: Retry) -> None:
    """No caller is given another's token, nor one method's for another: each has slots of its own."""
    assert RETRY.slot != other.slot
    assert RETRY.body_digest == other.body_digest


@pytest.mark.parametrize("field", [field.name for field in fields(KeyDraft)])
def test_body_digest_covers_every_field(field: str) -> None:
    """The same request_id with any field changed is another request in the same slot, and so can be refused."""
    # The type of a field that is named by a variable can not be checked.
    other = Retry.of(CALLER, "create", REQUEST_ID, ("acme", replace(DRAFT, **{field: OTHER_VALUES[field]})))  # type: ignore[arg-type]
    assert RETRY.slot == other.slot
    assert RETRY.body_digest != other.body_digest


def test_body_digest_covers_what_stands_beside_the_draft() -> None:
    """The organization of a new key, and the grace of a rotation, are parts of the body."""
    assert RETRY.body_digest != Retry.of(CALLER, "create", REQUEST_ID, ("other", DRAFT)).body_digest
    short, long = (
        Retry.of(CALLER, "rotate", REQUEST_ID, ("key_1", timedelta(hours=hours))).body_digest for hours in (1, 2)
    )
    assert short != long


def test_slot_outlives_changes_of_the_caller() -> None:
    """A caller that was given other permissions between two tries still finds its answer."""
    assert RETRY.slot == Retry.of(replace(CALLER, grants=Grants(("*",))), "create", REQUEST_ID, BODY).slot


def test_only_digests_leave() -> None:
    """The id opens the kept token, and so it can not be read from what is stored."""
    stored = RETRY.slot + RETRY.body_digest
    assert 64 == len(stored)
    assert REQUEST_ID.bytes not in stored
    assert str(REQUEST_ID).encode() not in stored
