"""What a deployment is given at its first start, and keeps."""

from __future__ import annotations

import asyncio
import secrets
from datetime import timedelta

import pytest

from latchgate.domain.model import ROOT_ORGANIZATION_ID, Environment, KeyType
from latchgate.domain.permissions import WILDCARD
from latchgate.domain.token import Form, TokenFormat, digest
from latchgate.storage import queries
from latchgate.storage.bootstrap import BootstrapError, RootKey, ensure_root_key, load_tag_key
from latchgate.storage.migrate import migrate
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from support.databases import TOKENS, insert_key, insert_organization, next_id, opened

TAG_KEY = b"a tag key from the settings, 32+"
ROOT_TOKEN = "root-token-of-this-test-0123456789abcdef"


async def _ensure(database: Database, root_token: str | None = None) -> RootKey:
    return await ensure_root_key(database, TOKENS, next_id, root_token)


async def _root_keys(observer: Connection) -> int:
    count: int = await observer.fetchval("SELECT count(*) FROM key WHERE organization_id = 'org_root'")
    return count


async def _stored(observer: Connection) -> set[str]:
    return {row["name"] for row in await observer.fetch("SELECT name FROM deployment")}


async def test_tag_key_is_made_once_by_all_who_start_together(database_url: str) -> None:
    """Many workers that start on a new database at once all get the same tag key, and so does every later one."""
    async with opened(database_url, pool_size=8) as database:
        made = await asyncio.gather(*(load_tag_key(database, None) for _ in range(8)))
        again = await load_tag_key(database, None)

    assert {again} == set(made)
    assert 32 == len(again)


async def test_tag_keys_of_two_deployments_differ(database_url: str, empty_database_url: str) -> None:
    """A tag key is made at random."""
    await migrate(empty_database_url)
    async with opened(database_url) as one, opened(empty_database_url) as other:
        assert await load_tag_key(one, None) != await load_tag_key(other, None)


async def test_tag_key_from_the_settings_is_not_stored(database: Database, observer: Connection) -> None:
    """Of a tag key from the settings the database holds a fingerprint only: a copy of the database mints nothing."""
    assert TAG_KEY == await load_tag_key(database, TAG_KEY)
    assert TAG_KEY == await load_tag_key(database, TAG_KEY)

    assert {"tag_key_fingerprint"} == await _stored(observer)
    assert 0 == await observer.fetchval("SELECT count(*) FROM deployment WHERE value = $1", TAG_KEY)


async def test_other_tag_key_is_refused(database: Database, observer: Connection) -> None:
    """A tag key that is not the one before is refused, as it would refuse all tokens, and changes nothing."""
    await load_tag_key(database, TAG_KEY)
    with pytest.raises(BootstrapError, match="LATCHGATE_TAG_KEY is not the key"):
        await load_tag_key(database, TAG_KEY[::-1])

    assert TAG_KEY == await load_tag_key(database, TAG_KEY)
    assert {"tag_key_fingerprint"} == await _stored(observer)


async def test_missing_tag_key_is_refused(database: Database, observer: Connection) -> None:
    """A deployment whose tag key came from the settings does not start without it."""
    await load_tag_key(database, TAG_KEY)
    with pytest.raises(BootstrapError, match="LATCHGATE_TAG_KEY is not set"):
        await load_tag_key(database, None)

    assert {"tag_key_fingerprint"} == await _stored(observer)


async def test_tag_key_that_was_made_can_not_be_replaced_by_the_settings(database: Database) -> None:
    """A tag key from the settings is refused on a database that has made its own, unless it is that one."""
    made = await load_tag_key(database, None)
    with pytest.raises(BootstrapError, match="LATCHGATE_TAG_KEY is not the key"):
        await load_tag_key(database, TAG_KEY)

    assert made == await load_tag_key(database, made)


async def test_root_key_is_made_once_by_all_who_start_together(database_url: str, observer: Connection) -> None:
    """Of many workers that start on a new database at once, one makes a root key and shows its token; the others and
    all later ones make none.
    """
    async with opened(database_url, pool_size=8) as database:
        made = await asyncio.gather(*(_ensure(database) for _ in range(8)))
        again = await _ensure(database)

    (shown,) = [each for each in made if each.token is not None]
    assert 7 == made.count(RootKey(key_id=None, token=None, is_refused=False))
    assert RootKey(key_id=None, token=None, is_refused=False) == again
    assert 1 == await _root_keys(observer)
    assert shown.token is not None
    assert Form.OWN is TOKENS.recognise(shown.token)
    assert shown.key_id == await observer.fetchval("SELECT key_id FROM secret WHERE digest = $1", digest(shown.token))


async def test_given_root_token_is_taken_once_by_all_who_start_together(
    database_url: str, observer: Connection
) -> None:
    """Of many workers that start with the same root token at once, one makes the key; nobody shows a token. The key may
    do everything, does not expire, and is counted.
    """
    async with opened(database_url, pool_size=8) as database:
        made = await asyncio.gather(*(_ensure(database, ROOT_TOKEN) for _ in range(8)))
        (key_id,) = {each.key_id for each in made} - {None}
        assert key_id is not None
        key = await PostgresStore(database).get_key(key_id)
        organization = await PostgresStore(database).get_organization(ROOT_ORGANIZATION_ID)

    assert {None} == {each.token for each in made}
    assert 1 == await _root_keys(observer)
    assert key is not None
    assert ((WILDCARD,), None, True, "root-") == (key.permissions, key.expire_time, key.active, key.secrets[0].hint)
    assert organization is not None
    assert 1 == organization.key_count


async def test_another_root_token_makes_another_root_key(database: Database, observer: Connection) -> None:
    """A root token that was never seen gets a root key beside those that there are: so a lost one is replaced."""
    await _ensure(database)
    first = await _ensure(database, ROOT_TOKEN)
    second = await _ensure(database, ROOT_TOKEN[::-1])

    assert first.key_id != second.key_id
    assert 3 == await _root_keys(observer)


async def test_given_root_token_is_enough(database: Database, observer: Connection) -> None:
    """Where a root token was given once, a start without one makes no further root key."""
    await _ensure(database, ROOT_TOKEN)
    assert RootKey(key_id=None, token=None, is_refused=False) == await _ensure(database)
    assert 1 == await _root_keys(observer)


@pytest.mark.parametrize(
    "change",
    [
        "revoke_time = now()",
        "revoke_time = now(), delete_time = now()",
        "active = false",
        "expire_time = now()",
    ],
)
async def test_root_token_that_was_ended_is_not_revived(database: Database, observer: Connection, change: str) -> None:
    """A restart with the token of a root key that was revoked, deleted, switched off or has expired leaves it so, says
    so, and makes no other.
    """
    made = await _ensure(database, ROOT_TOKEN)
    await observer.execute(f"UPDATE key SET {change} WHERE id = $1", made.key_id)  # noqa: S608 - one of the above

    assert RootKey(key_id=None, token=None, is_refused=True) == await _ensure(database, ROOT_TOKEN)
    assert 1 == await _root_keys(observer)
    assert not await observer.fetchval(queries.SECRET_IS_GOOD_ROOT, digest(ROOT_TOKEN))


async def test_root_token_that_was_rotated_away_is_not_revived(database: Database, store: PostgresStore) -> None:
    """A restart with a root token in whose place a rotation has put another leaves it ended."""
    made = await _ensure(database, ROOT_TOKEN)
    await _ensure(database, ROOT_TOKEN[::-1])
    assert made.key_id is not None
    async with store.transaction() as transaction:
        await transaction.lock_key(made.key_id)
        minted = TOKENS.mint(KeyType.SECRET, Environment.LIVE)
        await transaction.rotate_secret(made.key_id, minted.secret, timedelta())

    assert RootKey(key_id=None, token=None, is_refused=True) == await _ensure(database, ROOT_TOKEN)


async def test_token_of_a_tenant_is_no_root_token(database: Database, store: PostgresStore) -> None:
    """A root token that is the token of a tenant's key does not become root."""
    await insert_organization(store)
    _, token = await insert_key(store)

    assert RootKey(key_id=None, token=None, is_refused=True) == await _ensure(database, token)


async def test_root_token_that_looks_like_one_of_ours_is_refused(database: Database, observer: Connection) -> None:
    """A root token that begins like one of this service's and has a wrong tag would never be looked up: it is refused,
    without being repeated.
    """
    token = TokenFormat(secrets.token_bytes(32)).mint(KeyType.SECRET, Environment.LIVE).token
    with pytest.raises(BootstrapError, match="LATCHGATE_ROOT_TOKEN") as caught:
        await _ensure(database, token)

    assert token not in str(caught.value)
    assert 0 == await _root_keys(observer)


async def test_root_key_is_made_again_once_none_is_left(database: Database, observer: Connection) -> None:
    """A database in which no lasting root key is left gets another: no operator is locked out for ever."""
    await _ensure(database)
    await observer.execute("UPDATE key SET revoke_time = now() WHERE organization_id = 'org_root'")

    made = await _ensure(database)
    assert made.token is not None
    assert 2 == await _root_keys(observer)
