"""Secrets go in and never come out: neither into logs, nor metrics, nor errors, nor tables, in a process of its own.

Every secret here is a canary. The scenario puts them where they belong and everywhere that they do not, makes the
database fail under way, and then all that the service and PostgreSQL have said is searched for each of them, in every
form that it could take.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import urlopen

import asyncpg
import grpc
import pytest

from apikeys.v1 import key_pb2
from apikeys.v1 import key_service_pb2 as pb
from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1 import token_service_pb2 as tokens_pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from apikeys.v1.token_service_pb2_grpc import TokenServiceStub
from support.processes import Latchgate, environment, latchgate
from support.service import bearer
from support.transport import DEADLINE_S, Http2, call_path, call_raw, fresh_database, length_delimited, path_of


def canary(name: str) -> str:
    """Makes a secret of mixed case that is found nowhere by chance."""
    return f"Canary-{name}-{secrets.token_urlsafe(24)}"


@dataclass(kw_only=True)
class Canaries:
    """All that must not come out, by what it is."""

    root_token: str = field(default_factory=lambda: canary("root"))
    tag_key: str = field(default_factory=lambda: canary("tag"))
    password: str = field(default_factory=lambda: canary("password").replace("_", "-"))
    unknown_token: str = field(default_factory=lambda: canary("unknown"))
    wrong_tag: str = field(default_factory=lambda: f"lk_Z{secrets.token_hex(20)[1:]}")
    request_ids: list[uuid.UUID] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """All that no one may say."""
        single = [self.root_token, self.tag_key, self.password, self.unknown_token, self.wrong_tag]
        return [*single, *self.tokens, *(str(each) for each in self.request_ids)]

    @property
    def presented(self) -> list[str]:
        """All that is shown to the service as a token."""
        return [self.root_token, self.unknown_token, self.wrong_tag, *self.tokens]


def forms(secret: bytes) -> Iterator[bytes]:
    """Gives all the ways in which bytes could be written."""
    yield secret
    for written in (secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
        yield written.rstrip(b"=")
        yield written.upper()
    yield quote(secret).encode()
    yield repr(secret)[2:-1].encode()


def found(said: bytes, canaries: Canaries, *, digests: bool) -> list[str]:
    """Lists the secrets, and their digests if they are secret too, that can be found in something."""
    hunted = {f"text of {text[:20]}": text.encode() for text in canaries.texts}
    hunted |= {f"bytes of {each}": each.bytes for each in canaries.request_ids}
    hunted |= {f"lower case of {text[:20]}": text.lower().encode() for text in canaries.texts}
    if digests:
        hunted |= {f"digest of {text[:20]}": hashlib.sha256(text.encode()).digest() for text in canaries.texts}
    return [name for name, secret in hunted.items() if any(form in said for form in forms(secret))]


@dataclass(kw_only=True)
class Client:
    """A caller that keeps all that it is told when it is refused."""

    channel: grpc.aio.Channel
    canaries: Canaries
    refusals: list[str] = field(default_factory=list)

    async def ask(self, method: str, request: Any, token: str | None = None) -> Any:
        """Calls a method as root, or with another token, and gives the answer; None if it was refused."""
        stub_class: Any = KeyServiceStub if hasattr(pb, type(request).__name__) else OrganizationServiceStub
        if hasattr(tokens_pb, type(request).__name__):
            stub_class = TokenServiceStub
        started = getattr(stub_class(self.channel), method)(
            request, metadata=bearer(token or self.canaries.root_token), timeout=DEADLINE_S
        )
        return await self.told(started)

    async def told(self, started: Any) -> Any:
        """Waits for an answer, or takes down every part of a refusal."""
        try:
            return await started
        except grpc.aio.AioRpcError as error:
            parts = (
                error.code(),
                error.details(),
                error.debug_error_string(),
                *(error.initial_metadata() or ()),
                *(error.trailing_metadata() or ()),
            )
            self.refusals.extend(str(part) for part in parts)
            return None


async def live_a_life(client: Client) -> None:
    """Makes keys, and takes down their tokens; uses them, changes them and ends them."""
    canaries = client.canaries
    await client.ask("CreateOrganization", organizations_pb.CreateOrganizationRequest(organization_id="acme", name="a"))
    for environment_ in (1, 2):
        request_id = uuid.uuid4()
        canaries.request_ids.append(request_id)
        draft = pb.CreateKeyRequest(
            organization_id="acme",
            name="a key",
            permissions=["keys:read", "keys:write", "read"],
            environment=environment_,  # type: ignore[arg-type]  # the two environments by their numbers
            request_id=str(request_id),
        )
        created = await client.ask("CreateKey", draft)
        assert created.token == (await client.ask("CreateKey", draft)).token
        canaries.tokens.append(created.token)
        await client.ask("ListKeys", pb.ListKeysRequest(), token=created.token)
        request_id = uuid.uuid4()
        canaries.request_ids.append(request_id)
        rotated = await client.ask("RotateKey", pb.RotateKeyRequest(key_id=created.key.id, request_id=str(request_id)))
        canaries.tokens.append(rotated.token)
        for token in canaries.tokens:
            await client.ask("Validate", pb.ValidateRequest(token=token, required_permissions=["read"]))
        await client.ask("UpdateKey", pb.UpdateKeyRequest(key=key_pb2.Key(id=created.key.id, name="another")))
        await client.ask("ToggleKey", pb.ToggleKeyRequest(key_id=created.key.id, active=False))
        await client.ask("RevokeKey", pb.RevokeKeyRequest(key_id=created.key.id, reason="lost"))
        await client.ask("DeleteKey", pb.DeleteKeyRequest(key_id=created.key.id))
    public = pb.CreateKeyRequest(organization_id="acme", name="public", key_type=key_pb2.KEY_TYPE_PUBLISHABLE)
    published = await client.ask("CreateKey", public)
    read = await client.ask("GetPublishableKey", pb.GetPublishableKeyRequest(organization_id="acme"))
    assert published.token == read.token
    await exchange_a_key(client)
    kept = pb.CreateKeyRequest(organization_id="acme", name="kept", permissions=["keys:read", "keys:write"])
    canaries.tokens.append((await client.ask("CreateKey", kept)).token)


async def exchange_a_key(client: Client) -> None:
    """Exchanges a key, refreshes with and without a request_id, and uses a token twice."""
    canaries, request_id = client.canaries, uuid.uuid4()
    canaries.request_ids.append(request_id)
    created = await client.ask("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="exchanged"))
    for _ in range(2):
        grant = await client.ask("ExchangeKey", tokens_pb.ExchangeKeyRequest(), token=created.token)
        used = tokens_pb.RefreshTokenRequest(refresh_token=grant.refresh_token, request_id=str(request_id))
        following = await client.ask("RefreshToken", used)
        assert following.refresh_token == (await client.ask("RefreshToken", used)).refresh_token
        for each in (grant, following):
            canaries.tokens += [each.access_token, each.refresh_token]
    await client.ask("RefreshToken", tokens_pb.RefreshTokenRequest(refresh_token=grant.refresh_token))
    canaries.tokens.append(created.token)


async def err_in_every_way(client: Client) -> None:
    """Puts every secret that is a token where none belongs, and where one belongs in a wrong form."""
    for token in client.canaries.presented:
        await _put_into_fields(client, token)
        await _put_into_headers(client, token)
        await _send_as_bytes(client, token)


async def _put_into_fields(client: Client, token: str) -> None:
    for method, request in (
        ("GetKey", pb.GetKeyRequest(key_id=token)),
        ("RevokeKey", pb.RevokeKeyRequest(key_id=token)),
        ("ListKeys", pb.ListKeysRequest(organization_id=token)),
        ("ListKeys", pb.ListKeysRequest(organization_id="acme", page_token=token)),
        ("ListKeys", pb.ListKeysRequest(organization_id="acme", user_id=token)),
        ("CreateKey", pb.CreateKeyRequest(organization_id=token, name=token)),
        ("CreateKey", pb.CreateKeyRequest(organization_id="acme", name=f"{token}\n", request_id=token)),
        ("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="a", permissions=[token])),
        ("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="a", allowed_cidrs=[token[:43]])),
        ("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="a", metadata={"a": f"{token}\0"})),
        ("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="a", user_id=token, user_email=token)),
        ("UpdateKey", pb.UpdateKeyRequest(key=key_pb2.Key(id=token), etag=token[:64])),
        ("GetOrganization", organizations_pb.GetOrganizationRequest(organization_id=token)),
        ("RefreshToken", tokens_pb.RefreshTokenRequest(refresh_token=token, request_id=token)),
        ("RefreshToken", tokens_pb.RefreshTokenRequest(refresh_token=f"{token}\n")),
        ("RefreshToken", tokens_pb.RefreshTokenRequest(refresh_token=token)),
        ("ExchangeKey", tokens_pb.ExchangeKeyRequest(audience=f"{token}\n", permissions=[token])),
        ("ExchangeKey", tokens_pb.ExchangeKeyRequest(permissions=[token.lower()])),
        ("RevokeToken", tokens_pb.RevokeTokenRequest(refresh_token=token[:500])),
        ("CreatePlan", organizations_pb.CreatePlanRequest(plan=organizations_pb.Plan(id=token))),
        ("Validate", pb.ValidateRequest(token=token, client_ip=token, required_permissions=[token])),
        ("Validate", pb.ValidateRequest(token=f"{token} ", min_revision=-1)),
    ):
        await client.ask(method, request)
        await client.ask(method, request, token=token)
    if token.startswith("lk_"):
        await client.ask("UpdateKey", field_mask(token))
        named = {f"{token}\n": ""}
        await client.ask("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="a", metadata=named))


def field_mask(path: str) -> pb.UpdateKeyRequest:
    """Makes a change of what can not be changed."""
    request = pb.UpdateKeyRequest(key=key_pb2.Key(id="key_" + "0" * 26))
    request.update_mask.paths.append(path)
    return request


async def _put_into_headers(client: Client, token: str) -> None:
    for metadata in (
        (("authorization", token),),
        (("authorization", f"Basic {token}"),),
        (("authorization", f"Bearer {token} {token}"),),
        (*bearer(token), *bearer(token)),
        (("x-api-key", token), (f"x-{token.lower()}", "1")),
        (("x-token-bin", token.encode()),),
    ):
        await client.told(call_path(client.channel, path_of("ListPlans"), b"", metadata=metadata, timeout=DEADLINE_S))
    for path in (f"/{token}", f"/apikeys.v1.KeyService/{token}", f"/{token}/Validate"):
        await client.told(call_path(client.channel, path, b"", timeout=DEADLINE_S))
    check, symbol = length_delimited(1, token.encode()), length_delimited(4, token.encode())
    await client.told(call_path(client.channel, "/grpc.health.v1.Health/Check", check, timeout=DEADLINE_S))
    reflect: Any = client.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    await client.told(reflect(iter([symbol]), timeout=DEADLINE_S).read())


async def _send_as_bytes(client: Client, token: str) -> None:
    for method in ("Validate", "CreateKey", "BatchValidate"):
        for raw in (length_delimited(1, token.encode() + b"\xff"), token.encode(), b"\x0b" + token.encode()):
            started = call_raw(client.channel, method, raw, metadata=bearer(client.canaries.root_token))
            await client.told(started)


async def send_what_no_library_sends(port: int, canaries: Canaries) -> None:
    """Sends headers that are not UTF-8, which the gRPC library logs."""
    async with Http2.connected(port) as connection:
        for token in canaries.presented:
            for name, value in (
                (b"authorization", b"Bearer " + token.encode() + b"\xff"),
                (b"authorization", token.encode() + b"\xff"),
                (b"authorization", b"BEARER\t" + token.encode()),
                (b"x-api-key", b"\xff" + token.encode()),
            ):
                stream = await connection.start_call(path_of("ListPlans"), b"", [(name, value)])
                await connection.frame(Http2.HEADERS, stream)


async def make_the_database_fail(client: Client, dsn: str) -> None:
    """Takes tables and connections away under way, and gives them back."""
    connection = await asyncpg.connect(dsn)
    token = client.canaries.tokens[-1]
    draft = pb.CreateKeyRequest(organization_id="acme", name="a", request_id=str(client.canaries.request_ids[0]))
    for table in ("request", "secret", "key"):
        await connection.execute(f"ALTER TABLE {table} RENAME TO away")
        await client.ask("CreateKey", draft)
        await client.ask("ListKeys", pb.ListKeysRequest(), token=token)
        await client.ask("Validate", pb.ValidateRequest(token=token))
        await connection.execute(f"ALTER TABLE away RENAME TO {table}")
    # A value that a column can not hold is quoted in PostgreSQL's message.
    await connection.execute("ALTER TABLE secret ADD CONSTRAINT none CHECK (octet_length(digest) = 0) NOT VALID")
    await client.ask("CreateKey", pb.CreateKeyRequest(organization_id="acme", name="a"))
    await connection.execute("ALTER TABLE secret DROP CONSTRAINT none")
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for _ in range(3):
        await client.ask("ListKeys", pb.ListKeysRequest(), token=token)
        await client.ask("Validate", pb.ValidateRequest(token=token))
    await connection.close()


async def everything_stored(dsn: str) -> bytes:
    """Writes down all rows of all tables, and what PostgreSQL shows of its sessions."""
    connection = await asyncpg.connect(dsn)
    tables = [row[0] for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    assert {"key", "secret", "request", "organization", "plan", "deployment", "change_log"} <= set(tables)
    rows = []
    for table in tables:
        # A publishable token is public, and stored so that it can be read.
        rows += await connection.fetch(f"SELECT (to_jsonb(t) - 'readable_token')::text FROM {table} t")  # noqa: S608 - a name of the catalogue
    rows += await connection.fetch("SELECT query FROM pg_stat_activity WHERE datname = current_database()")
    assert len(rows) > 20
    await connection.close()
    return "\n".join(str(row[0]) for row in rows).encode()


async def server_log(dsn: str) -> bytes:
    """Reads PostgreSQL's own log, if it is the one that the tests have started."""
    connection = await asyncpg.connect(dsn)
    log = Path(await connection.fetchval("SHOW data_directory")) / "log"
    await connection.close()
    return log.read_bytes() if log.is_file() else b""


@asynccontextmanager
async def database_of_a_stranger(postgres_url: str, template_url: str, password: str) -> AsyncIterator[str]:
    """Makes a database, and a role with a password for its address."""
    role = f"canary_{secrets.token_hex(8)}"
    async with fresh_database(postgres_url, template_url) as url:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{password}'")
        try:
            parts = urlsplit(url)
            yield urlunsplit(parts._replace(netloc=f"{role}:{password}@{parts.netloc.rpartition('@')[2]}"))
        finally:
            await connection.execute(f"DROP ROLE {role}")
            await connection.close()


def free_ports(count: int) -> Sequence[int]:
    """Finds ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_no_secret_comes_out(postgres_url: str, template_url: str, tmp_path: Path, log_format: str) -> None:
    """Whatever happens, no token, digest, request id, tag key, root token or password is in the log at level debug, in
    the metrics, in any part of any error, in a table, or in what PostgreSQL itself logs.
    """
    canaries = Canaries()
    port, metrics_port = free_ports(2)
    async with database_of_a_stranger(postgres_url, template_url, canaries.password) as dsn:
        variables = environment(
            DATABASE_URL=dsn,
            LISTEN=f"127.0.0.1:{port}",
            METRICS_LISTEN=f"127.0.0.1:{metrics_port}",
            ROOT_TOKEN=canaries.root_token,
            TAG_KEY=canaries.tag_key,
            LOG_LEVEL="debug",
            LOG_FORMAT=log_format,
        )
        async with (
            latchgate("serve", tmp_path, variables) as process,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            client = Client(channel=channel, canaries=canaries)
            await _go_through_it_all(process, client, port, dsn)
            metrics = await asyncio.to_thread(lambda: urlopen(f"http://127.0.0.1:{metrics_port}/metrics").read())
            stored = await everything_stored(dsn)
            process.tell(signal.SIGTERM)
            assert 0 == await process.ended()

        logged = process.text.encode()
        assert [] == found(logged, canaries, digests=True)
        assert [] == found(metrics, canaries, digests=True)
        assert [] == found("\n".join(client.refusals).encode(), canaries, digests=True)
        assert [] == found(stored, canaries, digests=False)
        assert [] == found(await server_log(dsn), canaries, digests=True)
        # The hunt itself works: what is stored does hold the digests, and the log does tell of all this.
        assert any("digest" in name for name in found(stored, canaries, digests=True))
        assert logged.count(b"INTERNAL") > 3
        assert logged.count(b"Invalid encoding") > 3
        if log_format == "json":
            assert all(json.loads(line)["event"] for line in process.err)


async def _go_through_it_all(process: Latchgate, client: Client, port: int, dsn: str) -> None:
    await process.line("serving")
    await live_a_life(client)
    await err_in_every_way(client)
    await send_what_no_library_sends(port, client.canaries)
    await make_the_database_fail(client, dsn)
