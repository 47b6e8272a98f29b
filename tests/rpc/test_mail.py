"""Mail to the people whom keys belong to."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme

from support.databases import until
from support.keys import Tenant, cloned_database, database_of, hours_ahead, make_tenant
from support.mail import PASSWORD, USER, Post, post
from support.service import RunningService, bearer, run_service
from support.transport import eventually, sample
from support.webhooks import make_due

pytestmark = pytest.mark.asyncio(loop_scope="session")

ANN = "ann@example.com"
SENDER = "Latchgate <keys@latchgate.example>"


def mail_settings(server: Post, **more: Any) -> dict[str, Any]:
    """Settings for a service that hands its mail to a server, at once."""
    return {
        "smtp_host": "127.0.0.1",
        "smtp_port": server.port,
        "smtp_from": SENDER,
        "outbox_poll_seconds": 0.05,
    } | more


@asynccontextmanager
async def secure_post(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Post]:
    """A mail server that demands TLS and a password, whose certificate is trusted by this process."""
    authority, served = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(served)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    async with post(served) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Post]:
    """A mail server that demands TLS and a password."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with secure_post(tmp_path_factory.mktemp("mail"), monkeypatch) as running:
            yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mailing(server: Post, postgres_url: str, template_url: str) -> AsyncIterator[RunningService]:
    """A service that sends mail."""
    settings = mail_settings(server, smtp_user=USER, smtp_password=PASSWORD)
    async with cloned_database(postgres_url, template_url) as url, run_service(url, **settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def tenant(mailing: RunningService, server: Post) -> Tenant:
    """A tenant of the test's own; the server has forgotten all mail before."""
    server.letters.clear()
    return await make_tenant(mailing, "acme")


async def mails(service: RunningService) -> list[tuple[str, int]]:
    """Gives what has become of all mails, and how often each was tried, in the order in which they were made."""
    async with database_of(service) as connection:
        rows = await connection.fetch("SELECT state, attempts FROM mail ORDER BY event_number")
    return [(row["state"], row["attempts"]) for row in rows]


async def test_what_is_told(tenant: Tenant, server: Post) -> None:
    """The person of a key is told when it is made, given a new token, and ended by another; over TLS, with the server's
    password, as plain text and as HTML, and without a token.
    """
    created = await tenant.key(name="ci & cd", user_email=ANN)
    rotated = await tenant.rotate(created.key.id)
    other = await tenant.caller("keys:write")
    await tenant.revoke(created.key.id, reason="leaked", caller=other)
    letters = await server.until(3)
    assert [
        "API key “ci & cd” has a new token",
        "API key “ci & cd” was created",
        "API key “ci & cd” was revoked",
    ] == sorted(each.message["subject"] for each in letters)
    for letter in letters:
        assert ("keys@latchgate.example", [ANN], True, True) == (
            letter.sender,
            letter.recipients,
            letter.is_encrypted,
            letter.is_known,
        )
        assert (SENDER, ANN, "auto-generated") == tuple(
            letter.message[name] for name in ("from", "to", "auto-submitted")
        )
        assert f"Key: {created.key.id}" in letter.part("plain").splitlines()
        assert "<td>ci &amp; cd</td>" in letter.part("html")
        for token in (created.token, rotated.token):
            assert token[-20:] not in letter.message.as_string()
    assert 3 == len({letter.message["message-id"] for letter in letters})


async def test_who_needs_not_be_told(tenant: Tenant, server: Post) -> None:
    """Keys without an address get no mail, nor does anyone whose own key, or a key of whose making, is ended by
    themselves; updates and switches are told to nobody.
    """
    await tenant.key()
    own = await tenant.key(permissions=["keys:write"], user_email=ANN)
    made = await tenant.key(user_email=ANN)
    await tenant.toggle(made.key.id)
    await tenant.revoke(made.key.id)
    await tenant.revoke(own.key.id, caller=bearer(own.token))
    await tenant.key(user_email="bob@example.com")
    letters = await server.until(3)
    assert sorted([ANN, ANN, "bob@example.com"]) == sorted(letter.recipients[0] for letter in letters)
    assert {"created"} == {letter.message["subject"].rpartition(" ")[2] for letter in letters}


async def test_expiry_is_told_before(tenant: Tenant, server: Post) -> None:
    """A key that is about to expire is told of to its person, with when."""
    created = await tenant.key(user_email=ANN, expire_time=hours_ahead(24 * 6))
    await server.until(1)
    async with database_of(tenant.service) as connection:

        async def has_looked() -> bool:
            return bool(await connection.fetchval("SELECT 1 FROM expiry_scan WHERE kind = 'expiring_7'"))

        # It does so for the first time soon after its start.
        await until(has_looked)
        # As if a day had passed until the next look.
        await connection.execute("UPDATE expiry_scan SET until_time = until_time - interval '2 days'")
    _, letter = await server.until(2)
    day = created.key.expire_time.ToDatetime().date().isoformat()
    assert f"API key “a key” expires on {day}" == letter.message["subject"]
    assert f"Expires: {day}T" in letter.part("plain")


async def test_mail_server_is_away_and_back(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server can not take a mail it is tried again, and sent once; one that it never will take is dead."""
    async with secure_post(tmp_path, monkeypatch) as server:
        settings = mail_settings(server, smtp_user=USER, smtp_password=PASSWORD)
        async with run_service(database_url, **settings) as service:
            tenant = await make_tenant(service, "acme")
            server.answers.append("450 mailbox busy")
            await tenant.key(user_email=ANN)

            async def has_failed() -> bool:
                return [("pending", 1)] == await mails(service) and not server.answers

            await until(has_failed)
            await eventually(lambda: sample(service, "latchgate_mail_attempts_total", result="pending") == 1)
            await make_due(service)
            await server.until(1)
            server.answers.append("550 no such person")
            await tenant.key(user_email="nobody@example.com")

            async def are_done() -> bool:
                return [("delivered", 2), ("dead", 1)] == await mails(service)

            await until(are_done)
            assert 1 == len(server.letters)


async def test_server_without_tls_gets_nothing(database_url: str) -> None:
    """A server that offers no STARTTLS is handed nothing, unless plain text is asked for."""
    async with post() as server, run_service(database_url, **mail_settings(server)) as service:
        tenant = await make_tenant(service, "acme")
        await tenant.key(user_email=ANN)
        await eventually(lambda: sample(service, "latchgate_mail_attempts_total", result="pending") == 1)
        assert [] == server.letters
    async with post() as server, run_service(database_url, **mail_settings(server, smtp_tls="none")) as service:
        await make_due(service)
        (letter,) = await server.until(1)
        assert (False, [ANN]) == (letter.is_encrypted, letter.recipients)


async def test_no_server_no_mail(database_url: str) -> None:
    """Without a server in the settings no mail is even stored: one that is named later does not tell of the past."""
    async with run_service(database_url, outbox_poll_seconds=0.05) as service:
        tenant = await make_tenant(service, "acme")
        await tenant.key(user_email=ANN)
        async with database_of(service) as connection:

            async def are_dispatched() -> bool:
                waiting: int = await connection.fetchval("SELECT count(*) FROM event WHERE dispatch_time IS NULL")
                return waiting == 0

            await until(are_dispatched)
        assert [] == await mails(service)
