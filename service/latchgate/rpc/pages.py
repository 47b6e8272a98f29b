"""Page tokens: where a list goes on, sealed so that they can be neither made up nor carried elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import TypeVar

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf.message import Message

from latchgate.domain.errors import PageTokenError

DEFAULT_SIZE = 100
MAX_SIZE = 1000
# Well within the 4 MiB that clients take by default.
MAX_PAGE_BYTES = 3 * 1024 * 1024

Item = TypeVar("Item", bound=Message)


class PageTokens:
    """Seals the last id of a page together with what was listed for whom."""

    def __init__(self, secret: bytes) -> None:
        """Takes a secret that all workers share, and derives the sealing key from it."""
        derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"latchgate page token").derive(secret)
        self._fernet = Fernet(base64.urlsafe_b64encode(derived))

    def make(self, listing: tuple[object, ...], last_id: str) -> str:
        """Makes the token for what follows `last_id`. `listing` is the caller, the method and all filters."""
        return self._fernet.encrypt(_fingerprint(listing) + last_id.encode()).decode()

    def read(self, listing: tuple[object, ...], page_token: str) -> str:
        """Gives the last id; for an empty token the empty id. Raises PageTokenError."""
        if not page_token:
            return ""
        try:
            content = self._fernet.decrypt(page_token.encode())
        except InvalidToken:
            content = b""
        fingerprint = _fingerprint(listing)
        if not content.startswith(fingerprint):
            raise PageTokenError(
                "page_token does not belong to this list; give the next_page_token of the same call and filters"
            )
        return content[len(fingerprint) :].decode()


def _fingerprint(listing: tuple[object, ...]) -> bytes:
    return hashlib.sha256(repr(listing).encode()).digest()


def page_size(requested: int) -> int:
    """Gives how many to list: the default for 0, the most there is for more."""
    return min(requested, MAX_SIZE) or DEFAULT_SIZE


def fitting(items: Iterable[Item]) -> tuple[list[Item], bool]:
    """Gives the items that fit into one answer, at least one, and whether any had to be left for the next page."""
    page: list[Item] = []
    left_bytes = MAX_PAGE_BYTES
    for item in items:
        left_bytes -= item.ByteSize()
        if page and left_bytes < 0:
            return page, True
        page.append(item)
    return page, False
