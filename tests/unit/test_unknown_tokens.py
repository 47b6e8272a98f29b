"""Tokens that nobody knows: what they may ask of the database, and how long who sends them waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latchgate.domain.errors import (
    LookupBudgetError,
    StorageUnavailableError,
)
from latchgate.domain.floods import ForeignLookupBudget
from latchgate.domain.model import (
    Environment,
    KeyType,
    Lookup,
    Outcome,
    Verdict,
)
from latchgate.domain.suspicion import Suspect
from latchgate.domain.token import TokenFormat, digest
from support.records import KEY_RECORD, NOW_S, ManualClock
from support.scenes import (
    FOREIGN_TOKEN,
    ORDER,
    RECORD,
    REVISION,
    TOKEN,
    TOKENS,
    Scene,
    invented,
    known_by,
    scene_of,
    scene_with,
)


async def test_unknown_tokens_beyond_the_budget_are_suspicious() -> None:
    """Tokens that are not even looked up any more are counted as those that are."""
    scene = Scene()
    for number in range(5):
        await scene.is_looked_up(invented(number))
    assert [(Suspect("", Outcome.NOT_FOUND, "", ""), 5)] == scene.suspicion.take()


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


async def test_only_foreign_tokens_are_kept_as_unknown() -> None:
    """That a token is none is kept of foreign formats alone, with the time before storage was asked."""
    scene = Scene()
    sent_s = scene.clock()
    await scene.validate(TOKEN)
    await scene.validate(FOREIGN_TOKEN)
    assert [(known_by(FOREIGN_TOKEN), Lookup(None, NOW_S, REVISION), sent_s)] == scene.memory.kept_unknown
    assert not [record for _, (record, *_), _ in scene.memory.kept if record is not None]


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
