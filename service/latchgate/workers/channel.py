"""What a supervisor and a worker say to each other: lines of JSON over a pair of sockets.

Secrets go this way and no other: not by arguments, which all users of a machine can read, nor by log lines.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
"""More than the metrics of a worker take."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a worker's start has found and made. `schema_before` is None for a new database.

    `root_token` is there only if it was made now, and is shown once. `missing_scopes` are permissions that match no
    scope any more, and how many keys hold each.
    """

    schema: str
    schema_before: str | None
    root_token: str | None
    is_root_refused: bool
    missing_scopes: dict[str, int]

    def as_message(self) -> Message:
        """Writes it down."""
        return {"is": "ready", "found": asdict(self)}


class Channel:
    """One end of a pair of sockets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes the streams of an open connection."""
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        """Takes over a socket."""
        return cls(*await asyncio.open_unix_connection(sock=end, limit=MAX_LINE_BYTES))

    def send(self, message: Message) -> None:
        """Says something; what the other does not hear because it is gone is lost."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> Message | None:
        """Waits for what the other says, and gives None once it is gone."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):
            return None
        # One that was killed may have stopped in the middle of a line.
        message: Message | None = json.loads(line) if line.endswith(b"\n") else None
        return message

    async def close(self) -> None:
        """Sends what was said, and ends it."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
