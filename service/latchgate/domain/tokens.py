"""Keys exchanged for short-lived access tokens and refresh tokens: one use case a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from latchgate.domain.errors import (
    CredentialsInvalidError,
    KeyRequiredError,
    PermissionNotHeldError,
    RefreshTokenInvalidError,
    RefreshTokenReusedError,
    RootOrganizationError,
)
from latchgate.domain.families import (
    Family,
    Holder,
    NewFamily,
    TokenTerms,
    Use,
    access_end,
    claims,
    family_entry,
    family_snapshot,
    request_digest,
    still_held,
    use_of,
)
from latchgate.domain.keyring import Keyring
from latchgate.domain.model import Caller, Outcome, Visitor
from latchgate.domain.permissions import Grants
from latchgate.domain.ports import IdMaker, Sealer, SuspicionRecorder
from latchgate.domain.refresh import RefreshToken, RefreshTokenFormat
from latchgate.domain.token_ports import TokenStore, TokenTransaction, UseRecorder

MAX_FAMILIES: Final = 1000
"""How many families a key can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What is given out: an access token, and the refresh token that gives the next one."""

    access_token: str = field(repr=False)
    expire_time: datetime
    refresh_token: str = field(repr=False)
    refresh_expire_time: datetime


class TokenManager:
    """Exchanges, refreshes and ends tokens."""

    def __init__(  # noqa: PLR0913 - what it is composed of
        self,
        *,
        store: TokenStore,
        keyring: Keyring,
        tokens: RefreshTokenFormat,
        sealer: Sealer,
        terms: TokenTerms,
        make_id: IdMaker,
        uses: UseRecorder,
        suspicion: SuspicionRecorder,
    ) -> None:
        """Takes where tokens are kept, what signs, how refresh tokens are made and sealed, and who hears of uses."""
        self._store = store
        self._keyring = keyring
        self._tokens = tokens
        self._sealer = sealer
        self._terms = terms
        self._make_id = make_id
        self._uses = uses
        self._suspicion = suspicion

    async def exchange(self, caller: Caller, permissions: Sequence[str], audience: str) -> Grant:
        """Exchanges the caller's key, for some of its permissions or all of them."""
        if caller.is_root:
            raise RootOrganizationError("root keys are not exchanged: what they may do must not leave the service")
        if caller.secret_id is None:
            raise KeyRequiredError("a JWT is not exchanged for another; present the key")
        async with self._store.transaction() as transaction:
            holder = await transaction.lock_holder(caller.key_id, caller.secret_id)
            if holder is None or not holder.is_good:
                raise CredentialsInvalidError(
                    "the calling token was ended while the call was under way; nothing was given out",
                    outcome=Outcome.REVOKED.name,
                )
            _check_held(permissions, holder)
            token = self._tokens.mint()
            family = NewFamily(
                id=self._make_id("fam_"),
                key_id=holder.key_id,
                secret_id=holder.secret_id,
                audience=audience or self._terms.audience,
                permissions=tuple(permissions or holder.permissions),
                expire_time=holder.read_time + self._terms.refresh,
                token=token,
            )
            await transaction.insert_family(family, MAX_FAMILIES)
            grant = await self._grant(transaction, holder, family, token.token)
            entry = family_entry(holder.organization_id, family, None, family_snapshot(family))
            await transaction.record_audit(caller, entry)
        return grant

    async def refresh(self, visitor: Visitor, text: str, request_id: UUID | None) -> Grant:
        """Uses a refresh token up. One that was used up before ends its family, which stays so though this raises."""
        token = self._read(visitor, text)
        if token is None:
            raise _invalid()
        async with self._store.transaction() as transaction:
            found = await self._lock(transaction, visitor, token)
            if found is None:
                raise _invalid()
            caller, holder, family = found
            use = use_of(family, token, request_id)
            if use is Use.REUSE:
                await _end(transaction, caller, family, "reused")
            else:
                grant = await self._use(transaction, visitor, holder, family, (token, request_id, use))
                entry = family_entry(holder.organization_id, family, None, None)
                await transaction.record_audit(caller, entry)
        if use is Use.REUSE:
            raise RefreshTokenReusedError(
                "the refresh token was used before, and so it or its successor is in other hands; all that came of the "
                "same exchange has ended: exchange the key again, and find out who else has had its refresh token"
            )
        self._uses.used_secret(holder.secret_id, holder.organization_id, holder.read_time.timestamp())
        return grant

    async def revoke(self, visitor: Visitor, text: str) -> None:
        """Ends the family of a refresh token, if there is one."""
        token = self._read(visitor, text)
        if token is None:
            return
        async with self._store.transaction() as transaction:
            found = await self._lock(transaction, visitor, token)
            if found is not None:
                caller, _, family = found
                await _end(transaction, caller, family, "revoked")

    def _read(self, visitor: Visitor, text: str) -> RefreshToken | None:
        """Gives the token that a text is; what is none is counted as suspicious."""
        token = self._tokens.read(text)
        if token is None:
            self._suspicion.suspect(visitor.client_ip, Outcome.NOT_FOUND, None)
        return token

    async def _lock(
        self, transaction: TokenTransaction, visitor: Visitor, token: RefreshToken
    ) -> tuple[Caller, Holder, Family] | None:
        """Locks a token's family and its key, whose the call is then; None if there is no such family any more."""
        known = await transaction.find_family(token.family_digest)
        if known is not None:
            family_id, key_id, secret_id = known
            holder = await transaction.lock_holder(key_id, secret_id)
            family = await transaction.lock_family(family_id)
            if holder is not None and family is not None:
                caller = visitor.becomes(
                    key_id=key_id,
                    secret_id=secret_id,
                    organization_id=holder.organization_id,
                    grants=Grants(holder.permissions),
                )
                return caller, holder, family
        self._suspicion.suspect(visitor.client_ip, Outcome.NOT_FOUND, None)
        return None

    async def _use(
        self,
        transaction: TokenTransaction,
        visitor: Visitor,
        holder: Holder,
        family: Family,
        presented: tuple[RefreshToken, UUID | None, Use],
    ) -> Grant:
        """Gives out what follows. Raises RefreshTokenInvalidError."""
        token, request_id, use = presented
        is_over = family.expire_time <= holder.read_time
        if is_over or use is Use.LATE or not (holder.is_good and holder.may_be_at(visitor.client_ip)):
            raise _invalid()
        if use is Use.RETRY and request_id is not None and family.sealed_token is not None:
            following = self._sealer.open(request_id, family.sealed_token)
        else:
            following = self._tokens.mint(token.handle).token
            await transaction.use_token(
                family,
                RefreshToken(token=following, handle=token.handle).digest,
                request_digest(family.id, request_id) if request_id else None,
                self._sealer.seal(request_id, following) if request_id else None,
            )
        return await self._grant(transaction, holder, family, following)

    async def _grant(
        self, transaction: TokenTransaction, holder: Holder, family: NewFamily | Family, refresh_token: str
    ) -> Grant:
        """Signs an access token with what the family asks for and the key still has."""
        end = access_end(holder, family.expire_time, self._terms)
        permissions = still_held(family.permissions, holder)
        said = claims(self._make_id("at_"), holder, family.audience, permissions, end, self._terms.issuer)
        return Grant(
            access_token=await self._keyring.sign(transaction, said, holder.read_time),
            expire_time=end,
            refresh_token=refresh_token,
            refresh_expire_time=family.expire_time,
        )


def _invalid() -> RefreshTokenInvalidError:
    """Makes the one answer for all refresh tokens that are not accepted: it does not tell them apart."""
    return RefreshTokenInvalidError("the refresh token is not accepted; exchange the key again")


async def _end(transaction: TokenTransaction, caller: Caller, family: Family, reason: str) -> None:
    """Ends a family, and records why."""
    await transaction.delete_family(family.id)
    entry = family_entry(caller.organization_id, family, family_snapshot(family), {"end_reason": reason})
    await transaction.record_audit(caller, entry)


def _check_held(permissions: Sequence[str], holder: Holder) -> None:
    """Demands that the key has what is asked for. Raises PermissionNotHeldError."""
    lacking = Grants(holder.permissions).lacking(permissions)
    if lacking is not None:
        raise PermissionNotHeldError(
            f"the calling key lacks {lacking}, and so can not be exchanged for it", permission=lacking
        )
