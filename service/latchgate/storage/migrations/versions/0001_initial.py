"""The first schema."""

from alembic import op

revision = "0001"
down_revision = None

_STATEMENTS = (
    # Named defaults of organizations. 0 requests a minute: no limit.
    """
    CREATE TABLE plan (
        id text COLLATE "C" PRIMARY KEY,
        rate_limit_per_minute integer NOT NULL
            CONSTRAINT plan_rate_limit_not_negative CHECK (rate_limit_per_minute >= 0),
        max_keys integer NOT NULL CONSTRAINT plan_max_keys_not_negative CHECK (max_keys >= 0),
        create_time timestamptz NOT NULL DEFAULT now(),
        update_time timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Tenants. key_count counts the keys that are not revoked; it is kept by the statements that insert and revoke.
    """
    CREATE TABLE organization (
        id text COLLATE "C" PRIMARY KEY,
        name text NOT NULL,
        plan_id text COLLATE "C" NOT NULL CONSTRAINT organization_plan REFERENCES plan,
        active boolean NOT NULL DEFAULT true,
        scopes jsonb NOT NULL DEFAULT '[]',
        key_count bigint NOT NULL DEFAULT 0 CONSTRAINT organization_key_count_not_negative CHECK (key_count >= 0),
        create_time timestamptz NOT NULL DEFAULT now(),
        update_time timestamptz NOT NULL DEFAULT now()
    ) WITH (fillfactor = 80)
    """,
    # Keys. No token, no digest: those are of secrets. revision is that of the last change, 0 for none.
    """
    CREATE TABLE key (
        id text COLLATE "C" PRIMARY KEY,
        organization_id text COLLATE "C" NOT NULL CONSTRAINT key_organization REFERENCES organization,
        name text NOT NULL,
        key_type text NOT NULL CONSTRAINT key_type_known CHECK (key_type IN ('secret', 'publishable')),
        environment text NOT NULL CONSTRAINT key_environment_known CHECK (environment IN ('live', 'test')),
        permissions text[] NOT NULL,
        rate_limit_per_minute integer NOT NULL
            CONSTRAINT key_rate_limit_not_negative CHECK (rate_limit_per_minute >= 0),
        active boolean NOT NULL DEFAULT true,
        user_id text NOT NULL,
        user_email text NOT NULL,
        metadata jsonb NOT NULL,
        allowed_cidrs text[] NOT NULL,
        created_by text NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now(),
        update_time timestamptz NOT NULL DEFAULT now(),
        expire_time timestamptz,
        revoke_time timestamptz,
        revoke_reason text NOT NULL DEFAULT '',
        delete_time timestamptz,
        version bigint NOT NULL DEFAULT 1,
        revision bigint NOT NULL DEFAULT 0,
        CONSTRAINT key_deleted_is_revoked CHECK (delete_time IS NULL OR revoke_time IS NOT NULL)
    )
    """,
    # Keyset paging of an organization's keys, and of one user's.
    "CREATE INDEX key_by_organization ON key (organization_id, id)",
    "CREATE INDEX key_by_user ON key (organization_id, user_id, id) WHERE user_id <> ''",
    # The few that count, among all that ever were.
    "CREATE INDEX key_unrevoked ON key (organization_id, id) WHERE revoke_time IS NULL",
    "CREATE INDEX key_publishable ON key (organization_id, environment, id) WHERE key_type = 'publishable'",
    # What is kept of tokens. readable_token is for publishable keys alone.
    """
    CREATE TABLE secret (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        digest bytea NOT NULL CONSTRAINT secret_digest_unique UNIQUE
            CONSTRAINT secret_digest_is_sha256 CHECK (octet_length(digest) = 32),
        key_id text COLLATE "C" NOT NULL CONSTRAINT secret_key REFERENCES key,
        hint text NOT NULL,
        readable_token text,
        create_time timestamptz NOT NULL DEFAULT now(),
        end_time timestamptz
    )
    """,
    "CREATE INDEX secret_by_key ON secret (key_id, id)",
    # Narrow, with room on each page and no index on the time: an update stays on its page and touches no index.
    """
    CREATE TABLE last_used (
        secret_id bigint PRIMARY KEY CONSTRAINT last_used_secret REFERENCES secret ON DELETE CASCADE,
        used_time timestamptz
    ) WITH (fillfactor = 80)
    """,
    # Every change that validation can see, in the order of the commits.
    "CREATE SEQUENCE change_revision AS bigint",
    """
    CREATE TABLE change_log (
        revision bigint PRIMARY KEY,
        entity text NOT NULL CONSTRAINT change_log_entity_known CHECK (entity IN ('key', 'organization', 'plan')),
        entity_id text NOT NULL,
        change_time timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Answers to calls with a request_id. sealed_token is cleared after 10 minutes, the row goes after a day.
    """
    CREATE TABLE request (
        slot bytea PRIMARY KEY CONSTRAINT request_slot_is_sha256 CHECK (octet_length(slot) = 32),
        body_digest bytea NOT NULL CONSTRAINT request_body_is_sha256 CHECK (octet_length(body_digest) = 32),
        key_id text COLLATE "C" NOT NULL DEFAULT '',
        revision bigint NOT NULL DEFAULT 0,
        sealed_token bytea,
        create_time timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX request_by_time ON request (create_time)",
    "CREATE INDEX request_with_token ON request (create_time) WHERE sealed_token IS NOT NULL",
    # What the deployment must not change by accident: the tag key, or its fingerprint.
    "CREATE TABLE deployment (name text PRIMARY KEY, value bytea NOT NULL)",
    "INSERT INTO plan (id, rate_limit_per_minute, max_keys) VALUES ('default', 0, 1000), ('root', 0, 100)",
    "INSERT INTO organization (id, name, plan_id) VALUES ('org_root', 'Latchgate', 'root')",
)


def upgrade() -> None:
    """Makes the schema."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes the schema, and all data with it."""
    op.execute("DROP TABLE deployment, request, change_log, last_used, secret, key, organization, plan")
    op.execute("DROP SEQUENCE change_revision")
