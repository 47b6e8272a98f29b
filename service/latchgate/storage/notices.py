"""What time brings about: keys that are about to expire, have expired, or were used for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from latchgate.domain.events import key_event
from latchgate.domain.model import Key
from latchgate.domain.outbox import EventType
from latchgate.domain.ports import IdMaker
from latchgate.storage import queries, queries_outbox, rows
from latchgate.storage.postgres import Database
from latchgate.storage.transaction import PostgresTransaction

SCAN_ROWS: Final = 1000
# Few: no answer is given while what is told of them is written, and whoever would change one of their keys waits.
PUBLISH_ROWS: Final = 50
# As many as are published before others of the work beside the calls get a turn.
PUBLISH_AT_ONCE: Final = 1000
# How often it is written down up to which expiry was looked, if there is nothing to note.
SCAN_PAUSE: Final = timedelta(seconds=30)

_EXPIRED: Final = "expired"
_FIRST_USED: Final = "first_used"


class Notices:
    """Finds what time has brought about, once over all workers, and publishes events of it."""

    def __init__(self, database: Database, make_id: IdMaker, days_before: Sequence[int]) -> None:
        """Takes the open database, and how many days before its expiry a key is told of."""
        self._database = database
        self._make_id = make_id
        self._leads = {_EXPIRED: timedelta(0)} | {f"expiring_{days}": timedelta(days=days) for days in days_before}
        self._has_begun = False

    async def work(self) -> int:
        """Notes what has come about, and publishes it; gives how many events."""
        if await self._may_be_due():
            await self.note()
        return await self.publish()

    async def _may_be_due(self) -> bool:
        """Says whether there is anything to note; one statement that writes nothing."""
        async with self._database.connection() as connection:
            is_due: bool = await connection.fetchval(
                queries_outbox.EXPIRY_DUE, list(self._leads), list(self._leads.values()), SCAN_PAUSE
            )
        return is_due

    async def publish(self) -> int:
        """Publishes what was noted and still holds; gives how many events."""
        async with self._database.connection() as connection:
            if not await connection.fetchval(queries_outbox.NOTICE_EXISTS):
                return 0
        published = 0
        for _ in range(0, PUBLISH_AT_ONCE, PUBLISH_ROWS):
            taken, told = await self._publish_batch()
            published += told
            if taken < PUBLISH_ROWS:
                break
        return published

    async def note(self) -> None:
        """Notes the keys whose expiry has come, or is about to."""
        async with self._database.connection() as connection:
            if not self._has_begun:
                for kind, lead in self._leads.items():
                    await connection.execute(queries_outbox.EXPIRY_SCAN_BEGIN, kind, lead)
                self._has_begun = True
            for kind, lead in self._leads.items():
                while await connection.fetchval(queries_outbox.EXPIRY_SCAN, kind, lead, SCAN_ROWS) == SCAN_ROWS:
                    pass

    async def _publish_batch(self) -> tuple[int, int]:
        """Publishes what some notices are about, as far as they still hold; gives how many notices and events.

        With the keys locked, as whoever changes one has it: the events of each are in their order.
        """
        async with self._database.transaction() as connection:
            notices = await connection.fetch(queries_outbox.NOTICE_TAKE, PUBLISH_ROWS)
            found = await connection.fetch(queries.KEY_GET_MANY, list({notice["key_id"] for notice in notices}))
            keys = {row["id"]: rows.key(row) for row in found}
            events = []
            for notice in notices:
                key = keys[notice["key_id"]]
                event_type = _event_type(key, notice["kind"], notice["expire_time"])
                if event_type:
                    events.append(key_event(self._make_id, event_type, key))
            await PostgresTransaction(connection).publish(*events)
        return len(notices), len(events)


def _event_type(key: Key, kind: str, expire_time: datetime) -> EventType | None:
    """Says what a notice is to be told as; None if the key has been changed so that it holds no more."""
    if kind == _FIRST_USED:
        return EventType.FIRST_USED
    if key.revoke_time is not None or key.expire_time != expire_time:
        return None
    if kind == _EXPIRED:
        return EventType.EXPIRED if key.is_expired else None
    return None if key.is_expired else EventType.EXPIRING
