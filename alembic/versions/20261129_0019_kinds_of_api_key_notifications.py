"""Pass the kind of the changed row to the triggers that notify of changed API keys.

Revision: 0019
Follows: 0018
Made: 2026-11-29

Before, the SQL function `notify_api_key_change` read the kind of the changed row from the table's
name. After a table was renamed, `KeyVerifier` was notified of the wrong kind of row, and accepted
revoked API keys from its memory. Now an argument of the trigger is the kind. While the migration
replaces the triggers, it blocks writers of `api_keys` and `tiger_accounts` for some milliseconds.
"""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

# SET_SEARCH_PATH sets the search path in the same form as migration 0006. The SQL function
# notify_api_key_change stores the search path with which it was created.
SET_SEARCH_PATH = (
    "SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true)"
)
FUNCTION = """
CREATE OR REPLACE FUNCTION notify_api_key_change() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_api_keys', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify(channel, 'all');
{branches}
    END IF;
    RETURN NULL;
END
$$
"""
BY_ARGUMENT = """\
    ELSE
        PERFORM pg_notify(channel, pg_catalog.concat(TG_ARGV[0], ' ', OLD.id));"""
BY_TABLE_NAME = """\
    ELSIF TG_TABLE_NAME = 'api_keys' THEN
        PERFORM pg_notify(channel, pg_catalog.concat('key ', OLD.id));
    ELSE
        PERFORM pg_notify(channel, pg_catalog.concat('account ', OLD.id));"""
UNNOTIFIED = "'{usage_count,last_used_at,updated_at}'::text[]"
OTHER_COLUMN_CHANGED = (
    f"WHEN ((to_jsonb(OLD.*) - {UNNOTIFIED}) IS DISTINCT FROM (to_jsonb(NEW.*) - {UNNOTIFIED}))"
)
STATUS_CHANGED = "WHEN (OLD.status IS DISTINCT FROM NEW.status)"
# Each trigger on rows: its table, its name, the kind of its rows, its event and its condition.
TRIGGERS = (
    ("api_keys", "notify_update", "key", "UPDATE", OTHER_COLUMN_CHANGED),
    ("api_keys", "notify_delete", "key", "DELETE", ""),
    ("tiger_accounts", "notify_api_keys_update", "account", "UPDATE", STATUS_CHANGED),
    ("tiger_accounts", "notify_api_keys_delete", "account", "DELETE", ""),
)


def upgrade() -> None:
    op.execute(SET_SEARCH_PATH)
    op.execute(FUNCTION.format(branches=BY_ARGUMENT))
    replace_triggers(with_kind=True)


def downgrade() -> None:
    op.execute(SET_SEARCH_PATH)
    op.execute(FUNCTION.format(branches=BY_TABLE_NAME))
    replace_triggers(with_kind=False)


def replace_triggers(*, with_kind: bool) -> None:
    for table, name, kind, event, condition in TRIGGERS:
        argument = f"'{kind}'" if with_kind else ""
        op.execute(
            f"CREATE OR REPLACE TRIGGER {name} AFTER {event} ON {table} FOR EACH ROW {condition}"
            f" EXECUTE FUNCTION notify_api_key_change({argument})"
        )
        # PostgreSQL resets a replaced trigger to ENABLE.
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}")
