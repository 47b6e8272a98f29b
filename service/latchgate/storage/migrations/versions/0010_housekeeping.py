"""What one worker is to do now and then for all of them."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Makes the table: when each kind of housekeeping was last begun, by whichever worker."""
    op.execute('CREATE TABLE housekeeping (name text COLLATE "C" PRIMARY KEY, begin_time timestamptz NOT NULL)')


def downgrade() -> None:
    """Removes it. Workers of the release before do all of it each for itself."""
    op.execute("DROP TABLE housekeeping")
