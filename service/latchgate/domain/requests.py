"""Retries made safe: a request that carries a request_id is carried out once and answered alike each time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from uuid import UUID

from latchgate.domain.errors import RequestIdExpiredError, RequestIdReusedError
from latchgate.domain.model import Caller
from latchgate.domain.ports import AnsweredRequest, Sealer, Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """One request with a request_id. Only digests of the id leave this module: the id opens the token that is kept."""

    request_id: UUID
    slot: bytes
    body_digest: bytes

    @classmethod
    def of(cls, caller: Caller, method: str, request_id: UUID, body: object) -> Retry:
        """Makes it from the caller, the method and the body (a frozen value whose repr is all of it)."""
        slot = hashlib.sha256(f"{caller.id}\n{method}\n{request_id}".encode()).digest()
        return cls(request_id=request_id, slot=slot, body_digest=hashlib.sha256(repr(body).encode()).digest())

    async def earlier_answer(self, transaction: Transaction, sealer: Sealer) -> tuple[AnsweredRequest, str] | None:
        """Gives the answer to the same request before, with its token, or None: then it is to be carried out now.

        Raises RequestIdReusedError and RequestIdExpiredError.
        """
        answered = await transaction.claim_request(self.slot, self.body_digest)
        if answered is None:
            return None
        if answered.body_digest != self.body_digest:
            raise RequestIdReusedError(
                f"this request_id was used for key {answered.key_id} with another body; use a new one",
                key_id=answered.key_id,
            )
        if answered.sealed_token is None:
            raise RequestIdExpiredError(
                f"this request made a token of key {answered.key_id} that is no longer kept; rotate the key to get one",
                key_id=answered.key_id,
            )
        return answered, sealer.open(self.request_id, answered.sealed_token)

    async def keep(self, transaction: Transaction, sealer: Sealer, *, key_id: str, revision: int, token: str) -> None:
        """Keeps the answer for the next time."""
        await transaction.answer_request(self.slot, key_id, revision, sealer.seal(self.request_id, token))
