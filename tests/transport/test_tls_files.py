"""TLS: what is served, who is let in, and certificates that change under way."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from apikeys.v1 import key_service_pb2 as pb
from apikeys.v1.key_service_pb2_grpc import KeyServiceStub
from latchgate.app import serving
from latchgate.config import SettingsError
from latchgate.observability import Metrics
from latchgate.rpc.pipeline import Pipeline
from latchgate.rpc.server import make_server
from latchgate.rpc.tls import ReloadingCredentials, TlsFiles
from support.service import make_settings, run_service
from support.transport import DEADLINE_S, Http2

NO_DATABASE = "postgresql://nobody@127.0.0.1:1/nothing"
CONNECTIONS = 60
"""So many that of eight servers each has some, but once in some hundred times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A certificate authority and a folder with the files that a server is given."""

    ca: trustme.CA
    folder: Path

    @property
    def files(self) -> TlsFiles:
        """The server's files, without an authority for clients."""
        return TlsFiles(certificate=self.folder / "tls.crt", key=self.folder / "tls.key", client_ca=None)

    @property
    def mutual(self) -> TlsFiles:
        """The server's files, with an authority for clients."""
        return TlsFiles(certificate=self.files.certificate, key=self.files.key, client_ca=self.folder / "clients.crt")

    def issue(self) -> trustme.LeafCert:
        """Makes another certificate for the server."""
        return self.ca.issue_cert("localhost", "127.0.0.1")

    def put(self, leaf: trustme.LeafCert) -> None:
        """Writes a certificate with its chain and its key."""
        self.files.certificate.write_bytes(chain(leaf))
        self.files.key.write_bytes(leaf.private_key_pem.bytes())

    def context(self, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """Makes what a client of HTTP/2 needs to trust the server, and to show its own certificate."""
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        context.set_alpn_protocols(["h2"])
        if client is not None:
            client.configure_cert(context)
        return context

    def credentials(self, client: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
        """The same for a client of gRPC."""
        root = self.ca.cert_pem.bytes()
        if client is None:
            return grpc.ssl_channel_credentials(root)
        return grpc.ssl_channel_credentials(root, client.private_key_pem.bytes(), chain(client))


def chain(leaf: trustme.LeafCert) -> bytes:
    """Gives a certificate with all that stand between it and the root."""
    return b"".join(pem.bytes() for pem in leaf.cert_chain_pems)


def der(leaf: trustme.LeafCert) -> bytes:
    """Gives a certificate as it goes over the wire."""
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority with a certificate in place; it is also the authority for clients."""
    made = Authority(ca=trustme.CA(), folder=tmp_path)
    made.put(made.issue())
    made.ca.cert_pem.write_to_path(tmp_path / "clients.crt")
    return made


@asynccontextmanager
async def tls_server(files: TlsFiles, *, shares_port: bool = False) -> AsyncIterator[int]:
    """Runs the real server without a database: TLS and health need none. Gives its port."""
    pipeline = Pipeline(Metrics(CollectorRegistry()), is_validate_open=True)
    server = make_server(pipeline=pipeline, connection_age_s=60, shares_port=shares_port)
    await server.listen("127.0.0.1:0", ReloadingCredentials(files).credentials)
    try:
        yield server.port
    finally:
        await server.stop(0)


async def shown(port: int, authority: Authority) -> bytes:
    """Connects anew, and gives the certificate that the server shows."""
    async with Http2.connected(port, tls=authority.context()) as connection:
        await connection.settings()
        return connection.certificate


async def check(port: int, credentials: grpc.ChannelCredentials) -> int:
    """Asks for health over a channel of its own, and gives the answer's number."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    status: int = answer.status
    return status


async def code_of_check(port: int, credentials: grpc.ChannelCredentials) -> grpc.StatusCode:
    """Asks for health, which must be refused, and gives the code."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(port, credentials)
    return caught.value.code()


async def test_serves_over_tls(authority: Authority, database_url: str) -> None:
    """With a certificate and a key, keys are created and judged over TLS, and nothing is served without it."""
    files = authority.files
    async with run_service(database_url, tls_cert=files.certificate, tls_key=files.key) as service:
        async with grpc.aio.secure_channel(
            service.address.replace("127.0.0.1", "localhost"), authority.credentials()
        ) as channel:
            stub: Any = KeyServiceStub(channel)
            listed = await stub.ListKeys(pb.ListKeysRequest(organization_id="org_root"), metadata=service.root)
            judged = await stub.Validate(pb.ValidateRequest(token=service.root[0][1].removeprefix("Bearer ")))

        assert ["root"] == [key.name for key in listed.keys]
        assert pb.OUTCOME_VALID == judged.outcome
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.validate("a token", client_ip="")
        assert grpc.StatusCode.UNAVAILABLE == caught.value.code()


async def test_mutual_tls_lets_in_whom_the_authority_knows(authority: Authority) -> None:
    """With an authority for clients, a client with a certificate of it is served."""
    async with tls_server(authority.mutual) as port:
        client = authority.ca.issue_cert("gateway")
        assert health_pb2.HealthCheckResponse.NOT_SERVING == await check(port, authority.credentials(client))


async def test_mutual_tls_refuses_all_others(authority: Authority) -> None:
    """A client without a certificate, or with one of another authority, does not get as far as a call."""
    async with tls_server(authority.mutual) as port:
        assert grpc.StatusCode.UNAVAILABLE == await code_of_check(port, authority.credentials())
        stranger = trustme.CA().issue_cert("gateway")
        assert grpc.StatusCode.UNAVAILABLE == await code_of_check(port, authority.credentials(stranger))


async def test_client_certificate_is_not_asked_for_without_authority(authority: Authority) -> None:
    """Without an authority for clients, no certificate of theirs is looked at."""
    async with tls_server(authority.files) as port:
        stranger = trustme.CA().issue_cert("gateway")
        assert health_pb2.HealthCheckResponse.NOT_SERVING == await check(port, authority.credentials(stranger))


async def test_new_certificate_is_taken_up(authority: Authority) -> None:
    """A certificate that is replaced is shown at the next connection, without a restart; what is open lives on."""
    first, second = authority.issue(), authority.issue()
    authority.put(first)
    async with tls_server(authority.files) as port:
        async with Http2.connected(port, tls=authority.context()) as old:
            await old.settings()
            assert der(first) == old.certificate

            authority.put(second)
            with capture_logs() as lines:
                assert der(second) == await shown(port, authority)
                assert der(second) == await shown(port, authority)

            await old.ping()
        assert ["certificate_reloaded"] == [line["event"] for line in lines]


async def test_new_certificate_is_taken_up_by_all(authority: Authority) -> None:
    """Of several servers on a port each shows a new certificate from the next connection on; it is said once."""
    first, second = authority.issue(), authority.issue()
    authority.put(first)
    async with tls_server(authority.files, shares_port=True) as port:
        assert {der(first)} == {await shown(port, authority) for _ in range(CONNECTIONS)}
        authority.put(second)
        with capture_logs() as lines:
            assert {der(second)} == {await shown(port, authority) for _ in range(CONNECTIONS)}
        assert ["certificate_reloaded"] == [line["event"] for line in lines]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


BAD_STATES: Final[Mapping[str, Callable[[Authority], object]]] = {
    "certificate without its key": lambda authority: authority.files.certificate.write_bytes(chain(authority.issue())),
    "key without its certificate": lambda authority: authority.files.key.write_bytes(
        authority.issue().private_key_pem.bytes()
    ),
    "half a certificate": lambda authority: _cut(authority.files.certificate),
    "half a key": lambda authority: _cut(authority.files.key),
    "half an authority": lambda authority: _cut(authority.folder / "clients.crt"),
    "empty certificate": lambda authority: authority.files.certificate.write_bytes(b""),
    "no certificate": lambda authority: authority.files.certificate.unlink(),
    "no key": lambda authority: authority.files.key.unlink(),
    "no authority": lambda authority: (authority.folder / "clients.crt").unlink(),
    "second certificate cut off": lambda authority: authority.files.certificate.write_bytes(
        authority.files.certificate.read_bytes() + b"-----BEGIN CERTIFICATE-----\nMIIB"
    ),
    "certificate that is none": lambda authority: authority.files.certificate.write_bytes(
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    ),
    "authority that is none": lambda authority: (authority.folder / "clients.crt").write_bytes(
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    ),
}


@pytest.mark.parametrize("spoil", BAD_STATES.values(), ids=BAD_STATES)
async def test_files_that_do_not_fit_change_nothing(authority: Authority, spoil: Callable[[Authority], object]) -> None:
    """While files are missing, half written or do not belong together, connections are served with what was there
    before, and the log says so, once; as soon as they fit again, they are taken up.
    """
    first, second = authority.issue(), authority.issue()
    authority.put(first)
    client = authority.ca.issue_cert("gateway")
    async with tls_server(authority.mutual) as port:
        spoil(authority)
        with capture_logs() as lines:
            for _ in range(3):
                async with Http2.connected(port, tls=authority.context(client)) as connection:
                    await connection.settings()
                    assert der(first) == connection.certificate
        (line,) = lines
        assert ("certificate_not_reloaded", "error") == (line["event"], line["log_level"])
        assert str(authority.folder) in line["problem"]
        assert "PRIVATE KEY" not in line["problem"].replace("holds no PEM PRIVATE KEY", "")

        authority.put(second)
        authority.ca.cert_pem.write_to_path(authority.folder / "clients.crt")
        async with Http2.connected(port, tls=authority.context(client)) as connection:
            await connection.settings()
            assert der(second) == connection.certificate


async def test_new_authority_for_clients_is_taken_up(authority: Authority) -> None:
    """An authority for clients that is replaced counts from the next connection on."""
    other = trustme.CA()
    old_client, new_client = authority.ca.issue_cert("gateway"), other.issue_cert("gateway")
    async with tls_server(authority.mutual) as port:
        assert grpc.StatusCode.UNAVAILABLE == await code_of_check(port, authority.credentials(new_client))

        other.cert_pem.write_to_path(authority.folder / "clients.crt")

        assert health_pb2.HealthCheckResponse.NOT_SERVING == await check(port, authority.credentials(new_client))
        assert grpc.StatusCode.UNAVAILABLE == await code_of_check(port, authority.credentials(old_client))


async def test_client_that_speaks_no_tls_is_shut_out(authority: Authority) -> None:
    """A client that speaks plain text to the port gets no answer, and others are served."""
    async with tls_server(authority.files) as port:
        async with Http2.connected(port) as connection:
            with pytest.raises((EOFError, ConnectionError)):
                await connection.settings()
        assert health_pb2.HealthCheckResponse.NOT_SERVING == await check(port, authority.credentials())


@pytest.mark.parametrize("spoil", BAD_STATES.values(), ids=BAD_STATES)
async def test_start_with_files_that_do_not_fit(authority: Authority, spoil: Callable[[Authority], object]) -> None:
    """At the start, files that can not be used are one line which names the settings and the file, and no key."""
    spoil(authority)
    await _assert_one_line(authority)


async def test_start_with_encrypted_key(authority: Authority) -> None:
    """A key with a password is told as such: there is no way to give the password."""
    key = serialization.load_pem_private_key(authority.files.key.read_bytes(), password=None)
    encryption = serialization.BestAvailableEncryption(b"a password")
    authority.files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    assert "has a password" in await _assert_one_line(authority)


async def _assert_one_line(authority: Authority) -> str:
    files = authority.mutual
    settings = make_settings(NO_DATABASE, tls_cert=files.certificate, tls_key=files.key, tls_client_ca=files.client_ca)
    with pytest.raises(SettingsError) as caught:
        async with serving(settings):
            pytest.fail("the service must not start")
    said = str(caught.value)
    assert said.startswith("LATCHGATE_TLS_CERT, LATCHGATE_TLS_KEY, LATCHGATE_TLS_CLIENT_CA: ")
    assert str(authority.folder) in said
    assert [said] == said.splitlines()
    assert "BEGIN" not in said
    return said
