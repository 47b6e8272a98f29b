"""Connections that know the arrays of built-in types without asking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from latchgate.storage.link import Link
from latchgate.storage.postgres import Connection, Database
from latchgate.storage.session import ARRAYS
from support.statements import statements

VALUES: dict[str, list[Any]] = {
    "bytea": [b"", b"\x00\xff", None],
    "int2": [-(2**15), 2**15 - 1, None],
    "int4": [-(2**31), 2**31 - 1, None],
    "int8": [-(2**63), 2**63 - 1, None],
    "float8": [0.1, -math.inf, math.inf, None],
    "timestamptz": [datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), None],
    "interval": [timedelta(days=-1), timedelta(microseconds=1), None],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gathers the types that the driver asks the server for."""
    types: list[int] = []
    ask = asyncpg.Connection._introspect_types  # type: ignore[attr-defined]  # noqa: SLF001 - what is overridden has no public name

    async def noting(self: Connection, typeoids: Sequence[int], *more: Any) -> Any:
        types.extend(typeoids)
        return await ask(self, typeoids, *more)

    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", noting)
    return types


async def test_no_statement_has_a_type_asked_for(database: Database, asked: list[int]) -> None:
    """Of what the statements take and give the driver knows all, in every connection."""
    all_statements = [each for named in statements().values() for each in named.values()]
    async with database.connection() as connection:
        for statement in all_statements:
            await connection.prepare(statement)
    assert (True, []) == (len(all_statements) > 100, asked)


@pytest.mark.parametrize("element", VALUES)
async def test_values_of_arrays(database_url: str, asked: list[int], element: str) -> None:
    """What is sent in an array comes back, also from within the server, and none is asked for."""
    link = Link(database_url, timeout_s=5.0)
    async with link.connection() as connection:
        for values in (VALUES[element], []):
            row = await connection.fetchrow(f"SELECT $1::{element}[] AS all, $1::{element}[]::text AS read", values)
            assert row is not None
            assert values == row["all"]
            assert row["read"] == await connection.fetchval(f"SELECT $1::text::{element}[]::text", row["read"])
    link.cut()
    assert [] == asked


async def test_what_is_known_is_what_the_server_says(observer: Connection) -> None:
    """Numbers and elements are those of the catalogue."""
    said = await observer.fetch(
        "SELECT oid::int, typname AS name, typelem::int AS elemtype FROM pg_type WHERE oid = ANY ($1::text::oid[])",
        "{" + ",".join(map(str, ARRAYS)) + "}",
    )
    known = {(array["oid"], array["name"], array["elemtype"]) for array in ARRAYS.values()}
    assert known == {(row["oid"], row["name"], row["elemtype"]) for row in said}
    assert VALUES.keys() == {array["name"].removeprefix("_") for array in ARRAYS.values()}


async def test_other_types_are_asked_for(database: Database, asked: list[int]) -> None:
    """What is not known is asked for as ever, alone or beside what is."""
    async with database.connection() as connection:
        uuids = ["00000000-0000-0000-0000-000000000001"]
        assert uuids == [str(each) for each in await connection.fetchval("SELECT $1::uuid[]", uuids)]
        row = await connection.fetchrow("SELECT $1::int8[] AS numbers, $2::date[] AS days", [1], [])
        assert row is not None
        assert ([1], []) == (row["numbers"], row["days"])
    assert asked
