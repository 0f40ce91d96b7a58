"""The schema that `DB_SCHEMA` names: its creation, and the search path of sessions."""

from typing import NamedTuple

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from tiger_db.errors import MigrationError, SchemaMismatch
from tiger_db.settings import SCHEMA_OPTION, quote_identifier, search_path

# `SEARCH_PATH` is an SQL query that returns the fields of the class `SearchPath`. The names of
# functions are qualified, because another schema in the search path can have functions with the
# same names.
SEARCH_PATH = """
SELECT pg_catalog.current_schemas(true), pg_catalog.current_setting('search_path'), current_user,
    pg_catalog.current_database()
"""


class SearchPath(NamedTuple):
    """The search path of a session, from the result of the query `SEARCH_PATH`."""

    schemas: list[str]  # existing schemas of the search path in order, including pg_catalog
    setting: str
    role: str
    database: str

    def resolves_to(self, schema: str) -> bool:
        """Return whether PostgreSQL searches first pg_catalog, then `schema` (if it exists)."""
        found = [name for name in self.schemas if not name.startswith("pg_temp")]
        return found == ["pg_catalog"] or found[:2] == ["pg_catalog", schema]

    def repair_sql(self, schema: str) -> str:
        """Return the ALTER ROLE statement that sets the search path of the role to the schema."""
        role, database = quote_identifier(self.role), quote_identifier(self.database)
        return f"ALTER ROLE {role} IN DATABASE {database} SET search_path = {search_path(schema)}"

    def check(self, schema: str) -> None:
        """Raise SchemaMismatch if the search path does not resolve to the schema."""
        if not self.resolves_to(schema):
            raise SchemaMismatch(
                f"a pooler dropped the search path to the schema {quote_identifier(schema)}"
                f" (DB_SCHEMA), and sessions use the search path {self.setting}:"
                f" run {self.repair_sql(schema)}"
            )


def configured_schema(connection: Connection) -> str | None:
    """Return `DB_SCHEMA`, or None if tiger_db did not create the engine."""
    schema: str | None = connection.get_execution_options().get(SCHEMA_OPTION)
    return schema


def check_search_path(connection: Connection) -> None:
    schema = configured_schema(connection)
    # If the setting `search_path` is as expected, current_schemas() is not called. If the schema is
    # missing and the role has no privilege to create temporary tables, current_schemas() fails.
    setting = text("SELECT pg_catalog.current_setting('search_path')")
    if schema is not None and connection.scalar(setting) != search_path(schema):
        SearchPath._make(connection.exec_driver_sql(SEARCH_PATH).one()).check(schema)


def create_schema(connection: Connection) -> None:
    """Create the schema that `DB_SCHEMA` names if the schema is missing, and commit the change.

    Raises:
        MigrationError: the database role lacks the privilege to create or to use the schema.
        SchemaMismatch: the search path of the session does not resolve to `DB_SCHEMA`.
    """
    check_search_path(connection)
    schema = configured_schema(connection)
    if schema is not None:
        quoted = quote_identifier(schema)
        if is_missing(connection, schema):
            try:
                connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")
                connection.commit()
            except DBAPIError as error:
                connection.rollback()
                state = getattr(error.orig, "sqlstate", None)
                if state == "42501":  # SQLSTATE of insufficient_privilege
                    raise MigrationError(
                        "the schema of DB_SCHEMA is missing, and this role may not create it: ask"
                        f" an administrator to run CREATE SCHEMA {quoted}, and GRANT USAGE, CREATE"
                        f" ON SCHEMA {quoted} to this role"
                    ) from None
                if state not in ("42P06", "23505"):  # another process created the same schema first
                    raise
        # If the role lacks USAGE on the schema, PostgreSQL skips the schema, and would create the
        # tables in pg_temp as temporary tables.
        usage = text("SELECT has_schema_privilege(:schema, 'USAGE')")
        if not connection.scalar(usage, {"schema": schema}):
            raise MigrationError(
                f"this role may not use the schema {quoted} (DB_SCHEMA): ask an administrator to"
                f" GRANT USAGE, CREATE ON SCHEMA {quoted} to this role"
            )
        # SQLAlchemy has possibly cached another default schema before `DB_SCHEMA` existed.
        connection.dialect.default_schema_name = schema
    connection.rollback()


def is_missing(connection: Connection, schema: str) -> bool:
    found = text("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = :schema)")
    return not connection.scalar(found, {"schema": schema})


def search_path_sql(schema: str, *, create: bool) -> str:
    """Return the statements CREATE SCHEMA and SET search_path for the start of a psql script."""
    created = f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(schema)};\n\n" if create else ""
    return f"{created}SET search_path = {search_path(schema)};\n\n"
