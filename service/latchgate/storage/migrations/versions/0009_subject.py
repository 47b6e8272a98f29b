"""Callers with a JWT in the audit trail."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds whose the caller's JWT was; empty where it has shown a key. A default that is constant touches no row."""
    op.execute("""ALTER TABLE audit_event ADD COLUMN actor_subject text COLLATE "C" NOT NULL DEFAULT ''""")


def downgrade() -> None:
    """Removes it. Chains with events that name a subject do not verify any more."""
    op.execute("ALTER TABLE audit_event DROP COLUMN actor_subject")
