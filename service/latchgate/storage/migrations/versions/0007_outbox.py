"""Events, the webhooks that are told of them, deliveries, and mail."""

from alembic import op

revision = "0007"
down_revision = "0006"

_STATEMENTS = (
    # What is to be told of, entered with the change itself. number gives the order: events of one subject are entered
    # with it locked. body is what is sent, the same each time. mail_to is empty where nobody is told by mail.
    """
    CREATE TABLE event (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        id text COLLATE "C" NOT NULL CONSTRAINT event_id_unique UNIQUE,
        organization_id text COLLATE "C" NOT NULL,
        type text NOT NULL,
        subject text COLLATE "C" NOT NULL,
        body text NOT NULL,
        mail_to text NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT now(),
        dispatch_time timestamptz
    )
    """,
    "CREATE INDEX event_waiting ON event (number) WHERE dispatch_time IS NULL",
    "CREATE INDEX event_by_time ON event (create_time)",
    # Where an organization wants to be told. Secrets are encrypted. failing_since: the first failure after a success.
    """
    CREATE TABLE webhook (
        id text COLLATE "C" PRIMARY KEY,
        organization_id text COLLATE "C" NOT NULL CONSTRAINT webhook_organization REFERENCES organization,
        url text NOT NULL,
        event_types text[] NOT NULL,
        enabled boolean NOT NULL DEFAULT true,
        disable_time timestamptz,
        disable_reason text
            CONSTRAINT webhook_disable_reason_known CHECK (disable_reason IN ('caller', 'gone', 'failing')),
        failing_since timestamptz,
        sealed_secret bytea NOT NULL,
        old_sealed_secret bytea,
        old_secret_end_time timestamptz,
        created_by text NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now(),
        update_time timestamptz NOT NULL DEFAULT now(),
        delete_time timestamptz,
        version bigint NOT NULL DEFAULT 1,
        CONSTRAINT webhook_disabled_for_a_reason CHECK (enabled = (disable_reason IS NULL))
    )
    """,
    "CREATE INDEX webhook_by_organization ON webhook (organization_id, id) WHERE delete_time IS NULL",
    "CREATE INDEX webhook_ended ON webhook (id) WHERE delete_time IS NOT NULL OR NOT enabled",
    # One event on its way to one webhook. While it is sent, next_time lies as far ahead as the sending may take: should
    # its worker die, it is due again then. attempts counts all of them, tries those since it was last made pending.
    """
    CREATE TABLE delivery (
        id text COLLATE "C" PRIMARY KEY,
        webhook_id text COLLATE "C" NOT NULL CONSTRAINT delivery_webhook REFERENCES webhook,
        organization_id text COLLATE "C" NOT NULL,
        event_number bigint NOT NULL CONSTRAINT delivery_event REFERENCES event,
        event_type text NOT NULL,
        subject text COLLATE "C" NOT NULL,
        state text NOT NULL DEFAULT 'pending'
            CONSTRAINT delivery_state_known CHECK (state IN ('pending', 'delivered', 'dead')),
        attempts integer NOT NULL DEFAULT 0,
        tries integer NOT NULL DEFAULT 0,
        create_time timestamptz NOT NULL DEFAULT now(),
        next_time timestamptz DEFAULT now(),
        first_time timestamptz,
        last_time timestamptz,
        last_status integer NOT NULL DEFAULT 0,
        last_error text,
        last_duration interval,
        done_time timestamptz,
        CONSTRAINT delivery_once UNIQUE (webhook_id, event_number),
        CONSTRAINT delivery_pending_or_done CHECK ((state = 'pending') = (done_time IS NULL))
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX delivery_due ON delivery (next_time) WHERE state = 'pending'",
    "CREATE INDEX delivery_in_order ON delivery (webhook_id, subject, event_number) WHERE state = 'pending'",
    "CREATE INDEX delivery_by_organization ON delivery (organization_id, id)",
    "CREATE INDEX delivery_by_webhook ON delivery (webhook_id, id)",
    "CREATE INDEX delivery_by_event ON delivery (event_number)",
    "CREATE INDEX delivery_done ON delivery (done_time) WHERE state <> 'pending'",
    # Mail about an event, likewise.
    """
    CREATE TABLE mail (
        id text COLLATE "C" PRIMARY KEY,
        event_number bigint NOT NULL CONSTRAINT mail_event REFERENCES event,
        recipient text NOT NULL,
        state text NOT NULL DEFAULT 'pending'
            CONSTRAINT mail_state_known CHECK (state IN ('pending', 'delivered', 'dead')),
        attempts integer NOT NULL DEFAULT 0,
        create_time timestamptz NOT NULL DEFAULT now(),
        next_time timestamptz DEFAULT now(),
        first_time timestamptz,
        last_error text,
        done_time timestamptz,
        CONSTRAINT mail_once UNIQUE (event_number, recipient),
        CONSTRAINT mail_pending_or_done CHECK ((state = 'pending') = (done_time IS NULL))
    )
    """,
    "CREATE INDEX mail_due ON mail (next_time) WHERE state = 'pending'",
    "CREATE INDEX mail_done ON mail (done_time) WHERE state <> 'pending'",
    # What time has brought about, once for each key, kind and expiry: expiring_ with the days, expired, first_used.
    # publish_time is when an event was made of it.
    """
    CREATE TABLE key_notice (
        key_id text COLLATE "C" NOT NULL CONSTRAINT key_notice_key REFERENCES key ON DELETE CASCADE,
        kind text NOT NULL,
        expire_time timestamptz NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now(),
        publish_time timestamptz,
        PRIMARY KEY (key_id, kind, expire_time)
    )
    """,
    "CREATE INDEX key_notice_waiting ON key_notice (create_time) WHERE publish_time IS NULL",
    """
    CREATE INDEX key_notice_by_expiry ON key_notice (expire_time)
    WHERE kind <> 'first_used' AND publish_time IS NOT NULL
    """,
    # Up to which expiry keys were looked through, for each kind of notice.
    "CREATE TABLE expiry_scan (kind text PRIMARY KEY, until_time timestamptz NOT NULL)",
    "CREATE INDEX key_expiring ON key (expire_time) WHERE expire_time IS NOT NULL AND revoke_time IS NULL",
)


def upgrade() -> None:
    """Makes the tables."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes them."""
    op.execute("DROP INDEX key_expiring")
    op.execute("DROP TABLE expiry_scan, key_notice, mail, delivery, webhook, event")
