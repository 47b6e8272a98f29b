"""What a worker holds of keys: what was put is what is got, until it is old, dropped, or driven out by others."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from typing import Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latchgate.domain.allotments import Allotments
from latchgate.domain.cache import MAX_CHANCES, KeyCache
from latchgate.domain.model import KeyIdentity, KeyRecord
from latchgate.storage import rows
from support.records import KEY_RECORD

NOW_S: Final = 1000.0
LATER_S: Final = 2000.0


def record_of(key: int, organization: int = 0, plan: int = 0, version: int = 0) -> KeyRecord:
    """Makes a record; `version` tells two of the same key apart."""
    return replace(
        KEY_RECORD,
        secret_id=version,
        key_id=f"key_{key}",
        organization_id=f"org_{organization}",
        plan_id=f"plan_{plan}",
    )


def digest_of(number: int) -> bytes:
    """Makes a digest."""
    return number.to_bytes(32, "big")


def filled(count: int, max_keys: int | None = None) -> KeyCache:
    """Makes a cache with so many keys of one organization."""
    cache = KeyCache(max_keys or count)
    for number in range(count):
        cache.put(digest_of(number), record_of(number), LATER_S)
    return cache


def held(cache: KeyCache, *numbers: int, now_s: float = NOW_S) -> list[int]:
    """Says which of these digests the cache knows. Each of them is used by that."""
    return [number for number in numbers if cache.get(digest_of(number), now_s) is not None]


def test_what_was_put_is_got() -> None:
    """A record is given back as it was put, for its own digest and no other."""
    cache = filled(2)
    assert [record_of(0), record_of(1), None] == [cache.get(digest_of(number), NOW_S) for number in range(3)]
    assert 2 == len(cache)


def test_what_is_put_again_takes_the_place() -> None:
    """Of a digest the newest record counts, for as long as it was put for, also if it has moved elsewhere since."""
    cache = filled(1)
    moved = record_of(7, organization=8, plan=9, version=1)
    cache.put(digest_of(0), moved, LATER_S + 1)
    assert moved == cache.get(digest_of(0), LATER_S)
    assert 1 == len(cache)
    for drop, former in ((cache.drop_key, "key_0"), (cache.drop_organization, "org_0"), (cache.drop_plan, "plan_0")):
        drop(former)
        assert moved == cache.get(digest_of(0), NOW_S)


@pytest.mark.parametrize(("ahead_s", "is_held"), [(-0.001, True), (0.0, False), (1.0, False)])
def test_age_is_bounded(ahead_s: float, is_held: bool) -> None:
    """A record is held until the very moment that it was put for, and takes no place once it was found too old."""
    cache = filled(1)
    assert is_held is bool(held(cache, 0, now_s=LATER_S + ahead_s))
    assert int(is_held) == len(cache)


def test_use_does_not_make_younger() -> None:
    """However often a record is used, it gets no older than it was to get."""
    cache = filled(1)
    for quarter in range(4):
        assert [0] == held(cache, 0, now_s=NOW_S + quarter * 250)
    assert [] == held(cache, 0, now_s=LATER_S)


def test_number_is_bounded() -> None:
    """The cache never holds more than it may; how many were driven out is counted."""
    cache = filled(50, max_keys=10)
    assert (10, 40) == (len(cache), cache.evicted)
    assert 10 == len(held(cache, *range(50)))


def test_newest_is_always_held() -> None:
    """Whatever is full and in use, what was put just now is held."""
    cache = KeyCache(3)
    for number in range(100):
        cache.put(digest_of(number), record_of(number), LATER_S)
        assert [number] == held(cache, number)


def test_unused_go_in_the_order_in_which_they_came() -> None:
    """Of keys that were used once alone, those that came first go first: the newest are not driven out by the next."""
    cache = filled(4)
    for number in range(4, 7):
        cache.put(digest_of(number), record_of(number), LATER_S)
    assert [3, 4, 5, 6] == held(cache, *range(7))


def test_used_get_a_second_chance() -> None:
    """A key that was used since the hand came by stays when others come; the first that was not goes."""
    cache = filled(4)
    assert [0, 2] == held(cache, 0, 2)
    cache.put(digest_of(4), record_of(4), LATER_S)
    assert 4 == len(cache)
    assert [0, 2, 3, 4] == held(cache, *range(5))


def test_second_chance_is_one() -> None:
    """A key that is not used again goes when the hand comes by for the second time."""
    cache = filled(3)
    assert [0, 1, 2] == held(cache, 0, 1, 2)
    for number in range(3, 6):
        cache.put(digest_of(number), record_of(number), LATER_S)
    assert [] == held(cache, 0, 1, 2)


def test_keys_that_are_used_once_do_not_drive_out_those_in_use() -> None:
    """A stream of keys that come once leaves those alone that are asked for again and again."""
    cache = filled(8)
    for number in range(8, 200):
        assert [0, 1, 2] == held(cache, 0, 1, 2)
        cache.put(digest_of(number), record_of(number), LATER_S)
    assert [0, 1, 2] == held(cache, 0, 1, 2)


def test_search_for_a_place_is_bounded() -> None:
    """Where all are in use, so many get a second chance and no more: the next one goes, and putting stays short."""
    count = MAX_CHANCES * 3
    cache = filled(count)
    held(cache, *range(count))
    cache.put(digest_of(count), record_of(count), LATER_S)
    assert [MAX_CHANCES] == sorted(set(range(count)) - set(held(cache, *range(count))))


def test_places_that_were_freed_are_used_first() -> None:
    """What is dropped makes room: nothing is driven out while there is a free place."""
    cache = filled(4)
    cache.drop_key("key_1")
    assert [] == held(cache, 3, now_s=LATER_S)
    for number in (4, 5):
        cache.put(digest_of(number), record_of(number), LATER_S)
    assert ([0, 2, 4, 5], 0) == (held(cache, *range(6)), cache.evicted)


def test_rotation_leaves_two_secrets_of_a_key() -> None:
    """Both tokens of a key in rotation are held, and each can be renewed without the other."""
    cache = KeyCache(10)
    for number in range(3):
        cache.put(digest_of(number), record_of(1, version=number), LATER_S)
    cache.put(digest_of(1), record_of(1, version=9), LATER_S)
    found = [cache.get(digest_of(number), NOW_S) for number in range(3)]
    assert [0, 9, 2] == [record and record.secret_id for record in found]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_key_is_dropped_with_all_its_secrets(gone: int) -> None:
    """Dropping a key drops each of its tokens, whichever of them was put anew or is gone already, and no other key."""
    cache = KeyCache(10)
    cache.put(digest_of(9), record_of(2), LATER_S)
    for number in range(3):
        until_s = NOW_S if number == gone else LATER_S
        cache.put(digest_of(number), record_of(1, version=number), until_s)
    assert [each for each in range(3) if each != gone] == held(cache, 0, 1, 2)
    cache.drop_key("key_1")
    assert [9] == held(cache, 0, 1, 2, 9)
    assert 1 == len(cache)


def test_organization_is_dropped_with_all_its_keys() -> None:
    """Dropping an organization drops its keys and no others; what is put from then on is held."""
    cache = KeyCache(100)
    for number in range(20):
        cache.put(digest_of(number), record_of(number, organization=number % 2), LATER_S)
    cache.drop_organization("org_1")
    cache.put(digest_of(1), record_of(1, organization=1, version=1), LATER_S)
    assert [*range(0, 20, 2), 1] == held(cache, *range(0, 20, 2), *range(1, 20, 2))
    # They have made room, too.
    assert 11 == len(cache)


def test_plan_is_dropped_with_all_its_organizations() -> None:
    """Dropping a plan drops the keys of all organizations that have it, and no others; what comes after is held."""
    cache = KeyCache(100)
    for number in range(24):
        organization = number % 6
        cache.put(digest_of(number), record_of(number, organization=organization, plan=organization % 2), LATER_S)
    cache.drop_plan("plan_1")
    assert list(range(0, 24, 2)) == held(cache, *range(24))
    cache.put(digest_of(1), record_of(1, organization=1, plan=1, version=1), LATER_S)
    assert [1] == held(cache, 1)
    cache.drop_plan("plan_1")
    assert [] == held(cache, 1)


def test_organization_that_has_another_plan() -> None:
    """What was read under an organization's former plan is not held beside what was read under its present one: the
    former plan's limits are of the past. A later change of the former plan leaves the organization alone.
    """
    cache = KeyCache(10)
    cache.put(digest_of(0), record_of(0, plan=0), LATER_S)
    cache.put(digest_of(1), record_of(1, plan=1), LATER_S)
    assert [1] == held(cache, 0, 1)
    cache.drop_plan("plan_0")
    assert [1] == held(cache, 1)
    cache.drop_plan("plan_1")
    assert [] == held(cache, 1)


@pytest.mark.parametrize("drop", ["drop_key", "drop_organization", "drop_plan"])
def test_dropping_what_is_not_held(drop: str) -> None:
    """Most changes are of keys that a worker has never seen: they change nothing."""
    cache = filled(3)
    getattr(cache, drop)("unknown")
    assert [0, 1, 2] == held(cache, *range(4))


def test_clear() -> None:
    """After all was forgotten, nothing is found, and the cache works as a new one does."""
    cache = filled(5, max_keys=3)
    cache.clear()
    assert (0, []) == (len(cache), held(cache, *range(5)))
    for number in range(5):
        cache.put(digest_of(number), record_of(number), LATER_S)
    assert 3 == len(cache)


class NaiveCache:
    """The same without any bound on the number: every entry is looked at whenever something is dropped."""

    def __init__(self) -> None:
        self.entries: dict[bytes, tuple[KeyRecord, float]] = {}

    def put(self, digest: bytes, record: KeyRecord, until_s: float) -> None:
        """Holds a record, and nothing of the same organization under another plan."""
        self.drop("organization_id", record.organization_id, unless_plan_id=record.plan_id)
        self.entries[digest] = (record, until_s)

    def get(self, digest: bytes, now_s: float) -> KeyRecord | None:
        """Gives a record that is not too old."""
        record, until_s = self.entries.get(digest, (None, 0.0))
        return record if now_s < until_s else None

    def drop(self, field: str, value: str, unless_plan_id: str = "") -> None:
        """Forgets records by one of their fields."""
        self.entries = {
            digest: (record, until_s)
            for digest, (record, until_s) in self.entries.items()
            if getattr(record, field) != value or record.plan_id == unless_plan_id
        }


few = st.integers(0, 3)
puts = st.tuples(st.just("put"), st.integers(0, 7), few, few, st.integers(0, 1), st.integers(0, 40))
drops = st.tuples(st.sampled_from(["drop_key", "drop_organization", "drop_plan"]), few)
gets = st.tuples(st.just("get"), st.integers(0, 7))
steps = st.lists(puts | drops | gets | st.just(("clear",)), max_size=60)


def play(cache: KeyCache, naive: NaiveCache, step: tuple[Any, ...], now: int) -> None:
    """Does the same to both."""
    name, *values = step
    if name == "put":
        number, key, organization, plan, age = values
        record = record_of(key, organization, plan, version=now)
        cache.put(digest_of(number), record, now + age)
        naive.put(digest_of(number), record, now + age)
    elif name == "clear":
        cache.clear()
        naive.entries.clear()
    elif name == "get":
        cache.get(digest_of(values[0]), now)
    else:
        getattr(cache, name)(f"{name.removeprefix('drop_').replace('organization', 'org')}_{values[0]}")
        naive.drop(
            f"{name.removeprefix('drop_')}_id",
            f"{name.removeprefix('drop_').replace('organization', 'org')}_{values[0]}",
        )


@given(steps=steps)
def test_with_room_for_all_it_is_as_the_naive_one(steps: list[tuple[Any, ...]]) -> None:
    """Whatever is put and dropped in whatever order, with room for all the cache holds what the plainest one would."""
    cache, naive = KeyCache(8), NaiveCache()
    for now, step in enumerate(steps):
        play(cache, naive, step, now)
        if now % 5 == 4:
            numbers = range(8)
            assert [naive.get(digest_of(each), now) for each in numbers] == [
                cache.get(digest_of(each), now) for each in numbers
            ]
    assert 0 == cache.evicted


@given(steps=steps, max_keys=st.integers(1, 7))
def test_with_room_for_some_it_holds_no_more_than_the_naive_one(steps: list[tuple[Any, ...]], max_keys: int) -> None:
    """However little room there is, the cache never holds what is old or dropped, nor more than it may, and always what
    was put last; and its own books are right: whatever was done, it can be filled to its bound, and not beyond.
    """
    cache, naive = KeyCache(max_keys), NaiveCache()
    for now, step in enumerate(steps):
        play(cache, naive, step, now)
        assert len(cache) <= max_keys
        if step[0] == "put":
            assert naive.get(digest_of(step[1]), now) == cache.get(digest_of(step[1]), now)
        if now % 5 == 4:
            for each in map(digest_of, range(8)):
                assert cache.get(each, now) in (None, naive.get(each, now))
    for number in range(100, 100 + 3 * max_keys):
        cache.put(digest_of(number), record_of(number, organization=9, plan=9), LATER_S)
    assert max_keys == len(cache)


KEYS: Final = 20_000
PERMISSIONS: Final = tuple(
    [f"orders:{verb}" for verb in ("read", "write", "list")[: 1 + kind % 3]] + [f"area{kind}:*"] for kind in range(8)
)


def row_of(number: int) -> dict[str, Any]:
    """What the database gives of a key: strings of its own for every row. Ten keys are of one organization."""
    return {
        "secret_id": 100_000 + number,
        "key_id": f"key_{number:026d}",
        "organization_id": f"org_{number // 10:026d}",
        "organization_active": True,
        "plan_id": f"plan{number % 3}",
        "key_name": f"key number {number}",
        "kind": " ".join(("secret", "live", *PERMISSIONS[number % 8])),
        "allowed_cidrs": [f"10.{number % 16}.0.0/16"] if number % 4 == 0 else [],
        "rate_limit_per_minute": 600,
        "active": True,
        "revoked": False,
        "expire_s": float("inf"),
        "secret_end_s": float("inf"),
        "create_s": 1.7e9 + number,
        "user_id": f"user_{number}",
        "user_email": f"user{number}@example.com",
        "metadata": "{}",
    }


def test_memory_of_a_key() -> None:
    """A key in memory, with all that belongs to it, takes no more than 1,000 bytes, of which what is shown takes 250:
    a million keys go into a gigabyte. The permits of its limit belong to it once the limiter has forgotten the key.
    """

    def show(identity: KeyIdentity) -> bytes:
        return identity.key_id.encode().ljust(250)

    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cache, limiter = KeyCache(KEYS), Allotments(lambda: NOW_S, 1, stands_after_s=0.0)
        for number in range(KEYS):
            record = rows.key_record(cast("rows.Row", row_of(number)), show)
            assert limiter.take(record.key_id, 60_000, 1) is not None
            record.permits = limiter.permits(record.key_id)
            cache.put(digest_of(number), record, 1000.0 + number)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert KEYS == len(cache)
    assert 250 < (after - before) / KEYS <= 1000
