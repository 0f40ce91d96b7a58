"""Create the table trading_pauses.

Revision: 0014
Follows: 0013
Made: 2026-11-28

The migration locks no existing table. Processes that run the code of revision 0013 work with the
schema of revision 0014, but ignore a pause of trading. Restart all processes with the new code
before you rely on `tiger-db pause`. The downgrade drops the table, and thereby ends a pause of
trading.
"""

import sqlalchemy as sa

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trading_pauses",
        sa.Column(
            "singleton",
            sa.Boolean(),
            server_default=sa.true(),
            nullable=False,
            comment="Primary key whose only value is true, so that there is at most one pause",
        ),
        sa.Column("reason", sa.Text(), nullable=False, comment="Reason of the pause"),
        sa.Column(
            "paused_at",
            sa.DateTime(timezone=True),
            server_default=sa.func.clock_timestamp(),
            nullable=False,
            comment="Start of the pause",
        ),
        sa.Column(
            "paused_by",
            sa.Text(),
            nullable=True,
            comment="User or service that started the pause",
        ),
        sa.CheckConstraint("singleton", name=op.f("ck_trading_pauses_singleton")),
        sa.CheckConstraint(
            "char_length(reason) BETWEEN 1 AND 500", name=op.f("ck_trading_pauses_reason_length")
        ),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_trading_pauses")),
        comment="The pause of trading that is in force; no row: trading is not paused",
    )


def downgrade() -> None:
    op.drop_table("trading_pauses")
