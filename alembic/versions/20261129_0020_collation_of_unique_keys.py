"""Compare account numbers and the prefixes of API keys by code point.

Revision: 0020
Follows: 0019
Made: 2026-11-29

After an upgrade of the operating system or of ICU, the sort order of a collation can change. An
index that has the old order does not find all rows, so that a unique index accepts duplicates. With
the collation "C", the sort order never changes.

While the migration builds the two unique indexes again, it blocks readers and writers of
`api_keys` and `tiger_accounts`, for 1 to 2 s for each 100,000 rows. PostgreSQL does not rewrite the
tables. If the sort order of the database's collation has changed already, the migration fails
when an account number or a prefix is stored twice.
"""

import sqlalchemy as sa

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None
squawk_ignore = {
    "changing-column-type": "PostgreSQL does not rewrite a table whose column gets another collation"
}

COLUMNS = (("api_keys", "key_prefix"), ("tiger_accounts", "account_number"))


def upgrade() -> None:
    for table, column in COLUMNS:
        op.alter_column(table, column, type_=sa.Text(collation="C"))


def downgrade() -> None:
    for table, column in COLUMNS:
        op.alter_column(table, column, type_=sa.Text(collation="default"))
