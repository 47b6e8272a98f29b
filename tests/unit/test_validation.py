"""Validation: a token and what a request needs become a verdict."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latchgate.domain.allotments import Allotments
from latchgate.domain.cache import Entry, KeyCache
from latchgate.domain.coherence import MAX_AGE_S, Change, Coherence, Entity, LeaseTerms, LogReading
from latchgate.domain.errors import (
    InvalidFieldError,
    LookupBudgetError,
    RevisionUnknownError,
    StorageUnavailableError,
)
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
from latchgate.domain.rules import normal_cidrs
from latchgate.domain.shares import WINDOW_SLOTS
from latchgate.domain.suspicion import Suspect, SuspicionCounter
from latchgate.domain.token import TokenFormat, digest
from latchgate.domain.validation import ForeignLookupBudget, Need, Patience, Validator, fingerprint
from support.limits import CountingAlone
from support.records import INSTANT_S, KEY_RECORD, NOW_S, ManualClock, bound_to, granting

CONTRACT = Path(__file__).parents[2] / "protos/apikeys/v1/key_service.proto"
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
NAMELESS = ORDER[:5]
"""Outcomes that do not say whose key it is."""

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


def test_order_is_the_documented_one() -> None:
    """The contract tells callers in which order the checks are made; the tests below hold the service to that order."""
    comment = " ".join(line.strip(" /") for line in CONTRACT.read_text().splitlines() if line.startswith("//"))
    documented = re.search(r"Checked in the order ([A-Z_, ]+);", comment)
    assert documented is not None
    assert ", ".join(outcome.name for outcome in ORDER) == documented[1]


async def test_valid() -> None:
    """A good token is answered with everything that a gateway may want to know."""
    verdict = await scene_of().validate()
    rate = RateState(allowed=True, limit=60, remaining=3, reset_after_s=4)
    assert Verdict(outcome=Outcome.VALID, revision=REVISION, now_s=NOW_S, record=RECORD, rate=rate) == verdict


@pytest.mark.parametrize(
    "outcomes",
    [each for count in range(1, len(ORDER) + 1) for each in combinations(ORDER, count)],
    ids=lambda outcomes: "+".join(outcome.value for outcome in outcomes),
)
async def test_the_first_reason_in_order_is_the_answer(outcomes: tuple[Outcome, ...]) -> None:
    """Of all the reasons to refuse a token, the first in the documented order is given."""
    verdict = await scene_with(*outcomes).validate()
    assert outcomes[0] is verdict.outcome


@pytest.mark.parametrize("outcome", NAMELESS)
async def test_nameless_outcomes(outcome: Outcome) -> None:
    """Whoever holds a token that is no longer good does not learn from it whose it was."""
    verdict = await scene_with(outcome).validate()
    assert Verdict(outcome=outcome, revision=REVISION) == verdict


@pytest.mark.parametrize("outcome", [each for each in ORDER if each not in NAMELESS])
async def test_outcomes_with_identity(outcome: Outcome) -> None:
    """Where the token is good and the request is not, the gateway is told whose key it is, for its own records."""
    verdict = await scene_with(outcome).validate()
    assert (NOW_S, RECORD.key_id, RECORD.shown) == (
        verdict.now_s,
        verdict.record and verdict.record.key_id,
        verdict.record and verdict.record.shown,
    )


@pytest.mark.parametrize("outcome", ORDER)
async def test_refused_calls_leave_no_use(outcome: Outcome) -> None:
    """Being refused is no use of a key: an attacker's attempts do not hide that a key lies idle."""
    scene = scene_with(outcome)
    await scene.validate()
    assert [] == scene.usage.recorded


@pytest.mark.parametrize("outcome", ORDER)
async def test_refusals_are_counted(outcome: Outcome) -> None:
    """A refusal is taken note of once, with the outcome that was answered, where it is known whose token it was."""
    scene = scene_with(outcome)
    await scene.validate()
    expected = [] if outcome is Outcome.NOT_FOUND else [(RECORD.secret_id, outcome, NOW_S)]
    assert expected == scene.usage.refusals


async def test_what_is_hidden_from_a_caller_is_not_counted() -> None:
    """Whoever may not know of a token, and is told that there is none, leaves no trace in its usage."""
    scene = scene_of()
    verdict = await scene.validator.validate(TOKEN, only_organization_id="another")
    assert Outcome.NOT_FOUND is verdict.outcome
    assert ([], []) == (scene.usage.recorded, scene.usage.refusals)


@pytest.mark.parametrize("outcome", [each for each in ORDER if each is not Outcome.RATE_LIMITED])
async def test_refused_calls_are_not_charged(outcome: Outcome) -> None:
    """What is refused for any other reason never reaches the limiter: it can not use up a key's limit."""
    scene = scene_with(outcome)
    await scene.validate()
    assert [] == scene.limiter.asked


async def test_use_is_recorded_once() -> None:
    """A valid call is one use of its secret, at the database's time, and no refusal."""
    scene = scene_of()
    await scene.validate()
    assert [(RECORD.secret_id, NOW_S)] == scene.usage.recorded
    assert [] == scene.usage.refusals


async def test_limiter_is_asked_for_the_keys_limit() -> None:
    """A call is charged once, to the key, and so to all its tokens together, with the cost that it named."""
    scene = scene_of()
    await scene.validator.validate(TOKEN, required_permissions=NEEDED, client_ip=CLIENT_IP, cost=5)
    assert [(RECORD.key_id, 60, 5)] == scene.limiter.asked


async def test_default_cost_is_1() -> None:
    """A call that names no cost counts for one request."""
    scene = scene_of()
    await scene.validate()
    assert [(RECORD.key_id, 60, 1)] == scene.limiter.asked


async def test_keys_without_limit() -> None:
    """A key without a limit is not counted at all, and its answer holds no limit."""
    scene = scene_of(replace(RECORD, rate_limit_per_minute=0))
    scene.limiter.allowed = False
    verdict = await scene.validate()
    assert (Outcome.VALID, None) == (verdict.outcome, verdict.rate)
    assert [] == scene.limiter.asked


async def test_rate_limited_says_when_to_come_back() -> None:
    """A refusal for the rate carries the state of the limit."""
    verdict = await scene_with(Outcome.RATE_LIMITED).validate()
    assert RateState(allowed=False, limit=60, remaining=3, reset_after_s=4) == verdict.rate


async def test_waiting_for_the_limiter() -> None:
    """Where the limiter can not say, it is waited for and asked again, as often as it takes; the call counts once."""
    scene = scene_of()
    scene.limiter.hesitations = 2
    verdict = await scene.validator.validate(TOKEN, required_permissions=NEEDED, client_ip=CLIENT_IP, cost=5)
    assert Outcome.VALID is verdict.outcome
    assert [(RECORD.key_id, 60, 5)] * 2 == scene.limiter.waited
    assert [(RECORD.key_id, 60, 5)] == scene.limiter.asked
    assert [(RECORD.secret_id, NOW_S)] == scene.usage.recorded


@pytest.mark.parametrize("outcome", AFFLICTIONS)
async def test_keys_that_change_while_the_limiter_is_waited_for(outcome: Outcome) -> None:
    """A key that is ended or restricted while its call waits for the limiter is judged as it is then, from what memory
    or the database says then; and the call that is refused is not charged.
    """
    for is_in_memory in (False, True):
        scene = scene_of()
        scene.limiter.hesitations = 1
        scene.memory.known = Lookup(RECORD, NOW_S, REVISION) if is_in_memory else None

        def change(scene: Scene = scene) -> None:
            scene.memory.known = None
            scene.put(AFFLICTIONS[outcome](RECORD))

        scene.limiter.meanwhile = change
        assert outcome is (await scene.validate()).outcome
        assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


def test_nothing_is_recalled_that_the_limiter_can_not_say() -> None:
    """Memory that lacks what the limiter has to ask for is not taken for a yes, nor for a no."""
    scene = Scene()
    scene.memory.known = Lookup(RECORD, NOW_S, REVISION)
    scene.limiter.hesitations = 1
    assert recall(scene.validator, Need.of(NEEDED, CLIENT_IP, 1, 0)) is None
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("outcome", Outcome)
async def test_what_is_suspicious(outcome: Outcome) -> None:
    """Tokens that nobody has, that are revoked, or that come from where they may not, are counted by who sends them,
    with the key where there is one; nothing else is.
    """
    scene = scene_of() if outcome is Outcome.VALID else scene_with(outcome)
    address = "192.0.2.1" if outcome is Outcome.ADDRESS_DENIED else CLIENT_IP
    for _ in range(2):
        await scene.validator.validate(TOKEN, required_permissions=NEEDED, client_ip=address)
    whose = {
        Outcome.NOT_FOUND: ("", ""),
        Outcome.REVOKED: (RECORD.organization_id, RECORD.key_id),
        Outcome.ADDRESS_DENIED: (RECORD.organization_id, RECORD.key_id),
    }
    expected = [(Suspect(address, outcome, *whose[outcome]), 2)] if outcome in whose else []
    assert expected == scene.suspicion.take()


async def test_unknown_tokens_beyond_the_budget_are_suspicious() -> None:
    """Tokens that are not even looked up any more are counted as those that are."""
    scene = Scene()
    for number in range(5):
        await scene.is_looked_up(invented(number))
    assert [(Suspect("", Outcome.NOT_FOUND, "", ""), 5)] == scene.suspicion.take()


async def test_with_the_real_limiter() -> None:
    """A key is good for its limit a minute, and is so again when the time has come that it was told."""
    clock = ManualClock()
    scene = scene_of(replace(KEY_RECORD, rate_limit_per_minute=3))
    validator = Validator(
        tokens=TOKENS,
        keys=scene.reader,
        memory=scene.memory,
        limiter=CountingAlone(clock),
        usage=scene.usage,
        foreign=ForeignLookupBudget(clock),
        patience=Patience(clock),
        suspicion=SuspicionCounter(clock),
    )
    verdicts = [await validator.validate(TOKEN) for _ in range(4)]
    assert [Outcome.VALID] * 3 + [Outcome.RATE_LIMITED] == [verdict.outcome for verdict in verdicts]
    assert [2, 1, 0, 0] == [verdict.rate and verdict.rate.remaining for verdict in verdicts]
    assert verdicts[3].rate is not None
    clock.advance(verdicts[3].rate.reset_after_s)
    assert Outcome.VALID is (await validator.validate(TOKEN)).outcome
    assert 4 == len(scene.usage.recorded)


@pytest.mark.parametrize(
    ("ahead_s", "outcome"),
    [(-INSTANT_S, Outcome.EXPIRED), (0.0, Outcome.EXPIRED), (INSTANT_S, Outcome.VALID)],
)
async def test_expiry_boundary(ahead_s: float, outcome: Outcome) -> None:
    """A key is refused from the very instant of its expiry on, by the database's clock."""
    verdict = await scene_of(replace(RECORD, expire_s=NOW_S + ahead_s)).validate()
    assert outcome is verdict.outcome


@pytest.mark.parametrize(
    ("ahead_s", "outcome"),
    [(-INSTANT_S, Outcome.REVOKED), (0.0, Outcome.REVOKED), (INSTANT_S, Outcome.VALID)],
)
async def test_end_of_a_rotated_token(ahead_s: float, outcome: Outcome) -> None:
    """A token that a rotation replaced is refused from the very instant of its end on; before, it is good."""
    verdict = await scene_of(replace(RECORD, secret_end_s=NOW_S + ahead_s)).validate()
    assert outcome is verdict.outcome


async def test_a_rotated_token_of_an_expired_key_is_revoked() -> None:
    """A replaced token is answered as such, also when its key has expired since."""
    verdict = await scene_of(replace(RECORD, secret_end_s=NOW_S, expire_s=NOW_S, active=False)).validate()
    assert Outcome.REVOKED is verdict.outcome


@pytest.mark.parametrize(
    ("needed", "outcome"),
    [
        ((), Outcome.VALID),
        (("orders:read",), Outcome.VALID),
        (("orders:read", "invoices:write:all"), Outcome.VALID),
        (("orders:read", "orders:write"), Outcome.PERMISSION_DENIED),
        (("orders:write", "orders:read"), Outcome.PERMISSION_DENIED),
        (("invoices",), Outcome.PERMISSION_DENIED),
        (("*",), Outcome.PERMISSION_DENIED),
    ],
)
async def test_all_permissions_are_required(needed: tuple[str, ...], outcome: Outcome) -> None:
    """A request needs all of its permissions, and one that needs none is good for any key."""
    scene = scene_of(granting(KEY_RECORD, "orders:read", "invoices:*"))
    assert outcome is (await scene.validator.validate(TOKEN, required_permissions=needed)).outcome


@pytest.mark.parametrize(
    ("cidrs", "client_ip", "outcome"),
    [
        (("192.0.2.0/24",), "192.0.2.255", Outcome.VALID),
        (("192.0.2.0/24",), "192.0.3.0", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24", "198.51.100.7/32"), "198.51.100.7", Outcome.VALID),
        (("192.0.2.0/24", "198.51.100.7/32"), "198.51.100.8", Outcome.ADDRESS_DENIED),
        (("2001:db8::/32",), "2001:db8:ffff::1", Outcome.VALID),
        (("2001:db8::/32",), "2001:db9::1", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24",), "::ffff:192.0.2.1", Outcome.VALID),
        (("192.0.2.0/24",), "::ffff:c000:201", Outcome.VALID),
        (("192.0.2.0/24",), "::ffff:192.0.3.1", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24",), "::192.0.2.1", Outcome.ADDRESS_DENIED),
        (("0.0.0.0/0",), "2001:db8::1", Outcome.ADDRESS_DENIED),
        (("::/0",), "192.0.2.1", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24",), "", Outcome.ADDRESS_DENIED),
        (("0.0.0.0/0", "::/0"), "", Outcome.ADDRESS_DENIED),
        ((), "", Outcome.VALID),
        ((), "203.0.113.9", Outcome.VALID),
    ],
)
async def test_networks(cidrs: tuple[str, ...], client_ip: str, outcome: Outcome) -> None:
    """A key that is bound to networks is good within them alone; IPv4 that comes mapped into IPv6 is IPv4."""
    scene = scene_of(bound_to(KEY_RECORD, *cidrs))
    assert outcome is (await scene.validator.validate(TOKEN, client_ip=client_ip)).outcome


@st.composite
def networks_and_members(draw: st.DrawFn) -> tuple[IPv4Network | IPv6Network, str]:
    """Draws a network and an address in it, but for mapped IPv4 in an IPv6 network that is wider than all of IPv4."""
    member = draw(st.ip_addresses())
    mapped = isinstance(member, IPv6Address) and member.ipv4_mapped is not None
    shortest = 96 if mapped else 0
    return ip_network((member, draw(st.integers(shortest, member.max_prefixlen))), strict=False), str(member)


@given(drawn=networks_and_members())
@example(drawn=(ip_network("::ffff:192.0.2.0/120"), "::ffff:192.0.2.7"))
async def test_every_address_of_a_network_is_within(drawn: tuple[IPv4Network | IPv6Network, str]) -> None:
    """A network that a key was given admits all of its addresses, in the form in which it is stored."""
    network, member = drawn
    scene = scene_of(bound_to(KEY_RECORD, *normal_cidrs([str(network)])))
    assert Outcome.VALID is (await scene.validator.validate(TOKEN, client_ip=member)).outcome


MALFORMED_IPS = ["192.0.2.1:443", "192.0.2.0/24", "[2001:db8::1]", "localhost", "192.0.2.01", " 192.0.2.1", "\0"]


@pytest.mark.parametrize("client_ip", MALFORMED_IPS, ids=ascii)
async def test_malformed_address_of_a_bound_key(client_ip: str) -> None:
    """Where the address decides and can not be read, the caller is told of its mistake, and nothing is charged."""
    scene = scene_of()
    with pytest.raises(InvalidFieldError) as caught:
        await scene.validator.validate(TOKEN, client_ip=client_ip)
    assert ["client_ip"] == [field for field, _ in caught.value.violations]
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("client_ip", MALFORMED_IPS, ids=ascii)
async def test_malformed_address_elsewhere(client_ip: str) -> None:
    """Where the address decides nothing, its form does not matter: the token is judged all the same."""
    free = scene_of(KEY_RECORD)
    assert Outcome.VALID is (await free.validator.validate(TOKEN, client_ip=client_ip)).outcome
    revoked = scene_with(Outcome.REVOKED)
    assert Outcome.REVOKED is (await revoked.validator.validate(TOKEN, client_ip=client_ip)).outcome


@pytest.mark.parametrize(
    "token",
    ["", "x", "\0" * 43, f"Bearer {TOKEN}", f"{TOKEN} ", TOKEN[:-1] + "-\n", "\N{KELVIN SIGN}" * 43, "a" * 1_000_000],
    ids=["empty", "short", "NUL", "with scheme", "blank", "newline", "look-alike", "huge"],
)
async def test_impossible_tokens_never_reach_the_reader(token: str) -> None:
    """A flood of what can not be a token costs no lookup, and is simply not found."""
    scene = Scene(per_second=0)
    assert Verdict(outcome=Outcome.NOT_FOUND, revision=0) == await scene.validator.validate(token)
    assert [] == scene.reader.asked


async def test_invented_tokens_of_our_form_never_reach_the_reader() -> None:
    """A flood of tokens with our prefix and wrong tags costs no lookup and none of the budget for foreign tokens."""
    scene = Scene()
    scene.put(KEY_RECORD, FOREIGN_TOKEN)
    stranger = TokenFormat(bytes(32))
    for _ in range(200):
        token = stranger.mint(KeyType.SECRET, Environment.LIVE).token
        assert Outcome.NOT_FOUND is (await scene.validator.validate(token)).outcome
    assert [] == scene.reader.asked
    assert Outcome.VALID is (await scene.validator.validate(FOREIGN_TOKEN)).outcome


async def test_tokens_are_looked_up_by_digest() -> None:
    """The reader is asked once, and never sees the token itself."""
    scene = scene_of()
    await scene.validate()
    assert [digest(TOKEN)] == scene.reader.asked


async def test_storage_failures_are_no_outcome() -> None:
    """When storage does not answer, neither is the token refused nor let through: the caller hears an error."""
    scene = scene_of()
    scene.reader.failure = StorageUnavailableError("the database does not answer")
    with pytest.raises(StorageUnavailableError):
        await scene.validate()
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


async def test_foreign_tokens_are_judged_alike() -> None:
    """An imported token is as good as a minted one."""
    scene = Scene()
    scene.put(RECORD, FOREIGN_TOKEN)
    assert (await scene_of().validate()) == await scene.validate(FOREIGN_TOKEN)


async def test_invented_foreign_tokens_are_budgeted() -> None:
    """Beyond the budget, unknown foreign tokens are an error, for one may be real; operators see how many."""
    scene = Scene(per_second=2)
    assert [True, True, False, False] == [await scene.is_looked_up(invented(number)) for number in range(4)]
    with pytest.raises(LookupBudgetError):
        await scene.validator.validate(invented(4))
    assert 3 == scene.foreign.refused


async def test_floods_do_not_starve_known_foreign_tokens() -> None:
    """While invented tokens use up the budget, imported ones that are in use are answered as ever."""
    scene = Scene(per_second=2)
    scene.put(KEY_RECORD, FOREIGN_TOKEN)
    assert await scene.is_looked_up(FOREIGN_TOKEN)
    for number in range(1000):
        await scene.is_looked_up(invented(number))
        assert Outcome.VALID is (await scene.validator.validate(FOREIGN_TOKEN)).outcome


async def test_floods_do_not_evict_known_foreign_tokens() -> None:
    """However many invented tokens are looked up in vain, an imported one keeps its place."""
    scene = Scene(per_second=2, remembered=3)
    scene.put(KEY_RECORD, FOREIGN_TOKEN)
    assert await scene.is_looked_up(FOREIGN_TOKEN)
    for number in range(100):
        scene.clock.advance(1)
        assert await scene.is_looked_up(invented(number))
    await scene.use_up_budget()
    assert await scene.is_looked_up(FOREIGN_TOKEN)


async def test_floods_do_not_touch_minted_tokens() -> None:
    """While the budget for foreign tokens is used up, minted tokens are answered as ever."""
    scene = Scene(per_second=0)
    scene.put(RECORD)
    assert not await scene.is_looked_up(FOREIGN_TOKEN)
    assert Outcome.VALID is (await scene.validate()).outcome


async def test_budget_comes_back() -> None:
    """The budget fills up evenly, and an idle time saves up no more than one second's worth."""
    scene = Scene(per_second=2)
    await scene.use_up_budget()
    scene.clock.advance(0.5)
    assert [True, False] == [await scene.is_looked_up(invented(number)) for number in range(2)]
    scene.clock.advance(3600)
    assert [True, True, False] == [await scene.is_looked_up(invented(number)) for number in range(3)]


@given(
    per_second=st.integers(1, 5),
    # Eighths of a second, so that the budget's sums are exact.
    gaps=st.lists(st.integers(0, 20).map(lambda eighths: eighths / 8), max_size=60),
)
def test_budget_bounds_every_span(per_second: int, gaps: list[float]) -> None:
    """In no span of time are more unknown tokens looked up than the rate allows, and one second's worth saved up."""
    clock = ManualClock()
    budget = ForeignLookupBudget(clock, per_second)
    passed = []
    for number, gap in enumerate(gaps):
        clock.advance(gap)
        if budget.spend(digest(invented(number))):
            passed.append(clock.now_s)
    for first, start in enumerate(passed):
        for last in range(first, len(passed)):
            assert (passed[last] - start + 1) * per_second >= last - first + 1


async def test_lost_foreign_tokens_lose_their_place() -> None:
    """A foreign token that is found no more is again one of the unknown ones, which share the budget."""
    scene = Scene(per_second=2)
    scene.put(KEY_RECORD, FOREIGN_TOKEN)
    assert await scene.is_looked_up(FOREIGN_TOKEN)
    scene.reader.records.clear()
    assert await scene.is_looked_up(FOREIGN_TOKEN)
    await scene.use_up_budget()
    assert not await scene.is_looked_up(FOREIGN_TOKEN)


async def test_failed_lookups_forget_nothing() -> None:
    """A database that is away for a while does not make known foreign tokens unknown."""
    scene = Scene(per_second=1)
    scene.put(KEY_RECORD, FOREIGN_TOKEN)
    assert await scene.is_looked_up(FOREIGN_TOKEN)
    scene.reader.failure = StorageUnavailableError("the database does not answer")
    with pytest.raises(StorageUnavailableError):
        await scene.validator.validate(FOREIGN_TOKEN)
    scene.reader.failure = None
    assert not await scene.is_looked_up(invented(0))
    assert await scene.is_looked_up(FOREIGN_TOKEN)


async def test_known_foreign_tokens_are_bounded() -> None:
    """Memory is bounded: of the known foreign tokens, the one that was unused for the longest is forgotten first."""
    scene = Scene(per_second=3, remembered=2)
    first, second, third = tokens = [invented(number) for number in range(3)]
    for token in tokens:
        scene.put(KEY_RECORD, token)
    assert await scene.is_looked_up(first)
    assert await scene.is_looked_up(second)
    assert await scene.is_looked_up(first)
    assert await scene.is_looked_up(third)
    assert [True, False, True] == [await scene.is_looked_up(token) for token in tokens]


@pytest.mark.parametrize("min_revision", [0, 1, REVISION])
async def test_revisions_that_were_reached(min_revision: int) -> None:
    """A state that holds the change asked for, or a later one, is answered from."""
    verdict = await scene_of(KEY_RECORD).validator.validate(TOKEN, min_revision=min_revision)
    assert (Outcome.VALID, REVISION) == (verdict.outcome, verdict.revision)


@pytest.mark.parametrize("record", [KEY_RECORD, None], ids=["found", "not found"])
async def test_revisions_that_were_never_given_out(record: KeyRecord | None) -> None:
    """An answer from before the change that was asked for is never given, and nothing is charged or recorded."""
    scene = scene_of(record) if record else Scene()
    with pytest.raises(RevisionUnknownError):
        await scene.validator.validate(TOKEN, min_revision=REVISION + 1)
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


async def test_tokens_of_other_organizations_are_not_found() -> None:
    """A caller that may ask about its own organization alone can not tell another's token from none."""
    scene = scene_of()
    hidden = await scene.validator.validate(TOKEN, only_organization_id="other")
    missing = await Scene().validator.validate(TOKEN, only_organization_id="other")
    assert Verdict(outcome=Outcome.NOT_FOUND, revision=REVISION) == hidden == missing
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("only_organization_id", ["", RECORD.organization_id])
async def test_tokens_of_ones_own_organization(only_organization_id: str) -> None:
    """A caller is told of tokens of its own organization, and one without bounds of all."""
    verdict = await scene_of(KEY_RECORD).validator.validate(TOKEN, only_organization_id=only_organization_id)
    assert Outcome.VALID is verdict.outcome


@pytest.mark.parametrize("token", [TOKEN, "no token"], ids=["a token", "none"])
@pytest.mark.parametrize("cost", [-1, 1_000_001])
async def test_costs_that_make_no_sense(token: str, cost: int) -> None:
    """A cost below 0 or above a million is refused, whatever the token: a gateway's mistake shows at once."""
    scene = scene_of()
    with pytest.raises(InvalidFieldError) as caught:
        await scene.validator.validate(token, cost=cost)
    assert ["cost"] == [field for field, _ in caught.value.violations]
    assert [] == scene.reader.asked


@pytest.mark.parametrize("cost", [0, 1_000_000])
async def test_costs_at_the_bounds(cost: int) -> None:
    """A cost may be anything from 0 to a million, and is charged as it is."""
    scene = scene_of(replace(KEY_RECORD, rate_limit_per_minute=60))
    assert Outcome.VALID is (await scene.validator.validate(TOKEN, cost=cost)).outcome
    assert [(RECORD.key_id, 60, cost)] == scene.limiter.asked


async def test_number_of_permissions() -> None:
    """A request may need 100 permissions, and no more."""
    scene = scene_of(granting(KEY_RECORD, "*"))
    needed = [f"orders:{number}" for number in range(101)]
    assert Outcome.VALID is (await scene.validator.validate(TOKEN, required_permissions=needed[:100])).outcome
    for token in (TOKEN, "no token"):
        with pytest.raises(InvalidFieldError) as caught:
            await scene.validator.validate(token, required_permissions=needed)
        assert ["required_permissions"] == [field for field, _ in caught.value.violations]


async def test_negative_revision() -> None:
    """A revision below 0 is refused: none was ever given out."""
    with pytest.raises(InvalidFieldError) as caught:
        await scene_of().validator.validate(TOKEN, min_revision=-1)
    assert ["min_revision"] == [field for field, _ in caught.value.violations]


KNOWN = Lookup(RECORD, NOW_S + 5, REVISION + 1)
"""What memory knows, where a test has it know something: not what storage would say."""


async def test_what_memory_knows_costs_no_lookup() -> None:
    """A token that memory knows is judged by what it knows, at its time and revision, and storage is not asked."""
    scene = Scene(per_second=0)
    for token in (TOKEN, FOREIGN_TOKEN):
        scene.memory.known = KNOWN
        rate = RateState(allowed=True, limit=60, remaining=3, reset_after_s=4)
        assert Verdict(Outcome.VALID, KNOWN.revision, KNOWN.now_s, RECORD, rate) == await scene.validate(token)
    assert ([], []) == (scene.reader.asked, scene.memory.kept)
    assert [(RECORD.secret_id, KNOWN.now_s)] * 2 == scene.usage.recorded
    assert 0 == scene.foreign.refused


async def test_memory_knows_that_a_token_is_none() -> None:
    """A token that memory knows to be none is not found, without a lookup, and without touching the budget."""
    scene = Scene(per_second=0)
    scene.memory.known = Lookup(None, NOW_S, REVISION)
    assert Verdict(Outcome.NOT_FOUND, REVISION) == await scene.validate(FOREIGN_TOKEN)
    assert ([], 0) == (scene.reader.asked, scene.foreign.refused)


@pytest.mark.parametrize(
    "token",
    ["no token", TokenFormat(bytes(32)).mint(KeyType.SECRET, Environment.LIVE).token],
    ids=["none", "of another deployment"],
)
async def test_impossible_tokens_take_no_place_in_memory(token: str) -> None:
    """What can not be a token takes no place in memory, and asks nothing of storage."""
    scene = Scene()
    assert Outcome.NOT_FOUND is (await scene.validate(token)).outcome
    assert ([], [], []) == (scene.reader.asked, scene.memory.kept, scene.memory.kept_unknown)


async def test_memory_is_asked_for_the_revision_of_the_request() -> None:
    """It is memory that knows whether it holds the change that was asked for; what it can not say, storage is asked."""
    scene = scene_of(KEY_RECORD)
    await scene.validator.validate(TOKEN, min_revision=REVISION)
    assert [(known_by(TOKEN), REVISION)] == scene.memory.asked
    assert [digest(TOKEN)] == scene.reader.asked


@pytest.mark.parametrize("token", [TOKEN, FOREIGN_TOKEN], ids=["own", "foreign"])
async def test_what_was_looked_up_is_kept(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What storage says is given to memory, with the time before it was asked: memory's age is counted from there."""
    scene = Scene()
    scene.put(RECORD, token)
    sent_s = scene.clock()
    find = scene.reader.find

    async def find_slowly(token_digest: bytes) -> Lookup:
        scene.clock.advance(3)
        return await find(token_digest)

    monkeypatch.setattr(scene.reader, "find", find_slowly)
    await scene.validate(token)
    assert [(known_by(token), Lookup(RECORD, NOW_S, REVISION), sent_s)] == scene.memory.kept
    assert [] == scene.memory.kept_unknown


async def test_only_foreign_tokens_are_kept_as_unknown() -> None:
    """That a token is none is kept of foreign formats alone, with the time before storage was asked."""
    scene = Scene()
    sent_s = scene.clock()
    await scene.validate(TOKEN)
    await scene.validate(FOREIGN_TOKEN)
    assert [(known_by(FOREIGN_TOKEN), Lookup(None, NOW_S, REVISION), sent_s)] == scene.memory.kept_unknown
    assert not [record for _, (record, *_), _ in scene.memory.kept if record is not None]


async def test_failed_lookups_are_not_kept() -> None:
    """What storage could not say is not kept as if it had said no."""
    scene = scene_of()
    scene.reader.failure = StorageUnavailableError("the database does not answer")
    for token in (TOKEN, FOREIGN_TOKEN):
        with pytest.raises(StorageUnavailableError):
            await scene.validate(token)
    assert ([], []) == (scene.memory.kept, scene.memory.kept_unknown)


async def test_memory_that_is_older_than_asked_for_is_not_answered_from() -> None:
    """Whatever memory gives, an answer from before the change that was asked for is never given."""
    scene = Scene()
    scene.memory.known = KNOWN
    with pytest.raises(RevisionUnknownError):
        await scene.validator.validate(TOKEN, min_revision=KNOWN.revision + 1)


async def test_ends_come_while_a_key_is_in_memory() -> None:
    """A key that is in memory ends in its time: the time of the answer counts, not that of the lookup."""
    scene = Scene()
    ending = replace(KEY_RECORD, expire_s=NOW_S)
    for now_s, outcome in ((NOW_S - INSTANT_S, Outcome.VALID), (NOW_S, Outcome.EXPIRED)):
        scene.memory.known = Lookup(ending, now_s, REVISION)
        assert outcome is (await scene.validator.validate(TOKEN)).outcome


@pytest.mark.parametrize(
    "outcomes",
    [(), *((each,) for each in ORDER[1:]), *combinations(ORDER[1:], 2)],
    ids=lambda outcomes: "+".join(outcome.value for outcome in outcomes) or "valid",
)
async def test_what_is_recalled_is_what_would_be_found(outcomes: tuple[Outcome, ...]) -> None:
    """What is answered from memory in one go is the very answer that would be found out otherwise, and is charged and
    recorded as that would be.
    """
    recalled, found = scene_with(*outcomes), scene_with(*outcomes)
    known = Lookup(recalled.reader.records.get(digest(TOKEN)), NOW_S, REVISION)
    recalled.memory.known = found.memory.known = known
    verdict = recall(recalled.validator, Need.of(NEEDED, CLIENT_IP, 5, REVISION))
    assert verdict is not None
    assert outcomes[:1] == (() if verdict[0] is Outcome.VALID else verdict[:1])
    assert verdict == await found.validator.validate(
        TOKEN, required_permissions=NEEDED, client_ip=CLIENT_IP, cost=5, min_revision=REVISION
    )
    assert [known_by(TOKEN)] == recalled.memory.entries.asked
    assert [(known_by(TOKEN), REVISION)] == found.memory.asked
    assert recalled.limiter.asked == found.limiter.asked
    assert recalled.usage.recorded == found.usage.recorded
    assert recalled.usage.refusals == found.usage.refusals
    assert [] == recalled.reader.asked


ADDRESSES = ("", "192.0.2.1", "198.51.100.1", "::ffff:192.0.2.1", "2001:db8::1")
permission_sets = st.lists(st.sampled_from(["orders:read", "orders:write", "orders:*", "*", "read"]), max_size=3)


@given(
    granted=permission_sets,
    needed=permission_sets,
    networks=st.sets(st.sampled_from(["192.0.2.0/24", "2001:db8::/32"])),
    client_ip=st.sampled_from(ADDRESSES),
    limit=st.sampled_from([0, 60]),
    ahead_s=st.sampled_from([-INSTANT_S, 0.0, INSTANT_S]),
    second_ahead_s=st.sampled_from([-INSTANT_S, 0.0, INSTANT_S]),
)
async def test_recalled_is_what_is_found(
    granted: list[str],
    needed: list[str],
    networks: set[str],
    client_ip: str,
    limit: int,
    ahead_s: float,
    second_ahead_s: float,
) -> None:
    """Whatever a key may do and a request needs: what is recalled is what the general way finds."""
    record = replace(
        bound_to(granting(KEY_RECORD, *granted), *sorted(networks)),
        rate_limit_per_minute=limit,
        expire_s=NOW_S + ahead_s,
        secret_end_s=NOW_S + second_ahead_s,
    )
    scene = Scene()
    scene.memory.known = Lookup(record, NOW_S, REVISION)
    found = await scene.validator.validate(TOKEN, required_permissions=needed, client_ip=client_ip)
    recalled = recall(scene.validator, Need.of(needed, client_ip, 1, 0))
    assert found == recalled


ORGANIZATION = Change(Entity.ORGANIZATION, KEY_RECORD.organization_id)


def validator_over(memory: Coherence, scene: Scene) -> Validator:
    """Puts a real memory in place of the scene's."""
    return Validator(
        tokens=TOKENS,
        keys=scene.reader,
        memory=memory,
        limiter=scene.limiter,
        usage=scene.usage,
        foreign=scene.foreign,
        patience=Patience(memory.now_s),
        suspicion=scene.suspicion,
    )


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["keep", "renew", "miss a renewal", "drop", "change", "leave"]), st.floats(0, 3)),
        max_size=12,
    ),
    min_revision=st.integers(0, 3),
)
@example(steps=[("renew", 0), ("keep", LeaseTerms(length_s=2).usable_s)], min_revision=0)
@example(steps=[("renew", 0), ("keep", MAX_AGE_S), ("renew", 0)], min_revision=0)
@example(steps=[("renew", 0), ("keep", 0), ("drop", 0)], min_revision=0)
def test_what_is_recalled_is_what_memory_finds(steps: list[tuple[str, float]], min_revision: int) -> None:
    """Whatever has happened to a lease, to what is held and to its organization: a key is recalled if and only if
    memory would find it, as of the same time and change, and each answer is counted.
    """
    scene, clock = Scene(), ManualClock()
    memory = Coherence(terms=LeaseTerms(length_s=2), cache=KeyCache(10), boottime=clock)
    validator = validator_over(memory, scene)
    record, head = replace(KEY_RECORD, rate_limit_per_minute=0), 0
    for step, seconds in (*steps, ("", 0.0)):
        changes: list[Change] = []
        match step:
            case "keep":
                memory.keep(known_by(TOKEN), Lookup(record, NOW_S, head), sent_s=clock())
            case "drop" | "change":
                changes = [ORGANIZATION] if step == "drop" else [Change(Entity.KEY, "another")]
                head += 1
            case "leave":
                memory.leave()
        if step in {"renew", "drop", "change", "miss a renewal"}:
            reading = LogReading(head=head, timeline="1", now_s=NOW_S + clock(), is_member=True, changes=changes)
            memory.read(reading, sent_s=clock(), is_renewal=step != "miss a renewal")
        clock.advance(seconds)
        before = memory.hits
        recalled = recall(validator, Need.of((), "", 1, min_revision))
        hits = memory.hits - before
        # After it: what it finds to be of the past it forgets.
        found = memory.find(known_by(TOKEN), min_revision)
        expected = None if found is None else (Outcome.VALID, found.revision, found.now_s, record, None)
        assert (expected, found is not None) == (recalled, hits)


def test_what_is_recalled_is_in_use() -> None:
    """A key that is answered from memory is not the one that makes place for a new one."""
    scene, clock, cache = Scene(), ManualClock(), KeyCache(2)
    memory = Coherence(terms=LeaseTerms(length_s=2), cache=cache, boottime=clock)
    memory.read(
        LogReading(head=0, timeline="1", now_s=NOW_S, is_member=True, changes=[]), sent_s=clock(), is_renewal=True
    )
    validator = validator_over(memory, scene)
    for held in (known_by(TOKEN), known_by(FOREIGN_TOKEN)):
        memory.keep(held, Lookup(KEY_RECORD, NOW_S, 0), sent_s=clock())
    assert recall(validator, Need.of((), "", 1, 0)) is not None
    memory.keep(known_by("a new token"), Lookup(KEY_RECORD, NOW_S, 0), sent_s=clock())
    assert {known_by(TOKEN), known_by("a new token")} == set(cache.entries)


def test_nothing_is_recalled_of_what_memory_does_not_know() -> None:
    """Memory that says nothing is not taken for a yes."""
    assert recall(Scene().validator, Need.of((), "", 1, 0)) is None


def test_what_nobody_knows_is_not_recalled() -> None:
    """That a token is none is not said in haste, though memory knows it: those who try many have to wait."""
    scene = Scene()
    scene.memory.known = Lookup(None, NOW_S, REVISION)
    assert recall(scene.validator, Need.of((), "", 1, 0)) is None


async def test_many_unknown_tokens_have_to_wait() -> None:
    """Some unknown tokens a second are answered at once, those beyond later; a second later it is the same again."""
    scene = Scene()
    wrong = TOKEN[:-1] + ("0" if TOKEN[-1] != "0" else "1")
    scene.memory.known = None
    tokens = [wrong, "x", TOKENS.mint(KeyType.SECRET, Environment.LIVE).token]
    for _ in range(2):
        for token in tokens:
            assert Outcome.NOT_FOUND is (await scene.validate(token)).outcome
        assert [] == scene.slept_s
        for token in tokens:
            assert Outcome.NOT_FOUND is (await scene.validate(token)).outcome
        assert pytest.approx([0.05, 0.1, 0.15]) == sorted(scene.slept_s)
        scene.slept_s.clear()
        scene.clock.advance(1)


async def test_tokens_beyond_the_budget_have_to_wait() -> None:
    """An unknown token that may not be looked up is told so as late as others are."""
    scene = Scene(per_second=0)
    for _ in range(4):
        with pytest.raises(LookupBudgetError):
            await scene.validate(FOREIGN_TOKEN)
    assert pytest.approx([0.1]) == scene.slept_s


@pytest.mark.parametrize("outcome", [None, *ORDER[1:]])
async def test_nobody_else_waits(outcome: Outcome | None) -> None:
    """However many unknown tokens are tried, every key that is known, good or not, is answered at once."""
    scene = scene_with(*([outcome] if outcome else []))
    for _ in range(10):
        await scene.validate("x")
    scene.slept_s.clear()
    assert (outcome or Outcome.VALID) is (await scene.validate()).outcome
    assert [] == scene.slept_s


@pytest.mark.parametrize(
    ("permissions", "client_ip", "cost", "min_revision", "field"),
    [
        (["read"] * 101, "", 1, 0, "required_permissions"),
        ((), "", 1_000_001, 0, "cost"),
        ((), "", -1, 0, "cost"),
        ((), "", 1, -1, "min_revision"),
    ],
)
def test_needs_that_make_no_sense(
    permissions: list[str], client_ip: str, cost: int, min_revision: int, field: str
) -> None:
    """What a request needs is checked before it is kept for others."""
    with pytest.raises(InvalidFieldError) as caught:
        Need.of(permissions, client_ip, cost, min_revision)
    assert [field] == [named for named, _ in caught.value.violations]


def test_address_of_a_key_that_is_bound_to_networks() -> None:
    """An address that is none is refused where it is needed, and not looked at elsewhere."""
    scene = Scene()
    scene.memory.known = Lookup(RECORD, NOW_S, REVISION)
    need = Need.of(NEEDED, "10.0.0.0/8", 1, 0)
    with pytest.raises(InvalidFieldError) as caught:
        recall(scene.validator, need)
    assert ["client_ip"] == [named for named, _ in caught.value.violations]
    scene.memory.known = Lookup(replace(RECORD, networks=()), NOW_S, REVISION)
    verdict = recall(scene.validator, need)
    assert verdict is not None
    assert Outcome.VALID is verdict[0]


SPARE = 7
GOOD_FOR_S = 5.0


@dataclass(frozen=True, slots=True)
class Counted:
    """A scene with a key of a limit that was used once, and what its next uses are counted in."""

    scene: Scene
    record: KeyRecord
    permits: Permits
    uses: Uses

    def recall(self, cost: int = 1) -> Verdict:
        """Has the token judged from memory."""
        judgement = recall(self.scene.validator, Need.of(NEEDED, "", cost, 0))
        assert judgement is not None
        return Verdict._make(judgement)

    def is_counted_in_place(self, cost: int = 1) -> bool:
        """Has the token judged, and says whether the limiter was asked."""
        asked = len(self.scene.limiter.asked)
        self.recall(cost)
        return len(self.scene.limiter.asked) == asked


def counted(*, left: int = SPARE, used: int = 20) -> Counted:
    """Uses a key once, whose permits are good for some seconds of the worker's clock, as its uses of the database's."""
    scene, record = Scene(), replace(RECORD, networks=())
    scene.memory.known = Lookup(record, NOW_S, REVISION)
    permits, uses = Permits(), Uses(NOW_S + GOOD_FOR_S)
    permits.left, permits.used, permits.until_s = left, used, scene.clock() + GOOD_FOR_S
    scene.limiter.given[record.key_id], scene.usage.given = permits, uses
    made = Counted(scene, record, permits, uses)
    made.recall()
    assert ([(record.key_id, 60, 1)], [(record.secret_id, NOW_S)]) == (scene.limiter.asked, scene.usage.recorded)
    return made


def test_use_is_counted_in_place() -> None:
    """A key that has permits is charged and counted without the limiter and the recorder: what it costs, once."""
    key = counted()
    for number in range(1, SPARE + 1):
        key.scene.memory.known = Lookup(key.record, NOW_S + number / 10, REVISION)
        rate = RateState(allowed=True, limit=60, remaining=60 - 20 - number, reset_after_s=WINDOW_SLOTS)
        assert Verdict(Outcome.VALID, REVISION, NOW_S + number / 10, key.record, rate) == key.recall()
        assert (SPARE - number, 20 + number) == (key.permits.left, key.permits.used)
        assert (number, NOW_S + number / 10) == (key.uses.valid, key.uses.used_s)
    assert (1, 1) == (len(key.scene.limiter.asked), len(key.scene.usage.recorded))


def test_cost_is_charged_in_place() -> None:
    """A request is charged all that it costs; one of no cost nothing, though it is a use."""
    key = counted()
    assert [(True, 60, 36, WINDOW_SLOTS)] * 2 == [key.recall(4).rate, key.recall(0).rate]
    assert (SPARE - 4, 24, 2) == (key.permits.left, key.permits.used, key.uses.valid)


def test_time_of_use_does_not_go_back() -> None:
    """An answer that is overtaken by another leaves the later time."""
    key = counted()
    key.recall()
    key.scene.memory.known = Lookup(key.record, NOW_S - 1, REVISION)
    key.recall()
    assert (2, NOW_S) == (key.uses.valid, key.uses.used_s)


def test_limiter_is_asked_where_permits_do_not_do() -> None:
    """Without as many permits as it takes, beyond the limit, or once they have expired, the limiter has the word."""
    assert counted().is_counted_in_place(SPARE)
    assert not counted().is_counted_in_place(SPARE + 1)
    assert counted(left=100, used=20).is_counted_in_place(40)
    assert not counted(left=100, used=20).is_counted_in_place(41)
    late = counted()
    late.scene.clock.advance(GOOD_FOR_S - INSTANT_S)
    assert late.is_counted_in_place()
    late.scene.clock.advance(INSTANT_S)
    assert not late.is_counted_in_place()
    assert (SPARE - 1, 21) == (late.permits.left, late.permits.used)


def test_what_the_limiter_refuses_in_the_end_is_refused() -> None:
    """Whoever has no permits left is told what the limiter says."""
    key = counted(left=0)
    key.scene.limiter.allowed = False
    assert Outcome.RATE_LIMITED is key.recall().outcome
    assert [(key.record.secret_id, Outcome.RATE_LIMITED, NOW_S)] == key.scene.usage.refusals
    assert 0 == key.uses.valid


def test_use_is_recorded_anew_when_its_time_is_over() -> None:
    """From the end of what uses are counted in on, the recorder is asked what the next ones are counted in."""
    key = counted()
    key.scene.memory.known = Lookup(key.record, NOW_S + GOOD_FOR_S - INSTANT_S, REVISION)
    key.recall()
    assert (1, 1) == (key.uses.valid, len(key.scene.usage.recorded))
    later = key.scene.usage.given = Uses(NOW_S + 2 * GOOD_FOR_S)
    key.scene.memory.known = Lookup(key.record, NOW_S + GOOD_FOR_S, REVISION)
    key.recall()
    key.recall()
    assert (1, 1, 2) == (key.uses.valid, later.valid, len(key.scene.usage.recorded))
    assert 1 == len(key.scene.limiter.asked)


@pytest.mark.parametrize("outcome", ORDER[1:-1])
def test_what_is_wrong_with_a_key_is_found_however_it_is_counted(outcome: Outcome) -> None:
    """That its uses are counted in place lets no key through that is not good by now, and charges it nothing."""
    key = counted()
    wrong = AFFLICTIONS[outcome](key.record)
    wrong.permits, wrong.uses = key.permits, key.uses
    key.scene.memory.known = Lookup(wrong, NOW_S, REVISION)
    assert outcome is key.recall().outcome
    assert (SPARE, 20, 0) == (key.permits.left, key.permits.used, key.uses.valid)
    assert [outcome] == [each for _, each, _ in key.scene.usage.refusals]


class CountedShares:
    """Implements Limiter over shares, without a store."""

    def __init__(self, allotments: Allotments) -> None:
        self.take = allotments.take
        self.permits = allotments.permits

    async def wait(self, key_id: str, limit: int, cost: int) -> None:
        """Is not waited for here."""


steps = st.lists(
    st.tuples(st.just("ask"), st.integers(0, 4)) | st.tuples(st.just("wait"), st.floats(0.01, 40)), max_size=60
)


@given(steps=steps, limit=st.sampled_from([0, 30, 600, 1200]))
async def test_counting_in_place_comes_to_the_same(steps: list[tuple[str, float]], limit: int) -> None:
    """Over any time, what is recalled is judged, charged and noted as by the rules for all that memory can not say."""
    clock, memory_clock = ManualClock(), ManualClock()
    record, other = (replace(RECORD, networks=(), rate_limit_per_minute=limit) for _ in range(2))
    worlds = [Allotments(clock, 4, stands_after_s=0), Allotments(clock, 4, stands_after_s=0)]
    scene, usages = Scene(), (MemoryUsage(), MemoryUsage())
    recalling, asking = (
        Validator(
            tokens=TOKENS,
            keys=scene.reader,
            memory=scene.memory,
            limiter=CountedShares(world),
            usage=usage,
            foreign=scene.foreign,
            patience=Patience(clock),
            suspicion=scene.suspicion,
        )
        for world, usage in zip(worlds, usages, strict=True)
    )
    scene.memory.clock = memory_clock
    for kind, number in steps:
        if kind == "wait":
            clock.advance(number)
            memory_clock.advance(number)
            continue
        need = Need.of(NEEDED, "", int(number), 0)
        scene.memory.known = Lookup(record, NOW_S, REVISION)
        recalled = recall(recalling, need)
        assert asking._judge(other, NOW_S, REVISION, need) == recalled  # noqa: SLF001 - the rules, as they are written
    noted, recorded = usages
    assert (recorded.recorded, recorded.refusals) == (noted.recorded, noted.refusals)
