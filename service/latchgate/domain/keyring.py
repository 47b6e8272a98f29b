"""Keeping the keys that sign access tokens: made when they are needed, changed in time, published, replaced at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final

from latchgate.domain import access
from latchgate.domain.audit import AuditEntry
from latchgate.domain.model import ROOT_ORGANIZATION_ID, Caller
from latchgate.domain.signing import SigningKey, signing_key, upkeep
from latchgate.domain.token_ports import TokenSigner, TokenStore, TokenTransaction

PUBLISHED_KEPT_S: Final = 10.0
"""For how long the published keys are answered from memory: whoever asks without end asks the database now and then."""


class Keyring:
    """The keys of a deployment, which all its workers share by way of the store."""

    def __init__(
        self,
        store: TokenStore,
        signer: TokenSigner,
        monotonic: Callable[[], float],
        lost: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> None:
        """Takes where keys are kept, what signs, a clock that never goes back, and who hears of unreadable keys."""
        self._store = store
        self._signer = signer
        self._monotonic = monotonic
        self._lost = lost
        # What was published, as of when; and the reading that is under way, for all who wait for it.
        self._published: tuple[float, Sequence[SigningKey]] | None = None
        self._reading: asyncio.Future[Sequence[SigningKey]] | None = None

    async def sign(self, transaction: TokenTransaction, claims: Mapping[str, object], now: datetime) -> str:
        """Signs within a transaction, of which it is to be the last thing but for the audit trail."""
        key = signing_key(await transaction.signing_keys(), now)
        if key is None or not self._signer.can_use(key):
            key = signing_key(await self._keep(transaction, now), now)
        if key is None:
            raise LookupError("a key was made, and there is none")
        return self._signer.sign(key, claims)

    async def keep(self) -> None:
        """Does what is to be done about the keys now. Raises StorageUnavailableError."""
        async with self._store.transaction() as transaction:
            await self._keep(transaction, await transaction.now())

    async def _keep(self, transaction: TokenTransaction, now: datetime) -> Sequence[SigningKey]:
        keys = await transaction.lock_signing_keys()
        unusable = [key.kid for key in keys if not self._signer.can_use(key)]
        needed = upkeep(keys, unusable, now)
        if needed.drop:
            await transaction.delete_signing_keys(needed.drop)
        keys = [key for key in keys if key.kid not in needed.drop]
        if needed.make_for is not None:
            if unusable:
                self._lost(unusable)
            keys.append(await transaction.insert_signing_key(self._signer.make(), needed.make_for))
        return keys

    async def published(self) -> Sequence[SigningKey]:
        """Gives the keys with which tokens are verified, as of some seconds ago. Raises StorageUnavailableError."""
        if self._published is not None and self._monotonic() - self._published[0] < PUBLISHED_KEPT_S:
            return self._published[1]
        reading = self._reading
        if reading is None:
            reading = self._reading = asyncio.ensure_future(self._read())
            reading.add_done_callback(self._end_reading)
        # However many ask, and whoever of them gives up: what is read is read once.
        return await asyncio.shield(reading)

    async def _read(self) -> Sequence[SigningKey]:
        read_s = self._monotonic()
        async with self._store.transaction() as transaction:
            keys = await transaction.signing_keys() or await self._keep(transaction, await transaction.now())
        keys = sorted(keys, key=lambda key: key.sign_time)
        if self._reading is asyncio.current_task():
            self._published = read_s, keys
        return keys

    def _end_reading(self, reading: asyncio.Future[Sequence[SigningKey]]) -> None:
        if self._reading is reading:
            self._reading = None
        if not reading.cancelled():
            # Told to whoever waits; where nobody does any more, to nobody.
            reading.exception()

    async def replace(self, caller: Caller) -> SigningKey:
        """Ends all keys at once, and has another one sign from now on."""
        access.require_root(caller)
        async with self._store.transaction() as transaction:
            await access.require_still_in_use(caller, transaction)
            ended = [key.kid for key in await transaction.lock_signing_keys()]
            await transaction.delete_signing_keys(ended)
            key = await transaction.insert_signing_key(self._signer.make(), await transaction.now())
            entry = AuditEntry(
                organization_id=ROOT_ORGANIZATION_ID,
                entity="signing_key",
                entity_id=key.kid,
                before={"kids": ended},
                after={"kids": [key.kid]},
            )
            await transaction.record_audit(caller, entry)
        # Nor is a reading that has begun before of any use to those who ask from now on.
        self._published = self._reading = None
        return key
