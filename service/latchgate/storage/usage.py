"""How keys are used: gathered in memory and written in batches, never one write a call."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from math import ceil
from typing import Final
from uuid import UUID, uuid4
from weakref import ref

from latchgate.domain.model import NO_USES, KeyRecord, Outcome, Uses
from latchgate.storage import queries, queries_outbox, queries_usage
from latchgate.storage.postgres import Connection, Database

# Few, so that neither this process nor the database is long at one of them.
FLUSH_ROWS = 500
# What lies close together is written together; answers wait for the sorting.
SORTED_ROWS = 10_000
FORGET_ROWS = 5000
# How many secrets a flush writes, if there are as many, and over how many flushes more are spread: one that is used all
# the time is written less often then, and no moment has to bear all of it.
FLUSH_SECRETS: Final = 10_000
FLUSHES: Final = 6
# For as long is known how far a worker has written that is not heard of any more.
FLUSHES_KEPT = timedelta(days=7)
HOUR_S: Final = 3600.0

# How outcomes are stored: for good.
OUTCOME_NUMBERS: Final = {
    Outcome.VALID: 1,
    Outcome.REVOKED: 3,
    Outcome.INACTIVE: 4,
    Outcome.EXPIRED: 5,
    Outcome.ORGANIZATION_INACTIVE: 6,
    Outcome.PERMISSION_DENIED: 7,
    Outcome.ADDRESS_DENIED: 8,
    Outcome.RATE_LIMITED: 9,
}
_VALID_NUMBER: Final = OUTCOME_NUMBERS[Outcome.VALID]


class _Uses(Uses):
    """What was answered about one secret in one hour: how often VALID, when last, and how often what else."""

    __slots__ = ("organization_id", "record", "refused")

    def __init__(self, organization_id: str, until_s: float) -> None:
        super().__init__(until_s)
        self.organization_id = organization_id
        # Whose answers are counted here in place, for as long as memory holds it.
        self.record: ref[KeyRecord] | None = None
        self.refused: Counter[Outcome] | None = None

    def count(self, now_s: float) -> None:
        """Counts an answer of VALID."""
        self.valid += 1
        self.used_s = max(self.used_s, now_s)

    def close(self) -> None:
        """Has what comes from now on counted elsewhere. A record that is held for long does not hold this, too."""
        self.until_s = NO_USES.until_s
        record = self.record() if self.record is not None else None
        if record is not None:
            record.uses = NO_USES

    def counts(self) -> Sequence[tuple[int, int]]:
        """Gives pairs of an outcome's number and how often it was answered, by the number."""
        if self.refused is None:
            return ((_VALID_NUMBER, self.valid),)
        counts = [(OUTCOME_NUMBERS[outcome], count) for outcome, count in self.refused.items()]
        if self.valid:
            counts.append((_VALID_NUMBER, self.valid))
        return sorted(counts)


_Hour = dict[int, _Uses]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is written in one transaction: all of it or nothing, and never twice."""

    sequence: int
    hour: int
    uses: Sequence[tuple[int, _Uses]]
    """By secret, in their order."""


class UsageBuffer:
    """Implements UsageRecorder and UseRecorder of the domain's ports. A crash loses what came since the last flush.

    Counts can not be written twice as times can. So what is written is cut into parts with numbers, and a part leaves
    its number in its transaction. One of which it is not known whether it was written is sent again as it was, before
    all others, and does nothing if its number is there already.
    """

    def __init__(self, database: Database) -> None:
        """Takes where to write."""
        self._database = database
        self.incarnation: UUID = uuid4()
        self._sequence = 0
        # By hour since 1970, of which one is at hand for as long as times lie within it.
        self._hours: dict[int, _Hour] = {}
        self._uses: _Hour = {}
        self._begin_s = self._end_s = 0.0
        self._unwritten: _Part | None = None
        self._flushing = asyncio.Lock()
        # How many secrets were taken out to be written, and how many had come by each of the last flushes.
        self._taken = 0
        self._come: deque[int] = deque(maxlen=FLUSHES)

    @property
    def pending(self) -> int:
        """How many secrets have uses that are not written yet; of several hours, or tried before, as often as that."""
        unwritten = len(self._unwritten.uses) if self._unwritten else 0
        return unwritten + sum(map(len, tuple(self._hours.values())))

    def used(self, record: KeyRecord, now_s: float) -> Uses:
        """Takes note of an answer of VALID. Answers overtake each other, times do not go back.

        Gives what the next ones can be counted in.
        """
        uses = self._of(record.secret_id, record.organization_id, now_s)
        uses.count(now_s)
        uses.record = ref(record)
        return uses

    def used_secret(self, secret_id: int, organization_id: str, now_s: float) -> None:
        """Takes note of a use that was no answer of Validate, as `used` does."""
        self._of(secret_id, organization_id, now_s).count(now_s)

    def _of(self, secret_id: int, organization_id: str, now_s: float) -> _Uses:
        """Gives the uses of a secret in the hour in which a time lies."""
        if not self._begin_s <= now_s < self._end_s:
            self._turn(now_s)
        uses = self._uses.get(secret_id)
        if uses is None:
            uses = self._uses[secret_id] = _Uses(organization_id, self._end_s)
        return uses

    def refused(self, record: KeyRecord, outcome: Outcome, now_s: float) -> None:
        """Takes note of any other answer."""
        uses = self._of(record.secret_id, record.organization_id, now_s)
        if uses.refused is None:
            uses.refused = Counter()
        uses.refused[outcome] += 1

    def _turn(self, now_s: float) -> None:
        """Has the hour at hand in which a time lies."""
        hour = int(now_s // HOUR_S)
        self._uses = self._hours.setdefault(hour, {})
        self._begin_s = hour * HOUR_S
        self._end_s = self._begin_s + HOUR_S

    async def flush(self) -> None:
        """Writes what has gathered; of more than FLUSH_SECRETS secrets those that have waited for longest.

        All that has come is written by the sixth flush from then on (FLUSHES). What may not have been written is kept
        for the next time.
        """
        async with self._flushing:
            await self._write_unwritten()
            await self._write_oldest(self._due())

    async def finish(self) -> None:
        """Writes all that has gathered, as `flush` does: nothing comes any more."""
        async with self._flushing:
            await self._write_unwritten()
            await self._write_oldest(self.pending)

    def _due(self) -> int:
        """Says how many are to be written now, so that nothing is late, and no later flush has much more to write."""
        self._come.append(self._taken + self.pending)
        spare = FLUSHES - len(self._come)
        shares = (ceil((come - self._taken) / flushes) for flushes, come in enumerate(self._come, 1 + spare))
        return max(FLUSH_SECRETS, *shares)

    async def _write_oldest(self, count: int) -> None:
        for hour, gathered in tuple(self._hours.items()):
            oldest = list(islice(gathered, count))
            count -= len(oldest)
            for secret_ids in _batches(oldest):
                self._sequence += 1
                uses = [(secret_id, gathered.pop(secret_id)) for secret_id in secret_ids]
                self._taken += len(uses)
                for _, each in uses:
                    each.close()
                self._unwritten = _Part(sequence=self._sequence, hour=hour, uses=uses)
                await self._write_unwritten()
            if not gathered and gathered is not self._uses:
                del self._hours[hour]

    async def _write_unwritten(self) -> None:
        """Writes the part that was taken out, until it is known to be written."""
        part = self._unwritten
        if part is None:
            return
        async with self._database.transaction() as connection:
            # A crash of the server may lose the last moments' uses; waiting for the disk would be the higher price.
            await connection.execute("SET LOCAL synchronous_commit = off")
            is_new = await connection.fetchval(queries_usage.USAGE_FLUSH_MARK, self.incarnation, part.sequence)
            if is_new:
                await _write(connection, part)
        self._unwritten = None


def _batches(secret_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Gives ids in batches for a part each, in order; for many ids not in one order all over, which would take long."""
    for begin in range(0, len(secret_ids), SORTED_ROWS):
        run = sorted(secret_ids[begin : begin + SORTED_ROWS])
        for at in range(0, len(run), FLUSH_ROWS):
            yield run[at : at + FLUSH_ROWS]


async def _write(connection: Connection, part: _Part) -> None:
    """Writes a part: times, counts by secret, counts by organization, in the order in which everyone locks them."""
    used = [(secret_id, uses.used_s) for secret_id, uses in part.uses if uses.valid]
    if used:
        first = await connection.fetch(queries.LAST_USED_UPDATE, *_columns(used))
        if first:
            await connection.execute(queries_outbox.KEY_NOTE_FIRST_USED, [row["secret_id"] for row in first])
    by_secret: list[tuple[int, int, int]] = []
    sums: dict[tuple[str, int], int] = {}
    for secret_id, uses in part.uses:
        for outcome, count in uses.counts():
            by_secret.append((secret_id, outcome, count))
            summed = uses.organization_id, outcome
            sums[summed] = sums.get(summed, 0) + count
    by_organization = [(organization_id, outcome, count) for (organization_id, outcome), count in sorted(sums.items())]
    await connection.execute(queries_usage.USAGE_SECRET_ADD, part.hour, *_columns(by_secret))
    await connection.execute(queries_usage.USAGE_ORGANIZATION_ADD, part.hour, *_columns(by_organization))


def _columns(rows: Sequence[tuple[object, ...]]) -> list[Sequence[object]]:
    return list(zip(*rows, strict=True))


async def forget_usage(database: Database, kept: timedelta) -> None:
    """Removes counts of hours that are longer ago than `kept`, and what is known of workers that are long gone."""
    async with database.connection() as connection:
        for statement in (queries_usage.USAGE_SECRET_FORGET, queries_usage.USAGE_ORGANIZATION_FORGET):
            more = True
            while more:
                status: str = await connection.execute(statement, kept, FORGET_ROWS)
                more = int(status.rsplit(maxsplit=1)[-1]) == FORGET_ROWS
        await connection.execute(queries_usage.USAGE_FLUSH_FORGET, FLUSHES_KEPT)
