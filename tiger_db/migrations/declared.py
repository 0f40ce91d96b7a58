"""The triggers and functions that the migrations make.

They are data, in the form in which PostgreSQL prints it when its search path has
pg_catalog only; {schema} stands for the name of the schema. A change of a trigger or a
function by a migration changes the data here too; migrations keep SQL of their own and import none
of this. Whoever owns the tables can switch all of it off, also by accident (`pg_restore
--disable-triggers` that was interrupted, `ALTER TABLE ... DISABLE TRIGGER`): nothing that the
triggers protect or announce can then be relied on.
"""

from dataclasses import dataclass

from tiger_db.models import metadata


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger: its parts as `pg_get_triggerdef` prints them, and `pg_trigger.tgenabled`."""

    table: str
    name: str
    events: str
    action: str
    enabled: str = "O"  # A: also for what replication and a restore write (ENABLE ALWAYS)
    partitions: bool = False  # whether each partition has it too

    def on(self, table: str, schema: str | None = None) -> str:
        """Return the definition on the table or on one of its partitions.

        The names in it are qualified by the schema, unless it is None.
        """
        action = self.action.replace("{schema}.", f"{schema}." if schema else "")
        return f"CREATE TRIGGER {self.name} {self.events} ON {table} {action}"


_NOTIFY_KEYS = "EXECUTE FUNCTION {schema}.notify_api_key_change()"
_REFUSE = "EXECUTE FUNCTION {schema}.refuse_audit_change()"
_NO_USE = "'{usage_count,last_used_at,updated_at}'::text[]"  # what every use of a key writes
_TRIGGERS = (
    Trigger(
        "api_keys",
        "notify_update",
        "AFTER UPDATE",
        f"FOR EACH ROW WHEN ((to_jsonb(old.*) - {_NO_USE})"
        f" IS DISTINCT FROM (to_jsonb(new.*) - {_NO_USE})) {_NOTIFY_KEYS}",
        "A",
    ),
    Trigger("api_keys", "notify_delete", "AFTER DELETE", f"FOR EACH ROW {_NOTIFY_KEYS}", "A"),
    Trigger(
        "api_keys", "notify_truncate", "AFTER TRUNCATE", f"FOR EACH STATEMENT {_NOTIFY_KEYS}", "A"
    ),
    Trigger(
        "tiger_accounts",
        "notify_api_keys_update",
        "AFTER UPDATE",
        f"FOR EACH ROW WHEN (old.status IS DISTINCT FROM new.status) {_NOTIFY_KEYS}",
        "A",
    ),
    Trigger(
        "tiger_accounts",
        "notify_api_keys_delete",
        "AFTER DELETE",
        f"FOR EACH ROW {_NOTIFY_KEYS}",
        "A",
    ),
    Trigger(
        "tiger_accounts",
        "notify_api_keys_truncate",
        "AFTER TRUNCATE",
        f"FOR EACH STATEMENT {_NOTIFY_KEYS}",
        "A",
    ),
    Trigger(
        "tiger_accounts",
        "end_auto_suspension",
        "BEFORE UPDATE OF status",
        "FOR EACH ROW WHEN (new.auto_suspended AND (old.auto_suspended"
        " OR new.status <> 'suspended'::{schema}.account_status))"
        " EXECUTE FUNCTION {schema}.end_auto_suspension()",
    ),
    Trigger(
        "token_statuses",
        "notify_refresh",
        "AFTER INSERT OR UPDATE OF status",
        "FOR EACH ROW WHEN (new.status = 'pending'::{schema}.token_refresh_status)"
        " EXECUTE FUNCTION {schema}.notify_refresh()",
    ),
    Trigger(
        "audit_logs",
        "refuse_change",
        "BEFORE DELETE OR UPDATE",
        f"FOR EACH ROW {_REFUSE}",
        partitions=True,
    ),
    Trigger(
        "audit_logs",
        "refuse_truncate",
        "BEFORE TRUNCATE",
        f"FOR EACH STATEMENT {_REFUSE}",
        partitions=True,
    ),
    Trigger(
        "audit_logs",
        "notify_insert",
        "AFTER INSERT",
        "FOR EACH STATEMENT EXECUTE FUNCTION {schema}.notify_audit_event()",
    ),
    Trigger(
        "audit_seals",
        "refuse_change",
        "BEFORE DELETE OR UPDATE OR TRUNCATE",
        f"FOR EACH STATEMENT {_REFUSE}",
    ),
)
# By signature, the rest as `pg_get_functiondef` prints it; here {schema} is a literal.
FUNCTIONS = {
    "end_auto_suspension()": """ RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
BEGIN
    NEW.auto_suspended := false;
    RETURN NEW;
END
$function$
""",
    "make_audit_months(ahead integer)": """ RETURNS integer
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
DECLARE
    this_month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    oldest uuid := uuid7_floor((this_month - interval '10 years') AT TIME ZONE 'UTC');
    newest uuid := uuid7_floor((this_month + make_interval(months => ahead + 1))
        AT TIME ZONE 'UTC');
    missing timestamp[];
    strays boolean;
    month timestamp;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext(
        pg_catalog.concat('make_audit_months', nullif(current_schema(), 'public'))));
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
$function$
""",
    "make_audit_partition(month timestamp without time zone)": """ RETURNS void
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
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
$function$
""",
    "notify_api_key_change()": """ RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_api_keys', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify(channel, 'all');
    ELSIF TG_TABLE_NAME = 'api_keys' THEN
        PERFORM pg_notify(channel, pg_catalog.concat('key ', OLD.id));
    ELSE
        PERFORM pg_notify(channel, pg_catalog.concat('account ', OLD.id));
    END IF;
    RETURN NULL;
END
$function$
""",
    "notify_audit_event()": """ RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_audit_logs', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    IF pg_try_advisory_xact_lock(hashtext(channel)) THEN
        PERFORM pg_notify(channel, '');
    END IF;
    RETURN NULL;
END
$function$
""",
    "notify_refresh()": """ RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_refreshes', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    PERFORM pg_notify(channel, '');
    RETURN NULL;
END
$function$
""",
    "refuse_audit_change()": """ RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege', HINT = 'An audit trail that can be changed proves'
            ' nothing. Whole months leave it by tiger-db maintain-audit, when they are sealed.';
END
$function$
""",
    "set_updated_at()": """ RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO {schema}, 'pg_temp'
AS $function$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$function$
""",
    "uuid7_floor(at timestamp with time zone)": """ RETURNS uuid
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
BEGIN ATOMIC
 SELECT (rpad(lpad(to_hex(milliseconds.milliseconds), 12, '0'::text), 32, '0'::text))::uuid AS rpad
    FROM CAST((floor(LEAST(GREATEST((EXTRACT(epoch FROM uuid7_floor.at) * (1000)::numeric), \
(0)::numeric), ('281474976710655'::bigint)::numeric)))::bigint AS bigint) \
milliseconds(milliseconds);
END
""",
    "uuid7_time(id uuid)": """ RETURNS timestamp with time zone
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
BEGIN ATOMIC
 SELECT to_timestamp((((((('x'::text || "left"(replace((id)::text, '-'::text, ''::text), 12)))\
::bit(48))::bigint)::numeric / 1000.0))::double precision) AS to_timestamp;
END
""",
}


def updated_at_triggers() -> list[Trigger]:
    """Return the triggers that keep `updated_at`, one for each table that has this column."""
    return [
        Trigger(
            table.name,
            "set_updated_at",
            "BEFORE UPDATE",
            "FOR EACH ROW EXECUTE FUNCTION {schema}.set_updated_at()",
        )
        for table in metadata.sorted_tables
        if "updated_at" in table.c
    ]


def triggers() -> list[Trigger]:
    """Return all triggers of the schema."""
    return [*_TRIGGERS, *updated_at_triggers()]
