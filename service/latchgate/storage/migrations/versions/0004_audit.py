"""The audit trail."""

from alembic import op

revision = "0004"
down_revision = "0003"

_STATEMENTS = (
    # Where each organization's chain ends. Taken before an event is added, so that its events follow each other.
    """
    CREATE TABLE audit_head (
        organization_id text COLLATE "C" PRIMARY KEY,
        sequence bigint NOT NULL,
        hash bytea NOT NULL,
        event_time timestamptz NOT NULL
    ) WITH (fillfactor = 50)
    """,
    # Where each chain begins, once its first events are too old to be kept: the last one that is gone.
    """
    CREATE TABLE audit_start (
        organization_id text COLLATE "C" PRIMARY KEY,
        sequence bigint NOT NULL,
        hash bytea NOT NULL
    )
    """,
    # Events, by month; never changed. before_change and after_change are null where there is nothing.
    """
    CREATE TABLE audit_event (
        organization_id text COLLATE "C" NOT NULL,
        sequence bigint NOT NULL,
        event_time timestamptz NOT NULL,
        actor_key_id text COLLATE "C" NOT NULL,
        actor_organization_id text COLLATE "C" NOT NULL,
        certificate text NOT NULL,
        peer text NOT NULL,
        method text NOT NULL,
        request_id text NOT NULL,
        entity text NOT NULL,
        entity_id text COLLATE "C" NOT NULL,
        before_change jsonb,
        after_change jsonb,
        revision bigint NOT NULL,
        code text NOT NULL,
        reason text NOT NULL,
        hash bytea NOT NULL CONSTRAINT audit_event_hash_is_sha256 CHECK (octet_length(hash) = 32),
        PRIMARY KEY (organization_id, sequence, event_time)
    ) PARTITION BY RANGE (event_time)
    """,
    "CREATE INDEX audit_event_by_entity ON audit_event (organization_id, entity_id, sequence)",
    "CREATE INDEX audit_event_by_actor ON audit_event (organization_id, actor_key_id, sequence)",
    # What is recorded stays as it is, whoever asks.
    """
    CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'the audit trail is append-only' USING ERRCODE = 'insufficient_privilege';
    END
    $$
    """,
    """
    CREATE TRIGGER audit_event_append_only BEFORE UPDATE OR DELETE ON audit_event
    FOR EACH ROW EXECUTE FUNCTION audit_refuse()
    """,
    """
    CREATE TRIGGER audit_event_not_truncated BEFORE TRUNCATE ON audit_event
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()
    """,
    # Makes the partitions of this month and the three after it. For those who may not make tables, too.
    """
    CREATE FUNCTION audit_make_partitions() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path FROM CURRENT SET timezone = 'UTC' AS $$
    DECLARE
        month timestamptz := date_trunc('month', now());
        name text;
    BEGIN
        PERFORM pg_advisory_xact_lock(hashtext('latchgate audit partitions'));
        FOR step IN 0..3 LOOP
            name := 'audit_event_' || to_char(month, 'YYYY_MM');
            IF to_regclass(name) IS NULL THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF audit_event FOR VALUES FROM (%L) TO (%L)',
                               name, month, month + interval '1 month');
                EXECUTE format('CREATE TRIGGER audit_event_not_truncated BEFORE TRUNCATE ON %I '
                               'FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()', name);
            END IF;
            month := month + interval '1 month';
        END LOOP;
    END
    $$
    """,
    # Drops the partitions in which every event is older than asked for, and notes where the chains begin then. Gives
    # how many. For those who may not drop tables, too, and so never what is younger than 30 days, whoever asks.
    """
    CREATE FUNCTION audit_forget(retention interval) RETURNS integer LANGUAGE plpgsql SECURITY DEFINER
    SET search_path FROM CURRENT SET timezone = 'UTC' AS $$
    DECLARE
        kept_from timestamptz := now() - greatest(retention, interval '30 days');
        part record;
        dropped integer := 0;
    BEGIN
        PERFORM pg_advisory_xact_lock(hashtext('latchgate audit partitions'));
        FOR part IN
            SELECT c.relname AS name
            FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = 'audit_event'::regclass
              AND to_timestamp(right(c.relname, 7), 'YYYY_MM') + interval '1 month' <= kept_from
            ORDER BY c.relname
        LOOP
            EXECUTE format('
                INSERT INTO audit_start (organization_id, sequence, hash)
                SELECT DISTINCT ON (organization_id) organization_id, sequence, hash FROM %I
                ORDER BY organization_id, sequence DESC
                ON CONFLICT (organization_id) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash',
                part.name);
            EXECUTE format('DROP TABLE %I', part.name);
            dropped := dropped + 1;
        END LOOP;
        RETURN dropped;
    END
    $$
    """,
    "SELECT audit_make_partitions()",
    # Tokens that were tried and should not be, counted by the hour and source. Without a key: tokens that nobody has.
    """
    CREATE TABLE suspicious_use (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        hour timestamptz NOT NULL,
        source text COLLATE "C" NOT NULL,
        outcome text NOT NULL,
        organization_id text COLLATE "C" NOT NULL,
        key_id text COLLATE "C" NOT NULL,
        count bigint NOT NULL,
        first_time timestamptz NOT NULL DEFAULT now(),
        last_time timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT suspicious_use_once UNIQUE (hour, source, outcome, key_id)
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX suspicious_use_by_organization ON suspicious_use (organization_id, id)",
)


def upgrade() -> None:
    """Makes the tables, and the functions that keep their partitions."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes them, and all that was recorded with them."""
    op.execute("DROP TABLE audit_event, audit_head, audit_start, suspicious_use")
    op.execute("DROP FUNCTION audit_forget(interval), audit_make_partitions(), audit_refuse()")
