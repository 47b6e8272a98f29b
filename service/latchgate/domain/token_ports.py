"""What the exchange of keys for tokens needs from the outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from latchgate.domain.families import Family, Holder, NewFamily
from latchgate.domain.ports import Transaction
from latchgate.domain.signing import KeyPair, SigningKey


class TokenSigner(Protocol):
    """Makes the keys that sign, keeps their private halves encrypted, and signs with them."""

    def make(self) -> KeyPair:
        """Makes a key."""

    def can_use(self, key: SigningKey) -> bool:
        """Says whether the private half can be read: not if it was encrypted under another tag key."""

    def sign(self, key: SigningKey, claims: Mapping[str, object]) -> str:
        """Makes an access token (RFC 9068) that says `claims`."""


class UseRecorder(Protocol):
    """Remembers that a secret was used; see latchgate.domain.ports.UsageRecorder."""

    def used_secret(self, secret_id: int, organization_id: str, now_s: float) -> None:
        """Takes note of a use, without waiting for storage, at a time of the database's clock in seconds since 1970."""


class TokenTransaction(Transaction, Protocol):
    """One transaction, in which tokens are given out. Locks are taken in the order organization, key, family."""

    async def find_family(self, family_digest: bytes) -> tuple[str, str, int] | None:
        """Gives the ids of a family, its key and its secret, without a lock."""

    async def lock_holder(self, key_id: str, secret_id: int) -> Holder | None:
        """Locks a key and its organization as `lock_key` does, then reads what tokens need to know of them."""

    async def insert_family(self, family: NewFamily, most: int) -> None:
        """Stores a family whose key is locked; of its key's those beyond the `most` newest end."""

    async def lock_family(self, family_id: str) -> Family | None:
        """Reads a family whose key is locked, and keeps others from changing it until the end."""

    async def use_token(
        self, family: Family, token_digest: bytes, request_digest: bytes | None, sealed_token: bytes | None
    ) -> None:
        """Puts the next token in the place of the one to be used, and keeps what a retry is to be given."""

    async def delete_family(self, family_id: str) -> None:
        """Ends a family that is locked."""

    async def signing_keys(self) -> Sequence[SigningKey]:
        """Reads the keys that sign and are published."""

    async def lock_signing_keys(self) -> Sequence[SigningKey]:
        """Reads them after waiting for others who change them, and keeps others from doing so until the end."""

    async def insert_signing_key(self, pair: KeyPair, sign_time: datetime) -> SigningKey:
        """Stores a key. Only with the keys locked."""

    async def delete_signing_keys(self, kids: Sequence[str]) -> None:
        """Removes keys. Only with the keys locked."""


class TokenStore(Protocol):
    """Families and signing keys at rest. Every method raises StorageUnavailableError as KeyStore's do."""

    def transaction(self) -> AbstractAsyncContextManager[TokenTransaction]:
        """Opens a transaction; see latchgate.domain.ports.KeyStore."""
