"""Filling large tables: indexes and constraints are made when all rows are there, which takes a fraction of the time.

What the tables are like afterwards is the same, but that the pages of indexes are as full as those of a new index.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from bench.machine import BenchError

# What rows and indexes are sorted with. It is set for the session that fills, and for no other.
_SETTINGS = ("SET work_mem = '256MB'", "SET maintenance_work_mem = '512MB'")

# Keys before what refers to them.
_CONSTRAINTS = """
    SELECT conrelid::regclass::text AS relation, conname AS name, pg_get_constraintdef(oid) AS definition
    FROM pg_constraint
    WHERE conrelid = ANY ($1::text[]::regclass[]) AND contype IN ('p', 'u', 'f')
       OR confrelid = ANY ($1::text[]::regclass[]) AND contype = 'f'
    ORDER BY contype = 'f', contype <> 'p', conname
"""
_INDEXES = """
    SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition
    FROM pg_index
    WHERE indrelid = ANY ($1::text[]::regclass[])
    ORDER BY indexrelid::regclass::text
"""


@asynccontextmanager
async def without_indexes(connection: asyncpg.Connection[asyncpg.Record], tables: Sequence[str]) -> AsyncIterator[None]:
    """Drops all indexes and keys of these tables, with what refers to them, and makes them again at the end."""
    constraints = await connection.fetch(_CONSTRAINTS, tables)
    before = await connection.fetch(_INDEXES, tables)
    for each in reversed(constraints):
        await connection.execute(f'ALTER TABLE {each["relation"]} DROP CONSTRAINT "{each["name"]}"')
    # Those that belonged to keys are gone with them.
    indexes = await connection.fetch(_INDEXES, tables)
    for each in indexes:
        await connection.execute(f"DROP INDEX {each['name']}")
    for setting in _SETTINGS:
        await connection.execute(setting)
    yield
    for each in indexes:
        await connection.execute(each["definition"])
    for each in constraints:
        await connection.execute(f'ALTER TABLE {each["relation"]} ADD CONSTRAINT "{each["name"]}" {each["definition"]}')
    if (constraints, before) != (
        await connection.fetch(_CONSTRAINTS, tables),
        await connection.fetch(_INDEXES, tables),
    ):
        raise BenchError("the tables have not got all of their indexes and keys again")
