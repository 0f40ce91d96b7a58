"""Notify of refreshes that are brought forward or have ended; drop an index that has no query.

Revision: 0016
Follows: 0015
Made: 2026-11-28

The payload of a notification is empty if a refresh is pending. If a refresh has ended, the payload is
the id of the refresh. The index on `token_expires_at` is dropped, because a token is now due at
`token_refresh_at` in every query. Code of revision 0015 works with the schema of revision 0016: its
workers also look for due refreshes after each refresh that has ended.
"""

import sqlalchemy as sa

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
squawk_ignore = {
    "require-concurrent-index-creation": "tiger_accounts is small",
    "require-concurrent-index-deletion": "dropping an index needs no scan",
}

# SET_SEARCH_PATH sets the search path in the same form as migration 0006. The SQL function
# notify_refresh stores the search path with which it was created.
SET_SEARCH_PATH = (
    "SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true)"
)
NOTIFY = """
CREATE OR REPLACE FUNCTION notify_refresh() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_refreshes', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    PERFORM pg_notify(channel, {payload});
    RETURN NULL;
END
$$
"""
TRIGGER = """
CREATE OR REPLACE TRIGGER notify_refresh AFTER INSERT OR UPDATE OF {columns} ON token_statuses
FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION notify_refresh()
"""


def upgrade() -> None:
    op.execute(SET_SEARCH_PATH)
    payload = "CASE WHEN NEW.status = 'pending' THEN '' ELSE NEW.id::text END"
    op.execute(NOTIFY.format(payload=payload))
    op.execute(
        TRIGGER.format(columns="status, scheduled_at", condition="NEW.status <> 'in_progress'")
    )
    op.drop_index("ix_tiger_accounts_token_expires_at", "tiger_accounts")


def downgrade() -> None:
    op.create_index(
        "ix_tiger_accounts_token_expires_at",
        "tiger_accounts",
        ["token_expires_at"],
        postgresql_where=sa.text("status = 'active' AND access_token IS NOT NULL"),
    )
    op.execute(TRIGGER.format(columns="status", condition="NEW.status = 'pending'"))
    op.execute(SET_SEARCH_PATH)
    op.execute(NOTIFY.format(payload="''"))
