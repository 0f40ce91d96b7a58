"""Add the refresh times of access tokens, and notify workers of pending refreshes.

Revision: 0005
Follows: 0004
Made: 2026-11-25

Processes of revision 0004 work with the schema of revision 0005. If processes of revision 0004
store an access token, the token is due for a refresh one hour before its expiry.
"""

import sqlalchemy as sa

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
squawk_ignore = {
    "require-concurrent-index-creation": "tiger_accounts is small",
}

CHANNEL = "tiger_db_refreshes"
NOTIFY = f"""
CREATE FUNCTION notify_refresh() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('{CHANNEL}', '');
    RETURN NULL;
END
$$
"""


def upgrade() -> None:
    op.add_column(
        "tiger_accounts",
        sa.Column(
            "token_refresh_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time at which the access token should be refreshed",
        ),
    )
    op.execute(
        "UPDATE tiger_accounts SET token_refresh_at = token_expires_at - interval '1 hour'"
        " WHERE token_expires_at IS NOT NULL"
    )
    op.create_index(
        "ix_tiger_accounts_token_refresh_at",
        "tiger_accounts",
        ["token_refresh_at"],
        postgresql_where=sa.text("status = 'active' AND access_token IS NOT NULL"),
    )
    op.execute(NOTIFY)
    op.execute(
        "CREATE TRIGGER notify_refresh AFTER INSERT OR UPDATE OF status ON token_statuses"
        " FOR EACH ROW WHEN (NEW.status = 'pending') EXECUTE FUNCTION notify_refresh()"
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER notify_refresh ON token_statuses")
    op.execute("DROP FUNCTION notify_refresh()")
    op.drop_index("ix_tiger_accounts_token_refresh_at", "tiger_accounts")
    op.drop_column("tiger_accounts", "token_refresh_at")
