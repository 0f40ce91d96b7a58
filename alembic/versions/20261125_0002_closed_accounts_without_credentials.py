"""Remove the credentials of closed accounts; add the columns auto_suspended and client_options.

Revision: 0002
Follows: 0001
Made: 2026-11-25

The migration locks the small table tiger_accounts during a scan of all rows. Processes of revision 0001
work with the schema of revision 0002, but cannot close an account: a new CHECK constraint refuses
a closed account with a private key.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
squawk_ignore = {
    "constraint-missing-not-valid": "the scan is short, because tiger_accounts is small",
    "ban-drop-not-null": "processes of revision 0001 always write the column private_key",
}

END_AUTO_SUSPENSION = """
CREATE FUNCTION end_auto_suspension() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.auto_suspended := false;
    RETURN NEW;
END
$$
"""


def upgrade() -> None:
    op.add_column(
        "tiger_accounts",
        sa.Column(
            "client_options",
            postgresql.JSONB(),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Other settings of Tiger's configuration file, such as timeout and language",
        ),
    )
    op.add_column(
        "tiger_accounts",
        sa.Column(
            "auto_suspended",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="Whether the account is suspended because of too many errors, not by a person",
        ),
    )
    op.alter_column(
        "tiger_accounts",
        "private_key",
        existing_type=sa.LargeBinary(),
        nullable=True,
        existing_comment="RSA private key (base64 DER), encrypted",
        comment="RSA private key (base64 DER), encrypted; null if the account is closed",
    )
    op.execute(
        "UPDATE tiger_accounts SET private_key = NULL, secret_key = NULL, access_token = NULL,"
        " refresh_token = NULL, token_expires_at = NULL, is_default_trading = false,"
        " is_default_data = false WHERE status = 'closed'"
    )
    op.create_check_constraint(
        op.f("ck_tiger_accounts_client_options_object"),
        "tiger_accounts",
        "jsonb_typeof(client_options) = 'object'",
    )
    op.create_check_constraint(
        op.f("ck_tiger_accounts_credentials_unless_closed"),
        "tiger_accounts",
        "CASE WHEN status = 'closed' THEN"
        " num_nonnulls(private_key, secret_key, access_token, refresh_token) = 0"
        " AND NOT is_default_trading AND NOT is_default_data"
        " ELSE private_key IS NOT NULL END",
    )
    op.create_check_constraint(
        op.f("ck_tiger_accounts_auto_suspended_is_suspended"),
        "tiger_accounts",
        "status = 'suspended' OR NOT auto_suspended",
    )
    op.execute(END_AUTO_SUSPENSION)
    op.execute(
        "CREATE TRIGGER end_auto_suspension BEFORE UPDATE OF status ON tiger_accounts FOR EACH ROW"
        " WHEN (NEW.auto_suspended AND (OLD.auto_suspended OR NEW.status <> 'suspended'))"
        " EXECUTE FUNCTION end_auto_suspension()"
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER end_auto_suspension ON tiger_accounts")
    op.execute("DROP FUNCTION end_auto_suspension()")
    op.drop_constraint(op.f("ck_tiger_accounts_credentials_unless_closed"), "tiger_accounts")
    # The upgrade removed the private keys of closed accounts, so the downgrade cannot restore them.
    # An empty ciphertext, which cannot be decrypted, replaces each removed private key.
    op.execute("UPDATE tiger_accounts SET private_key = '' WHERE private_key IS NULL")
    op.alter_column(
        "tiger_accounts",
        "private_key",
        existing_type=sa.LargeBinary(),
        nullable=False,
        existing_comment="RSA private key (base64 DER), encrypted; null if the account is closed",
        comment="RSA private key (base64 DER), encrypted",
    )
    op.drop_column("tiger_accounts", "auto_suspended")
    op.drop_column("tiger_accounts", "client_options")
