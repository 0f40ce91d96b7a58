"""The table in which Alembic stores the revision of tiger_db, beside version tables of others."""

from typing import NamedTuple

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from tiger_db.errors import MigrationError
from tiger_db.migrations.locks import MIGRATION_LOCK_ID, lock_key
from tiger_db.settings import quote_identifier

VERSION_TABLE = "tiger_db_alembic_version"
# Earlier releases used Alembic's default table, which other applications use too.
FORMER_VERSION_TABLE = "alembic_version"
# The index of the primary key is renamed too. Otherwise, another application could not create its
# own table alembic_version in the same schema, because its primary key would have the same name.
TAKEOVER = (
    f"ALTER TABLE {FORMER_VERSION_TABLE} RENAME TO {VERSION_TABLE}",
    f"ALTER INDEX IF EXISTS {FORMER_VERSION_TABLE}_pkc RENAME TO {VERSION_TABLE}_pkc",
)
# A table with one of these names belongs to tiger_db if it has the column, with a comment. All
# releases have these columns.
KEY_COLUMNS = {
    "api_keys": "tiger_account_id",
    "audit_logs": "tiger_account_id",
    "tiger_accounts": "tiger_id",
    "token_statuses": "tiger_account_id",
}
# A version table of earlier releases fits the schema if each table exists from its revision on.
LATER_TABLES = {"0003": "api_key_limits", "0004": "audit_seals", "0014": "trading_pauses"}
_LISTED = 3  # number of revisions that a message lists
_KEY_COLUMNS = ", ".join(map(str, KEY_COLUMNS.items()))
_HAS_OUR_TABLES = f"""
{len(KEY_COLUMNS)} = (SELECT count(pg_catalog.col_description(attrelid, attnum))
    FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_class AS c ON c.oid = attrelid
    WHERE relnamespace = n.oid AND (relname, attname) IN ({_KEY_COLUMNS}))
"""  # noqa: S608  # constants
_FIND = text(f"""
SELECT pg_catalog.to_regclass('{VERSION_TABLE}') IS NOT NULL AS present,
    ARRAY(SELECT t FROM pg_catalog.unnest(CAST(:later AS text[])) AS t
        WHERE pg_catalog.to_regclass(t) IS NOT NULL) AS later,
    pg_catalog.to_regclass('{FORMER_VERSION_TABLE}') IS NOT NULL AS former,
    (SELECT nspname::text FROM pg_catalog.pg_namespace AS n
        WHERE nspname = pg_catalog.current_schema() AND {_HAS_OUR_TABLES}) AS schema
""")  # noqa: S608  # constants
# Alembic creates an ordinary table with this column.
_IS_VERSION_TABLE = text("""
SELECT relkind = 'r' AND ARRAY['version_num character varying(32)'] = ARRAY(
    SELECT pg_catalog.format('%s %s', attname, pg_catalog.format_type(atttypid, atttypmod))
    FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
FROM pg_catalog.pg_class AS c WHERE c.oid = pg_catalog.to_regclass(:table)
""")
_OTHER_SCHEMA = text(
    f"SELECT min(nspname) FROM pg_catalog.pg_namespace AS n WHERE {_HAS_OUR_TABLES}"  # noqa: S608
)


class StoredRevisions(NamedTuple):
    """The revisions of tiger_db that a schema stores, and the table that contains them.

    A schema has several revisions only if branches of migrations were not merged.
    """

    revisions: tuple[str, ...]
    former: bool = False  # True if the table of earlier releases contains the revisions
    lost: str | None = None  # message if the schema has tables of tiger_db without a revision


def find_revisions(connection: Connection, known: frozenset[str]) -> StoredRevisions:
    """Return the revisions in the current schema. `known` contains the revisions of this release.

    A table `alembic_version` belongs to tiger_db only if the schema has the tables of tiger_db with
    their comments, if this release has the revision, and if the tables are those of the revision.
    Otherwise, it belongs to another application.
    """
    found = connection.execute(_FIND, {"later": [*LATER_TABLES.values()]}).one()
    if found.present:
        if not _is_version_table(connection, VERSION_TABLE):
            reason = f"the table {VERSION_TABLE} is not a version table of Alembic"
            return StoredRevisions((), lost=f"{reason}: restore it from a backup")
        return StoredRevisions(_read(connection, VERSION_TABLE))
    if found.schema is None:
        return StoredRevisions(())
    reason = f"the table {FORMER_VERSION_TABLE} is missing too"
    if found.former:
        try:
            with connection.begin_nested():
                foreign, revisions = _read_former(connection, known, set(found.later))
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != "42P01":  # undefined_table
                raise
            return find_revisions(connection, known)  # another process has just renamed the table
        if foreign is None:
            return StoredRevisions(revisions, former=True)
        reason = f"the table {FORMER_VERSION_TABLE} is not tiger_db's, because it {foreign}"
    schema = quote_identifier(found.schema)
    return StoredRevisions(
        (),
        lost=f"the schema {schema} has the tables of tiger_db but no table {VERSION_TABLE}, and"
        f" {reason}: restore the table {VERSION_TABLE} from a backup",
    )


def _read_former(
    connection: Connection, known: frozenset[str], later: set[str]
) -> tuple[str | None, tuple[str, ...]]:
    """Return why the table `alembic_version` is not tiger_db's, or None, and its revisions."""
    if not _is_version_table(connection, FORMER_VERSION_TABLE):
        return "is not a version table of Alembic", ()
    revisions = _read(connection, FORMER_VERSION_TABLE)
    if not revisions:
        return "has no revision", ()
    listed = ", ".join(revisions[:_LISTED]) + ", …" * (len(revisions) > _LISTED)
    if not known.issuperset(revisions):
        return f"has the revision {listed}", ()
    if later != {table for since, table in LATER_TABLES.items() if max(revisions) >= since}:
        return f"has the revision {listed}, which has other tables than the schema", ()
    return None, revisions


def find_other_schema(connection: Connection) -> str | None:
    """Return the name of a schema that contains the tables of tiger_db, or None."""
    schema: str | None = connection.scalar(_OTHER_SCHEMA)
    return schema


def take_over(connection: Connection, known: frozenset[str]) -> bool:
    """Rename the version table of earlier releases. Return whether this call renamed the table.

    Raises:
        MigrationError: the schema has tables of tiger_db, but no revision of tiger_db.
    """
    stored = find_revisions(connection, known)
    if stored.lost:
        raise MigrationError(stored.lost)
    if not stored.former:
        return False
    # A process that migrates the schema has this lock already. The command `alembic` has not.
    lock = f"SELECT pg_catalog.pg_advisory_xact_lock({lock_key(MIGRATION_LOCK_ID)})"
    connection.exec_driver_sql(lock)
    if not find_revisions(connection, known).former:  # another process has renamed the table
        return False
    for statement in TAKEOVER:
        connection.exec_driver_sql(statement)
    return True


def _is_version_table(connection: Connection, table: str) -> bool:
    # The answer is NULL if another process has just renamed the table. The caller then reads it.
    return connection.scalar(_IS_VERSION_TABLE, {"table": table}) is not False


def _read(connection: Connection, table: str) -> tuple[str, ...]:
    query = f"SELECT coalesce(version_num, 'NULL') FROM {table} ORDER BY 1 LIMIT 100"  # noqa: S608
    return tuple(connection.exec_driver_sql(query).scalars())
