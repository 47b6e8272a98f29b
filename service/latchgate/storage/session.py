"""asyncpg's connections, that know the arrays of built-in types from the start.

Of itself asyncpg knows of arrays those of text alone, and asks for each other one when a connection first meets it, by
a query over the catalogue that takes PostgreSQL about 10 ms, as long as many of our own. All that it would be told is
the same in every PostgreSQL: https://github.com/postgres/postgres/blob/master/src/include/catalog/pg_type.dat
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import asyncpg

# The driver's classes are generic to the type checker alone.
if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection


def _array(element: str, element_oid: int) -> Mapping[str, Any]:
    """Says of an array what asyncpg would read of it in the catalogue."""
    return {
        "ns": "pg_catalog",
        "name": f"_{element}",
        "kind": b"b",
        "basetype": None,
        "elemtype": element_oid,
        "elemdelim": b",",
        "range_subtype": None,
        "attrtypoids": None,
        "attrnames": None,
    }


# By their numbers in the catalogue.
ARRAYS: Final[Mapping[int, Mapping[str, Any]]] = {
    oid: {"oid": oid, **_array(element, element_oid)}
    for oid, element, element_oid in (
        (1001, "bytea", 17),
        (1005, "int2", 21),
        (1007, "int4", 23),
        (1016, "int8", 20),
        (1022, "float8", 701),
        (1185, "timestamptz", 1184),
        (1187, "interval", 1186),
    )
}
# Stands for the statement by which asyncpg asks: it has a name, and so has displaced no other.
_UNASKED: Final = SimpleNamespace(name="unasked")


class Session(_Connection):
    """A connection that asks the server only for types that are not in ARRAYS."""

    async def _introspect_types(self, typeoids: Sequence[int], *more: Any) -> Any:
        """Gives rows of types. There is no public way to tell asyncpg of them: where this is not called, it asks."""
        if ARRAYS.keys() >= set(typeoids):
            return [ARRAYS[oid] for oid in typeoids], _UNASKED
        return await super()._introspect_types(typeoids, *more)  # type: ignore[misc]  # not in the stubs
