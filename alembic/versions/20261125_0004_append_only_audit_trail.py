"""Make the audit trail append-only, and add positions, seals and smaller indexes.

Revision: 0004
Follows: 0003
Made: 2026-11-25

The migration rewrites and locks audit_logs to add the positions of audit events. If audit_logs has
many rows, stop the programs that write audit events before the migration. Processes of revision 0003
work with the schema of revision 0004, but can no longer change audit events.
"""

import sqlalchemy as sa

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
squawk_ignore = {
    "adding-field-with-default": "the rewrite of audit_logs is described at the beginning of the migration",
    "require-concurrent-index-creation": "another statement of the migration locks audit_logs already",
    "require-concurrent-index-deletion": "another statement of the migration locks audit_logs already",
}

REFUSE = """
CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege', HINT = 'An audit trail that can be changed proves'
            ' nothing. Whole months leave it by tiger-db maintain-audit, when they are sealed.';
END
$$
"""

# PostgreSQL serializes the commits of transactions that called NOTIFY. To avoid waits, only the
# transaction that holds an advisory lock sends a notification. Readers of audit events poll
# audit_logs between notifications, and therefore miss no event.
NOTIFY = """
CREATE FUNCTION notify_audit_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_try_advisory_xact_lock(hashtext('tiger_db_audit_logs')) THEN
        PERFORM pg_notify('tiger_db_audit_logs', '');
    END IF;
    RETURN NULL;
END
$$
"""

# uuid7_time returns the timestamp of a UUIDv7, and is the inverse of uuid7_floor.
UUID7_TIME = """
CREATE FUNCTION uuid7_time(id uuid) RETURNS timestamptz
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
$$
"""

# ATTACH PARTITION does not block writers, but CREATE TABLE with PARTITION OF does.
MAKE_AUDIT_PARTITION = """
CREATE FUNCTION make_audit_partition(month timestamp) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    partition text := 'audit_logs_' || to_char(month, 'YYYY_MM');
BEGIN
    EXECUTE format('CREATE TABLE %I (LIKE audit_logs INCLUDING ALL)', partition);
    EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %I'
        ' FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()', partition);
    EXECUTE format(
        'ALTER TABLE audit_logs ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition,
        uuid7_floor(month AT TIME ZONE 'UTC'),
        uuid7_floor((month + interval '1 month') AT TIME ZONE 'UTC'));
END
$$
"""

# The default partition contains events of months without a partition, and events whose ids contain
# the time of a wrong clock. Audit events cannot be deleted. To move an event to the partition of
# its month, make_audit_months inserts all events of the default partition into a new table again.
MAKE_AUDIT_MONTHS = """
CREATE OR REPLACE FUNCTION make_audit_months(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    this_month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    oldest uuid := uuid7_floor((this_month - interval '10 years') AT TIME ZONE 'UTC');
    newest uuid := uuid7_floor((this_month + make_interval(months => ahead + 1))
        AT TIME ZONE 'UTC');
    missing timestamp[];
    strays boolean;
    month timestamp;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('make_audit_months'));
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

# The downgrade restores the function make_audit_months of revision 0001.
MAKE_AUDIT_MONTHS_BEFORE = """
CREATE OR REPLACE FUNCTION make_audit_months(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    month timestamp;
    partition text;
    lower uuid;
    upper uuid;
    made integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('make_audit_months'));
    FOR month IN
        SELECT generate_series(this_month, this_month + make_interval(months => ahead), '1 month')
        FROM date_trunc('month', now() AT TIME ZONE 'UTC') AS this_month
    LOOP
        partition := 'audit_logs_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass(partition) IS NOT NULL;
        lower := uuid7_floor(month AT TIME ZONE 'UTC');
        upper := uuid7_floor((month + interval '1 month') AT TIME ZONE 'UTC');
        LOCK TABLE audit_logs_default IN SHARE ROW EXCLUSIVE MODE;
        EXECUTE format('CREATE TABLE %I (LIKE audit_logs INCLUDING ALL)', partition);
        EXECUTE format(
            'WITH strays AS ('
            'DELETE FROM audit_logs_default WHERE id >= %L AND id < %L RETURNING *'
            ') INSERT INTO %I SELECT * FROM strays', lower, upper, partition);
        EXECUTE format(
            'ALTER TABLE audit_logs ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            partition, lower, upper);
        made := made + 1;
    END LOOP;
    RETURN made;
END
$$
"""

# A direct INSERT into a partition uses the column defaults of the partition, not of audit_logs.
DEFAULTS = """
DO $$
DECLARE
    partition regclass;
BEGIN
    FOR partition IN
        SELECT inhrelid FROM pg_inherits WHERE inhparent = CAST('audit_logs' AS regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER created_at SET DEFAULT clock_timestamp()', partition);
    END LOOP;
END
$$
"""
REFUSE_TRUNCATE = """
DO $$
DECLARE
    partition regclass;
BEGIN
    FOR partition IN
        SELECT CAST('audit_logs' AS regclass) UNION ALL SELECT inhrelid FROM pg_inherits
        WHERE inhparent = CAST('audit_logs' AS regclass)
    LOOP
        EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %s'
            ' FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()', partition);
    END LOOP;
END
$$
"""
ALLOW_TRUNCATE = """
DO $$
DECLARE
    partition regclass;
BEGIN
    FOR partition IN SELECT tgrelid FROM pg_trigger JOIN pg_partition_tree('audit_logs')
        ON relid = tgrelid WHERE tgname = 'refuse_truncate'
    LOOP
        EXECUTE format('DROP TRIGGER refuse_truncate ON %s', partition);
    END LOOP;
END
$$
"""
FILTERED = ("tiger_account_id", "api_key_id", "user_id")


def upgrade() -> None:
    op.execute("CREATE SEQUENCE audit_logs_position_seq")
    op.add_column(
        "audit_logs",
        sa.Column(
            "position",
            sa.BigInteger(),
            nullable=False,
            server_default=sa.text("nextval('audit_logs_position_seq'::regclass)"),
            comment="Position in the order of the inserts; rolled-back transactions leave gaps",
        ),
    )
    # now() returns the start time of the transaction. With now(), an audit event could get an
    # earlier time than a seal that was written before the event.
    op.alter_column(
        "audit_logs",
        "created_at",
        existing_type=sa.DateTime(timezone=True),
        existing_nullable=False,
        server_default=sa.text("clock_timestamp()"),
    )
    op.execute(DEFAULTS)
    op.create_index(
        "ix_audit_logs_position",
        "audit_logs",
        ["position"],
        postgresql_using="brin",
        postgresql_with={"pages_per_range": 32, "autosummarize": True},
    )
    for name in FILTERED:
        op.drop_index(f"ix_audit_logs_{name}_id", "audit_logs")
        op.create_index(
            f"ix_audit_logs_{name}",
            "audit_logs",
            [name],
            postgresql_where=sa.text(f"{name} IS NOT NULL"),
        )
    for name in ("request_id", "session_id"):
        op.create_index(
            f"ix_audit_logs_{name}",
            "audit_logs",
            [name],
            postgresql_using="brin",
            postgresql_ops={name: "text_bloom_ops"},
            postgresql_with={"pages_per_range": 32, "autosummarize": True},
        )
    op.create_table(
        "audit_seals",
        sa.Column(
            "number",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="Consecutive number of the seal, starting at 1",
        ),
        sa.Column(
            "statement",
            sa.Text(),
            nullable=False,
            comment="Signed JSON: positions of the sealed events,"
            " root of the Merkle tree of the events, digest of the previous seal",
        ),
        sa.Column(
            "signature",
            sa.LargeBinary(),
            nullable=False,
            comment="Ed25519 signature of the bytes in the column `statement`",
        ),
        sa.Column(
            "digests",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 digests of the sealed events, in the order of the event positions",
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit_seals")),
        comment="Seals: signed proofs of the contents of the audit trail",
    )
    op.execute(REFUSE)
    op.execute(
        "CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE ON audit_logs"
        " FOR EACH ROW EXECUTE FUNCTION refuse_audit_change()"
    )
    op.execute(REFUSE_TRUNCATE)
    op.execute(
        "CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seals"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()"
    )
    op.execute(NOTIFY)
    op.execute(
        "CREATE TRIGGER notify_insert AFTER INSERT ON audit_logs"
        " FOR EACH STATEMENT EXECUTE FUNCTION notify_audit_event()"
    )
    op.execute(UUID7_TIME)
    op.execute(MAKE_AUDIT_PARTITION)
    op.execute(MAKE_AUDIT_MONTHS)


def downgrade() -> None:
    op.execute(MAKE_AUDIT_MONTHS_BEFORE)
    op.execute("DROP FUNCTION make_audit_partition(timestamp)")
    op.execute("DROP FUNCTION uuid7_time(uuid)")
    op.execute("DROP TRIGGER notify_insert ON audit_logs")
    op.execute("DROP FUNCTION notify_audit_event()")
    op.execute("DROP TRIGGER refuse_change ON audit_logs")
    op.execute(ALLOW_TRUNCATE)
    op.drop_table("audit_seals")
    op.execute("DROP FUNCTION refuse_audit_change()")
    for name in ("request_id", "session_id"):
        op.drop_index(f"ix_audit_logs_{name}", "audit_logs")
    for name in FILTERED:
        op.drop_index(f"ix_audit_logs_{name}", "audit_logs")
        op.create_index(
            f"ix_audit_logs_{name}_id",
            "audit_logs",
            [name, "id"],
            postgresql_where=sa.text(f"{name} IS NOT NULL"),
        )
    op.execute(DEFAULTS.replace("clock_timestamp()", "now()"))
    op.alter_column(
        "audit_logs",
        "created_at",
        existing_type=sa.DateTime(timezone=True),
        existing_nullable=False,
        server_default=sa.text("now()"),
    )
    op.drop_column("audit_logs", "position")
    op.execute("DROP SEQUENCE audit_logs_position_seq")
