"""When deliveries are tried again, and what follows from an attempt."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from latchgate.domain.deliveries import judge
from latchgate.domain.outbox import Attempt, DeliveryError, DeliveryState, EventType, Reply
from latchgate.domain.retries import RetryTerms

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
TERMS = RetryTerms()
LAST_MOMENT = NOON + timedelta(days=3)


def attempt(tries: int = 1, now: datetime = NOON, event_type: EventType = EventType.CREATED) -> Attempt:
    """An attempt of which the first was at noon."""
    return Attempt(
        delivery_id="dlv_1",
        webhook_id="whk_1",
        organization_id="acme",
        event_id="evt_1",
        event_type=event_type,
        url="https://example.com/",
        body="{}",
        sealed_secrets=(b"",),
        number=tries,
        tries=tries,
        first_time=NOON,
        now=now,
    )


def wait_s(tries: int, random: float, asked_s: float = 0.0) -> float:
    """For how long is waited after so many tries."""
    later = TERMS.next_time(tries, NOON, NOON, lambda: random, asked_s)
    assert later is not None
    return (later - NOON).total_seconds()


def test_waits_grow_and_are_spread() -> None:
    """The longest wait doubles from 5 seconds to 4 hours; the wait is anything between a second and that."""
    assert [5, 10, 20, 40] == [wait_s(tries, 1.0) for tries in (1, 2, 3, 4)]
    assert {4 * 3600} == {wait_s(tries, 1.0) for tries in (13, 100, 10_000)}
    assert [1, 20] == [wait_s(4, 0.0), wait_s(4, 0.5)]


def test_retry_after_is_heeded_within_bounds() -> None:
    """A receiver that asks to be left alone is, for up to 4 hours; it can not have itself asked sooner."""
    assert [600, 4 * 3600, 5] == [wait_s(1, 1.0, 600), wait_s(1, 0.0, 1e9), wait_s(1, 1.0, 1)]


def test_retries_end_after_three_days() -> None:
    """Nothing is tried later than three days after its first attempt; what took long to fail counts as well."""

    def next_time(now: datetime) -> datetime | None:
        return TERMS.next_time(1, NOON, now, lambda: 1.0)

    assert LAST_MOMENT == next_time(LAST_MOMENT - timedelta(seconds=5))
    assert next_time(LAST_MOMENT - timedelta(seconds=4)) is None


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_2xx_is_a_success(status: int) -> None:
    """Whatever a receiver says with a status from 200 to 299, it has what was sent."""
    judged = judge(attempt(), Reply(status=status), TERMS, lambda: 1.0)
    assert (DeliveryState.DELIVERED, None, None) == (judged.state, judged.error, judged.next_time)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=500), DeliveryError.HTTP_STATUS),
        (Reply(status=404), DeliveryError.HTTP_STATUS),
        (Reply(status=301), DeliveryError.HTTP_STATUS),
        (Reply(status=199), DeliveryError.HTTP_STATUS),
        (Reply(error=DeliveryError.TIMEOUT), DeliveryError.TIMEOUT),
        (Reply(error=DeliveryError.ADDRESS_REFUSED), DeliveryError.ADDRESS_REFUSED),
    ],
)
def test_all_else_is_tried_again(reply: Reply, error: DeliveryError) -> None:
    """Every other status, redirects too, and every error is tried again; after three days it is dead."""
    judged = judge(attempt(), reply, TERMS, lambda: 1.0)
    assert (DeliveryState.PENDING, error, NOON + timedelta(seconds=5)) == (judged.state, judged.error, judged.next_time)
    judged = judge(attempt(20, LAST_MOMENT), reply, TERMS, lambda: 1.0)
    assert (DeliveryState.DEAD, error, None, False) == (judged.state, judged.error, judged.next_time, judged.is_gone)


def test_gone_ends_it() -> None:
    """410 is not tried again, and ends the webhook."""
    judged = judge(attempt(), Reply(status=410), TERMS, lambda: 1.0)
    assert (DeliveryState.DEAD, True) == (judged.state, judged.is_gone)


def test_tests_are_not_repeated() -> None:
    """A test says at once what came of it: it is never pending again."""
    judged = judge(attempt(event_type=EventType.WEBHOOK_TEST), Reply(status=500), TERMS, lambda: 1.0)
    assert (DeliveryState.DEAD, None) == (judged.state, judged.next_time)
