"""How PostgreSQL carries out the statements that must stay fast however much is stored."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from latchgate.domain.model import KeyFilter
from latchgate.storage import queries, queries_outbox, queries_usage
from latchgate.storage.link import Link
from latchgate.storage.lookups import find_many, lookup_link
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.stores import PostgresStore
from support.databases import connected, opened, show
from support.folders import cloning

KEYS = 60_000
PAGE = 100
HOUR = 500_000
"""The first one in which something was counted."""

# `old` has most of all keys, and all of them are older than those of `new`: a walk along all keys by id would meet none
# of them for long, and yet statistics make it look cheap. The later half of its keys is revoked; a few are a user's.
FILL = f"""
INSERT INTO organization (id, name, plan_id) VALUES ('old', 'Old', 'default'), ('new', 'New', 'default');
INSERT INTO key (id, organization_id, name, key_type, environment, permissions, rate_limit_per_minute, user_id,
                 user_email, metadata, allowed_cidrs, created_by, revoke_time)
SELECT 'key_' || lpad(i::text, 26, '0'), CASE WHEN i <= 40000 THEN 'old' ELSE 'new' END, 'a key',
       CASE WHEN i % 10000 = 1 THEN 'publishable' ELSE 'secret' END, 'live', '{{read}}', 0,
       CASE WHEN i % 4000 = 0 THEN 'u1' ELSE '' END, '', '{{}}', '{{}}', '',
       CASE WHEN i BETWEEN 20001 AND 40000 THEN now() END
FROM generate_series(1, {KEYS}) i;
INSERT INTO secret (digest, key_id, hint, readable_token)
SELECT sha256(id::bytea), id, 'lk_abcde', CASE WHEN key_type = 'publishable' THEN 'public' END FROM key;
INSERT INTO last_used (secret_id) SELECT id FROM secret;
INSERT INTO usage_by_secret (secret_id, hour, outcome, count)
SELECT id, hour, 1, 1 FROM secret, generate_series({HOUR}, {HOUR} + 1) AS hours (hour) WHERE id <= 20000;
INSERT INTO usage_by_organization (organization_id, hour, outcome, count)
SELECT 'o' || n, hour, 1, 1 FROM generate_series(1, 500) n, generate_series({HOUR}, {HOUR} + 23) AS hours (hour);
INSERT INTO webhook (id, organization_id, url, event_types, created_by, sealed_secret)
VALUES ('whk_1', 'new', 'https://example.com/', '{{}}', '', '');
INSERT INTO event (id, organization_id, type, subject, body, dispatch_time)
SELECT 'evt_' || i, 'new', 'api_key.created', 'key_' || i, '{{}}', now() FROM generate_series(1, 20000) i;
INSERT INTO delivery (id, webhook_id, organization_id, event_number, event_type, subject, state, next_time, done_time)
SELECT 'dlv_' || number, 'whk_1', 'new', number, type, subject, 'delivered', NULL, now() FROM event;
UPDATE delivery SET state = 'pending', done_time = NULL, next_time = now() + interval '1 hour'
WHERE event_number % 4 = 0;
INSERT INTO mail (id, event_number, recipient, state, next_time, done_time)
SELECT 'mail_' || number, number, 'ann@example.com', 'delivered', NULL, now() FROM event;
ANALYZE;
"""  # noqa: S608 - figures of this module


@pytest.fixture(scope="module")
def filled_url(postgres_url: str, template_url: str) -> Iterator[str]:
    """A database with many keys. Tests only read it."""
    name = f"test_{uuid.uuid4().hex}"

    async def make() -> None:
        async with connected(postgres_url) as connection:
            await connection.execute(cloning(name, template_url))
        async with connected(url) as connection:
            await connection.execute(FILL)

    async def drop() -> None:
        async with connected(postgres_url) as connection:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    asyncio.run(make())
    yield url
    asyncio.run(drop())


@pytest.fixture
async def filled(filled_url: str) -> AsyncIterator[Database]:
    """The storage layer's pools on it."""
    async with opened(filled_url) as database:
        yield database


@pytest.fixture
async def lookups(filled_url: str) -> AsyncIterator[Link]:
    """The connection for lookups on it."""
    link = lookup_link(filled_url)
    yield link
    link.cut()


async def generic_plan(connection: Connection, statement: str, types: str, values: str) -> dict[str, Any]:
    """The plan by which the connection would run a statement that it keeps prepared."""
    await connection.execute(f"PREPARE kept {f'({types})' if types else ''} AS {statement}")
    answer = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE kept {f'({values})' if values else ''}")
    await connection.execute("DEALLOCATE kept")
    plan: dict[str, Any] = json.loads(answer)[0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step of a plan."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


def accesses(plan: dict[str, Any]) -> set[tuple[str, str, str]]:
    """How a plan reaches tables: the step, the table and the index."""
    return {
        (node["Node Type"], node["Relation Name"], node.get("Index Name", ""))
        for node in nodes(plan)
        if "Relation Name" in node
    }


FIND_ACCESSES = {
    ("Index Only Scan", "change_log", "change_log_pkey"),
    ("Index Scan", "secret", "secret_digest_unique"),
    # What came after one that has an end.
    ("Index Scan", "secret", "secret_by_key"),
    ("Index Scan", "key", "key_pkey"),
    ("Index Scan", "organization", "organization_pkey"),
    ("Index Scan", "plan", "plan_pkey"),
}


@pytest.mark.parametrize("count", [1, 500])
async def test_lookup_goes_by_the_digest(lookups: Link, count: int) -> None:
    """The Validate query reaches secrets by the index on the digest, and what belongs to them by primary keys, for one
    digest and for as many as are ever sent at once.
    """
    digests = f"(SELECT array_agg(digest) FROM (SELECT digest FROM secret LIMIT {count}) s)"  # noqa: S608 - a figure
    async with lookups.connection() as connection:
        array = await connection.fetchval(f"SELECT quote_literal({digests}::text)")
        plan = await generic_plan(connection, queries.SECRET_FIND, "bytea[]", array)

    assert FIND_ACCESSES == accesses(plan)
    conditions = {
        node["Index Name"]: node["Index Cond"] for node in nodes(plan) if node.get("Relation Name") == "secret"
    }
    assert {
        "secret_digest_unique": "(digest = ANY ($1))",
        "secret_by_key": "((key_id = s.key_id) AND (id > s.id))",
    } == conditions


async def test_lookup_goes_by_the_digest_on_a_database_that_was_new(database_url: str) -> None:
    """The plan is the same before anything is stored: connections are kept for weeks, and so are their plans."""
    link = lookup_link(database_url)
    async with link.connection() as connection:
        plan = await generic_plan(connection, queries.SECRET_FIND, "bytea[]", "'{}'")
    link.cut()

    assert FIND_ACCESSES == accesses(plan)


async def test_lookups_are_planned_once(lookups: Link) -> None:
    """Lookups of any number of digests share one plan from the first on."""
    find = find_many(lookups, show)
    for count in (1, 2, 3, 500):
        await find([bytes([count % 256]) * 32 for _ in range(count)])

    async with lookups.connection() as connection:
        plans = await connection.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1", queries.SECRET_FIND
        )

    assert [(4, 0)] == [tuple(row) for row in plans]


async def run_plan(database: Database, statement: str, *values: Any) -> dict[str, Any]:
    """The plan of a statement that is prepared anew for these values, with what it did."""
    async with database.connection() as connection:
        prepared = await connection.prepare(statement)
        (answer,) = await prepared.explain(*values, analyze=True)
    plan: dict[str, Any] = answer["Plan"]
    return plan


def key_scan(plan: dict[str, Any]) -> tuple[str, str, int]:
    """How the table of keys was reached: the step, the index, and how many rows were read."""
    (scan,) = [node for node in nodes(plan) if node.get("Relation Name") == "key"]
    read = scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)
    return scan["Node Type"], scan.get("Index Name", ""), int(read)


def steps(plan: dict[str, Any]) -> set[str]:
    """The kinds of steps of a plan."""
    return {node["Node Type"] for node in nodes(plan)}


def page(after: str, state: str | None, count: int) -> tuple[Any, ...]:
    """What the statements that list keys take, without the deleted ones."""
    show_deleted = False
    return ("old", after, None, None, state, show_deleted, count)


@pytest.mark.parametrize(
    ("after", "state", "index"),
    [
        pytest.param("", None, "key_by_organization", id="first"),
        pytest.param(f"key_{1000:026d}", None, "key_by_organization", id="deep"),
        pytest.param("", "revoked", "key_by_organization", id="revoked"),
        pytest.param("", "active", "key_unrevoked", id="active"),
    ],
)
async def test_page_reads_no_more_than_it_gives(filled: Database, after: str, state: str | None, index: str) -> None:
    """A page of an organization's keys is a walk along an index of its own that ends with the page: the first page as
    any later one, and however its keys lie among those of others.
    """
    plan = await run_plan(filled, queries.KEY_LIST, *page(after, state, PAGE))

    assert ("Index Scan", index, PAGE) == key_scan(plan)
    assert not {"Sort", "Seq Scan"} & steps(plan)


@pytest.mark.parametrize("after", ["", f"key_{30_000:026d}"])
async def test_page_of_a_user_reads_that_users_keys_alone(filled: Database, after: str) -> None:
    """A page of one user's keys reads no others: they are found by the index of users."""
    plan = await run_plan(filled, queries.KEY_LIST_OF_USER, *page(after, None, 5), "u1")

    assert "key_by_user" in {node.get("Index Name") for node in nodes(plan)}
    assert key_scan(plan)[2] <= 10


async def test_unused_keys_are_found_along_the_index(filled: Database) -> None:
    """A page of unused keys is a walk along the index of an organization's keys that count; it ends with the page, and
    looks up of each key alone when it was used.
    """
    since = datetime.now(UTC) + timedelta(days=1)
    plan = await run_plan(filled, queries.KEY_LIST_UNUSED, "old", "", "~", since, PAGE)

    assert ("Index Scan", "key", "key_unrevoked") in accesses(plan)
    assert not {"Sort", "Seq Scan"} & {node["Node Type"] for node in nodes(plan) if node.get("Relation Name")}
    read = [node["Actual Rows"] * node["Actual Loops"] for node in nodes(plan) if node.get("Relation Name")]
    assert PAGE == max(read)


async def test_reach_reads_no_keys(filled: Database) -> None:
    """How far a walk along an organization's keys goes is read from the index, and no further than that."""
    plan = await run_plan(filled, queries.KEY_REACH, "old", "", 1000)

    assert {"key_unrevoked"} == {index for _, table, index in accesses(plan) if table == "key"}
    assert 1000 == max(node["Actual Rows"] for node in nodes(plan))


@pytest.mark.parametrize(
    ("statement", "of", "table", "rows"),
    [
        pytest.param(queries_usage.USAGE_OF_KEY, f"key_{1000:026d}", "usage_by_secret", 2, id="key"),
        pytest.param(queries_usage.USAGE_OF_ORGANIZATION, "o7", "usage_by_organization", 24, id="organization"),
    ],
)
async def test_usage_is_looked_up_by_the_hour(filled: Database, statement: str, of: str, table: str, rows: int) -> None:
    """What others have counted in the same hours is not read, for a key as for an organization."""
    plan = await run_plan(filled, statement, of, HOUR - 100, HOUR + 100, 1)

    (scan,) = [node for node in nodes(plan) if node.get("Relation Name") == table]
    conditions = [node["Index Cond"] for node in nodes(plan) if node.get("Index Name") == f"{table}_pkey"]
    assert [True] == [f"({table}.hour = hours.hour) AND " in condition for condition in conditions]
    assert rows == round(scan["Actual Rows"] * scan["Actual Loops"])
    assert 0 == scan.get("Rows Removed by Filter", 0)


async def test_publishable_key_is_not_searched_among_all(filled: Database) -> None:
    """GetPublishableKey reads publishable keys alone."""
    plan = await run_plan(filled, queries.KEY_GET_PUBLISHABLE, "old", "live")

    assert "key_publishable" in {node.get("Index Name") for node in nodes(plan)}
    assert key_scan(plan)[2] <= 4


async def test_lists_are_planned_for_their_filters(filled_url: str) -> None:
    """However often keys were listed, the next list is planned for its own filters: a plan for any filters would not
    know which index serves them, and yet look cheaper for long pages.
    """
    async with opened(filled_url, pool_size=1) as database:
        store = PostgresStore(database)
        for user_id in ("", "u1"):
            for _ in range(7):
                await store.list_keys(KeyFilter(organization_id="old", user_id=user_id), "", 1001)
        async with database.connection() as connection:
            generic = await connection.fetchval(
                "SELECT coalesce(sum(generic_plans), 0) FROM pg_prepared_statements WHERE statement = ANY ($1::text[])",
                [queries.KEY_LIST, queries.KEY_LIST_OF_USER],
            )

    assert 0 == generic


async def test_what_is_due_is_asked_of_small_indexes(filled: Database) -> None:
    """What workers ask each second reads the indexes of what waits, by when it is due, however much is kept or waits
    for later.
    """
    leads = "ARRAY['expired', 'expiring_7'], ARRAY[interval '0', interval '7 days'], interval '30 seconds'"
    async with filled.connection() as connection:
        due = await generic_plan(connection, queries_outbox.OUTBOX_DUE, "", "")
        expiries = await generic_plan(connection, queries_outbox.EXPIRY_DUE, "text[], interval[], interval", leads)

    assert {"event_waiting", "delivery_due", "mail_due"} == {index for _, _, index in accesses(due)}
    assert "key_expiring" in {node.get("Index Name") for node in nodes(expiries)}
