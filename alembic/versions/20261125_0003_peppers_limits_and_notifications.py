"""Add peppers, a table for rate limits, and notifications on changes of API keys.

Revision: 0003
Follows: 0002
Made: 2026-11-25

The migration locks api_keys and tiger_accounts briefly. Processes of revision 0002 work with the schema
of revision 0003.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
squawk_ignore = {
    "constraint-missing-not-valid": "the scan is short, because api_keys is small",
    "require-concurrent-index-creation": "api_keys is small",
}

CHANNEL = "tiger_db_api_keys"
# The trigger sends no notification if a statement changes only columns in COUNTERS.
COUNTERS = "'{usage_count,last_used_at,updated_at}'::text[]"
CHANGED = f"to_jsonb(OLD) - {COUNTERS} IS DISTINCT FROM to_jsonb(NEW) - {COUNTERS}"

NOTIFY = f"""
CREATE FUNCTION notify_api_key_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify('{CHANNEL}', 'all');
    ELSIF TG_TABLE_NAME = 'api_keys' THEN
        PERFORM pg_notify('{CHANNEL}', 'key ' || OLD.id);
    ELSE
        PERFORM pg_notify('{CHANNEL}', 'account ' || OLD.id);
    END IF;
    RETURN NULL;
END
$$
"""
TRIGGERS = {
    "notify_update": (
        "api_keys",
        f"AFTER UPDATE ON api_keys FOR EACH ROW WHEN ({CHANGED})",
    ),
    "notify_delete": ("api_keys", "AFTER DELETE ON api_keys FOR EACH ROW"),
    "notify_truncate": ("api_keys", "AFTER TRUNCATE ON api_keys FOR EACH STATEMENT"),
    "notify_api_keys_update": (
        "tiger_accounts",
        "AFTER UPDATE ON tiger_accounts FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)",
    ),
    "notify_api_keys_delete": ("tiger_accounts", "AFTER DELETE ON tiger_accounts FOR EACH ROW"),
    "notify_api_keys_truncate": (
        "tiger_accounts",
        "AFTER TRUNCATE ON tiger_accounts FOR EACH STATEMENT",
    ),
}


def upgrade() -> None:
    op.add_column(
        "api_keys",
        sa.Column(
            "pepper_id",
            sa.Text(),
            nullable=True,
            comment="Id of the pepper in key_hash; null: no pepper",
        ),
    )
    op.alter_column(
        "api_keys",
        "key_hash",
        existing_type=sa.Text(),
        existing_nullable=False,
        existing_comment="passlib hash of the secret part of the key",
        comment="passlib hash of the pepper and the secret part of the key",
    )
    for rule, name in (
        ("char_length(pepper_id) >= 1", "ck_api_keys_pepper_id_min_1"),
        ("char_length(pepper_id) <= 32", "ck_api_keys_pepper_id_max_32"),
    ):
        op.create_check_constraint(op.f(name), "api_keys", rule)
    op.create_index(
        "ix_api_keys_expires_at_id",
        "api_keys",
        ["expires_at", "id"],
        postgresql_where=sa.text("status = 'active' AND expires_at IS NOT NULL"),
    )
    op.create_table(
        "api_key_limits",
        sa.Column("api_key_id", sa.UUID(), nullable=False, comment="API key"),
        sa.Column(
            "hour",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Start (UTC) of the latest hour in which the API key was used",
        ),
        sa.Column(
            "hour_count",
            sa.BigInteger(),
            nullable=False,
            comment="Number of uses of the API key in the hour in the column `hour`",
        ),
        sa.Column(
            "day",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Start (UTC) of the latest day on which the API key was used",
        ),
        sa.Column(
            "day_count",
            sa.BigInteger(),
            nullable=False,
            comment="Number of uses of the API key on the day in the column `day`",
        ),
        sa.ForeignKeyConstraint(
            ["api_key_id"],
            ["api_keys.id"],
            name=op.f("fk_api_key_limits_api_key_id_api_keys"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("api_key_id", name=op.f("pk_api_key_limits")),
        comment="Usage counts in the latest hour and day, for the rate limits of API keys",
    )
    op.create_table(
        "api_key_batches",
        sa.Column(
            "writer", sa.UUID(), nullable=False, comment="Process that counts the uses of API keys"
        ),
        sa.Column(
            "number",
            sa.BigInteger(),
            nullable=False,
            comment="Sequence number of the last batch of usage counts that the process has written",
        ),
        sa.Column(
            "left_out",
            postgresql.ARRAY(sa.UUID()),
            nullable=False,
            comment="API keys that the batch skipped because their rows were locked; a later batch counts their uses",
        ),
        sa.Column(
            "written_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Time at which the process wrote the batch of usage counts",
        ),
        sa.PrimaryKeyConstraint("writer", name=op.f("pk_api_key_batches")),
        comment="Latest batch of usage counts that each process wrote",
    )
    # The INSERT copies the usage counts of today, so that rate limits include the uses of API keys
    # before the migration.
    op.execute(
        "INSERT INTO api_key_limits (api_key_id, hour, hour_count, day, day_count)"
        " SELECT u.api_key_id, date_trunc('hour', now(), 'UTC'),"
        " coalesce(sum(u.count) FILTER (WHERE u.hour = date_trunc('hour', now(), 'UTC')), 0),"
        " date_trunc('day', now(), 'UTC'), sum(u.count)"
        " FROM api_key_usage AS u JOIN api_keys AS k ON k.id = u.api_key_id"
        " WHERE u.hour >= date_trunc('day', now(), 'UTC')"
        " AND num_nonnulls(k.rate_limit_per_hour, k.rate_limit_per_day) > 0 GROUP BY u.api_key_id"
    )
    op.execute(NOTIFY)
    for name, (table, when) in TRIGGERS.items():
        op.execute(f"CREATE TRIGGER {name} {when} EXECUTE FUNCTION notify_api_key_change()")
        # With ENABLE ALWAYS, the trigger also fires during replication and restores.
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}")


def downgrade() -> None:
    for name, (table, _) in TRIGGERS.items():
        op.execute(f"DROP TRIGGER {name} ON {table}")
    op.execute("DROP FUNCTION notify_api_key_change()")
    op.drop_table("api_key_batches")
    op.drop_table("api_key_limits")
    op.drop_index("ix_api_keys_expires_at_id", "api_keys")
    op.alter_column(
        "api_keys",
        "key_hash",
        existing_type=sa.Text(),
        existing_nullable=False,
        existing_comment="passlib hash of the pepper and the secret part of the key",
        comment="passlib hash of the secret part of the key",
    )
    op.drop_column("api_keys", "pepper_id")
