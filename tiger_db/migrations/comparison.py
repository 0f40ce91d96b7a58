"""Comparison of a database with the declared triggers and functions, and SQL for repairs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.migrations.declared import FUNCTIONS, TRIGGERS, Trigger
from tiger_db.models import TABLES, metadata


@dataclass(frozen=True, slots=True)
class SchemaDifference:
    """A difference between a database and the declaration, with SQL that repairs the database."""

    tables: tuple[str, ...]  # affected tables (for a partition, the parent table)
    description: str
    repair: str
    undeclared: bool = False  # True if the difference is a trigger that tiger_db does not declare

    def __str__(self) -> str:
        return f"{self.description}: {self.repair}"


SET_LOCALLY = text("SELECT pg_catalog.set_config(:name, :value, true)")
SCHEMA = text("""
SELECT oid, nspname::text AS name, pg_catalog.quote_ident(nspname) AS quoted
FROM pg_catalog.pg_namespace WHERE nspname OPERATOR(pg_catalog.=) pg_catalog.current_schema()
""")
_TABLES = text("""
SELECT c.oid, root.oid AS root_oid, root.relname::text AS root, c.relkind::text AS kind,
    CASE c.relnamespace WHEN :schema THEN quote_ident(c.relname)
        ELSE c.oid::regclass::text END AS name, c.oid::regclass::text AS qualified,
    ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid
        AND attcollation = '"C"'::regcollation) AS by_code_point,
    ARRAY(SELECT concat_ws(' ', quote_ident(attname),
            CASE WHEN attgenerated = '' THEN pg_get_expr(adbin, 0) ELSE 'GENERATED' END)
        FROM pg_attrdef JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
        WHERE adrelid = c.oid AND attname <> 'position' ORDER BY 1) AS defaults,
    c.relpersistence = 'u' AS unlogged,
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
_TRIGGERS = text("""
SELECT tgrelid AS oid, quote_ident(tgname) AS name, tgenabled::text AS enabled,
    tgisinternal AS internal, tgparentid <> 0 AS cloned, pg_get_triggerdef(oid, true) AS definition
FROM pg_trigger WHERE tgrelid = ANY (CAST(:oids AS oid[])) ORDER BY tgname
""")
_FUNCTIONS = text("""
SELECT format('%I(%s)', proname, pg_get_function_arguments(oid)) AS signature,
    format('%I(%s)', proname, pg_get_function_identity_arguments(oid)) AS identity,
    pg_get_functiondef(oid) AS definition
FROM pg_proc WHERE pronamespace = :schema
    AND proname = ANY (CAST(:names AS text[])) AND prokind <> 'a' ORDER BY 1
""")
# `_OVERRIDES` finds database objects that can change the effect of tiger_db's SQL: casts of column
# types, and functions and operators that have the name of a PostgreSQL function or operator.
# The query `_OVERRIDES` also finds a value of the setting session_replication_role that disables
# triggers.
_OVERRIDES = text("""
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
SELECT format('function %s has the name of a PostgreSQL function', oid::regprocedure)
    AS description, format('DROP ROUTINE %s', oid::regprocedure) AS repair
FROM pg_proc WHERE pronamespace = :schema
    AND proname IN (SELECT proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace)
    AND ('pg_proc'::regclass, oid) NOT IN (SELECT * FROM of_extensions)
UNION ALL
SELECT format('operator %s has the name of a PostgreSQL operator', oid::regoperator),
    format('DROP OPERATOR %s', oid::regoperator)
FROM pg_operator WHERE oprnamespace = :schema
    AND oprname IN (SELECT oprname FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace)
    AND ('pg_operator'::regclass, oid) NOT IN (SELECT * FROM of_extensions)
UNION ALL
SELECT format('the cast from %s to %s is not declared by tiger_db', source, target),
    format('DROP CAST (%s AS %s)', source, target)
FROM (SELECT castsource::regtype AS source, casttarget::regtype AS target FROM pg_cast
    WHERE castsource IN (SELECT oid FROM of_types) OR casttarget IN (SELECT oid FROM of_types)) AS c
UNION ALL
SELECT format('session_replication_role is %s, so that triggers do not fire', setting),
    coalesce('ALTER ' || CASE source WHEN 'user' THEN format('ROLE %I', session_user)
        WHEN 'database' THEN format('DATABASE %I', current_database())
        WHEN 'database user'
            THEN format('ROLE %I IN DATABASE %I', session_user, current_database())
        WHEN 'global' THEN 'ROLE ALL' END || ' RESET session_replication_role',
        format('remove it where it is set (%s)', source))
FROM pg_settings WHERE name = 'session_replication_role' AND setting <> 'origin'
ORDER BY description
""")
# With other parameters, a session could store an event at a position that is sealed already. With
# another default of `position`, events could get positions that are never sealed.
SELECT_CHANGED_SEQUENCE = """
SELECT pg_catalog.format(
        'sequence audit_logs_position_seq has INCREMENT %s, MAXVALUE %s, CACHE %s%s', seqincrement,
        seqmax, seqcache, CASE WHEN seqcycle THEN ' and CYCLE' ELSE '' END) AS description,
    pg_catalog.format('ALTER SEQUENCE %s INCREMENT 1 NO MAXVALUE CACHE 1 NO CYCLE',
        seqrelid::regclass) || ', and restart the processes that record events' AS repair
FROM pg_catalog.pg_sequence WHERE seqrelid = pg_catalog.to_regclass({sequence})::oid
    AND NOT (seqincrement = 1 AND seqmax = 9223372036854775807 AND seqcache = 1 AND NOT seqcycle)
UNION ALL
SELECT pg_catalog.format('column position of audit_logs has %s',
        coalesce('the default ' || found, 'no default')),
    pg_catalog.format('ALTER TABLE %s ALTER position SET DEFAULT %s', attrelid::regclass, expected)
FROM pg_catalog.pg_attribute LEFT JOIN pg_catalog.pg_attrdef
        ON adrelid = attrelid AND adnum = attnum
    -- With the id of a table, pg_get_expr() would wait for locks on the table.
    CROSS JOIN LATERAL (SELECT CASE WHEN attgenerated = '' THEN pg_catalog.pg_get_expr(adbin, 0)
        ELSE 'GENERATED' END AS found) AS f,
    pg_catalog.format('nextval(''%s''::regclass)', pg_catalog.replace(
        pg_catalog.to_regclass({sequence})::text, '''', '''''')) AS expected
WHERE attrelid = pg_catalog.to_regclass({table})::oid AND attname = 'position'
    AND found IS DISTINCT FROM expected
"""
# The defaults of the columns of the trail, except that of `position`.
_TRAIL_DEFAULTS: dict[str, dict[str, str]] = {
    "audit_logs": {"created_at": "clock_timestamp()"},
    "audit_seals": {},
}
_KINDS = {
    "r": "a table",
    "p": "a partitioned table",
    "f": "a foreign table",
    "v": "a view",
    "m": "a materialized view",
}
_STATES = {
    "D": "is disabled",
    "R": "fires only for replicated changes (ENABLE REPLICA TRIGGER)",
    "A": "also fires for replicated changes (ENABLE ALWAYS TRIGGER)",
    "O": "does not fire for replicated changes (ENABLE TRIGGER)",
}


async def find_differences(connection: AsyncConnection) -> list[SchemaDifference]:
    """Compare triggers, functions, kinds of tables and collations with the declaration.

    `find_differences` also finds row security, rules, and objects and settings that change the
    effect of tiger_db's SQL, such as casts. The database must be at the head revision.
    `find_differences` sets the search path of the current transaction to pg_catalog, and waits for
    no lock on a table.
    """
    # If the setting quote_all_identifiers were on, PostgreSQL would print additional quotes.
    await connection.execute(SET_LOCALLY, {"name": "quote_all_identifiers", "value": "off"})
    schema = (await connection.execute(SCHEMA)).one()
    # With the search path pg_catalog, the queries call only PostgreSQL's own functions, and
    # PostgreSQL prints qualified names.
    await connection.execute(SET_LOCALLY, {"name": "search_path", "value": "pg_catalog, pg_temp"})
    values: dict[str, Any] = {
        "schema": schema.oid,
        "tables": [*TABLES],
        "names": [signature.partition("(")[0] for signature in FUNCTIONS],
    }
    tables = (await connection.execute(_TABLES, values)).all()
    values["oids"] = [table.oid for table in tables]
    functions = (await connection.execute(_FUNCTIONS, values)).all()
    return [
        *(
            SchemaDifference(tuple(sorted(TABLES)), row.description, row.repair)
            for row in await connection.execute(_OVERRIDES, values)
        ),
        *(
            SchemaDifference(("audit_logs",), row.description, row.repair)
            for row in await connection.execute(
                text(SELECT_CHANGED_SEQUENCE.format(sequence=":sequence", table=":table")),
                {
                    "sequence": f"{schema.quoted}.audit_logs_position_seq",
                    "table": f"{schema.quoted}.audit_logs",
                },
            )
        ),
        *_compare_functions(schema, functions),
        *(
            SchemaDifference((name,), f"table {name} is missing", "restore the table from a backup")
            for name in TABLES - {table.root for table in tables}
        ),
        *(
            SchemaDifference((table.root,), description, repair)
            for table in tables
            for description, repair in _compare_table(table)
        ),
        *_compare_triggers(
            schema.quoted, tables, (await connection.execute(_TRIGGERS, values)).all()
        ),
    ]


def _compare_functions(schema: Row[Any], found: Iterable[Row[Any]]) -> Iterator[SchemaDifference]:
    literal = "'" + schema.name.replace("'", "''") + "'"
    definitions = {row.signature: row.definition.partition("\n")[2] for row in found}
    for signature, declared in FUNCTIONS.items():
        definition, expected = definitions.get(signature), declared.replace("{schema}", literal)
        if definition == expected:
            continue
        name = signature.partition("(")[0]
        # One SQL function is called by no trigger: the function that manages the partitions of
        # audit_logs.
        tables = sorted({t.table for t in TRIGGERS if f".{name}(" in t.action}) or ["audit_logs"]
        state = "is missing" if definition is None else _first_changes(expected, definition)
        yield SchemaDifference(
            tuple(tables),
            f"function {name} (used by {', '.join(tables)}) {state}",
            _function_sql(f"{schema.quoted}.{signature}", expected),
        )
    for row in found:
        if row.signature not in FUNCTIONS:
            yield SchemaDifference(
                ("audit_logs",),
                f"function {row.identity} has the name of a tiger_db function",
                f"DROP FUNCTION {schema.quoted}.{row.identity}",
            )


def _first_changes(expected: str, definition: str) -> str:
    """Describe the first added line and the first missing line of a function's definition."""
    before, after = (
        [" ".join(line.split()) for line in source.replace("$function$", "\n").splitlines()]
        for source in (expected, definition)
    )
    changes = [
        f"{verb} `{line}`"
        for verb, lines, others in (("has", after, before), ("lacks", before, after))
        for line in [line for line in lines if line and line not in others][:1]
    ]
    return " and ".join(
        changes or ["has a definition that differs only in white space or in the order of lines"]
    )


def _function_sql(signature: str, definition: str) -> str:
    """Return the SQL that creates or replaces an SQL function, as one line."""
    clauses, _, body = definition.partition("AS $function$")
    sql = f"CREATE OR REPLACE FUNCTION {signature} {' '.join(clauses.split())}"
    if not body:  # a function body in standard SQL has no $function$
        return sql
    body = body.removesuffix("$function$\n").replace("\\", "\\\\").replace("'", "''")
    return f"{sql} AS E'{body}'".replace("\n", "\\n")


def _compare_table(table: Row[Any]) -> Iterator[tuple[str, str]]:
    """Yield a description and repairing SQL for each difference of a table from the declaration."""
    name, qualified = table.name, table.qualified
    if table.kind != (kind := _expected_kind(table)):
        yield (
            f"{name} is {_KINDS[table.kind]}, not {_KINDS[kind]}",
            "restore the table from a backup",
        )
    for column in metadata.tables[table.root].columns:
        # Alembic does not compare the collation of a column that has the default collation.
        if (
            getattr(column.type, "collation", None) == "C"
            and column.name not in table.by_code_point
        ):
            repair = f'ALTER TABLE {qualified} ALTER {column.name} TYPE text COLLATE "C"'
            yield f'column {column.name} of {name} does not have the collation "C"', repair
    if table.unlogged:
        repair = f"ALTER TABLE {qualified} SET LOGGED"
        yield f"{name} is unlogged, so that a crash empties it", repair
    if table.oid == table.root_oid and table.root in _TRAIL_DEFAULTS:
        yield from _compare_defaults(table)
    yield from _compare_row_security(table)
    for rule in table.rules:
        yield f"{name} has the rule {rule}", f"DROP RULE {rule} ON {qualified}"
    for child in table.children:  # ALTER TABLE … NO INHERIT keeps the rows of the child table
        yield f"table {child} inherits from {name}", f"ALTER TABLE {child} NO INHERIT {qualified}"


def _compare_row_security(table: Row[Any]) -> Iterator[tuple[str, str]]:
    name, qualified = table.name, table.qualified
    if table.secured:
        repair = f"ALTER TABLE {qualified} DISABLE ROW LEVEL SECURITY"
        yield f"row security of {name} is enabled", repair
    if table.forced:
        repair = f"ALTER TABLE {qualified} NO FORCE ROW LEVEL SECURITY"
        yield f"row security of {name} is forced", repair
    for policy in table.policies:
        yield f"{name} has the row security policy {policy}", f"DROP POLICY {policy} ON {qualified}"


def _compare_defaults(table: Row[Any]) -> Iterator[tuple[str, str]]:
    """Compare the defaults of a table of the trail, except that of the column `position`."""
    declared = _TRAIL_DEFAULTS[table.root]
    found = dict(default.split(" ", 1) for default in table.defaults)
    for column in sorted({*declared, *found}):
        default, expected = found.get(column), declared.get(column)
        if default == expected:
            continue
        change = "DROP DEFAULT" if expected is None else f"SET DEFAULT {expected}"
        if default == "GENERATED":
            change = "DROP EXPRESSION"
        state = "no default" if default is None else f"the default {default}"
        yield (
            f"column {column} of {table.name} has {state}",
            f"ALTER TABLE {table.qualified} ALTER {column} {change}",
        )


def _expected_kind(table: Row[Any]) -> str:
    partitioned = metadata.tables[table.root].dialect_options["postgresql"]["partition_by"]
    return "p" if partitioned and table.oid == table.root_oid else "r"


def _compare_triggers(
    schema: str, tables: Iterable[Row[Any]], found: Iterable[Row[Any]]
) -> Iterator[SchemaDifference]:
    states: dict[tuple[int, str], str | None] = {}
    for table in (table for table in tables if table.kind == _expected_kind(table)):
        on, qualified, of = table.name, table.qualified, (table.root,)
        is_root = table.oid == table.root_oid
        present = {row.name: row for row in found if row.oid == table.oid}
        for trigger in TRIGGERS:
            if trigger.table != table.root or not (trigger.partitions or is_root):
                continue
            row = present.pop(trigger.name, None)
            expected = trigger.definition(qualified, schema)
            state = states[table.oid, trigger.name] = _state(trigger, expected, row)
            # PostgreSQL copies row triggers of a table, and their changes, to all partitions.
            copied = not is_root and trigger.action.startswith("FOR EACH ROW")
            if state is None or (copied and states[table.root_oid, trigger.name] == state):
                continue
            enable = f"ALTER TABLE {qualified} ENABLE {'ALWAYS ' * (trigger.enabled == 'A')}TRIGGER"
            statements = []
            if state not in _STATES.values():
                statements.append(expected.replace("CREATE", "CREATE OR REPLACE", 1))
            if not statements or trigger.enabled == "A":
                statements.append(f"{enable} {trigger.name}")
            description = f"trigger {trigger.name} on {on} {state}"
            yield SchemaDifference(of, description, "; ".join(statements))
        for row in present.values():
            if row.internal and row.enabled != "O":  # an internal trigger enforces a foreign key
                description = f"trigger {row.name} on {on} {_STATES[row.enabled]}"
                repair = f"ALTER TABLE {qualified} ENABLE TRIGGER {row.name}"
                yield SchemaDifference(of, description, repair)
            elif not (row.internal or row.cloned):
                description = f"trigger {row.name} on {on} is not declared by tiger_db"
                repair = f"unless you need the trigger, DROP TRIGGER {row.name} ON {qualified}"
                yield SchemaDifference(of, description, repair, undeclared=True)


def _state(trigger: Trigger, expected: str, row: Row[Any] | None) -> str | None:
    if row is None:
        return "is missing"
    if row.definition != expected:
        return f"differs: {row.definition}"
    return _STATES[row.enabled] if row.enabled != trigger.enabled else None
