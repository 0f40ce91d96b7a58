"""Add tiger_accounts.failing_until.

Revision: 0015
Follows: 0014
Made: 2026-11-28

In earlier revisions, an account with three or more errors serves no requests for five minutes after
the last error. The migration sets failing_until of each account that serves no requests for this
reason. The new value is five minutes after the account's last error. The migration blocks reads
and writes of accounts for milliseconds. Code of revision 0014 works with this schema, but does not
set failing_until: restart all processes.
"""

import sqlalchemy as sa

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "tiger_accounts",
        sa.Column(
            "failing_until",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time until which the account serves no requests because of its errors",
        ),
    )
    op.execute(
        "UPDATE tiger_accounts SET failing_until = last_error_at + interval '5 minutes'"
        " WHERE error_count >= 3 AND last_error_at > now() - interval '5 minutes'"
    )


def downgrade() -> None:
    op.drop_column("tiger_accounts", "failing_until")
