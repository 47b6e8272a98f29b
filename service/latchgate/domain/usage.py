"""How keys are used: what was answered about them, and which are not used any more. For those who may read keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Final

from latchgate.domain import access
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.model import Caller, Key, Outcome
from latchgate.domain.ports import UsageStore

# How many keys are looked at for one page of unused ones: some tenths of a second at most.
MAX_EXAMINED: Final = 20_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class UsageStep(Enum):
    """How much time a bucket covers. The value is in hours."""

    HOUR = 1
    DAY = 24


# How many steps are counted where no begin is named, and at most.
DEFAULT_STEPS: Final = {UsageStep.HOUR: 24, UsageStep.DAY: 30}
MAX_STEPS: Final = {UsageStep.HOUR: 1000, UsageStep.DAY: 366}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSpan:
    """From when until when to count, by which step. None: as `GetUsage` of the contract has it."""

    start_time: datetime | None
    end_time: datetime | None
    step: UsageStep


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageBucket:
    """What was counted in the step that begins at `start_time`; only outcomes that were."""

    start_time: datetime
    counts: Mapping[Outcome, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedKeys:
    """One page of unused keys, oldest first.

    `reached` is the id up to which keys were looked at; empty if there are no more. Of `keys` none was used since
    `unused_since`.
    """

    keys: Sequence[Key]
    reached: str
    unused_since: datetime


class UsageReporter:
    """Tells how keys are used."""

    def __init__(self, store: UsageStore) -> None:
        """Takes where counts and keys are kept."""
        self._store = store

    async def get(self, caller: Caller, organization_id: str, key_id: str, span: UsageSpan) -> Sequence[UsageBucket]:
        """Counts what was answered about an organization's keys, or with `key_id` about one: each step, oldest first.

        For a key that is named, its organization need not be.
        """
        access.require(caller, access.READ_KEYS)
        if organization_id or not key_id:
            organization_id = access.organization_for(caller, organization_id)
        if key_id:
            key = await self._store.get_key(key_id)
            is_of_another = key is not None and organization_id not in ("", key.organization_id)
            access.visible(caller, None if is_of_another else key, key_id)
        start_hour, end_hour = _hours(span, span.end_time or await self._store.now())
        hours = span.step.value
        if key_id:
            counted = await self._store.usage_of_key(key_id, start_hour, end_hour, hours)
        else:
            counted = await self._store.usage_of_organization(organization_id, start_hour, end_hour, hours)
            if not counted and await self._store.scopes(organization_id) is None:
                raise access.organization_not_found(organization_id)
        return [
            UsageBucket(start_time=_time(hour), counts=counted.get(number, {}))
            for number, hour in enumerate(range(start_hour, end_hour, hours))
        ]

    async def unused(
        self, caller: Caller, organization_id: str, unused: timedelta, after: str, count: int
    ) -> UnusedKeys:
        """Lists up to `count` keys beyond the id `after` that were made before, and not used for, as long as `unused`.

        Looks at so many keys at most, so that a page may be short, or empty, and yet not be the last.
        """
        access.require(caller, access.READ_KEYS)
        organization_id = access.organization_for(caller, organization_id)
        now, reach = await self._store.reach(organization_id, after, MAX_EXAMINED)
        since = now - unused
        keys = await self._store.unused_keys(organization_id, after, reach, since, count + 1)
        if not keys and await self._store.scopes(organization_id) is None:
            raise access.organization_not_found(organization_id)
        reached = keys[count - 1].id if len(keys) > count else reach
        return UnusedKeys(keys=keys[:count], reached=reached, unused_since=since)


def total(buckets: Sequence[UsageBucket]) -> Mapping[Outcome, int]:
    """Sums up buckets."""
    sums: Counter[Outcome] = Counter()
    for bucket in buckets:
        sums.update(bucket.counts)
    return sums


def _hours(span: UsageSpan, end_time: datetime) -> tuple[int, int]:
    """Gives the hours since 1970 from which and up to which to count, both at a step's begin.

    Raises InvalidFieldError.
    """
    start_time, step = span.start_time, timedelta(hours=span.step.value)
    named = "end_time" if start_time is None else "start_time"
    if start_time is not None and start_time >= end_time:
        raise InvalidFieldError([(named, "must be before end_time, or before now where that is absent")])
    # The step in which it lies, and the one after that in which it ends.
    end = -((_EPOCH - end_time) // step)
    start = end - DEFAULT_STEPS[span.step] if start_time is None else (start_time - _EPOCH) // step
    if start < 0:
        raise InvalidFieldError([(named, "must not reach back beyond 1970")])
    if end - start > MAX_STEPS[span.step]:
        raise InvalidFieldError(
            [(named, f"must leave at most {MAX_STEPS[span.step]} steps of one {span.step.name.lower()} to count")]
        )
    return start * span.step.value, end * span.step.value


def _time(hour: int) -> datetime:
    return _EPOCH + timedelta(hours=hour)
