"""Families of refresh tokens, and the keys that sign access tokens."""

from alembic import op

revision = "0008"
down_revision = "0007"

_STATEMENTS = (
    # All that came of one exchange of a key. handle is the digest of what its tokens have in common, token_digest that
    # of the one to be used next. Of the use before there is which token it was, by which request, and encrypted, for 10
    # minutes, what it was given. secret_id refers to a secret of the key, which goes with it.
    """
    CREATE TABLE token_family (
        id text COLLATE "C" PRIMARY KEY,
        key_id text COLLATE "C" NOT NULL CONSTRAINT token_family_key REFERENCES key ON DELETE CASCADE,
        secret_id bigint NOT NULL,
        handle bytea NOT NULL CONSTRAINT token_family_handle_unique UNIQUE
            CONSTRAINT token_family_handle_is_sha256 CHECK (octet_length(handle) = 32),
        token_digest bytea NOT NULL
            CONSTRAINT token_family_token_is_sha256 CHECK (octet_length(token_digest) = 32),
        audience text NOT NULL,
        permissions text[] NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now(),
        expire_time timestamptz NOT NULL,
        used_digest bytea,
        use_time timestamptz,
        request_digest bytea,
        sealed_token bytea
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX token_family_by_key ON token_family (key_id, create_time, id)",
    "CREATE INDEX token_family_by_expiry ON token_family (expire_time)",
    "CREATE INDEX token_family_with_token ON token_family (use_time) WHERE sealed_token IS NOT NULL",
    # Key pairs on P-256: coordinates of the public half in base64url, the private half encrypted. sign_time is from
    # when on it signs.
    """
    CREATE TABLE signing_key (
        kid text COLLATE "C" PRIMARY KEY,
        x text NOT NULL,
        y text NOT NULL,
        sealed bytea NOT NULL,
        sign_time timestamptz NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now()
    )
    """,
)


def upgrade() -> None:
    """Makes the tables."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes them."""
    op.execute("DROP TABLE signing_key, token_family")
