"""SQL of tokens that keys are exchanged for, each statement with what it guarantees."""

from __future__ import annotations

# An advisory lock, which is a database's own; "latc" in ASCII, and a number of its own.
SIGNING_LOCK = 0x6C617467

# The family of a token, by what it has in common with all others of it. Without a lock: it may be gone a moment later.
FAMILY_FIND = "SELECT id, key_id, secret_id FROM token_family WHERE handle = $1"

# A family, with its first token.
FAMILY_INSERT = """
INSERT INTO token_family (id, key_id, secret_id, audience, permissions, expire_time, handle, token_digest)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""

# Ends the families of a key, which is locked, beyond the $2 newest.
FAMILY_TRIM = """
DELETE FROM token_family
WHERE id IN (SELECT id FROM token_family WHERE key_id = $1 ORDER BY create_time DESC, id DESC OFFSET $2)
"""

# A family, kept from change until the end of the transaction. What its last use was given is there only for $2.
FAMILY_LOCK = """
SELECT id, key_id, secret_id, audience, permissions, expire_time, token_digest, used_digest, request_digest,
       CASE WHEN use_time > now() - $2::interval THEN sealed_token END AS sealed_token
FROM token_family WHERE id = $1
FOR UPDATE
"""

# The next token in the place of the one that is used up, and what is kept of this use.
FAMILY_USE = """
UPDATE token_family
SET used_digest = token_digest, token_digest = $2, request_digest = $3, sealed_token = $4, use_time = now()
WHERE id = $1
"""

FAMILY_DELETE = "DELETE FROM token_family WHERE id = $1"

# Forgets up to $2 tokens that are kept for retries and older than $1. Those that another worker is at are left to it.
FAMILY_CLEAR = """
UPDATE token_family SET sealed_token = NULL
WHERE id IN (
    SELECT id FROM token_family
    WHERE sealed_token IS NOT NULL AND use_time <= now() - $1::interval
    ORDER BY use_time
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
"""

# Removes up to $1 families that have expired, likewise.
FAMILY_FORGET = """
DELETE FROM token_family
WHERE id IN (
    SELECT id FROM token_family WHERE expire_time <= now() ORDER BY expire_time LIMIT $1 FOR UPDATE SKIP LOCKED
)
"""

# The keys that sign, did a while ago, or will.
SIGNING_KEY_LIST = "SELECT kid, x, y, sealed, sign_time FROM signing_key ORDER BY sign_time"

SIGNING_KEY_INSERT = "INSERT INTO signing_key (kid, x, y, sealed, sign_time) VALUES ($1, $2, $3, $4, $5)"

SIGNING_KEY_DELETE = "DELETE FROM signing_key WHERE kid = ANY ($1::text[])"
