"""Set the search path of SQL functions, and give each schema its own channels and locks.

Revision: 0006
Follows: 0005
Made: 2026-11-28

Each schema gets its own notification channels and advisory locks. In the schema `public`, the names
of channels and the keys of advisory locks do not change. Therefore, processes of revision 0005 work with
the schema of revision 0006. The migration replaces SQL functions and locks no table.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# SET_SEARCH_PATH sets the search path in the form that the Python function `search_path` returns.
# Each SQL function stores the search path in the form of `search_path`, even if the connection's
# search path has another form.
SET_SEARCH_PATH = (
    "SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true)"
)
FROM_CURRENT = "SET search_path FROM CURRENT"

MONTHS_LOCK = """
        pg_catalog.concat('make_audit_months', nullif(current_schema(), 'public'))"""
# PostgreSQL limits the names of schemas and notification channels to 63 bytes. The name of a
# notification channel contains a digest of the schema's name, because a long schema's name and a
# prefix would exceed 63 bytes.
DECLARE = """DECLARE
    channel CONSTANT text := pg_catalog.concat('{}', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
"""

# The name pg_catalog.concat contains the schema, so that PostgreSQL never calls a function concat of
# another schema.
QUALIFIED = {
    "key": "pg_catalog.concat('key ', OLD.id)",
    "account": "pg_catalog.concat('account ', OLD.id)",
}
UNQUALIFIED = {"key": "'key ' || OLD.id", "account": "'account ' || OLD.id"}

NOTIFY_API_KEY_CHANGE = """
CREATE OR REPLACE FUNCTION notify_api_key_change() RETURNS trigger LANGUAGE plpgsql {keep} AS $$
{declare}BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify({channel}, 'all');
    ELSIF TG_TABLE_NAME = 'api_keys' THEN
        PERFORM pg_notify({channel}, {key});
    ELSE
        PERFORM pg_notify({channel}, {account});
    END IF;
    RETURN NULL;
END
$$
"""

# PostgreSQL serializes the commits of transactions that called NOTIFY. To avoid waits, only the
# transaction that holds an advisory lock sends a notification. Readers of audit events poll
# audit_logs between notifications, and therefore miss no event.
NOTIFY_AUDIT_EVENT = """
CREATE OR REPLACE FUNCTION notify_audit_event() RETURNS trigger LANGUAGE plpgsql {keep} AS $$
{declare}BEGIN
    IF pg_try_advisory_xact_lock(hashtext({channel})) THEN
        PERFORM pg_notify({channel}, '');
    END IF;
    RETURN NULL;
END
$$
"""

NOTIFY_REFRESH = """
CREATE OR REPLACE FUNCTION notify_refresh() RETURNS trigger LANGUAGE plpgsql {keep} AS $$
{declare}BEGIN
    PERFORM pg_notify({channel}, '');
    RETURN NULL;
END
$$
"""

# The default partition contains events of months without a partition, and events whose ids contain
# the time of a wrong clock. Audit events cannot be deleted. To move an event to the partition of
# its month, make_audit_months inserts all events of the default partition into a new table again.
MAKE_AUDIT_MONTHS = """
CREATE OR REPLACE FUNCTION make_audit_months(ahead integer) RETURNS integer LANGUAGE plpgsql
{keep} AS $$
DECLARE
    this_month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    oldest uuid := uuid7_floor((this_month - interval '10 years') AT TIME ZONE 'UTC');
    newest uuid := uuid7_floor((this_month + make_interval(months => ahead + 1))
        AT TIME ZONE 'UTC');
    missing timestamp[];
    strays boolean;
    month timestamp;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext({lock}));
    missing := ARRAY(SELECT m
        FROM generate_series(this_month, this_month + make_interval(months => ahead), '1 month')
        AS m WHERE to_regclass('audit_logs_' || to_char(m, 'YYYY_MM')) IS NULL);
    IF cardinality(missing) > 0 THEN
        LOCK TABLE audit_logs_default IN SHARE ROW EXCLUSIVE MODE;
    END IF;
    strays := EXISTS (SELECT FROM audit_logs_default WHERE id >= oldest AND id < newest);
    IF strays THEN
        LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE audit_logs DETACH PARTITION audit_logs_default;
        ALTER TABLE audit_logs_default RENAME TO audit_logs_strays;
        CREATE TABLE audit_logs_default PARTITION OF audit_logs DEFAULT;
        CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON audit_logs_default
            FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();
        missing := ARRAY(SELECT DISTINCT m FROM (
            SELECT unnest(missing)
            UNION SELECT date_trunc('month', uuid7_time(id) AT TIME ZONE 'UTC')
            FROM audit_logs_strays WHERE id >= oldest AND id < newest) AS months (m)
            WHERE to_regclass('audit_logs_' || to_char(m, 'YYYY_MM')) IS NULL ORDER BY m);
    END IF;
    FOREACH month IN ARRAY missing LOOP
        PERFORM make_audit_partition(month);
    END LOOP;
    IF strays THEN
        INSERT INTO audit_logs SELECT * FROM audit_logs_strays;
        DROP TABLE audit_logs_strays;
    END IF;
    RETURN cardinality(missing);
END
$$
"""

# uuid7_floor returns the smallest UUIDv7 with a given timestamp. A UUIDv7 begins with a timestamp
# of 48 bits, in milliseconds since 1970 (RFC 9562, section 5.7).
UUID7_FLOOR = """
CREATE OR REPLACE FUNCTION uuid7_floor(at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE {begin}
    SELECT rpad(lpad(to_hex(milliseconds), 12, '0'), 32, '0')::uuid
    FROM CAST(floor(least(greatest(extract(epoch FROM at) * 1000, 0), 281474976710655)) AS bigint)
        AS milliseconds{end}
"""

# uuid7_time returns the timestamp of a UUIDv7, and is the inverse of uuid7_floor.
UUID7_TIME = """
CREATE OR REPLACE FUNCTION uuid7_time(id uuid) RETURNS timestamptz
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE {begin}
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0){end}
"""

NOTIFYING = {
    "tiger_db_api_keys": NOTIFY_API_KEY_CHANGE,
    "tiger_db_audit_logs": NOTIFY_AUDIT_EVENT,
    "tiger_db_refreshes": NOTIFY_REFRESH,
}
# The migration sets the search path of the SQL functions in UNCHANGED, and keeps their bodies.
UNCHANGED = (
    "set_updated_at()",
    "end_auto_suspension()",
    "refuse_audit_change()",
    "make_audit_partition(timestamp)",
)


def upgrade() -> None:
    op.execute(SET_SEARCH_PATH)
    for channel, function in NOTIFYING.items():
        declare = DECLARE.format(channel)
        op.execute(
            function.format(keep=FROM_CURRENT, declare=declare, channel="channel", **QUALIFIED)
        )
    op.execute(MAKE_AUDIT_MONTHS.format(keep=FROM_CURRENT, lock=MONTHS_LOCK))
    for function in (UUID7_FLOOR, UUID7_TIME):
        op.execute(function.format(begin="BEGIN ATOMIC", end=";\nEND"))
    for name in UNCHANGED:
        op.execute(f"ALTER FUNCTION {name} {FROM_CURRENT}")


def downgrade() -> None:
    for name in UNCHANGED:
        op.execute(f"ALTER FUNCTION {name} RESET search_path")
    for function in (UUID7_FLOOR, UUID7_TIME):
        op.execute(function.format(begin="AS $$", end="\n$$"))
    op.execute(MAKE_AUDIT_MONTHS.format(keep="", lock="'make_audit_months'"))
    for channel, function in NOTIFYING.items():
        op.execute(function.format(keep="", declare="", channel=f"'{channel}'", **UNQUALIFIED))
