"""Add authentication codes to the rows of API keys.

Revision: 0021
Follows: 0020
Made: 2026-11-29

The codes need the peppers, which the database does not have: run `tiger-db sign-api-keys` after the
migration. Processes of revision 0020 ignore the codes, and write rows without codes.
"""

import sqlalchemy as sa

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

COLUMNS = (
    (
        "mac",
        sa.Text(),
        "Authentication code of the row as format:pepper id:code; null: unsigned",
    ),
    (
        "mac_denied_at",
        sa.DateTime(timezone=True),
        "Time of the last recorded denial because of a wrong or missing mac",
    ),
)


def upgrade() -> None:
    for name, type_, comment in COLUMNS:
        op.add_column("api_keys", sa.Column(name, type_, nullable=True, comment=comment))


def downgrade() -> None:
    for name, _, _ in reversed(COLUMNS):
        op.drop_column("api_keys", name)
