"""Imported keys at rest: what is stored is what is read, and two imports at once do not get in each other's way."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from latchgate.domain.imported import ImportRow, KnownToken
from latchgate.domain.model import Environment, KeyDraft
from latchgate.domain.token import digest
from latchgate.storage.postgres import Connection
from latchgate.storage.stores import PostgresStore
from support.databases import insert_key, insert_organization, next_id, started_and_waiting

LATER = datetime(2090, 1, 1, 1, 2, 3, 456789, tzinfo=UTC)
FULL = ImportRow(
    number=1,
    digest=digest("sk_live_of_the_contract_tests"),
    hint="sk_live_of",
    active=False,
    draft=KeyDraft(
        name="Ünïcode ☃ 'quotes' \\ %s $1",
        environment=Environment.TEST,
        permissions=("orders:*", "read", "*"),
        rate_limit_per_minute=7,
        expire_time=LATER,
        user_id="u1",
        user_email="u1@example.com",
        metadata={"a": '{"b": [1]}', "ü": "", "\ud7ff": '"'},
        allowed_cidrs=("10.0.0.0/8", "2001:db8::/32"),
    ),
)
PLAIN = ImportRow(number=2, digest=digest("plain"), hint="", active=True, draft=KeyDraft(name="b", metadata={}))


def with_digest(token: str) -> ImportRow:
    """Gives a row of a token."""
    return replace(PLAIN, digest=digest(token))


async def store_rows(store: PostgresStore, organization_id: str, *rows: ImportRow) -> set[str]:
    """Stores rows in a transaction of their own; gives the ids of the new keys."""
    async with store.transaction() as transaction:
        await transaction.lock_organization(organization_id)
        return set(
            await transaction.import_keys(organization_id, "key_importer", {next_id("key_"): row for row in rows})
        )


async def known(store: PostgresStore, *rows: ImportRow) -> dict[bytes, KnownToken]:
    """Reads whose the digests of rows are."""
    async with store.transaction() as transaction:
        return {token.digest: token for token in await transaction.find_tokens([row.digest for row in rows])}


async def test_rows_are_read_as_they_were_stored(store: PostgresStore) -> None:
    """Every field of a row comes back as it went in, with the key and by its digest, and differs in nothing."""
    await insert_organization(store)
    ids = await store_rows(store, "acme", FULL, PLAIN)
    tokens = await known(store, FULL, PLAIN)
    assert ids == {token.key_id for token in tokens.values()}
    for row in (FULL, PLAIN):
        token = tokens[row.digest]
        expected = (row.draft, row.hint, row.active, "acme", False)
        assert expected == (token.draft, token.hint, token.active, token.organization_id, token.is_ended)
        assert () == token.differences(row)
        key = await store.get_key(token.key_id)
        assert key is not None
        assert (row.draft.name, row.draft.permissions, row.draft.metadata, row.draft.allowed_cidrs, row.hint) == (
            key.name,
            key.permissions,
            key.metadata,
            key.allowed_cidrs,
            key.secrets[0].hint,
        )
        assert ("key_importer", row.draft.expire_time, None) == (key.created_by, key.expire_time, key.last_used_time)
    organization = await store.get_organization("acme")
    assert organization is not None
    assert 2 == organization.key_count


async def test_known_digests_are_passed_over(store: PostgresStore) -> None:
    """Rows whose digests are there are neither stored nor counted, whoever has them, and the others are."""
    await insert_organization(store)
    await insert_organization(store, "rival")
    _, minted = await insert_key(store, "rival")
    await store_rows(store, "acme", FULL)
    assert 1 == len(await store_rows(store, "acme", FULL, PLAIN, with_digest(minted)))
    organization = await store.get_organization("acme")
    assert organization is not None
    assert 2 == organization.key_count
    tokens = await known(store, FULL, with_digest(minted), with_digest("nobody's"))
    assert ["acme", "rival"] == sorted(token.organization_id for token in tokens.values())


async def test_two_imports_of_the_same_digests(store: PostgresStore, observer: Connection) -> None:
    """Two organizations that import the same digests at once, in opposite orders, do not deadlock: one waits for the
    other, and each digest is stored once.
    """
    await insert_organization(store)
    await insert_organization(store, "rival")
    rows = [with_digest(f"token {number}") for number in range(50)]
    async with store.transaction() as transaction:
        await transaction.lock_organization("acme")
        first = await transaction.import_keys("acme", "", {next_id("key_"): row for row in rows})
        waiting = await started_and_waiting(observer, store_rows(store, "rival", *reversed(rows), PLAIN))
    assert (50, 1) == (len(first), len(await waiting))
    orphans = "SELECT count(*) FROM key k WHERE NOT EXISTS (SELECT 1 FROM secret WHERE key_id = k.id)"
    assert 0 == await observer.fetchval(orphans)


async def test_imports_in_opposite_orders(store: PostgresStore, observer: Connection) -> None:
    """Imports that share digests never wait for each other in a ring, in whatever order their rows come: one of two
    that are held up by a third goes on when that is done, and then the other.
    """
    for organization_id in ("acme", "rival", "third"):
        await insert_organization(store, organization_id)
    low, middle, high = sorted((with_digest(f"token {number}") for number in range(3)), key=lambda row: row.digest)
    async with store.transaction() as transaction:
        await transaction.lock_organization("third")
        await transaction.import_keys("third", "", {next_id("key_"): middle})
        one = await started_and_waiting(observer, store_rows(store, "acme", high, middle, low))
        other = await started_and_waiting(observer, store_rows(store, "rival", low, high), 2)
    assert (2, 0) == (len(await one), len(await other))


async def test_newest_revision(store: PostgresStore) -> None:
    """The newest revision is that of the last change, and 0 before there was any."""
    await insert_organization(store)
    async with store.transaction() as transaction:
        assert 0 == await transaction.newest_revision()
        revision = await transaction.record_change("key", "key_a")
    async with store.transaction() as transaction:
        assert revision == await transaction.newest_revision()
