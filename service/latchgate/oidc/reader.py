"""Reading JWTs (RFC 7519): whether an issuer has signed one, for this service, and what it says."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping
from typing import Any, Final

from joserfc import jwt
from joserfc.errors import ClaimError, ExpiredTokenError, JoseError, MissingClaimError, SecurityWarning
from joserfc.jws import JWSRegistry
from joserfc.jwt import JWTClaimsRegistry

from latchgate.domain.errors import CredentialsInvalidError
from latchgate.oidc.keys import IssuerKeys

# Only such as are verified with a public key.
ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"}
)
# Of a JWT's header, which may hold certificates.
MAX_HEADER_BYTES: Final = 16 * 1024
# How all JWTs begin: `{"` in base64.
_BEGINNING: Final = "eyJ"
_SEGMENTS: Final = 3


class JwtReader:
    """Implements latchgate.domain.logins.JwtReader."""

    def __init__(self, *, issuer: str, audience: str, skew_s: int, keys: IssuerKeys) -> None:
        """Takes whose JWTs are read, for whom they must be, how far clocks may be apart, and the issuer's keys."""
        self._issuer = issuer
        self._skew_s = skew_s
        self._keys = keys
        self._claims: Mapping[str, Any] = {
            "iss": {"essential": True, "value": issuer},
            "aud": {"essential": True, "value": audience},
            "sub": {"essential": True},
            "exp": {"essential": True},
        }
        self._registry = JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
        self._registry.max_header_length = MAX_HEADER_BYTES

    def is_issued(self, token: str) -> bool:
        """Says whether a token says of itself that it is a JWT of the issuer."""
        segments = token.split(".") if token.startswith(_BEGINNING) else ()
        return len(segments) == _SEGMENTS and _object(segments[1]).get("iss") == self._issuer

    async def read(self, token: str) -> Mapping[str, Any]:
        """Gives what the issuer says in a token, whose times are not looked at yet.

        Raises CredentialsInvalidError for one that the issuer has not signed, and IssuerUnavailableError.
        """
        header = _object(token.partition(".")[0])
        algorithm, key_id = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise CredentialsInvalidError("the calling JWT is signed in a way that is not accepted")
        key = await self._keys.find(key_id) if key_id is None or isinstance(key_id, str) else None
        if key is None:
            raise CredentialsInvalidError("the calling JWT is signed with a key that its issuer does not publish")
        try:
            with warnings.catch_warnings():
                # That EdDSA has a new name. Issuers go on to use the old one.
                warnings.simplefilter("ignore", SecurityWarning)
                claims = jwt.decode(token, key, registry=self._registry).claims
        except (JoseError, ValueError, TypeError, RecursionError):
            raise CredentialsInvalidError(
                "the calling JWT is not accepted: it is not as its issuer has signed it"
            ) from None
        return claims

    def check(self, claims: Mapping[str, Any], now_s: float) -> None:
        """Demands that a token is for this service, and is good now. Raises CredentialsInvalidError."""
        registry = JWTClaimsRegistry(now=int(now_s), leeway=self._skew_s, **self._claims)
        try:
            registry.validate(dict(claims))
        except ExpiredTokenError:
            raise CredentialsInvalidError("the calling JWT has expired; get a new one from its issuer") from None
        except MissingClaimError as error:
            raise CredentialsInvalidError(f"the calling JWT lacks a claim: {error.claim}") from None
        except ClaimError as error:
            raise CredentialsInvalidError(
                f"the calling JWT is not accepted for its claim {error.claim}; see LATCHGATE_OIDC_AUDIENCE, and "
                "compare the issuer's clock with the database's"
            ) from None


def _object(segment: str) -> dict[str, Any]:
    """Reads a segment that nobody has verified; empty for what is no JSON object."""
    try:
        found = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
