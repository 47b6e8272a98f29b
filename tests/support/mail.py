"""A mail server that remembers what it is handed."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any, Final

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from support.databases import until

USER: Final = "latchgate"
PASSWORD: Final = "password-of-the-mail-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A mail as it came: who sent it to whom, as the envelope has it, and whether over TLS and by a known user."""

    sender: str
    recipients: list[str]
    message: EmailMessage
    is_encrypted: bool
    is_known: bool

    def part(self, kind: str) -> str:
        """Gives the text of one kind: `plain` or `html`."""
        body = self.message.get_body((kind,))
        assert body is not None
        return str(body.get_content())


@dataclass(slots=True, kw_only=True)
class Post:
    """The server. It answers RCPT with the next of `answers`, or takes what comes when there is none."""

    port: int = 0
    letters: list[Letter] = field(default_factory=list)
    answers: deque[str] = field(default_factory=deque)

    async def until(self, count: int) -> list[Letter]:
        """Waits until so many mails have come, and gives them."""

        async def have_come() -> bool:
            return len(self.letters) >= count

        await until(have_come)
        return self.letters[:count]

    async def handle_RCPT(  # noqa: N802 - named by aiosmtpd
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answers whether a recipient is taken."""
        del server, session
        if self.answers:
            return self.answers.popleft()
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - the same
        """Takes a mail."""
        del server
        content: Any = envelope.content
        message: Any = message_from_bytes(content, policy=default)
        self.letters.append(
            Letter(
                sender=str(envelope.mail_from),
                recipients=[str(each) for each in envelope.rcpt_tos],
                message=message,
                is_encrypted=session.ssl is not None,
                is_known=bool(session.authenticated),
            )
        )
        return "250 OK"


def _authenticate(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
    is_right = isinstance(data, LoginPassword) and (data.login, data.password) == (USER.encode(), PASSWORD.encode())
    return AuthResult(success=is_right)


@asynccontextmanager
async def post(tls: ssl.SSLContext | None = None) -> AsyncIterator[Post]:
    """Runs a mail server until the block ends; with TLS it demands STARTTLS and the user's password."""
    running = Post()
    loop = asyncio.get_running_loop()

    def serve() -> SMTP:
        return SMTP(
            running,
            loop=loop,
            hostname="post.example",
            tls_context=tls,
            require_starttls=tls is not None,
            auth_required=tls is not None,
            authenticator=_authenticate,
        )

    server = await loop.create_server(serve, "127.0.0.1", 0)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()
        await server.wait_closed()
