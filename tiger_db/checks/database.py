"""Checks of the schema, of indexes and partitions, of collations, and of Citus."""

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.checks import Outcome, fetch_all, join_first
from tiger_db.errors import SchemaMismatch
from tiger_db.migrations import schema_state
from tiger_db.migrations.comparison import find_differences
from tiger_db.migrations.grants import find_grant_differences, find_granted_roles
from tiger_db.models import TABLES, RoleKind, metadata
from tiger_db.models.base import readable_rules
from tiger_db.settings import Settings

_MAX_ROWS_NAMED = 3  # maximum number of rows of a table that a check names
# _OUR_TABLES selects the tables of tiger_db, partitions included.
_OUR_TABLES = """
our_tables AS (
    SELECT c.oid, root.relname FROM pg_class AS root
    JOIN pg_class AS c ON root.oid = coalesce(pg_partition_root(c.oid), c.oid)
    WHERE root.relnamespace = quote_ident(current_schema())::regnamespace
        AND root.relname = ANY (CAST(:tables AS text[]))
)
"""
# PostgreSQL records the version of a collation when the database or the collation is created. If no
# version is recorded, the version is unknown, or the collation has no versions, such as "C".
_CHANGED_COLLATIONS = text(f"""
WITH {_OUR_TABLES}, relations AS (
    SELECT oid FROM our_tables
    UNION SELECT indexrelid FROM pg_index JOIN our_tables ON our_tables.oid = indrelid
), collations AS (
    SELECT 0 AS number, 'the default collation of the database' AS name, datcollversion AS recorded,
        pg_database_collation_actual_version(oid) AS actual,
        format('ALTER DATABASE %I REFRESH COLLATION VERSION', datname) AS refresh
    FROM pg_database WHERE datname = current_database()
    UNION ALL
    SELECT 1, concat('the collation ', oid::regcollation), collversion,
        pg_collation_actual_version(oid),
        format('ALTER COLLATION %s REFRESH VERSION', oid::regcollation)
    FROM pg_collation WHERE oid IN (SELECT attcollation FROM pg_attribute
        WHERE attrelid IN (SELECT oid FROM relations))
)
SELECT name, recorded, actual, refresh,
    format('REINDEX DATABASE CONCURRENTLY %I', current_database()) AS reindex
FROM collations WHERE recorded IS NOT NULL AND recorded IS DISTINCT FROM actual
ORDER BY number, name
""")  # noqa: S608  # the inserted text is a constant
_VALID_CONSTRAINTS = text("""
SELECT conname FROM pg_constraint
WHERE contype = 'c' AND convalidated AND connamespace = quote_ident(current_schema())::regnamespace
""")
_CITUS_CATALOG = text("SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL")
_DISTRIBUTED_TABLES = text(f"""
WITH {_OUR_TABLES}
SELECT DISTINCT relname::text AS name FROM our_tables
WHERE oid IN (SELECT logicalrelid FROM pg_catalog.pg_dist_partition) ORDER BY 1
""")  # noqa: S608  # the inserted text is a constant


async def check_collations(connection: AsyncConnection) -> Outcome:
    """Find collations of tiger_db's columns and indexes whose version the server has changed.

    An upgrade of the operating system or of ICU can change the order of texts. Then an index that
    was built before does not find all rows.
    """
    rows = (await connection.execute(_CHANGED_COLLATIONS, {"tables": [*TABLES]})).all()
    if not rows:
        return Outcome("ok", "the server has the recorded versions of the collations")
    seen = "; ".join(
        f"{row.name} was recorded with the version {row.recorded}, and the server has"
        f" {f'the version {row.actual}' if row.actual else 'no version of it'}"
        for row in rows
    )
    seen += ": indexes of texts may not find all rows"
    if any(row.actual is None for row in rows):  # PostgreSQL refuses REFRESH without a version
        advice = (
            "use an operating system with the recorded version, or restore a dump of the database"
            " into a new database"
        )
        return Outcome("problem", seen, advice)
    commands = [rows[0].reindex, *(row.refresh for row in rows)]
    return Outcome("problem", seen, f"run {', then '.join(commands)}")


async def check_citus(connection: AsyncConnection) -> Outcome:
    """Find tables of tiger_db that Citus distributes, by the table in which Citus lists them."""
    names: list[str] = []
    if await connection.scalar(_CITUS_CATALOG):
        found = await connection.scalars(_DISTRIBUTED_TABLES, {"tables": [*TABLES]})
        names = list(found)
    if not names:
        return Outcome("ok", "no table is distributed")
    return Outcome(
        "problem",
        f"Citus distributes tables of tiger_db ({', '.join(names)}): their triggers, such as those"
        " that notify of revoked API keys, are not reliable",
        f"run SELECT undistribute_table('{names[0]}', cascade_via_foreign_keys => true), and the"
        " same for each other table, or move tiger_db to a database without Citus",
    )


async def check_readable_rows(connection: AsyncConnection) -> Outcome:
    """Find rows with times, JSON or lists that Python cannot read.

    Tables whose constraints for such values are valid have no such rows, and are not searched.
    """
    valid = {*await connection.scalars(_VALID_CONSTRAINTS)}
    found: list[str] = []
    for table in map(metadata.tables.__getitem__, TABLES):
        rules = [
            f"NOT ({rule})" for name, rule in readable_rules(table).items() if name not in valid
        ]
        if rules:
            ids = select(table.c["id"]).where(text(" OR ".join(rules))).limit(_MAX_ROWS_NAMED)
            found += [f"{table.name} {row_id}" for row_id in await connection.scalars(ids)]
    if not found:
        return Outcome("ok", "no row has times, JSON or lists that Python cannot read")
    seen = f"rows have times, JSON or lists that Python cannot read: {', '.join(found)}"
    return Outcome(
        "warning",
        seen,
        "correct the values with SQL: docs/operating.md explains how these values are read;"
        " audit events cannot be changed, and exports have their content",
    )


# A failed CREATE INDEX CONCURRENTLY leaves an invalid index.
_INVALID_INDEXES = """
SELECT i.indexrelid::regclass::text AS name, i.indisunique AS "unique" FROM pg_index i
WHERE NOT (i.indisvalid AND i.indisready)
    AND i.indexrelid NOT IN (SELECT index_relid FROM pg_stat_progress_create_index)
ORDER BY 2 DESC, 1
"""


async def check_indexes(connection: AsyncConnection) -> Outcome:
    rows = await fetch_all(connection, _INVALID_INDEXES)
    if not rows:
        return Outcome("ok", "none")
    return Outcome(
        "problem",
        join_first([f"{row.name}{' (unique)' if row.unique else ''}" for row in rows]),
        f"run REINDEX INDEX CONCURRENTLY {rows[0].name}, or drop the index",
    )


async def check_schema(connection: AsyncConnection) -> Outcome:
    try:
        state = await schema_state(connection)
        state.check()
    except SchemaMismatch as mismatch:
        seen, _, advice = str(mismatch).partition(": ")
        return Outcome("problem", seen, advice)
    return Outcome("ok", f"the schema is at revision {state.current}, the newest")


async def check_triggers(connection: AsyncConnection) -> Outcome:
    """Compare the triggers, functions, row security and rules in the database with this release."""
    differences = await find_differences(connection)
    changed = [difference.description for difference in differences if not difference.undeclared]
    added = [difference for difference in differences if difference.undeclared]
    seen = join_first([*changed, *(difference.description for difference in added)])
    if changed:
        advice = "run the SQL that `tiger-db check` prints, and find out who changed the schema"
        return Outcome("problem", seen, advice)
    if added:  # an added trigger can change or refuse writes, such as the revocation of an API key
        return Outcome("warning", seen, added[0].repair)
    return Outcome("ok", "all triggers, functions and rules match this release")


_ROLE = """
SELECT current_user::text AS name, rolsuper AS super,
    pg_has_role(relowner, 'MEMBER') AS owns
FROM pg_class, pg_roles WHERE pg_class.oid = to_regclass('audit_logs') AND rolname = current_user
"""


async def check_roles(connection: AsyncConnection, *, settings: Settings) -> Outcome:
    """Compare the privileges of roles with the declared ones, and find who can change the trail."""
    role = (await fetch_all(connection, _ROLE))[0]
    granted = await find_granted_roles(connection)
    if differences := await find_grant_differences(connection):
        seen = join_first([difference.description for difference in differences])
        return Outcome("problem", seen, join_first([found.repair for found in differences]))
    seen = "; ".join(f"{kind}: {name}" for name, kind in granted.items()) or "no role is granted"
    if not settings.production or not role.owns or RoleKind.APP in granted.values():
        return Outcome("ok", seen)
    state = "is a superuser" if role.super else "is the owner of the tables, or a member of it"
    return Outcome(
        "warning",
        f"{seen}, and the role {role.name} {state}: an application that connects with it can"
        " change the audit trail",
        "run `tiger-db grant` for the role of the application, and connect it with this role",
    )


_MONTHS_AHEAD = """
SELECT coalesce(min(n) - 1, 120) FROM generate_series(1, 120) AS n
WHERE NOT EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass
    AND inhrelid = to_regclass('audit_logs_' || to_char(
        date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => n), 'YYYY_MM')))
"""


async def audit_months_ahead(connection: AsyncConnection) -> int:
    """Count the consecutive months after the current month that have an audit partition."""
    return int((await fetch_all(connection, _MONTHS_AHEAD))[0][0])


def grade_partitions(months_ahead: int) -> Outcome:
    """Return an Outcome for the number of future months that have an audit partition."""
    seen = f"future months with an audit partition: {months_ahead}"
    match months_ahead:
        case 0:
            advice = "run `tiger-db migrate` now, and `tiger-db maintain-audit` every day"
            return Outcome("problem", seen, advice)
        case 1:
            return Outcome("warning", seen, "run `tiger-db maintain-audit` every day")
    return Outcome("ok", seen)


async def check_partitions(connection: AsyncConnection) -> Outcome:
    return grade_partitions(await audit_months_ahead(connection))
