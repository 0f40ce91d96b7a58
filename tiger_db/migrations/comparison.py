"""How a database differs from the declared triggers and functions, and the SQL that ends this."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.migrations.declared import FUNCTIONS, Trigger, triggers
from tiger_db.models import metadata


@dataclass(frozen=True, slots=True)
class SchemaDifference:
    """How a database differs from the declaration, and the SQL that ends this.

    `tables` are those concerned; a partition counts as its parent. `unknown`: a trigger was added
    that tiger_db does not have. It may be the application's own, or an attacker's.
    """

    tables: tuple[str, ...]
    description: str
    repair: str
    undeclared: bool = False

    def __str__(self) -> str:
        return f"{self.description}: {self.repair}"


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
SELECT format('function %s has the name of one of PostgreSQL''s', oid::regprocedure) AS description,
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
ORDER BY description
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


async def find_differences(connection: AsyncConnection) -> list[SchemaDifference]:
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
        *(SchemaDifference(_EVERY_TABLE, row.description, row.repair) for row in captures),
        *_compare_functions(schema, functions),
        *_compare_tables(tables),
        *_compare_triggers(schema.quoted, tables, found),
    ]


def _replication_role(row: Row[Any] | None) -> Iterator[SchemaDifference]:
    if row is None:
        return
    description = f"session_replication_role is {row.setting}, so that triggers do not fire"
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
    yield SchemaDifference(_EVERY_TABLE, description, repair)


def _compare_functions(schema: Row[Any], found: Iterable[Row[Any]]) -> Iterator[SchemaDifference]:
    literal = "'" + schema.name.replace("'", "''") + "'"
    definitions = {row.signature: row.definition.partition("\n")[2] for row in found}
    for signature, declared in FUNCTIONS.items():
        definition, expected = definitions.get(signature), declared.replace("{schema}", literal)
        if definition == expected:
            continue
        name = signature.partition("(")[0]
        tables = sorted({t.table for t in triggers() if f".{name}()" in t.action})
        description = f"function {name} (of {', '.join(tables or ['audit_logs'])}) "
        yield SchemaDifference(
            tuple(tables or ["audit_logs"]),  # the other functions make its partitions
            description + ("is missing" if definition is None else _changes(expected, definition)),
            _on_one_line(f"{schema.quoted}.{signature}", expected),
        )
    for row in found:
        if row.signature not in FUNCTIONS:
            name = row.signature.partition("(")[0]
            yield SchemaDifference(
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


def _compare_tables(found: Iterable[Row[Any]]) -> Iterator[SchemaDifference]:
    for name in metadata.tables.keys() - {table.root for table in found}:
        yield SchemaDifference((name,), f"table {name} is missing", "restore it from a backup")
    for table in found:
        name, of = table.name, (table.root,)
        if table.kind != _kind(table):
            description = f"{name} is {_KINDS[table.kind]}, not {_KINDS[_kind(table)]}"
            yield SchemaDifference(of, description, "restore it from a backup")
        alter = f"ALTER TABLE {table.qualified}"
        if table.secured:
            description = f"row security of {name} is enabled"
            yield SchemaDifference(of, description, f"{alter} DISABLE ROW LEVEL SECURITY")
        if table.forced:
            description = f"row security of {name} is forced"
            yield SchemaDifference(of, description, f"{alter} NO FORCE ROW LEVEL SECURITY")
        for policy in table.policies:
            description = f"{name} has the policy {policy}"
            yield SchemaDifference(of, description, f"DROP POLICY {policy} ON {table.qualified}")
        for rule in table.rules:
            repair = f"DROP RULE {rule} ON {table.qualified}"
            yield SchemaDifference(of, f"{name} has the rule {rule}", repair)
        for child in table.children:  # which keeps its rows
            repair = f"ALTER TABLE {child} NO INHERIT {table.qualified}"
            yield SchemaDifference(of, f"table {child} inherits from {name}", repair)


def _kind(table: Row[Any]) -> str:
    partitioned = metadata.tables[table.root].dialect_options["postgresql"]["partition_by"]
    return "p" if partitioned and table.oid == table.root_oid else "r"


def _compare_triggers(
    schema: str, tables: Iterable[Row[Any]], found: Iterable[Row[Any]]
) -> Iterator[SchemaDifference]:
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
            yield SchemaDifference(
                of, f"trigger {trigger.name} on {on} {state}", "; ".join(statements)
            )
        for row in present.values():
            if row.internal and row.enabled != "O":  # a foreign key's
                description = f"trigger {row.name} on {on} {_STATES[row.enabled]}"
                yield SchemaDifference(
                    of, description, f"ALTER TABLE {qualified} ENABLE TRIGGER {row.name}"
                )
            elif not (row.internal or row.cloned):
                description = f"trigger {row.name} on {on} is not one of tiger_db's"
                repair = f"unless it is yours, DROP TRIGGER {row.name} ON {qualified}"
                yield SchemaDifference(of, description, repair, undeclared=True)


def _state(trigger: Trigger, expected: str, row: Row[Any] | None) -> str | None:
    if row is None:
        return "is missing"
    if row.definition != expected:
        return f"is another one: {row.definition}"
    return _STATES[row.enabled] if row.enabled != trigger.enabled else None
