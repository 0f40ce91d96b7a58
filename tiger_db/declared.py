"""The triggers and functions that the migrations make, and how a database differs from them.

The declaration is data, in the form in which PostgreSQL prints it when its search path has
pg_catalog only; {schema} stands for the name of the schema. A change of a trigger or a
function by a migration changes the data here too; migrations keep SQL of their own and import none
of this. Whoever owns the tables can switch all of it off, also by accident (`pg_restore
--disable-triggers` that was interrupted, `ALTER TABLE ... DISABLE TRIGGER`): nothing that the
triggers protect or announce can then be relied on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

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


@dataclass(frozen=True, slots=True)
class Difference:
    """How a database differs from the declaration, and the SQL that ends this.

    `tables` are those concerned; a partition counts as its parent. `unknown`: a trigger was added
    that tiger_db does not have. It may be the application's own, or an attacker's.
    """

    tables: tuple[str, ...]
    seen: str
    repair: str
    unknown: bool = False

    def __str__(self) -> str:
        return f"{self.seen}: {self.repair}"


_SET_LOCALLY = text("SELECT pg_catalog.set_config(:name, :value, true)")
_SCHEMA = text("""
SELECT oid, nspname::text AS name, pg_catalog.quote_ident(nspname) AS quoted
FROM pg_catalog.pg_namespace WHERE nspname OPERATOR(pg_catalog.=) pg_catalog.current_schema()
""")
_TABLES_FOUND = text("""
SELECT c.oid, root.oid AS root_oid, root.relname::text AS root, c.relkind::text AS kind,
    CASE c.relnamespace WHEN :schema THEN quote_ident(c.relname)
        ELSE c.oid::regclass::text END AS name, c.oid::regclass::text AS qualified,
    c.relrowsecurity AS secured, c.relforcerowsecurity AS forced,
    ARRAY(SELECT quote_ident(polname) FROM pg_policy WHERE polrelid = c.oid ORDER BY 1) AS policies,
    ARRAY(SELECT quote_ident(rulename) FROM pg_rewrite
        WHERE ev_class = c.oid AND rulename <> '_RETURN' ORDER BY 1) AS rules,
    ARRAY(SELECT i.inhrelid::regclass::text FROM pg_inherits AS i
        JOIN pg_class AS child ON child.oid = i.inhrelid
        WHERE i.inhparent = c.oid AND NOT child.relispartition ORDER BY 1) AS children
FROM pg_class AS root JOIN pg_class AS c ON root.oid = coalesce(pg_partition_root(c.oid), c.oid)
WHERE root.relnamespace = :schema
    AND root.relname = ANY (CAST(:tables AS text[])) AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
ORDER BY root.relname, c.oid <> root.oid, c.relname
""")
_TRIGGERS_FOUND = text("""
SELECT tgrelid AS oid, quote_ident(tgname) AS name, tgenabled::text AS enabled,
    tgisinternal AS internal, tgparentid <> 0 AS cloned, pg_get_triggerdef(oid, true) AS definition
FROM pg_trigger WHERE tgrelid = ANY (CAST(:oids AS oid[])) ORDER BY tgname
""")
_FUNCTIONS_FOUND = text("""
SELECT format('%I(%s)', proname, pg_get_function_arguments(oid)) AS signature,
    format('%I(%s)', proname, pg_get_function_identity_arguments(oid)) AS identity,
    pg_get_functiondef(oid) AS definition
FROM pg_proc WHERE pronamespace = :schema
    AND proname = ANY (CAST(:names AS text[])) AND prokind <> 'a' ORDER BY 1
""")
# Functions and operators that a call by PostgreSQL's name may mean, and casts of the tables' types.
_CAPTURES_FOUND = text("""
WITH of_columns AS (
    SELECT t.oid, t.typelem FROM pg_attribute JOIN pg_type AS t ON t.oid = atttypid
    WHERE attrelid = ANY (CAST(:oids AS oid[]))
), types AS (
    SELECT oid, typarray FROM pg_type
    WHERE typrelid = ANY (CAST(:oids AS oid[])) OR (typnamespace = :schema
        AND oid IN (SELECT oid FROM of_columns UNION SELECT typelem FROM of_columns))
), of_types AS (
    SELECT oid FROM types UNION SELECT typarray FROM types
), of_extensions AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
)
SELECT format('function %s has the name of one of PostgreSQL''s', oid::regprocedure) AS seen,
    format('DROP ROUTINE %s', oid::regprocedure) AS repair
FROM pg_proc WHERE pronamespace = :schema
    AND proname IN (SELECT proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace)
    AND ('pg_proc'::regclass, oid) NOT IN (SELECT * FROM of_extensions)
UNION ALL
SELECT format('operator %s has the name of one of PostgreSQL''s', oid::regoperator),
    format('DROP OPERATOR %s', oid::regoperator)
FROM pg_operator WHERE oprnamespace = :schema
    AND oprname IN (SELECT oprname FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace)
    AND ('pg_operator'::regclass, oid) NOT IN (SELECT * FROM of_extensions)
UNION ALL
SELECT format('the cast from %s to %s is not one of tiger_db''s', source, target),
    format('DROP CAST (%s AS %s)', source, target)
FROM (SELECT castsource::regtype AS source, casttarget::regtype AS target FROM pg_cast
    WHERE castsource IN (SELECT oid FROM of_types) OR casttarget IN (SELECT oid FROM of_types)) AS c
ORDER BY seen
""")
_REPLICATION_ROLE = text("""
SELECT setting, source, quote_ident(session_user) AS role,
    quote_ident(current_database()) AS database
FROM pg_settings WHERE name = 'session_replication_role' AND setting <> 'origin'
""")
_EVERY_TABLE = tuple(sorted(metadata.tables))
_KINDS = {
    "r": "a table",
    "p": "a partitioned table",
    "f": "a foreign table",
    "v": "a view",
    "m": "a materialized view",
}
_STATES = {
    "D": "is disabled",
    "R": "fires for replication only",
    "A": "fires for replication too",
    "O": "does not fire for replication",
}


async def compare(connection: AsyncConnection) -> list[Difference]:
    """Compare triggers, functions, row security, rules and kinds of tables with the declaration.

    Also reported is what makes them act otherwise than declared: functions and operators of the
    schema that have a name of PostgreSQL's, casts of tiger_db's types, tables that inherit from
    tiger_db's, and a `session_replication_role` of this session that switches triggers off.

    The database must be at this code's revision. The search path of the connection's transaction
    is set to pg_catalog.
    """
    # How names are printed is no matter of the database's settings.
    await connection.execute(_SET_LOCALLY, {"name": "quote_all_identifiers", "value": "off"})
    schema = (await connection.execute(_SCHEMA)).one()
    # From here on, no function or operator of the schema can take the place of PostgreSQL's, and
    # PostgreSQL prints names qualified.
    await connection.execute(_SET_LOCALLY, {"name": "search_path", "value": "pg_catalog, pg_temp"})
    here = {"schema": schema.oid}
    tables = (await connection.execute(_TABLES_FOUND, here | {"tables": [*metadata.tables]})).all()
    oids = {"oids": [table.oid for table in tables]}
    found = (await connection.execute(_TRIGGERS_FOUND, oids)).all()
    names = [signature.partition("(")[0] for signature in FUNCTIONS]
    functions = (await connection.execute(_FUNCTIONS_FOUND, here | {"names": names})).all()
    captures = (await connection.execute(_CAPTURES_FOUND, here | oids)).all()
    return [
        *_replication_role((await connection.execute(_REPLICATION_ROLE)).first()),
        *(Difference(_EVERY_TABLE, row.seen, row.repair) for row in captures),
        *_compare_functions(schema, functions),
        *_compare_tables(tables),
        *_compare_triggers(schema.quoted, tables, found),
    ]


def _replication_role(row: Row[Any] | None) -> Iterator[Difference]:
    if row is None:
        return
    seen = f"session_replication_role is {row.setting}, so that triggers do not fire"
    setters = {
        "user": f"ROLE {row.role}",
        "database": f"DATABASE {row.database}",
        "database user": f"ROLE {row.role} IN DATABASE {row.database}",
        "global": "ROLE ALL",
    }
    if row.source in setters:
        repair = f"ALTER {setters[row.source]} RESET session_replication_role"
    else:
        repair = f"remove it where it is set ({row.source})"
    yield Difference(_EVERY_TABLE, seen, repair)


def _compare_functions(schema: Row[Any], found: Iterable[Row[Any]]) -> Iterator[Difference]:
    literal = "'" + schema.name.replace("'", "''") + "'"
    definitions = {row.signature: row.definition.partition("\n")[2] for row in found}
    for signature, declared in FUNCTIONS.items():
        definition, expected = definitions.get(signature), declared.replace("{schema}", literal)
        if definition == expected:
            continue
        name = signature.partition("(")[0]
        tables = sorted({t.table for t in triggers() if f".{name}()" in t.action})
        seen = f"function {name} (of {', '.join(tables or ['audit_logs'])}) "
        yield Difference(
            tuple(tables or ["audit_logs"]),  # the other functions make its partitions
            seen + ("is missing" if definition is None else _changes(expected, definition)),
            _on_one_line(f"{schema.quoted}.{signature}", expected),
        )
    for row in found:
        if row.signature not in FUNCTIONS:
            name = row.signature.partition("(")[0]
            yield Difference(
                ("audit_logs",),
                f"function {row.identity} has the name of one of tiger_db's",
                f"DROP FUNCTION {schema.quoted}.{row.identity}",
            )


def _changes(expected: str, definition: str) -> str:
    """Name the first line that is too many, and the first that is missing."""
    before, after = (
        [" ".join(line.split()) for line in source.replace("$function$", "\n").splitlines()]
        for source in (expected, definition)
    )
    changes = [
        f"{verb} `{line}`"
        for verb, lines, others in (("has", after, before), ("lacks", before, after))
        for line in [line for line in lines if line and line not in others][:1]
    ]
    return " and ".join(changes or ["has other white space or another order of lines"])


def _on_one_line(signature: str, definition: str) -> str:
    clauses, _, body = definition.partition("AS $function$")
    statement = f"CREATE OR REPLACE FUNCTION {signature} {' '.join(clauses.split())}"
    if not body:  # SQL-standard: it is among the clauses
        return statement
    body = body.removesuffix("$function$\n").replace("\\", "\\\\").replace("'", "''")
    return f"{statement} AS E'{body}'".replace("\n", "\\n")


def _compare_tables(found: Iterable[Row[Any]]) -> Iterator[Difference]:
    for name in metadata.tables.keys() - {table.root for table in found}:
        yield Difference((name,), f"table {name} is missing", "restore it from a backup")
    for table in found:
        name, of = table.name, (table.root,)
        if table.kind != _kind(table):
            seen = f"{name} is {_KINDS[table.kind]}, not {_KINDS[_kind(table)]}"
            yield Difference(of, seen, "restore it from a backup")
        alter = f"ALTER TABLE {table.qualified}"
        if table.secured:
            seen = f"row security of {name} is enabled"
            yield Difference(of, seen, f"{alter} DISABLE ROW LEVEL SECURITY")
        if table.forced:
            seen = f"row security of {name} is forced"
            yield Difference(of, seen, f"{alter} NO FORCE ROW LEVEL SECURITY")
        for policy in table.policies:
            seen = f"{name} has the policy {policy}"
            yield Difference(of, seen, f"DROP POLICY {policy} ON {table.qualified}")
        for rule in table.rules:
            repair = f"DROP RULE {rule} ON {table.qualified}"
            yield Difference(of, f"{name} has the rule {rule}", repair)
        for child in table.children:  # which keeps its rows
            repair = f"ALTER TABLE {child} NO INHERIT {table.qualified}"
            yield Difference(of, f"table {child} inherits from {name}", repair)


def _kind(table: Row[Any]) -> str:
    partitioned = metadata.tables[table.root].dialect_options["postgresql"]["partition_by"]
    return "p" if partitioned and table.oid == table.root_oid else "r"


def _compare_triggers(
    schema: str, tables: Iterable[Row[Any]], found: Iterable[Row[Any]]
) -> Iterator[Difference]:
    states: dict[tuple[int, str], str | None] = {}
    for table in (table for table in tables if table.kind == _kind(table)):
        on, qualified, of = table.name, table.qualified, (table.root,)
        is_root = table.oid == table.root_oid
        present = {row.name: row for row in found if row.oid == table.oid}
        for trigger in triggers():
            if trigger.table != table.root or not (trigger.partitions or is_root):
                continue
            row = present.pop(trigger.name, None)
            expected = trigger.on(qualified, schema)
            state = states[table.oid, trigger.name] = _state(trigger, expected, row)
            # Partitions copy row triggers, and follow when that of their parent is repaired.
            copied = not is_root and trigger.action.startswith("FOR EACH ROW")
            if state is None or (copied and states[table.root_oid, trigger.name] == state):
                continue
            enable = f"ALTER TABLE {qualified} ENABLE {'ALWAYS ' * (trigger.enabled == 'A')}TRIGGER"
            statements = []
            if state not in _STATES.values():
                statements.append(expected.replace("CREATE", "CREATE OR REPLACE", 1))
            if not statements or trigger.enabled == "A":
                statements.append(f"{enable} {trigger.name}")
            yield Difference(of, f"trigger {trigger.name} on {on} {state}", "; ".join(statements))
        for row in present.values():
            if row.internal and row.enabled != "O":  # a foreign key's
                seen = f"trigger {row.name} on {on} {_STATES[row.enabled]}"
                yield Difference(of, seen, f"ALTER TABLE {qualified} ENABLE TRIGGER {row.name}")
            elif not (row.internal or row.cloned):
                seen = f"trigger {row.name} on {on} is not one of tiger_db's"
                repair = f"unless it is yours, DROP TRIGGER {row.name} ON {qualified}"
                yield Difference(of, seen, repair, unknown=True)


def _state(trigger: Trigger, expected: str, row: Row[Any] | None) -> str | None:
    if row is None:
        return "is missing"
    if row.definition != expected:
        return f"is another one: {row.definition}"
    return _STATES[row.enabled] if row.enabled != trigger.enabled else None
