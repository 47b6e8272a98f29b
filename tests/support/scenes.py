"""A validator between ports that do as a test says: what it is asked, what it answers, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from latchgate.domain.cache import Entry, KeyCache
from latchgate.domain.errors import (
    LookupBudgetError,
    StorageUnavailableError,
)
from latchgate.domain.floods import ForeignLookupBudget, Patience
from latchgate.domain.model import (
    NO_PERMITS,
    NO_USES,
    Environment,
    Judgement,
    KeyRecord,
    KeyType,
    Lookup,
    Outcome,
    Permits,
    RateState,
    Uses,
    Verdict,
)
from latchgate.domain.suspicion import SuspicionCounter
from latchgate.domain.token import TokenFormat, digest
from latchgate.domain.validation import Need, Validator, fingerprint
from support.records import KEY_RECORD, NOW_S, ManualClock, bound_to, granting

REVISION = 42

TOKENS = TokenFormat(bytes(range(32)))

TOKEN = TOKENS.mint(KeyType.SECRET, Environment.LIVE).token

FOREIGN_TOKEN = "sk_live_51H8xYzKq2mN4pR6sT8uV0wX"

ORDER = (
    Outcome.NOT_FOUND,
    Outcome.REVOKED,
    Outcome.EXPIRED,
    Outcome.INACTIVE,
    Outcome.ORGANIZATION_INACTIVE,
    Outcome.ADDRESS_DENIED,
    Outcome.PERMISSION_DENIED,
    Outcome.RATE_LIMITED,
)

# A request that RECORD is good for.
RECORD = replace(bound_to(granting(KEY_RECORD, "orders:read"), "192.0.2.0/24"), rate_limit_per_minute=60)

CLIENT_IP = "192.0.2.1"

NEEDED = ("orders:read",)

AFFLICTIONS: dict[Outcome, Callable[[KeyRecord], KeyRecord]] = {
    Outcome.REVOKED: lambda record: replace(record, revoked=True),
    Outcome.EXPIRED: lambda record: replace(record, expire_s=NOW_S),
    Outcome.INACTIVE: lambda record: replace(record, active=False),
    Outcome.ORGANIZATION_INACTIVE: lambda record: replace(record, organization_active=False),
    Outcome.ADDRESS_DENIED: lambda record: bound_to(record, "198.51.100.0/24"),
    Outcome.PERMISSION_DENIED: lambda record: granting(record, "orders:write"),
}
"""What makes an outcome hold of a record. The two others are not up to the record."""


class MemoryReader:
    """Finds records in memory, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.records: dict[bytes, KeyRecord] = {}
        self.asked: list[bytes] = []
        self.now_s = NOW_S
        self.revision = REVISION
        self.failure: StorageUnavailableError | None = None

    async def find(self, digest: bytes) -> Lookup:
        """Answers at once."""
        self.asked.append(digest)
        if self.failure:
            raise self.failure
        return Lookup(self.records.get(digest), self.now_s, self.revision)


class ScriptedLimiter:
    """Answers as it is told, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.allowed = True
        # How often it can not say, and what is waited for then.
        self.hesitations = 0
        self.waited: list[tuple[str, int, int]] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.given: dict[str, Permits] = {}

    async def wait(self, key_id: str, limit: int, cost: int) -> None:
        """Comes back when what happens meanwhile has happened."""
        self.waited.append((key_id, limit, cost))
        self.meanwhile()

    def take(self, key_id: str, limit: int, cost: int) -> RateState | None:
        """Answers with a state of the scripted kind."""
        if self.hesitations:
            self.hesitations -= 1
            return None
        self.asked.append((key_id, limit, cost))
        return RateState(allowed=self.allowed, limit=limit, remaining=3, reset_after_s=4)

    def permits(self, key_id: str) -> Permits:
        """Gives what it was told of the key, if anything; else all requests are counted here."""
        return self.given.get(key_id, NO_PERMITS)


class MemoryUsage:
    """Keeps what is recorded: uses, and refusals."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, float]] = []
        self.refusals: list[tuple[int, Outcome, float]] = []
        # What is to be counted in after each use that is recorded here.
        self.given = NO_USES

    def used(self, record: KeyRecord, now_s: float) -> Uses:
        """Takes note."""
        self.recorded.append((record.secret_id, now_s))
        return self.given

    def refused(self, record: KeyRecord, outcome: Outcome, now_s: float) -> None:
        """Takes note."""
        self.refusals.append((record.secret_id, outcome, now_s))


class Ahead(float):
    """What is added to a worker's time for the database's: whatever the worker's is, the sum is the same."""

    def __new__(cls, sum_s: float) -> Self:
        """Takes the sum."""
        made = super().__new__(cls)
        made.sum_s = sum_s
        return made

    sum_s: float

    def __radd__(self, _local_s: float) -> float:
        """Gives it."""
        return self.sum_s


class ScriptedEntries(dict[bytes, Entry]):
    """Has the same for whatever is asked for, and remembers what that was."""

    def __init__(self) -> None:
        super().__init__()
        self.record: KeyRecord | None = None
        self.asked: list[bytes] = []

    def get(self, fingerprint: bytes, _default: object = None) -> Any:
        """Gives it, fresh each time."""
        self.asked.append(fingerprint)
        if self.record is None:
            return None
        cache = KeyCache(1)
        cache.put(fingerprint, self.record, float("inf"))
        return cache.entries[fingerprint]


class ScriptedMemory:
    """Knows nothing until it is told what to answer; remembers what it was to keep, and when that was sent."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.entries = ScriptedEntries()
        self.hits = 0
        self.ahead_s: float = 0.0
        self.asked: list[tuple[bytes, int]] = []
        self.kept: list[tuple[bytes, Lookup, float]] = []
        self.kept_unknown: list[tuple[bytes, Lookup, float]] = []
        self.known = None

    @property
    def known(self) -> Lookup | None:
        """What it answers."""
        return self._known

    @known.setter
    def known(self, known: Lookup | None) -> None:
        """Tells it."""
        self._known = known
        self.lease_until_s = float("inf") if known else float("-inf")
        self.entries.record, self.ahead_s, self.applied_revision = (
            (known.record, Ahead(known.now_s), known.revision) if known else (None, Ahead(0), 0)
        )

    def now_s(self) -> float:
        """Tells the scene's time."""
        return self.clock()

    def find(self, fingerprint: bytes, min_revision: int) -> Lookup | None:
        """Gives what it was told, if there is anything."""
        self.asked.append((fingerprint, min_revision))
        return self.known

    def keep(self, fingerprint: bytes, lookup: Lookup, *, sent_s: float) -> None:
        """Takes note."""
        self.kept.append((fingerprint, lookup, sent_s))

    def keep_unknown(self, fingerprint: bytes, lookup: Lookup, *, sent_s: float) -> None:
        """Takes note."""
        self.kept_unknown.append((fingerprint, lookup, sent_s))


def recall(validator: Validator, need: Need) -> Judgement | None:
    """Has a validator judge TOKEN from memory now."""
    return validator.recall(TOKEN.encode(), need, validator.clock())


class Scene:
    """A validator and the ports that it was given."""

    def __init__(self, *, per_second: float = 2, remembered: int = 10) -> None:
        self.clock = ManualClock()
        self.reader = MemoryReader()
        self.limiter = ScriptedLimiter()
        self.usage = MemoryUsage()
        self.foreign = ForeignLookupBudget(self.clock, per_second, remembered)
        self.slept_s: list[float] = []
        self.drawn = 0
        self.memory = ScriptedMemory(self.clock)
        self.suspicion = SuspicionCounter(self.clock)
        self.validator = Validator(
            tokens=TOKENS,
            keys=self.reader,
            memory=self.memory,
            limiter=self.limiter,
            usage=self.usage,
            foreign=self.foreign,
            patience=Patience(self.clock, self._sleep, per_second=3, delay_s=0.1, draw=self._draw),
            suspicion=self.suspicion,
        )

    async def _sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)

    def _draw(self, least_s: float, most_s: float) -> float:
        """Draws the middle, and the ends in turn."""
        self.drawn += 1
        return (least_s, (least_s + most_s) / 2, most_s)[self.drawn % 3]

    def put(self, record: KeyRecord, token: str = TOKEN) -> None:
        """Makes a token one of a key."""
        self.reader.records[digest(token)] = record

    async def validate(self, token: str = TOKEN) -> Verdict:
        """Validates the request that RECORD is good for."""
        return await self.validator.validate(token, required_permissions=NEEDED, client_ip=CLIENT_IP)

    async def is_looked_up(self, token: str) -> bool:
        """Validates a token, and says whether it came as far as the reader."""
        asked = len(self.reader.asked)
        try:
            await self.validator.validate(token)
        except LookupBudgetError:
            assert asked == len(self.reader.asked)
            return False
        return asked + 1 == len(self.reader.asked)

    async def use_up_budget(self) -> None:
        """Validates invented foreign tokens until no more are looked up."""
        passed = [number for number in range(1000, 1010) if await self.is_looked_up(invented(number))]
        assert len(passed) < 10, "the budget knows no bounds"


def scene_of(record: KeyRecord = RECORD) -> Scene:
    """Sets a scene with one key."""
    scene = Scene()
    scene.put(record)
    return scene


def scene_with(*outcomes: Outcome) -> Scene:
    """Sets a scene of which all these outcomes hold."""
    scene = Scene()
    record = RECORD
    for outcome in AFFLICTIONS.keys() & set(outcomes):
        record = AFFLICTIONS[outcome](record)
    if Outcome.NOT_FOUND not in outcomes:
        scene.put(record)
    scene.limiter.allowed = Outcome.RATE_LIMITED not in outcomes
    return scene


def known_by(token: str) -> bytes:
    """Gives what memory knows a token by."""
    return fingerprint(token.encode())


def invented(number: int) -> str:
    """Makes up a foreign token."""
    return f"made-up-token-{number:08}"
