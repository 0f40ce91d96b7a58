"""Refuse to delete an account that has API keys or refreshes.

Revision: 0013
Follows: 0012
Made: 2026-11-28

The foreign keys from api_keys and token_statuses to tiger_accounts change from ON DELETE CASCADE to
ON DELETE RESTRICT. Before the migration, a DELETE of an account also deleted the account's API keys and
refreshes, without audit events. The migration changes no rows. Processes of revision 0012 work with the
schema of revision 0013, because these processes delete no accounts.

The migration locks tiger_accounts, api_keys and token_statuses for a short time that does not depend
on the size of the tables. A separate transaction validates the new foreign keys, and blocks neither readers nor writers.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "a foreign key with the same name and columns replaces the dropped one"
}

TABLES = ("api_keys", "token_statuses")


def upgrade() -> None:
    replace_foreign_keys("RESTRICT")


def downgrade() -> None:
    replace_foreign_keys("CASCADE")


def replace_foreign_keys(on_delete: str) -> None:
    # To prevent deadlocks, the migration locks the tables in the order in which tiger_db locks rows.
    op.execute("LOCK TABLE tiger_accounts, api_keys, token_statuses")
    for table in TABLES:
        name = f"fk_{table}_tiger_account_id_tiger_accounts"
        op.execute(
            f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name}"
            " FOREIGN KEY (tiger_account_id) REFERENCES tiger_accounts (id)"
            f" ON DELETE {on_delete} NOT VALID"
        )
    with op.get_context().autocommit_block():
        for table in TABLES:
            op.execute(
                f"ALTER TABLE {table}"
                f" VALIDATE CONSTRAINT fk_{table}_tiger_account_id_tiger_accounts"
            )
