"""What is kept so that retries are safe: slots, and sealed tokens for ten minutes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from uuid import UUID

import pytest
from cryptography.fernet import InvalidToken

from latchgate.domain.errors import RequestIdExpiredError, RequestIdReusedError
from latchgate.domain.keys import KeyManager
from latchgate.domain.ports import AnsweredRequest
from latchgate.storage import requests
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.requests import RequestSealer, forget_requests
from latchgate.storage.stores import PostgresStore
from support.databases import ROOT_CALLER, draft, insert_organization, started_and_waiting

SLOT, BODY = sha256(b"slot").digest(), sha256(b"body").digest()
REQUEST_ID = UUID("0190b5d2-0000-7000-8000-000000000001")
OTHER_ID = UUID("0190b5d2-0000-7000-8000-000000000002")


async def _claim(store: PostgresStore) -> AnsweredRequest | None:
    async with store.transaction() as transaction:
        return await transaction.claim_request(SLOT, BODY)


async def _answer(store: PostgresStore, slot: bytes = SLOT) -> None:
    async with store.transaction() as transaction:
        assert await transaction.claim_request(slot, BODY) is None
        await transaction.answer_request(slot, "key_1", 7, b"sealed")


async def _age(observer: Connection, age: timedelta) -> None:
    """Makes all slots look older than they are."""
    await observer.execute("UPDATE request SET create_time = now() - $1::interval", age)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the table of requests holds."""

    slots: int
    tokens: int


async def _kept(observer: Connection) -> Kept:
    row = await observer.fetchrow("SELECT count(*) AS slots, count(sealed_token) AS tokens FROM request")
    assert row is not None
    return Kept(slots=row["slots"], tokens=row["tokens"])


async def test_slot_gives_back_what_was_answered(store: PostgresStore) -> None:
    """The first claim of a slot finds nothing; every later one finds the answer that was kept."""
    await _answer(store)

    expected = AnsweredRequest(body_digest=BODY, key_id="key_1", revision=7, sealed_token=b"sealed")
    assert expected == await _claim(store)
    assert expected == await _claim(store)


async def test_twin_waits_for_the_first_and_hears_its_answer(store: PostgresStore, observer: Connection) -> None:
    """A claim of a slot whose first holder is still under way waits for its end, and then finds its answer."""
    async with store.transaction() as transaction:
        assert await transaction.claim_request(SLOT, BODY) is None
        twin = await started_and_waiting(observer, _claim(store))
        await transaction.answer_request(SLOT, "key_1", 7, b"sealed")

    answered = await twin
    assert answered is not None
    assert ("key_1", b"sealed") == (answered.key_id, answered.sealed_token)


async def test_twin_of_an_undone_request_carries_it_out(store: PostgresStore, observer: Connection) -> None:
    """If the first holder of a slot comes to nothing, a twin that waited for it has the slot."""
    claimed = asyncio.Event()

    async def claim_and_hold() -> None:
        async with store.transaction() as transaction:
            await transaction.claim_request(SLOT, BODY)
            claimed.set()
            await asyncio.Event().wait()

    first = asyncio.create_task(claim_and_hold())
    await claimed.wait()
    twin = await started_and_waiting(observer, _claim(store))
    first.cancel()

    assert await twin is None


async def test_request_is_carried_out_once_however_many_ask(
    store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """Many equal requests with the same id at the same time make one key, and all hear the same token."""
    await insert_organization(store)
    issued = await asyncio.gather(*(keys.create(ROOT_CALLER, "acme", draft(), REQUEST_ID) for _ in range(6)))
    key_id = issued[0].key.id
    rotated = await asyncio.gather(*(keys.rotate(ROOT_CALLER, key_id, timedelta(), REQUEST_ID) for _ in range(6)))

    assert 1 == len({(each.key.id, each.token) for each in issued})
    assert 1 == len({(each.key.id, each.token, each.effect.revision) for each in rotated})
    assert 1 == await observer.fetchval("SELECT count(*) FROM key WHERE organization_id = 'acme'")
    assert 2 == await observer.fetchval("SELECT count(*) FROM secret WHERE key_id = $1", key_id)


async def test_token_is_given_for_ten_minutes(store: PostgresStore, observer: Connection) -> None:
    """A kept token is given until ten minutes have passed, and not after, whether or not it was cleared by then."""
    await _answer(store)

    await _age(observer, timedelta(minutes=9, seconds=55))
    young = await _claim(store)
    await _age(observer, timedelta(minutes=10, seconds=1))
    old = await _claim(store)

    assert young is not None
    assert b"sealed" == young.sealed_token
    assert old is not None
    assert (BODY, "key_1", 7, None) == (old.body_digest, old.key_id, old.revision, old.sealed_token)


async def test_tokens_go_after_ten_minutes_and_slots_after_a_day(
    database: Database, store: PostgresStore, observer: Connection
) -> None:
    """Clearing removes tokens once they are ten minutes old, and slots once they are a day old; none before."""
    await _answer(store)
    seen = []
    for age in (
        timedelta(minutes=9, seconds=55),
        timedelta(minutes=10, seconds=1),
        timedelta(hours=23, minutes=59),
        timedelta(days=1, seconds=1),
    ):
        await _age(observer, age)
        await forget_requests(database)
        seen.append(await _kept(observer))

    assert [Kept(slots=1, tokens=1), Kept(slots=1, tokens=0), Kept(slots=1, tokens=0), Kept(slots=0, tokens=0)] == seen


async def test_slot_that_was_removed_is_free(store: PostgresStore, database: Database, observer: Connection) -> None:
    """A day later the same request is carried out anew."""
    await _answer(store)
    await _age(observer, timedelta(days=1, seconds=1))
    await forget_requests(database)

    assert await _claim(store) is None


async def test_retry_after_ten_minutes_is_told_so(
    store: PostgresStore, keys: KeyManager, observer: Connection, database: Database
) -> None:
    """A retry that comes too late for the token makes no second key, and names the first; another body is refused."""
    await insert_organization(store)
    issued = await keys.create(ROOT_CALLER, "acme", draft(), REQUEST_ID)
    with pytest.raises(RequestIdReusedError) as reused:
        await keys.create(ROOT_CALLER, "acme", draft("another"), REQUEST_ID)
    await _age(observer, timedelta(minutes=11))
    await forget_requests(database)
    with pytest.raises(RequestIdExpiredError) as expired:
        await keys.create(ROOT_CALLER, "acme", draft(), REQUEST_ID)

    assert {"key_id": issued.key.id} == reused.value.details == expired.value.details
    assert 1 == await observer.fetchval("SELECT count(*) FROM key WHERE organization_id = 'acme'")


async def test_backlog_is_forgotten_in_small_statements(
    database: Database, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much has gathered, all of it goes, without one statement for all."""
    monkeypatch.setattr(requests, "FORGET_ROWS", 10)
    await observer.execute(
        """
        INSERT INTO request (slot, body_digest, sealed_token, create_time)
        SELECT sha256(i::text::bytea), sha256(''), 'x', now() - i * interval '1 minute' - (i / 20) * interval '1 day'
        FROM generate_series(1, 45) i
        """
    )

    await forget_requests(database)

    assert Kept(slots=19, tokens=9) == await _kept(observer)


async def test_workers_do_not_wait_for_each_other_to_forget(
    store: PostgresStore, database: Database, observer: Connection
) -> None:
    """A slot that another transaction is at is left to it; the others are cleared meanwhile."""
    other = sha256(b"other").digest()
    await _answer(store)
    await _answer(store, other)
    await _age(observer, timedelta(days=2))
    async with store.transaction() as transaction:
        await transaction.answer_request(SLOT, "key_1", 7, b"sealed")
        await forget_requests(database)
        assert [SLOT] == [row["slot"] for row in await observer.fetch("SELECT slot FROM request")]


def test_seal_opens_for_the_same_request_and_tag_key_alone() -> None:
    """What was sealed opens with the same request id under the same tag key, and with no other of either."""
    sealed = RequestSealer(b"k" * 32).seal(REQUEST_ID, "lk_token")

    assert "lk_token" == RequestSealer(b"k" * 32).open(REQUEST_ID, sealed)
    for tag_key, request_id in ((b"k" * 32, OTHER_ID), (b"l" * 32, REQUEST_ID)):
        with pytest.raises(InvalidToken):
            RequestSealer(tag_key).open(request_id, sealed)
    with pytest.raises(InvalidToken):
        RequestSealer(b"k" * 32).open(REQUEST_ID, sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_seal_shows_nothing() -> None:
    """A sealed token holds no part of the token, and the same one is sealed differently each time."""
    sealer = RequestSealer(b"k" * 32)
    first, second = sealer.seal(REQUEST_ID, "lk_token"), sealer.seal(REQUEST_ID, "lk_token")

    assert first != second
    assert b"lk_" not in first
