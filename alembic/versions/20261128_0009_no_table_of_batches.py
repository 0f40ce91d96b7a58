"""Drop api_key_batches: the counter of key uses asks the server for the status of a transaction.

Revision: 0009
Follows: 0008
Made: 2026-11-28

Locks api_key_batches, which only counters use. Code of revision 0008 works on, but counts no more
uses of keys: stop it first. Rate limits are counted elsewhere.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-table": "nothing released uses it, and its rows are worthless afterwards"
}


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
