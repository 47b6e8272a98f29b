"""Keys at rest: asyncpg and PostgreSQL behind the domain's ports."""
