"""Rate limits that all workers share."""

from alembic import op

revision = "0003"
down_revision = "0002"

_STATEMENTS = (
    # One row for each key with a limit that was used lately: what each second of its window has cost, and what was
    # asked of it last and granted. Written many times a second, on its page and in no index. Not written ahead: after a
    # crash, and on a standby that takes over, windows begin empty.
    """
    CREATE UNLOGGED TABLE rate_window (
        key_id text COLLATE "C" PRIMARY KEY,
        newest bigint NOT NULL,
        allowed integer NOT NULL,
        charged integer NOT NULL,
        smallest integer NOT NULL,
        needed integer NOT NULL,
        wanted integer NOT NULL,
        back integer NOT NULL,
        back_slot bigint NOT NULL,
        granted integer NOT NULL,
        ages smallint[] NOT NULL,
        costs integer[] NOT NULL
    ) WITH (fillfactor = 50)
    """,
)


def upgrade() -> None:
    """Makes the table."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP TABLE rate_window")
