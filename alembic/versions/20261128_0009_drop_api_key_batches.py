"""Drop the unused table api_key_batches.

Revision: 0009
Follows: 0008
Made: 2026-11-28

The table api_key_batches showed whether a batch of usage counts was committed. Since this revision,
the usage counter of API keys asks PostgreSQL whether the transaction that wrote a batch of usage
counts was committed. After the migration, processes of revision 0008 cannot count uses of API keys,
so stop these processes before the migration. Rate limits do not use api_key_batches. The migration
locks api_key_batches only.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
squawk_ignore = {"ban-drop-table": "new code does not use the rows of api_key_batches"}


def upgrade() -> None:
    op.drop_table("api_key_batches")


def downgrade() -> None:
    op.create_table(
        "api_key_batches",
        sa.Column(
            "writer", sa.UUID(), nullable=False, comment="Process that counts the uses of API keys"
        ),
        sa.Column(
            "number",
            sa.BigInteger(),
            nullable=False,
            comment="Sequence number of the last batch of usage counts that the process has written",
        ),
        sa.Column(
            "left_out",
            postgresql.ARRAY(sa.UUID()),
            nullable=False,
            comment="API keys that the batch skipped because their rows were locked; a later batch counts their uses",
        ),
        sa.Column(
            "written_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Time at which the process wrote the batch of usage counts",
        ),
        sa.PrimaryKeyConstraint("writer", name=op.f("pk_api_key_batches")),
        comment="Latest batch of usage counts that each process wrote",
    )
