"""TokenService: each method converts, calls one use case, and converts back."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import structlog

from apikeys.v1 import token_service_pb2 as pb
from latchgate.domain.errors import RefreshTokenReusedError
from latchgate.domain.keyring import Keyring
from latchgate.domain.model import Caller, Visitor
from latchgate.domain.signing import SigningKey, jwk
from latchgate.domain.tokens import Grant, TokenManager
from latchgate.observers import TokenObserver
from latchgate.rpc.convert import timestamp_message

TOKEN_TYPE = "Bearer"  # noqa: S105 - how tokens are sent
_log = structlog.get_logger("latchgate.tokens")


class TokenService:
    """Serves apikeys.v1.TokenService."""

    def __init__(self, *, tokens: TokenManager, keyring: Keyring, observer: TokenObserver) -> None:
        """Takes the use cases, and who is told of refresh tokens that are used twice."""
        self._tokens = tokens
        self._keyring = keyring
        self._observer = observer

    async def exchange_key(self, request: pb.ExchangeKeyRequest, caller: Caller) -> pb.ExchangeKeyResponse:
        """Exchanges the caller's key."""
        grant = await self._tokens.exchange(caller, request.permissions, request.audience)
        return pb.ExchangeKeyResponse(**_fields(grant))

    async def refresh_token(self, request: pb.RefreshTokenRequest, visitor: Visitor) -> pb.RefreshTokenResponse:
        """Uses a refresh token up, and gives the next one."""
        request_id = UUID(request.request_id) if request.request_id else None
        try:
            grant = await self._tokens.refresh(visitor, request.refresh_token, request_id)
        except RefreshTokenReusedError:
            self._observer.refresh_token_reused()
            call, caller = visitor.call, visitor.caller
            key_id = caller.key_id if caller else None
            _log.warning("refresh_token_reused", key=key_id, peer=call.peer, request_id=call.request_id)
            raise
        return pb.RefreshTokenResponse(**_fields(grant))

    async def revoke_token(self, request: pb.RevokeTokenRequest, visitor: Visitor) -> pb.RevokeTokenResponse:
        """Ends what came of an exchange."""
        await self._tokens.revoke(visitor, request.refresh_token)
        return pb.RevokeTokenResponse()

    async def get_jwks(self, _request: pb.GetJwksRequest, _visitor: Visitor) -> pb.GetJwksResponse:
        """Gives the keys that tokens are verified with."""
        return pb.GetJwksResponse(keys=[_key_message(key) for key in await self._keyring.published()])

    async def rotate_signing_keys(
        self, _request: pb.RotateSigningKeysRequest, caller: Caller
    ) -> pb.RotateSigningKeysResponse:
        """Has another key sign, and no other be published."""
        return pb.RotateSigningKeysResponse(key=_key_message(await self._keyring.replace(caller)))


def _fields(grant: Grant) -> dict[str, Any]:
    """Gives the fields that both answers have."""
    return {
        "access_token": grant.access_token,
        "token_type": TOKEN_TYPE,
        "expire_time": timestamp_message(grant.expire_time),
        "refresh_token": grant.refresh_token,
        "refresh_expire_time": timestamp_message(grant.refresh_expire_time),
    }


def _key_message(key: SigningKey) -> pb.JsonWebKey:
    return pb.JsonWebKey(**jwk(key))
