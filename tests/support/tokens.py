"""Refresh tokens and access tokens, as tests need them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import asyncpg
import grpc
from joserfc import jwt
from joserfc.jwk import KeySet

from apikeys.v1 import token_service_pb2 as pb
from latchgate.domain.refresh import HANDLE_LENGTH, OWN_LENGTH, RefreshToken, RefreshTokenFormat
from latchgate.storage import queries_tokens
from latchgate.storage.signing import JoseSigner
from latchgate.storage.tokens import signing_key
from support.service import TAG_KEY, RunningService, bearer, refusal

REFRESH_TOKENS: Final = RefreshTokenFormat(TAG_KEY.encode())
"""The format of a service's own refresh tokens."""
_PLANTED_COUNT: Final = 2000
_next_planted: Final = itertools.count()


def _planted(number: int) -> RefreshToken:
    """Makes one of the refresh tokens that are planted."""
    handle = f"{number:0{HANDLE_LENGTH}}"
    made = REFRESH_TOKENS.read(REFRESH_TOKENS.tagged(handle, "0" * OWN_LENGTH))
    assert made is not None
    return made


async def plant_tokens(database_url: str) -> None:
    """Makes families of the root key, each with a refresh token that is known. A service must have made that key."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(
            """
            INSERT INTO token_family (id, key_id, secret_id, handle, token_digest, audience, permissions, expire_time)
            SELECT 'fam_' || number, root.*, handle, digest, 'latchgate', '{}', now() + interval '1 day'
            FROM (SELECT k.id, s.id FROM key k JOIN secret s ON s.key_id = k.id
                  WHERE k.organization_id = 'org_root' LIMIT 1) AS root,
                 unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY AS planted (handle, digest, number)
            """,
            [_planted(number).family_digest for number in range(_PLANTED_COUNT)],
            [_planted(number).digest for number in range(_PLANTED_COUNT)],
        )
    finally:
        await connection.close()


def next_refresh_token() -> str:
    """Gives a planted refresh token that nobody was given before."""
    return _planted(next(_next_planted) % _PLANTED_COUNT).token


async def published(service: RunningService) -> Sequence[Mapping[str, str]]:
    """Reads the keys that tokens are verified with."""
    answer: pb.GetJwksResponse = await service.tokens.GetJwks(pb.GetJwksRequest())
    return [{field.name: value for field, value in key.ListFields()} for key in answer.keys]


async def signed(service: RunningService, claims: Mapping[str, object]) -> str:
    """Signs claims as the service would, whatever they are."""
    connection = await asyncpg.connect(service.database_url)
    try:
        row = await connection.fetchrow(queries_tokens.SIGNING_KEY_LIST)
    finally:
        await connection.close()
    assert row is not None
    return JoseSigner(TAG_KEY.encode()).sign(signing_key(row), claims)


async def verified(service: RunningService, access_token: str) -> dict[str, Any]:
    """Gives what an access token says, if a published key has signed it: as another library's user would judge."""
    keys = KeySet.import_key_set({"keys": [dict(key) for key in await published(service)]})
    return dict(jwt.decode(access_token, keys, algorithms=["ES256"]).claims)


async def exchange(service: RunningService, token: str, **fields: Any) -> pb.ExchangeKeyResponse:
    """Exchanges the key of a token."""
    request = pb.ExchangeKeyRequest(**fields)
    answer: pb.ExchangeKeyResponse = await service.tokens.ExchangeKey(request, metadata=bearer(token))
    return answer


async def refresh(service: RunningService, refresh_token: str, request_id: str = "") -> pb.RefreshTokenResponse:
    """Uses a refresh token up."""
    request = pb.RefreshTokenRequest(refresh_token=refresh_token, request_id=request_id)
    answer: pb.RefreshTokenResponse = await service.tokens.RefreshToken(request)
    return answer


async def revoke(service: RunningService, refresh_token: str) -> None:
    """Ends what came of an exchange."""
    await service.tokens.RevokeToken(pb.RevokeTokenRequest(refresh_token=refresh_token))


async def refused_refresh(service: RunningService, refresh_token: str, request_id: str = "") -> str:
    """Demands that a refresh is refused as one of nobody who is known, and gives the reason."""
    error = await refusal(refresh(service, refresh_token, request_id))
    assert grpc.StatusCode.UNAUTHENTICATED == error.code
    assert {} == error.metadata
    return error.reason
