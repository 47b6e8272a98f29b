"""Workers that answer from memory."""

from alembic import op

revision = "0002"
down_revision = "0001"

_STATEMENTS = (
    # Every worker process, while a change has to wait for it. Updated all the time, on its page and in no index.
    # seen_revision is how far the last renewal read the log: an earlier lease is older than any later change. renewals
    # grows with each renewal, by no certain step.
    """
    CREATE TABLE worker (
        incarnation uuid PRIMARY KEY,
        applied_revision bigint NOT NULL DEFAULT 0,
        seen_revision bigint NOT NULL DEFAULT 0,
        renewals bigint NOT NULL DEFAULT 0,
        lease_s double precision NOT NULL CONSTRAINT worker_lease_positive CHECK (lease_s > 0),
        join_time timestamptz NOT NULL DEFAULT now()
    ) WITH (fillfactor = 50)
    """,
)


def upgrade() -> None:
    """Makes the table."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP TABLE worker")
