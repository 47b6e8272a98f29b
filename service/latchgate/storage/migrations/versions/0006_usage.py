"""How often keys are asked about, by outcome and hour."""

from alembic import op

revision = "0006"
down_revision = "0005"

_STATEMENTS = (
    # By secret, so that a row is narrow; a key's usage is that of all its secrets. hour is in hours since 1970, outcome
    # as latchgate.storage.usage numbers it. The hour comes first: what is written lies close together, as does what is
    # too old. Room on each page, so that an update stays there. No reference to secret, which would cost a look at it
    # for each row.
    """
    CREATE TABLE usage_by_secret (
        secret_id bigint NOT NULL,
        hour integer NOT NULL,
        outcome smallint NOT NULL,
        count bigint NOT NULL,
        PRIMARY KEY (hour, secret_id, outcome)
    ) WITH (fillfactor = 80)
    """,
    # The sums over an organization's secrets, written with them: reading them does not depend on how many keys it has.
    """
    CREATE TABLE usage_by_organization (
        organization_id text COLLATE "C" NOT NULL,
        hour integer NOT NULL,
        outcome smallint NOT NULL,
        count bigint NOT NULL,
        PRIMARY KEY (hour, organization_id, outcome)
    ) WITH (fillfactor = 50)
    """,
    # How far each worker has written, so that what may have been written is not counted twice.
    """
    CREATE TABLE usage_flush (
        incarnation uuid PRIMARY KEY,
        sequence bigint NOT NULL,
        flush_time timestamptz NOT NULL DEFAULT now()
    ) WITH (fillfactor = 50)
    """,
)


def upgrade() -> None:
    """Makes the tables."""
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Removes them, and all counts with them."""
    op.execute("DROP TABLE usage_flush, usage_by_organization, usage_by_secret")
