"""Validation from memory: the same verdicts, found and counted in one piece."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latchgate.domain.allotments import Allotments
from latchgate.domain.cache import KeyCache
from latchgate.domain.coherence import MAX_AGE_S, Change, Coherence, Entity, LeaseTerms, LogReading
from latchgate.domain.errors import (
    InvalidFieldError,
    RevisionUnknownError,
    StorageUnavailableError,
)
from latchgate.domain.floods import Patience
from latchgate.domain.model import (
    Environment,
    KeyRecord,
    KeyType,
    Lookup,
    Outcome,
    Permits,
    RateState,
    Uses,
    Verdict,
)
from latchgate.domain.shares import WINDOW_SLOTS
from latchgate.domain.token import TokenFormat, digest
from latchgate.domain.validation import Need, Validator
from support.records import INSTANT_S, KEY_RECORD, NOW_S, ManualClock, bound_to, granting
from support.scenes import (
    AFFLICTIONS,
    CLIENT_IP,
    FOREIGN_TOKEN,
    NEEDED,
    ORDER,
    RECORD,
    REVISION,
    TOKEN,
    TOKENS,
    MemoryUsage,
    Scene,
    known_by,
    recall,
    scene_of,
    scene_with,
)


def test_nothing_is_recalled_that_the_limiter_can_not_say() -> None:
    """Memory that lacks what the limiter has to ask for is not taken for a yes, nor for a no."""
    scene = Scene()
    scene.memory.known = Lookup(RECORD, NOW_S, REVISION)
    scene.limiter.hesitations = 1
    assert recall(scene.validator, Need.of(NEEDED, CLIENT_IP, 1, 0)) is None
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


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
@example(steps=[("renew", 0), ("keep", MAX_AGE_S / 2), ("renew", 0)], min_revision=0)
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
