"""Sending mail."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass, field
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, parseaddr
from enum import Enum
from typing import Final

import aiosmtplib

from latchgate.domain.mail import Mail, MailReply

# In all; less than for how long a mail is taken.
TIMEOUT_S: Final = 20.0
# From here on a server's answer is final (RFC 5321, 4.2.1).
_FINAL: Final = 500


class SmtpTls(Enum):
    """How a mail server is spoken to."""

    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SmtpServer:
    """The server that mail is handed to. `sender` is an address, with or without a name before it."""

    host: str
    port: int
    tls: SmtpTls
    sender: str
    user: str = ""
    password: str = field(default="", repr=False)


class MailSender:
    """Hands mail to a server, on a connection for each."""

    def __init__(
        self, server: SmtpServer, *, timeout_s: float = TIMEOUT_S, trust: ssl.SSLContext | None = None
    ) -> None:
        """Takes the server, how long a mail may take, and whose certificates are trusted."""
        self._server = server
        self._timeout_s = timeout_s
        self._trust = trust

    async def send(self, mail: Mail) -> MailReply:
        """Sends a mail, and gives what came of it. Never fails; says nothing of what the server has said."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._hand_over(_message(mail, self._server.sender), mail.recipient)
        except aiosmtplib.SMTPRecipientsRefused as error:
            return MailReply(error="recipient_refused", is_final=all(each.code >= _FINAL for each in error.recipients))
        except aiosmtplib.SMTPDataError as error:
            return MailReply(error="mail_refused", is_final=error.code >= _FINAL)
        except (aiosmtplib.SMTPException, OSError) as error:
            return MailReply(error=type(error).__name__)
        except ValueError:
            # No mail can be written to this address.
            return MailReply(error="recipient_unreadable", is_final=True)
        return MailReply()

    async def _hand_over(self, message: EmailMessage, recipient: str) -> None:
        server = self._server
        await aiosmtplib.send(
            message,
            recipients=[recipient],
            hostname=server.host,
            port=server.port,
            username=server.user or None,
            password=server.password or None,
            use_tls=server.tls is SmtpTls.TLS,
            # Demanded, not offered: a server that has none is not spoken to.
            start_tls=server.tls is SmtpTls.STARTTLS,
            tls_context=self._trust if server.tls is not SmtpTls.NONE else None,
            local_hostname=socket.gethostname(),
            timeout=self._timeout_s,
        )


def _message(mail: Mail, sender: str) -> EmailMessage:
    """Writes a mail as it is sent. Raises ValueError."""
    message = EmailMessage(policy=SMTP)
    _, address = parseaddr(sender)
    message["From"] = sender
    message["To"] = Address(addr_spec=mail.recipient)
    message["Subject"] = mail.subject
    message["Date"] = localtime()
    message["Message-ID"] = f"<{mail.message_id}@{address.rpartition('@')[2]}>"
    # Nobody's holiday notice is wanted (RFC 3834).
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(mail.text)
    message.add_alternative(mail.html, subtype="html")
    return message
