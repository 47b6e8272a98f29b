"""`serve`, `migrate`, `health` and `--version`: what they say, and the status that they end with."""

from __future__ import annotations

import asyncio
import re
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import grpc
import pytest
import trustme

from apikeys.v1 import key_service_pb2 as keys_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from latchgate.app import serving
from latchgate.config import load
from latchgate.health import HealthError, check_health
from support.databases import connected
from support.faults import faulty_wire
from support.processes import SERVE, environment, latchgate, run_latchgate
from support.service import ROOT_TOKEN, TAG_KEY, RunningService, make_settings

ROOT_TOKEN_LINE = r"^lk_[0-9A-Za-z]{40}$"
Ending = Callable[..., tuple[int, str, str]]
NOBODY = "postgresql://user:hunter2-password@127.0.0.1:1/gate"


def assert_one_line(ended: tuple[int, str, str]) -> str:
    """Demands that a command has failed with one line of complaint and nothing else; gives the line."""
    status, out, err = ended
    assert (1, "", 1) == (status, out, err.count("\n")), err
    assert err.startswith("latchgate: ")
    return err


async def test_root_token_is_shown_once(empty_database_url: str, tmp_path: Path) -> None:
    """A first `serve` migrates, and shows the root token that it made, which works; the next one shows none."""
    variables = environment(**SERVE, DATABASE_URL=empty_database_url)
    async with latchgate("serve", tmp_path, variables) as process:
        address = await process.address()
        token = (await process.line(ROOT_TOKEN_LINE))[0]
        assert [token] == [line for line in process.err if re.search("lk_[0-9A-Za-z]{40}", line)]
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = KeyServiceStub(channel)
            listed = await stub.ListKeys(
                keys_pb.ListKeysRequest(organization_id="org_root"), metadata=(("authorization", f"Bearer {token}"),)
            )
        assert 1 == len(listed.keys)
        process.tell(signal.SIGTERM)
        assert 0 == await process.ended()
    async with latchgate("serve", tmp_path, variables) as process:
        await process.address()
        process.tell(signal.SIGTERM)
        assert 0 == await process.ended()
        assert not [line for line in process.err if "lk_" in line]
        assert [] == process.out


async def test_migrate(empty_database_url: str, tmp_path: Path) -> None:
    """`migrate` brings an empty database up to date, says from where to where, and finds nothing to do after that."""
    variables = environment(DATABASE_URL=empty_database_url)
    status, out, err = await run_latchgate("migrate", tmp_path, variables)
    assert (0, []) == (status, err)
    schema = out[0].removesuffix(" (was empty)")
    assert [f"{schema} (was empty)"] == out
    assert (0, [schema], []) == await run_latchgate("migrate", tmp_path, variables)


def test_migrate_without_database(ending: Ending) -> None:
    """`migrate` does not wait for a database that is away: it says so in one line, without its address."""
    complaint = assert_one_line(ending("migrate", DATABASE_URL=NOBODY))
    assert "database is not available" in complaint
    assert "hunter2" not in complaint


async def test_migrate_is_stopped(postgres_url: str, empty_database_url: str, tmp_path: Path) -> None:
    """`migrate` that is told to stop ends at once, with status 1, and leaves the database as it was."""
    async with faulty_wire(postgres_url) as wire:
        await wire.listen()
        wire.swallow()
        async with latchgate("migrate", tmp_path, environment(DATABASE_URL=wire.url(empty_database_url))) as process:
            await wire.until_accepted()
            process.tell(signal.SIGTERM)
            assert 1 == await process.ended()
        assert ["latchgate: stopped by a signal"] == [line.partition(";")[0] for line in process.err]
    async with connected(empty_database_url) as connection:
        assert 0 == await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")


@pytest.fixture
async def used_url(database_url: str) -> str:
    """A database that a service with the tests' tag key and root token has used."""
    async with serving(make_settings(database_url)) as running:
        await running.ready
    return database_url


def test_other_tag_key(ending: Ending, used_url: str) -> None:
    """With another tag key than the database's tokens were made with the service does not start, and says why."""
    complaint = assert_one_line(ending("serve", DATABASE_URL=used_url, TAG_KEY=TAG_KEY[::-1]))
    assert "LATCHGATE_TAG_KEY" in complaint
    assert TAG_KEY[::-1] not in complaint


def test_no_tag_key(ending: Ending, used_url: str) -> None:
    """Without the tag key that the database's tokens were made with the service does not start, and says why."""
    assert "LATCHGATE_TAG_KEY" in assert_one_line(ending("serve", DATABASE_URL=used_url))


@pytest.fixture
async def weak_url(postgres_url: str, database_url: str) -> AsyncIterator[str]:
    """The address of a database for a user who may look at nothing in it."""
    role = f"weak_{uuid.uuid4().hex}"
    parts = urlsplit(database_url)
    host = parts.netloc.rpartition("@")[2]
    async with connected(postgres_url) as connection:
        await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'hunter2-password'")
        yield urlunsplit(parts._replace(netloc=f"{role}:hunter2-password@{host}"))
        await connection.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_database_refuses(ending: Ending, weak_url: str, command: str) -> None:
    """A database whose user may not do what is needed is not waited for: one line says what it lacks."""
    complaint = assert_one_line(ending(command, DATABASE_URL=weak_url))
    assert "permission" in complaint
    assert "hunter2" not in complaint


async def test_health(service: RunningService) -> None:
    """`health` is content with a service that serves."""
    await check_health(load(listen=service.address))


async def test_health_of_service_without_database() -> None:
    """`health` says of a service that waits for its database that it is NOT_SERVING."""
    async with serving(make_settings(NOBODY)) as running:
        with pytest.raises(HealthError, match="NOT_SERVING"):
            await check_health(load(listen=running.listen))


async def test_health_behind_tls(database_url: str, tmp_path: Path) -> None:
    """`health` of a port that speaks TLS goes by the metrics: no certificate stands between it and the answer."""
    authority = trustme.CA()
    issued = authority.issue_cert("gate.example.com")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = {name: tmp_path / f"{file}.pem" for name, file in [("cert", "cert"), ("key", "key"), ("client_ca", "ca")]}
    variables = {f"tls_{name}": path for name, path in tls.items()}
    async with serving(make_settings(database_url, **variables)) as running:
        await running.ready
        settings = load(listen=running.listen, metrics_listen=running.metrics_listen, **variables)
        # On a thread: it blocks, as it may in a process of its own.
        await asyncio.to_thread(lambda: asyncio.run(check_health(settings)))
    with pytest.raises(HealthError, match="does not answer"):
        await check_health(settings)


async def test_health_process(service: RunningService, tmp_path: Path) -> None:
    """The status of `health` is 0 or 1; it says nothing or one line; and it heeds no proxy."""
    proxies = {"http_proxy": "http://127.0.0.1:1", "grpc_proxy": "http://127.0.0.1:1"}
    healthy = environment(LISTEN=service.address, METRICS_LISTEN=service.running.metrics_listen) | proxies
    assert (0, [], []) == await run_latchgate("health", tmp_path, healthy)
    status, out, err = await run_latchgate("health", tmp_path, environment(LISTEN="127.0.0.1:1"))
    assert (1, [], ["latchgate: 127.0.0.1:1 does not answer (UNAVAILABLE)"]) == (status, out, err)


@pytest.mark.parametrize(
    ("listen", "asked"), [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:1", "[::1]:1"), ("localhost:1", "localhost:1")]
)
async def test_health_of_all_addresses(listen: str, asked: str) -> None:
    """`health` of a service that listens on all addresses asks on this machine's own."""
    with pytest.raises(HealthError, match=f"^{re.escape(asked)} "):
        await check_health(load(listen=listen, allow_plaintext=True))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--version"], 0, version("latchgate")), ([], 2, "COMMAND"), (["sing"], 2, "sing"), (["--help"], 0, "migrate")],
)
def test_arguments(ending: Ending, arguments: list[str], status: int, said: str) -> None:
    """`--version` and `--help` answer and end with 0; what is no command is told so and ends with 2."""
    ended, out, err = ending(*arguments)
    assert status == ended
    assert said in (err if status else out)


async def test_warnings(database_url: str, tmp_path: Path) -> None:
    """A root token of the settings whose key was revoked does not come back; the log says that it is refused.

    And it says of a variable that is none of ours, most likely a slip of the pen, that it is not known; and of a scope
    that was in the deployment's file once how many keys still hold it.
    """
    settings = make_settings(database_url)
    async with serving(settings) as running:
        await running.ready
    async with connected(database_url) as connection:
        await connection.execute("UPDATE key SET revoke_time = now() WHERE organization_id = 'org_root'")
        await connection.execute("INSERT INTO organization (id, name, plan_id) VALUES ('acme', 'Acme', 'default')")
        await connection.execute(
            """
            INSERT INTO key (id, organization_id, name, key_type, environment, permissions, rate_limit_per_minute,
                             user_id, user_email, metadata, allowed_cidrs, created_by)
            SELECT 'key_' || number, 'acme', '', 'secret', 'live', '{read,orders:read}', 0, '', '', '{}', '{}', ''
            FROM generate_series(1, 3) AS number
            """
        )
    variables = environment(
        **SERVE, DATABASE_URL=database_url, ROOT_TOKEN=ROOT_TOKEN, TAG_KEY=TAG_KEY, DATABASE_URI="hunter2-password"
    )
    async with latchgate("serve", tmp_path, variables) as process:
        missing = await process.event("scope_missing")
        assert ("warning", "orders:read", 3) == (missing["level"], missing["scope"], missing["keys"])
        assert "warning" == (await process.event("root_token_refused"))["level"]
        assert "LATCHGATE_DATABASE_URI" == (await process.event("unknown_setting"))["name"]
        assert ROOT_TOKEN not in process.text
        assert "hunter2" not in process.text
        process.tell(signal.SIGTERM)
        assert 0 == await process.ended()


def test_audit_verify(ending: Ending, used_url: str) -> None:
    """`audit verify` says of each organization's trail whether it is whole."""
    status, out, _ = ending("audit", "verify", DATABASE_URL=used_url)
    assert 0 == status
    assert re.fullmatch(r"org_root: whole, up to event 1 with hash [0-9a-f]{64}\n", out)
    assert "organization none has no audit trail" in assert_one_line(
        ending("audit", "verify", "--organization", "none", DATABASE_URL=used_url)
    )


@pytest.fixture
async def spoilt_url(used_url: str) -> str:
    """A database whose audit trail has lost its last event."""
    async with connected(used_url) as connection:
        await connection.execute("UPDATE audit_head SET sequence = 2")
    return used_url


def test_audit_verify_finds_what_is_missing(ending: Ending, spoilt_url: str) -> None:
    """Where an event is missing, `audit verify` says which one, and ends with 1."""
    status, out, _ = ending("audit", "verify", DATABASE_URL=spoilt_url)
    assert (1, "org_root: BROKEN: event 2 is missing\n") == (status, out)


def test_audit_verify_without_a_database(ending: Ending) -> None:
    """Where the database is away, `audit verify` says so in one line."""
    assert "the database is not available" in assert_one_line(ending("audit", "verify", DATABASE_URL=NOBODY))
