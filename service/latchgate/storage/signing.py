"""What signs access tokens: keys on P-256, their private halves encrypted under the tag key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from cryptography.fernet import Fernet, InvalidToken
from joserfc import jwt
from joserfc.jwk import ECKey

from latchgate.domain.signing import KeyPair, SigningKey
from latchgate.storage.sealing import fernet

ALGORITHM: Final = "ES256"
TYPE: Final = "at+jwt"
_USE: Final = b"latchgate signing key"


class JoseSigner:
    """Implements latchgate.domain.token_ports.TokenSigner."""

    def __init__(self, tag_key: bytes) -> None:
        """Takes the deployment's tag key."""
        self._tag_key = tag_key
        # The one that was used last, by its ciphertext: opening it takes longer than signing with it.
        self._opened: tuple[bytes, ECKey] | None = None

    def make(self) -> KeyPair:
        """Makes a key; its id is its thumbprint (RFC 7638)."""
        key = ECKey.generate_key("P-256", private=True)
        kid, public = key.thumbprint(), key.as_dict(private=False)
        secret = json.dumps(key.as_dict(private=True)).encode()
        return KeyPair(kid=kid, x=str(public["x"]), y=str(public["y"]), sealed=self._fernet(kid).encrypt(secret))

    def can_use(self, key: SigningKey) -> bool:
        """Says whether the private half can be read."""
        try:
            self._open(key)
        except InvalidToken:
            return False
        return True

    def sign(self, key: SigningKey, claims: Mapping[str, object]) -> str:
        """Makes a JWT (RFC 9068)."""
        header = {"alg": ALGORITHM, "kid": key.kid, "typ": TYPE}
        return jwt.encode(header, dict(claims), self._open(key), algorithms=[ALGORITHM])

    def _open(self, key: SigningKey) -> ECKey:
        if self._opened is None or self._opened[0] != key.sealed:
            secret = self._fernet(key.kid).decrypt(key.sealed)
            self._opened = key.sealed, ECKey.import_key(json.loads(secret))
        return self._opened[1]

    def _fernet(self, kid: str) -> Fernet:
        return fernet(self._tag_key, use=_USE, salt=kid.encode())
