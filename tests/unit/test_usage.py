"""From when until when usage is counted, and which keys are said to be unused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from latchgate.domain.errors import (
    InvalidFieldError,
    KeyNotFoundError,
    OrganizationNotFoundError,
    PermissionMissingError,
)
from latchgate.domain.model import Key, Outcome, Scope
from latchgate.domain.usage import MAX_EXAMINED, UsageReporter, UsageSpan, UsageStep, total
from support.records import KEY, ROOT, caller

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
TODAY = datetime(2030, 1, 2, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
READER = caller("keys:read")


class MemoryUsage:
    """Counts in memory: an answer of VALID in the last hour, and what a test puts beside it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.keys: list[Key] = [KEY]
        self.reached = ""
        self.counts: Mapping[int, Mapping[Outcome, int]] = {0: {Outcome.VALID: 2}}
        self.organizations = {"acme", "rival"}

    async def now(self) -> datetime:
        """Stands still."""
        return NOW

    async def get_key(self, key_id: str) -> Key | None:
        """Finds KEY."""
        return KEY if key_id == KEY.id else None

    async def scopes(self, organization_id: str) -> Sequence[Scope] | None:
        """Knows organizations, which have no scopes."""
        return () if organization_id in self.organizations else None

    async def usage_of_key(self, *asked: Any) -> Mapping[int, Mapping[Outcome, int]]:
        """Takes note of what is asked for."""
        self.asked.append(asked)
        return self.counts

    async def usage_of_organization(self, *asked: Any) -> Mapping[int, Mapping[Outcome, int]]:
        """Takes note of what is asked for."""
        self.asked.append(asked)
        return self.counts

    async def reach(self, organization_id: str, after: str, count: int) -> tuple[datetime, str]:
        """Gives how far a test says."""
        self.asked.append((organization_id, after, count))
        return NOW, self.reached

    async def unused_keys(
        self, organization_id: str, after: str, until: str, since: datetime, count: int
    ) -> Sequence[Key]:
        """Gives the first of its keys."""
        self.asked.append((organization_id, after, until, since, count))
        return self.keys[:count]


def span(start: datetime | None, end: datetime | None, step: UsageStep = UsageStep.HOUR) -> UsageSpan:
    """Puts a span together."""
    return UsageSpan(start_time=start, end_time=end, step=step)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        pytest.param(span(None, None), TODAY - DAY + 4 * HOUR, TODAY + 3 * HOUR, id="last 24 hours"),
        pytest.param(span(None, None, UsageStep.DAY), TODAY - 29 * DAY, TODAY, id="last 30 days"),
        pytest.param(span(NOW, NOW + HOUR), TODAY + 3 * HOUR, TODAY + 4 * HOUR, id="begun steps are whole"),
        pytest.param(span(TODAY, TODAY + HOUR), TODAY, TODAY, id="the end is not within"),
        pytest.param(
            span(NOW, NOW + timedelta(microseconds=1)), TODAY + 3 * HOUR, TODAY + 3 * HOUR, id="a moment is its step"
        ),
        pytest.param(span(NOW - DAY, NOW, UsageStep.DAY), TODAY - DAY, TODAY, id="days from midnight"),
        pytest.param(span(NOW - 2 * HOUR, None), TODAY + HOUR, TODAY + 3 * HOUR, id="until now"),
        pytest.param(span(TODAY - 1000 * HOUR, TODAY), TODAY - 1000 * HOUR, TODAY - HOUR, id="the most hours"),
        pytest.param(span(TODAY - 366 * DAY, TODAY, UsageStep.DAY), TODAY - 366 * DAY, TODAY - DAY, id="the most days"),
        pytest.param(
            span(datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, 1, tzinfo=UTC)),
            datetime(1970, 1, 1, tzinfo=UTC),
            datetime(1970, 1, 1, tzinfo=UTC),
            id="the first hour",
        ),
    ],
)
async def test_steps(asked: UsageSpan, first: datetime, last: datetime) -> None:
    """Every step from the one in which the start lies to the one before which the end lies is there, in order, and the
    hours that are asked for are those.
    """
    store = MemoryUsage()
    buckets = await UsageReporter(store).get(READER, "", "", asked)
    step = timedelta(hours=asked.step.value)
    times = [bucket.start_time for bucket in buckets]
    assert (first, last) == (times[0], times[-1])
    assert {step} == {later - time for time, later in pairwise(times)} | {step}
    (organization_id, start_hour, end_hour, step_hours) = store.asked[0]
    assert "acme" == organization_id
    assert (first.timestamp(), (last + step).timestamp()) == (start_hour * 3600, end_hour * 3600)
    assert asked.step.value == step_hours
    assert [{Outcome.VALID: 2}, *[{}] * (len(buckets) - 1)] == [bucket.counts for bucket in buckets]
    assert {Outcome.VALID: 2} == total(buckets)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        pytest.param(span(NOW, NOW), "start_time", id="no time at all"),
        pytest.param(span(NOW + HOUR, NOW), "start_time", id="the wrong way round"),
        pytest.param(span(NOW + HOUR, None), "start_time", id="in the future"),
        pytest.param(span(TODAY - 1001 * HOUR, TODAY), "start_time", id="too many hours"),
        pytest.param(span(TODAY - 367 * DAY, TODAY, UsageStep.DAY), "start_time", id="too many days"),
        pytest.param(span(datetime(1, 1, 1, tzinfo=UTC), NOW), "start_time", id="since the year 1"),
        pytest.param(span(None, datetime(1, 1, 1, tzinfo=UTC)), "end_time", id="until the year 1"),
        pytest.param(
            span(datetime(1969, 12, 31, 23, tzinfo=UTC), datetime(1970, 1, 1, 1, tzinfo=UTC)),
            "start_time",
            id="before 1970",
        ),
    ],
)
async def test_spans_that_make_no_sense(asked: UsageSpan, field: str) -> None:
    """A span that is empty, too long or before any usage is refused, and the field to be changed is named."""
    store = MemoryUsage()
    with pytest.raises(InvalidFieldError) as caught:
        await UsageReporter(store).get(READER, "", "", asked)
    assert [field] == [each for each, _ in caught.value.violations]
    assert [] == store.asked


async def test_the_latest_span_that_a_time_can_name() -> None:
    """The end may be as late as a time can be: nothing was counted then."""
    end = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    buckets = await UsageReporter(MemoryUsage()).get(READER, "", "", span(None, end))
    assert datetime(9999, 12, 31, 23, tzinfo=UTC) == buckets[-1].start_time


async def test_whose_usage_is_told() -> None:
    """Keys and organizations of others are as if they were not there; root names an organization or a key."""
    usage = UsageReporter(MemoryUsage())
    last_day = span(None, None)
    rival = caller("*", organization_id="rival")
    with pytest.raises(PermissionMissingError):
        await usage.get(caller("keys:write"), "", "", last_day)
    with pytest.raises(KeyNotFoundError):
        await usage.get(rival, "", KEY.id, last_day)
    with pytest.raises(KeyNotFoundError):
        await usage.get(rival, "rival", KEY.id, last_day)
    with pytest.raises(OrganizationNotFoundError):
        await usage.get(rival, "acme", KEY.id, last_day)
    with pytest.raises(OrganizationNotFoundError):
        await usage.get(rival, "acme", "", last_day)
    with pytest.raises(InvalidFieldError):
        await usage.get(ROOT, "", "", last_day)
    with pytest.raises(KeyNotFoundError):
        await usage.get(ROOT, "rival", KEY.id, last_day)
    assert 24 == len(await usage.get(ROOT, "", KEY.id, last_day))
    assert 24 == len(await usage.get(ROOT, "acme", KEY.id, last_day))


async def test_organization_that_is_not_there() -> None:
    """Root is told of an organization that is not there; one without any usage is one with counts of nothing."""
    store = MemoryUsage()
    store.counts = {}
    with pytest.raises(OrganizationNotFoundError):
        await UsageReporter(store).get(ROOT, "nobody", "", span(None, None))
    assert {} == total(await UsageReporter(store).get(ROOT, "acme", "", span(None, None)))


@pytest.mark.parametrize(
    ("found", "reached", "expected"),
    [
        pytest.param(3, "", "b", id="more than a page"),
        pytest.param(3, "z", "b", id="more than a page, and more to be looked at"),
        pytest.param(2, "z", "z", id="more to be looked at"),
        pytest.param(2, "", "", id="the last"),
        pytest.param(0, "z", "z", id="none yet"),
        pytest.param(0, "", "", id="none at all"),
    ],
)
async def test_pages_of_unused_keys(found: int, reached: str, expected: str) -> None:
    """A page tells up to which key was looked: its own last if there are more, else how far was walked."""
    store = MemoryUsage()
    store.keys, store.reached = [replace(KEY, id=each) for each in "abc"[:found]], reached
    page = await UsageReporter(store).unused(READER, "", timedelta(days=7), "0", 2)
    assert (expected, ["a", "b"][:found]) == (page.reached, [key.id for key in page.keys])
    assert NOW - timedelta(days=7) == page.unused_since
    assert [("acme", "0", MAX_EXAMINED), ("acme", "0", reached, NOW - timedelta(days=7), 3)] == store.asked
