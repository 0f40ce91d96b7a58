"""The state of a schema: the revision of a database, compared with this release."""

import shlex
from dataclasses import dataclass, field

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.errors import SchemaMismatch
from tiger_db.migrations.alembic_scripts import head_revision, known_revisions
from tiger_db.migrations.db_schema import check_search_path
from tiger_db.migrations.version_table import (
    VERSION_TABLE,
    StoredRevisions,
    find_other_schema,
    find_revisions,
    take_over,
)
from tiger_db.settings import quote_identifier


@dataclass(frozen=True, slots=True)
class SchemaState:
    """The revision of the database, and the head revision of this tiger_db release."""

    current: str | None  # current revision, or None if tiger_db is not installed in `DB_SCHEMA`
    head: str
    known: bool  # True if this release has a migration with the current revision.
    # Name of another schema that contains tiger_db, if `DB_SCHEMA` does not contain tiger_db.
    other_schema: str | None = field(default=None, kw_only=True)
    # True if the revision is in the version table `alembic_version` of earlier releases.
    former: bool = field(default=False, kw_only=True)
    # Message if the schema has tables of tiger_db, but no revision of tiger_db.
    lost: str | None = field(default=None, kw_only=True)

    @property
    def problem(self) -> str | None:
        """A message with advice if the schema does not fit this release, or else None."""
        if self.lost is not None:
            return self.lost
        if self.current is None and (schema := self.other_schema) is not None:
            setting = shlex.quote(f"DB_SCHEMA={schema}")
            return f"tiger_db is in the schema {quote_identifier(schema)}: set {setting}"
        if self.current is None:
            return "the database has no tiger_db schema: run `tiger-db init`"
        if self.current == self.head and self.former:
            return (
                "the revision of tiger_db is in the table alembic_version of earlier releases:"
                f" run `tiger-db migrate`, which renames the table to {VERSION_TABLE}"
            )
        if self.current == self.head:
            return None
        age = "older" if self.known else "newer"
        remedy = "run `tiger-db migrate`" if self.known else "upgrade tiger_db"
        return (
            f"the schema (revision {self.current}) is {age} than this tiger_db"
            f" (revision {self.head}): {remedy}"
        )

    def check(self) -> None:
        """Raise SchemaMismatch if the schema does not fit this release."""
        if self.problem:
            raise SchemaMismatch(self.problem)


async def schema_state(connection: AsyncConnection) -> SchemaState:
    """Return the revision of the database and the head revision of this release.

    Raises:
        MigrationError: the folder of migration scripts is empty, or has more than one head.
        SchemaMismatch: the search path of the session does not resolve to `DB_SCHEMA`.
    """
    head = head_revision()
    stored = await connection.run_sync(stored_revisions)
    current = stored.revisions
    other_schema = None if current else await connection.run_sync(find_other_schema)
    return SchemaState(
        ", ".join(current) or None,
        head,
        bool(current) and known_revisions().keys() >= set(current),
        other_schema=other_schema,
        former=stored.former,
        lost=stored.lost,
    )


def stored_revisions(connection: Connection) -> StoredRevisions:
    """Return the revisions of the database."""
    check_search_path(connection)
    return find_revisions(connection, frozenset(known_revisions()))


def take_over_version_table(connection: Connection) -> bool:
    """Rename the table `alembic_version` of an earlier release to `tiger_db_alembic_version`.

    A table `alembic_version` of another application keeps its name. Return whether this call
    renamed the table.

    Raises:
        MigrationError: the schema has tables of tiger_db, but no revision of tiger_db.
        SchemaMismatch: the search path of the session does not resolve to `DB_SCHEMA`.
    """
    check_search_path(connection)
    return take_over(connection, frozenset(known_revisions()))
