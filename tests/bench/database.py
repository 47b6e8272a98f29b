"""The databases that are asked: made, filled and dropped by the benchmark."""

from __future__ import annotations

import asyncio
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from bench.indexes import without_indexes
from bench.machine import BenchError, pinned, process_cpu_s, process_name
from latchgate.domain.model import Environment, KeyType
from latchgate.domain.token import MintedToken, TokenFormat
from latchgate.storage.embedded import EmbeddedDatabaseError, EmbeddedPostgres
from latchgate.storage.migrate import migrate

TAG_KEY = "tag-key-of-the-benchmark-0123456789abcdef"
MAX_CONNECTIONS = 500
URL_VARIABLE = "LATCHGATE_DATABASE_URL"

MAX_TOKENS = 50_000
"""Of how many keys the tokens are known, evenly spread over all: more than are asked for while a server is cached."""

_FILL = (
    "INSERT INTO plan (id, rate_limit_per_minute, max_keys) VALUES ('bench', 10000, 1000)",
    """
    INSERT INTO organization (id, name, plan_id, key_count)
    SELECT 'bench-' || lpad(o::text, 4, '0'), 'Organization ' || o, 'bench',
           least(1000, $1 - o * 1000)
    FROM generate_series(0, ($1 - 1) / 1000) AS o
    """,
    """
    INSERT INTO key (id, organization_id, name, key_type, environment, permissions, rate_limit_per_minute, user_id,
                     user_email, metadata, allowed_cidrs, created_by)
    SELECT 'key_' || lpad(to_hex(n), 10, '0') || left(md5(n::text), 16),
           'bench-' || lpad(((n - 1) / 1000)::text, 4, '0'),
           'service ' || lpad(n::text, 7, '0'), 'secret', 'live',
           ARRAY['orders:read', 'orders:write', 'invoices:read'], 0,
           'user-' || lpad(n::text, 7, '0'), 'user-' || lpad(n::text, 7, '0') || '@example.com',
           '{"team": "payments", "region": "eu-west"}', ARRAY[]::text[], ''
    FROM generate_series(1, $1) AS n
    """,
    # Known tokens lie among the others, so that a lookup of them finds the pages as cold or warm as any other's.
    """
    INSERT INTO secret (digest, key_id, hint)
    SELECT coalesce(known.digest, sha256(uuid_send(gen_random_uuid()))),
           'key_' || lpad(to_hex(n), 10, '0') || left(md5(n::text), 16),
           coalesce(known.hint, 'lk_?????')
    FROM generate_series(1, $1) AS n
    LEFT JOIN (
        SELECT 1 + (place - 1) * $1 / $2 AS n, digest, hint
        FROM unnest($3::bytea[], $4::text[]) WITH ORDINALITY AS given (digest, hint, place)
    ) known USING (n)
    ORDER BY n
    """,
    # Used before, long ago: of first uses somebody would be told, once for each key.
    "INSERT INTO last_used (secret_id, used_time) SELECT id, '2020-01-01' FROM secret ORDER BY id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """A database with `keys` keys, some tokens of them, and for a few tokens whose they are."""

    keys: int
    url: str
    size_bytes: int
    tokens: Sequence[str]
    sample: dict[str, str]


class Cluster:
    """A PostgreSQL server on which the benchmark makes databases of its own."""

    def __init__(self, url: str, connection: asyncpg.Connection[asyncpg.Record], *, is_embedded: bool) -> None:
        """Takes the address of any database on it, and a connection to that."""
        self._url = url
        self._connection = connection
        self.is_embedded = is_embedded

    async def version(self) -> str:
        """Gives the server's version."""
        shown: str = await self._connection.fetchval("SHOW server_version")
        return shown.split(maxsplit=1)[0]

    async def setting(self, name: str) -> str:
        """Gives a setting as people write it."""
        shown: str = await self._connection.fetchval("SELECT current_setting($1)", name)
        return shown

    @asynccontextmanager
    async def seeded(self, keys: int, tokens: int = MAX_TOKENS) -> AsyncIterator[Seeded]:
        """Makes a database with so many keys, and drops it in the end. Of at most `tokens` keys the token is known."""
        name = f"latchgate_bench_{uuid.uuid4().hex[:12]}"
        await self._connection.execute(f"CREATE DATABASE {name}")
        try:
            url = urlunsplit(urlsplit(self._url)._replace(path=f"/{name}"))
            await migrate(url)
            yield await _fill(url, keys, tokens)
        finally:
            await self._connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    async def cpu_s(self, url: str) -> dict[int, float] | None:
        """Gives the processor time of each of the service's connections to a database, in seconds, by process.

        None if they are not on this machine.
        """
        rows = await self._connection.fetch(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'latchgate' AND datname = $1",
            urlsplit(url).path.removeprefix("/"),
        )
        pids = [row["pid"] for row in rows]
        if not all(process_name(pid) == "postgres" for pid in pids):
            return None
        return {pid: process_cpu_s(pid) for pid in pids}


@asynccontextmanager
async def cluster(cores: Sequence[int]) -> AsyncIterator[Cluster]:
    """Connects to the server that LATCHGATE_DATABASE_URL names, or starts one on these cores. Raises BenchError."""
    given = os.environ.get(URL_VARIABLE)
    if given:
        async with _connected(given, is_embedded=False) as found:
            yield found
        return
    with tempfile.TemporaryDirectory(prefix="latchgate-bench-") as folder:
        try:
            # Not on a thread: what is started takes its cores from the thread that starts it.
            with pinned(cores):
                embedded = EmbeddedPostgres.start(Path(folder))
                try:
                    await _configure(await embedded.create_database())
                finally:
                    embedded.stop()
                embedded = EmbeddedPostgres.start(Path(folder))
        except EmbeddedDatabaseError as error:
            # Its log is gone with the folder.
            raise BenchError(str(error).partition("; see ")[0]) from None
        try:
            async with _connected(await embedded.create_database(), is_embedded=True) as started:
                yield started
        finally:
            await asyncio.to_thread(embedded.stop)


async def _configure(url: str) -> None:
    """Has the server run as that of a service is run, from its next start on.

    As many connections as the largest service of a benchmark needs, and a quarter of the machine's memory for pages,
    where PostgreSQL's manual begins: https://www.postgresql.org/docs/current/runtime-config-resource.html
    """
    quarter_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 // 2**20
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"ALTER SYSTEM SET max_connections = {MAX_CONNECTIONS}")
        await connection.execute(f"ALTER SYSTEM SET shared_buffers = '{quarter_mb}MB'")
    finally:
        await connection.close()


@asynccontextmanager
async def _connected(url: str, *, is_embedded: bool) -> AsyncIterator[Cluster]:
    try:
        connection = await asyncpg.connect(url, timeout=5)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise BenchError(
            f"the database that {URL_VARIABLE} names can not be reached ({type(error).__name__})"
        ) from None
    try:
        yield Cluster(url, connection, is_embedded=is_embedded)
    finally:
        await connection.close()


async def _fill(url: str, keys: int, tokens: int) -> Seeded:
    minted = _mint(min(keys, tokens))
    digests, hints = [each.secret.digest for each in minted], [each.secret.hint for each in minted]
    arguments: dict[int, tuple[object, ...]] = {1: (keys,), 2: (keys,), 3: (keys, len(minted), digests, hints)}
    connection = await asyncpg.connect(url)
    try:
        async with without_indexes(connection, ("key", "secret", "last_used", "key_notice")):
            for position, statement in enumerate(_FILL):
                await connection.execute(statement, *arguments.get(position, ()))
        # What a server does by itself within its first hour, done before it is measured.
        await connection.execute("VACUUM (FREEZE, ANALYZE) plan, organization, key, secret, last_used")
        with suppress(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CHECKPOINT")
        known = minted[:: max(1, len(minted) // 16)][:16]
        rows = await connection.fetch(
            "SELECT digest, key_id FROM secret WHERE digest = ANY ($1::bytea[])", [each.secret.digest for each in known]
        )
        owners = {row["digest"]: row["key_id"] for row in rows}
        size: int = await connection.fetchval("SELECT pg_database_size(current_database())")
    finally:
        await connection.close()
    return Seeded(
        keys=keys,
        url=url,
        size_bytes=size,
        tokens=[each.token for each in minted],
        sample={each.token: owners[each.secret.digest] for each in known},
    )


def _mint(count: int) -> list[MintedToken]:
    tokens = TokenFormat(TAG_KEY.encode())
    return [tokens.mint(KeyType.SECRET, Environment.LIVE) for _ in range(count)]


async def distinct_keys_used(url: str) -> int:
    """Gives for how many keys a use was stored since they were filled in."""
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval("SELECT count(*) FROM last_used WHERE used_time > '2020-01-02'")
    finally:
        await connection.close()
    return count


async def make_room(url: str) -> None:
    """Lets organizations have as many keys as a benchmark wants to make."""
    await _execute(url, "UPDATE plan SET max_keys = 1000000")


async def lift_limits(url: str) -> None:
    """Lets keys be used as often as anyone likes. Before a service is started on it."""
    await _execute(url, "UPDATE plan SET rate_limit_per_minute = 0")


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
