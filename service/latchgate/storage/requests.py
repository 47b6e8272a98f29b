"""What is kept for retries: how tokens are sealed, and how they are forgotten."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from cryptography.fernet import Fernet

from latchgate.storage import queries
from latchgate.storage.postgres import Database
from latchgate.storage.sealing import fernet
from latchgate.storage.transaction import TOKEN_KEPT

SLOT_KEPT = timedelta(days=1)
FORGET_ROWS = 5000


class RequestSealer:
    """Implements latchgate.domain.ports.Sealer: under a key of tag key and request id.

    The database holds neither the request id nor, with a tag key from the settings, the tag key: a copy of the database
    opens nothing.
    """

    def __init__(self, tag_key: bytes) -> None:
        """Takes the deployment's tag key."""
        self._tag_key = tag_key

    def seal(self, request_id: UUID, token: str) -> bytes:
        """Encrypts a token."""
        return self._fernet(request_id).encrypt(token.encode())

    def open(self, request_id: UUID, sealed: bytes) -> str:
        """Gives back what `seal` was given."""
        return self._fernet(request_id).decrypt(sealed).decode()

    def _fernet(self, request_id: UUID) -> Fernet:
        return fernet(self._tag_key, use=b"latchgate request token", salt=request_id.bytes)


async def forget_requests(database: Database) -> None:
    """Clears the tokens that are too old, and removes the slots that no retry will ask for.

    In small statements: however much has gathered, none takes so long that it would be cut off.
    """
    async with database.connection() as connection:
        for statement, age in ((queries.REQUEST_CLEAR, TOKEN_KEPT), (queries.REQUEST_DELETE, SLOT_KEPT)):
            more = True
            while more:
                status: str = await connection.execute(statement, age, FORGET_ROWS)
                more = int(status.rsplit(maxsplit=1)[-1]) == FORGET_ROWS
