"""What follows from an attempt to send an event to a webhook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus

from latchgate.domain.outbox import Attempt, DeliveryError, DeliveryState, EventType, Reply
from latchgate.domain.retries import RetryTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What follows from an attempt: the delivery's state, when to try again, and whether the webhook is gone."""

    state: DeliveryState
    error: DeliveryError | None
    next_time: datetime | None = None
    is_gone: bool = False


def judge(attempt: Attempt, reply: Reply, terms: RetryTerms, random: Callable[[], float]) -> Judgement:
    """Says what follows: any 2xx is a success; 410 ends the webhook; a test is not repeated; all else is."""
    if reply.error is None and HTTPStatus.OK <= reply.status < HTTPStatus.MULTIPLE_CHOICES:
        return Judgement(state=DeliveryState.DELIVERED, error=None)
    error = reply.error or DeliveryError.HTTP_STATUS
    if reply.error is None and reply.status == HTTPStatus.GONE:
        return Judgement(state=DeliveryState.DEAD, error=error, is_gone=True)
    now = attempt.now + timedelta(seconds=reply.duration_s)
    later = terms.next_time(attempt.tries, attempt.first_time, now, random, reply.retry_after_s)
    if later is None or attempt.event_type is EventType.WEBHOOK_TEST:
        return Judgement(state=DeliveryState.DEAD, error=error)
    return Judgement(state=DeliveryState.PENDING, error=error, next_time=later)
