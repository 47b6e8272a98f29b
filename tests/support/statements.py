"""The SQL of the service, found wherever there is a module of queries."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Final

from latchgate import storage
from latchgate.storage.postgres import Database

OUTBOX: Final = "queries_outbox"
"""The module whose statements have a table of their own in the tests."""


def statements() -> dict[str, dict[str, str]]:
    """Gives the statements of each module of queries, by their names."""
    modules = [each.name for each in pkgutil.iter_modules(storage.__path__) if each.name.startswith("queries")]
    return {
        module: {
            name: value
            for name, value in vars(import_module(f"{storage.__name__}.{module}")).items()
            if name.isupper() and not name.startswith("_") and isinstance(value, str)
        }
        for module in modules
    }


async def prepared(database: Database, named: Mapping[str, str]) -> dict[str, tuple[str, set[str]]]:
    """Gives the types that statements take and the columns that they give, as PostgreSQL understands them."""
    taken_and_given = {}
    async with database.connection() as connection:
        for name, value in named.items():
            statement = await connection.prepare(value)
            parameters = " ".join(parameter.name for parameter in statement.get_parameters())
            taken_and_given[name] = (parameters, {attribute.name for attribute in statement.get_attributes()})
    return taken_and_given
