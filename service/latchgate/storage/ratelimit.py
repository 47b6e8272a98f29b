"""The windows that all workers share, in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

from latchgate.domain.ports import RateAnswer, RateAsk, RateTold
from latchgate.domain.shares import WINDOW_SLOTS
from latchgate.storage import queries_rates
from latchgate.storage.link import Link
from latchgate.storage.postgres import Database

STATEMENT_TIMEOUT_S = 1.0
FORGET_ROWS = 5000

_SETTINGS = {
    # One plan for every number of keys, made once.
    "plan_cache_mode": "force_generic_plan",
    # A crash empties the table anyway.
    "synchronous_commit": "off",
    # A worker that was cut off does not hold rows for long.
    "statement_timeout": "800ms",
}


def rate_link(dsn: str) -> Link:
    """Makes the connection for rate limits: one of their own, so that nothing else has them wait."""
    return Link(dsn, timeout_s=STATEMENT_TIMEOUT_S, settings=_SETTINGS)


class PostgresRateStore:
    """Implements latchgate.domain.ports.RateStore. One call at a time."""

    def __init__(self, link: Link) -> None:
        """Takes the connection."""
        self._link = link

    async def exchange(self, asks: Sequence[RateAsk]) -> RateAnswer:
        """Sends one statement."""
        columns = list(zip(*asks, strict=True)) if asks else [()] * len(RateAsk._fields)
        async with self._link.connection() as connection:
            rows = await connection.fetch(queries_rates.RATE_EXCHANGE, *columns)
        told = {}
        for _, key_id, granted, slot, ages, costs, used, now_s in rows:
            if key_id is not None:
                # When the oldest slot leaves.
                leave_s = slot + WINDOW_SLOTS - now_s
                leaves = [(leave_s - age, cost) for age, cost in zip(ages, costs, strict=True)] if ages else ()
                told[key_id] = RateTold(granted, slot, used, leaves)
        return RateAnswer(rows[0]["workers"], told)

    def close(self) -> None:
        """Cuts the connection."""
        self._link.cut()


async def forget_windows(database: Database) -> None:
    """Removes the windows in which nothing is left."""
    async with database.connection() as connection:
        more = True
        while more:
            status: str = await connection.execute(queries_rates.RATE_FORGET, FORGET_ROWS)
            more = int(status.rsplit(maxsplit=1)[-1]) == FORGET_ROWS
