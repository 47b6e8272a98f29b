"""What the database, and whoever copies it, learns of tokens: nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

from latchgate.domain.keys import KeyManager
from latchgate.domain.model import KeyType
from latchgate.domain.token import digest
from latchgate.storage.bootstrap import ensure_root_key, load_tag_key
from latchgate.storage.lookups import FindMany
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.requests import forget_requests
from latchgate.storage.stores import PostgresStore
from support.databases import ROOT_CALLER, TAG_KEY, TOKENS, draft, insert_organization, next_id

ROOT_TOKEN = "root-token-of-this-test-0123456789abcdef"
REQUEST_ID = UUID("0190b5d2-0000-7000-8000-0000000000aa")


async def _columns(observer: Connection) -> list[tuple[str, str]]:
    """Every table of the schema, with all of its rows as text: columns of bytes are in hexadecimal."""
    rows = await observer.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
    found = []
    for (table,) in rows:
        rows_of = f"SELECT coalesce(string_agg(t::text, chr(10)), '') FROM {table} t"  # noqa: S608 - a table's name
        text = await observer.fetchval(rows_of)
        found.append((table, text))
    return found


def _traces(value: bytes) -> Iterator[str]:
    """The forms in which a value could stand somewhere."""
    yield value.decode()
    yield value.hex()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        # Wherever the value begins within a longer one, some of its groups of three bytes are written alike.
        for start in range(3):
            yield encode(value[start:][: len(value[start:]) // 3 * 3]).decode()


def _tables_with(dump: list[tuple[str, str]], value: str) -> set[str]:
    """The tables in which a token, or its random part, can be found."""
    parts = [value.encode(), value.encode()[-40:-11], value.encode()[9:]]
    return {table for table, text in dump for part in parts for trace in _traces(part) if trace in text}


async def test_no_secret_token_is_stored(
    database: Database, store: PostgresStore, keys: KeyManager, find: FindMany, observer: Connection
) -> None:
    """After all that can be done with tokens, none of a secret key, and no root token, tag key or request id stands
    anywhere in the database, in any form: only digests and hints. Publishable tokens are kept readable, and nowhere
    else than with their secret.
    """
    await load_tag_key(database, TAG_KEY)
    root = await ensure_root_key(database, TOKENS, next_id, None)
    await ensure_root_key(database, TOKENS, next_id, ROOT_TOKEN)
    await insert_organization(store)
    created = await keys.create(ROOT_CALLER, "acme", draft(), REQUEST_ID)
    rotated = await keys.rotate(ROOT_CALLER, created.key.id, timedelta(hours=1), REQUEST_ID)
    plain = await keys.create(ROOT_CALLER, "acme", draft())
    public = await keys.create(ROOT_CALLER, "acme", draft(key_type=KeyType.PUBLISHABLE), UUID(int=7))
    await find([digest(each.token) for each in (created, rotated, plain, public)])
    await keys.revoke(ROOT_CALLER, plain.key.id, "lost")
    dump = await _columns(observer)

    assert root.token is not None
    for token in (created.token, rotated.token, plain.token, root.token, ROOT_TOKEN):
        assert set() == _tables_with(dump, token)
        assert any(digest(token).hex() in text for table, text in dump if table == "secret")
    assert {"secret"} == _tables_with(dump, public.token)
    assert set() == _tables_with(dump, TAG_KEY.decode())
    for form in (str(REQUEST_ID), REQUEST_ID.hex, REQUEST_ID.bytes.hex()):
        assert not [table for table, text in dump if form in text]


async def test_sealed_tokens_are_all_that_stands_for_ten_minutes(
    database: Database, store: PostgresStore, keys: KeyManager, observer: Connection
) -> None:
    """What is kept for a retry is sealed, is of the same length for all tokens of a kind, and is gone once cleared."""
    await insert_organization(store)
    for number in range(3):
        await keys.create(ROOT_CALLER, "acme", draft(), UUID(int=number))
    lengths = await observer.fetch("SELECT DISTINCT octet_length(sealed_token) FROM request")
    assert 1 == len(lengths)

    await observer.execute("UPDATE request SET create_time = now() - interval '11 minutes'")
    await forget_requests(database)
    assert 0 == await observer.fetchval("SELECT count(sealed_token) FROM request")


async def test_hints_show_five_characters(store: PostgresStore, keys: KeyManager, observer: Connection) -> None:
    """A hint is the prefix and five characters of the random part; of a root token that was given, its first five."""
    await insert_organization(store)
    issued = await keys.create(ROOT_CALLER, "acme", draft())
    hint = await observer.fetchval("SELECT hint FROM secret WHERE digest = $1", digest(issued.token))

    assert issued.token[: len("lk_") + 5] == hint
    assert 8 == len(hint)
