"""Deleted keys are removed after a time."""

from alembic import op

revision = "0005"
down_revision = "0004"

_STATEMENTS = (
    # The few that may be to be removed, the first deleted first; asked for twice a minute by every worker.
    """
    CREATE INDEX key_deleted ON key (delete_time)
    WHERE delete_time IS NOT NULL AND organization_id <> 'org_root'
    """,
)


def upgrade() -> None:
    """Makes the index."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP INDEX key_deleted")
