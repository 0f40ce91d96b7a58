"""Drop the unused table api_key_batches.

Revision: 0009
Follows: 0008
Made: 2026-11-28

The usage counter of API keys now reads the status of a transaction from PostgreSQL instead of the
table api_key_batches. The migration locks api_key_batches only. After the migration, code of
revision 0008 cannot count uses of API keys, so stop that code before the migration. Rate limits do
not use api_key_batches.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
squawk_ignore = {"ban-drop-table": "no release uses it, and its rows have no further use"}


def upgrade() -> None:
    op.drop_table("api_key_batches")


def downgrade() -> None:
    op.create_table(
        "api_key_batches",
        sa.Column("writer", sa.UUID(), nullable=False, comment="A process that counts uses"),
        sa.Column(
            "number", sa.BigInteger(), nullable=False, comment="Of its latest batch of counts"
        ),
        sa.Column(
            "left_out",
            postgresql.ARRAY(sa.UUID()),
            nullable=False,
            comment="Keys that were locked, and left for the next batch",
        ),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=False, comment="When, UTC"),
        sa.PrimaryKeyConstraint("writer", name=op.f("pk_api_key_batches")),
        comment="The latest batch of counts that each process has written",
    )
