"""How what is kept secret is encrypted: Fernet, each secret under a key of its own that is derived from the tag key."""

from __future__ import annotations

import base64

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def fernet(tag_key: bytes, *, use: bytes, salt: bytes) -> Fernet:
    """Gives what encrypts one secret: by a key derived (HKDF, RFC 5869) for this `use`, and by the salt for it alone.

    With a tag key from the settings a copy of the database opens nothing.
    """
    derived = HKDF(algorithm=SHA256(), length=32, salt=salt, info=use)
    return Fernet(base64.urlsafe_b64encode(derived.derive(tag_key)))
