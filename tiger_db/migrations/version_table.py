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
_KEY_COLUMNS = ", ".join(map(str, KEY_COLUMNS.items()))
_HAS_OUR_TABLES = f"""
{len(KEY_COLUMNS)} = (SELECT count(pg_catalog.col_description(attrelid, attnum))
    FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_class AS c ON c.oid = attrelid
    WHERE relnamespace = n.oid AND (relname, attname) IN ({_KEY_COLUMNS}))
"""  # noqa: S608  # constants
_FIND = text(f"""
SELECT pg_catalog.to_regclass('{VERSION_TABLE}') IS NOT NULL AS present,
    pg_catalog.to_regclass('{FORMER_VERSION_TABLE}') IS NOT NULL AS former,
    (SELECT nspname::text FROM pg_catalog.pg_namespace AS n
        WHERE nspname = pg_catalog.current_schema() AND {_HAS_OUR_TABLES}) AS schema
""")  # noqa: S608  # constants
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
    their comments, and if this release has the revision. Otherwise, it belongs to another
    application.
    """
    found = connection.execute(_FIND).one()
    if found.present:
        return StoredRevisions(_read(connection, VERSION_TABLE))
    if found.schema is None:
        return StoredRevisions(())
    reason = f"the table {FORMER_VERSION_TABLE} is missing too"
    if found.former:
        try:
            with connection.begin_nested():
                revisions = _read(connection, FORMER_VERSION_TABLE)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != "42P01":  # undefined_table
                raise
            return find_revisions(connection, known)  # another process has just renamed the table
        if revisions and known.issuperset(revisions):
            return StoredRevisions(revisions, former=True)
        revision = f"the revision {', '.join(revisions)}" if revisions else "no revision"
        reason = f"the table {FORMER_VERSION_TABLE} is not tiger_db's, because it has {revision}"
    schema = quote_identifier(found.schema)
    return StoredRevisions(
        (),
        lost=f"the schema {schema} has the tables of tiger_db but no table {VERSION_TABLE}, and"
        f" {reason}: restore the table {VERSION_TABLE} from a backup",
    )


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


def _read(connection: Connection, table: str) -> tuple[str, ...]:
    query = f"SELECT version_num FROM {table} ORDER BY 1"  # noqa: S608  # a constant
    return tuple(connection.exec_driver_sql(query).scalars())
