"""Functions that run or write migrations, and compare the schema with its declaration.

Alembic is imported inside functions: each Database imports this module, but runs no migrations.
"""

import asyncio
import io
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tiger_db.errors import MigrationError, SchemaMismatch
from tiger_db.files import file_errors
from tiger_db.migrations.applications import include_object as include_object
from tiger_db.migrations.applications import render_item as render_item
from tiger_db.migrations.comparison import find_differences
from tiger_db.migrations.grants import (
    apply_grants,
    find_grant_differences,
    find_granted_roles,
    find_objects,
    grant_statements,
)
from tiger_db.migrations.locks import LOCK_TIMEOUT, Report, migration_lock, with_lock_retries
from tiger_db.migrations.version_table import (
    FORMER_VERSION_TABLE,
    TAKEOVER,
    VERSION_TABLE,
    StoredRevisions,
    find_other_schema,
    find_revisions,
    take_over,
)
from tiger_db.settings import SCHEMA_OPTION, quote_identifier, search_path

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.runtime.migration import RevisionStep
    from alembic.script import Script, ScriptDirectory

T = TypeVar("T")
MONTHS_AHEAD = 12
# `SEARCH_PATH` is an SQL query that returns the fields of the class `SearchPath`. The names of
# functions are qualified, because another schema in the search path can have functions with the
# same names.
SEARCH_PATH = """
SELECT pg_catalog.current_schemas(true), pg_catalog.current_setting('search_path'), current_user,
    pg_catalog.current_database()
"""


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


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    """A migration that was run. `seconds` is the duration of the migration's last attempt."""

    revision: str
    message: str
    seconds: float
    attempts: int


@dataclass(frozen=True, slots=True)
class UpgradeResult(SchemaState):
    """The schema state after an upgrade, with the migrations that the upgrade ran."""

    applied: list[AppliedMigration]
    months: int  # number of audit partitions that the upgrade created


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


def script_location() -> Path:
    """Return the folder of the Alembic scripts, in an installed package or in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "alembic"
    return installed if installed.is_dir() else package.parent / "alembic"


@cache
def scripts() -> "ScriptDirectory":
    """Return Alembic's directory of migration scripts, which is read once per process."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415  # slow import

    return ScriptDirectory.from_config(alembic_config())


def alembic_config(connection: Connection | None = None) -> "Config":
    """Return Alembic's configuration. If `connection` is not None, `alembic/env.py` uses it."""
    from alembic.config import Config  # noqa: PLC0415  # slow import

    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "%%(year)d%%(month).2d%%(day).2d_%%(rev)s_%%(slug)s")
    config.attributes["connection"] = connection
    return config


async def schema_state(connection: AsyncConnection) -> SchemaState:
    """Return the revision of the database and the head revision of this release.

    Raises:
        MigrationError: the folder of migration scripts is empty, or has more than one head.
        SchemaMismatch: the search path of the session does not resolve to `DB_SCHEMA`.
    """
    head = _head()
    stored = await connection.run_sync(_stored)
    current = stored.revisions
    other_schema = None if current else await connection.run_sync(find_other_schema)
    return SchemaState(
        ", ".join(current) or None,
        head,
        bool(current) and _revisions().keys() >= set(current),
        other_schema=other_schema,
        former=stored.former,
        lost=stored.lost,
    )


def _head() -> str:
    revisions = _revisions()
    heads = sorted(revisions.keys() - set().union(*revisions.values()))
    if not heads:
        raise MigrationError("there are no migration scripts")
    if len(heads) > 1:
        raise MigrationError(
            f"the migrations have {len(heads)} heads ({', '.join(heads)}):"
            " merge the heads with `alembic merge heads -m ...`"
        )
    return heads[0]


def _revisions() -> dict[str, set[str]]:
    """Return the revisions of this release, each with the revisions that it follows."""
    folder = script_location() / "versions"
    return _read_revisions(folder, folder.stat().st_mtime_ns if folder.is_dir() else 0)


@cache
def _read_revisions(folder: Path, _changed_at: int) -> dict[str, set[str]]:
    # Alembic would import Mako and each migration, which takes longer than most commands.
    found = {}
    for file in folder.glob("*.py"):
        values = dict(_REVISION.findall(file.read_text(encoding="utf-8")))
        if revision := _QUOTED.search(values.get("revision", "")):
            found[revision[1]] = {*_QUOTED.findall(values.get("down_revision", ""))}
    return found


_REVISION = re.compile(r"^((?:down_)?revision)\b[^=\n]*=([^=\n]*)$", re.MULTILINE)
_QUOTED = re.compile(r"""["'](\w+)["']""")


def _stored(connection: Connection) -> StoredRevisions:
    """Return the revisions of the database."""
    _check_search_path(connection)
    return find_revisions(connection, frozenset(_revisions()))


def take_over_version_table(connection: Connection) -> bool:
    """Rename the table `alembic_version` of an earlier release to `tiger_db_alembic_version`.

    A table `alembic_version` of another application keeps its name. Return whether this call
    renamed the table.

    Raises:
        MigrationError: the schema has tables of tiger_db, but no revision of tiger_db.
        SchemaMismatch: the search path of the session does not resolve to `DB_SCHEMA`.
    """
    _check_search_path(connection)
    return take_over(connection, frozenset(_revisions()))


def _configured_schema(connection: Connection) -> str | None:
    """Return `DB_SCHEMA`, or None if tiger_db did not create the engine."""
    schema: str | None = connection.get_execution_options().get(SCHEMA_OPTION)
    return schema


def _check_search_path(connection: Connection) -> None:
    schema = _configured_schema(connection)
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
    _check_search_path(connection)
    schema = _configured_schema(connection)
    if schema is not None:
        quoted = quote_identifier(schema)
        if _is_missing(connection, schema):
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


def _is_missing(connection: Connection, schema: str) -> bool:
    found = text("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = :schema)")
    return not connection.scalar(found, {"schema": schema})


def search_path_sql(schema: str, *, create: bool) -> str:
    """Return the statements CREATE SCHEMA and SET search_path for the start of a psql script."""
    created = f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(schema)};\n\n" if create else ""
    return f"{created}SET search_path = {search_path(schema)};\n\n"


async def upgrade(
    engine: AsyncEngine, revision: str = "head", *, report: Report = lambda _: None
) -> UpgradeResult:
    """Run migrations up to a revision, then create the audit partitions of the next months.

    Each migration has its own transaction. `upgrade` waits while another process runs migrations. A
    migration that waits too long for a table lock is rolled back and run again, because the
    migration blocks other sessions. At the head revision, `upgrade` finally repeats the grants of
    `tiger-db grant`, so that roles get their privileges on new tables. The function `report` is
    called with one line of text for each migration, for each failed attempt, and while `upgrade`
    waits.

    Raises:
        MigrationError: the database role lacks the privilege to create the schema, the target
            revision is unknown, or all attempts of a migration were blocked. Completed migrations
            stay applied.
        SchemaMismatch: the search path of the sessions does not resolve to `DB_SCHEMA`.
    """
    async with engine.connect() as connection:
        await connection.run_sync(create_schema)
    async with migration_lock(engine, report) as connection:
        applied = await _apply(engine, connection, revision, report, up=True)
        state = await schema_state(connection)
        await connection.rollback()
        months = 0
        if state.problem is None:

            async def create_months() -> int:
                async with connection.begin():
                    created = text("SELECT make_audit_months(:months)")
                    return int(await connection.scalar(created, {"months": MONTHS_AHEAD}))

            async def grant_again() -> None:
                async with connection.begin():
                    await apply_grants(connection)

            title = "creating audit partitions"
            months, *_ = await with_lock_retries(engine, connection, title, create_months, report)
            title = "granting privileges"
            await with_lock_retries(engine, connection, title, grant_again, report)
        return UpgradeResult(state.current, state.head, state.known, applied, months)


async def downgrade(
    engine: AsyncEngine, revision: str, *, report: Report = lambda _: None
) -> SchemaState:
    """Undo migrations down to a revision, with the same locks as `upgrade`.

    The revision `-1` undoes one migration, and the revision `base` undoes all migrations.

    Raises:
        MigrationError: the target revision is unknown, or all attempts of a migration were blocked.
    """
    async with migration_lock(engine, report) as connection:
        await _apply(engine, connection, revision, report, up=False)
        state = await schema_state(connection)
        await connection.commit()
        return state


async def pending(engine: AsyncEngine, revision: str = "head") -> "list[Script]":
    """Return the pending migrations, in the order in which `upgrade` would run them.

    Raises:
        MigrationError: the target revision is unknown.
        SchemaMismatch: the database schema is newer than this tiger_db release.
    """
    async with engine.connect() as connection:
        state = await schema_state(connection)
        current = (await connection.run_sync(_stored)).revisions
    if state.lost or (current and not state.known):
        state.check()
    return [step.revision for step in await asyncio.to_thread(_steps, current, revision, up=True)]


async def pending_sql(engine: AsyncEngine, revision: str = "head") -> str:
    """Return the SQL that `upgrade` would execute, as a script for `psql -v ON_ERROR_STOP=1`.

    Raises:
        MigrationError: the target revision is unknown, or the database is at several revisions.
        SchemaMismatch: the database schema is newer than this tiger_db release.
    """
    steps = await pending(engine, revision)
    async with engine.connect() as connection:
        schema = await connection.run_sync(_configured_schema)
        script = ""
        if schema is not None:
            missing = await connection.run_sync(_is_missing, schema)
            script = search_path_sql(schema, create=missing)
        if (await connection.run_sync(_stored)).former:
            script += _transaction_sql(*TAKEOVER)
        grants = await _grants_of_roles(connection)
    if steps:
        start = steps[0].down_revision
        if not (start is None or isinstance(start, str)):
            raise MigrationError(
                "the database has several revisions, but an SQL script can start at only one"
            )
        script += migration_sql(start, steps[-1].revision)
    if not steps or steps[-1].revision == _head():
        script += _transaction_sql(f"SELECT make_audit_months({MONTHS_AHEAD})", *grants)
    return script


async def _grants_of_roles(connection: AsyncConnection) -> list[str]:
    """Return the statements that grant the privileges of each granted role again."""
    present = text("SELECT pg_catalog.to_regclass('granted_roles') IS NOT NULL")
    if not await connection.scalar(present):
        return []
    roles = await find_granted_roles(connection)
    objects = await find_objects(connection)
    return [s for role, kind in roles.items() for s in grant_statements(objects, role, kind)]


def _transaction_sql(*statements: str) -> str:
    parts = ("BEGIN", LOCK_TIMEOUT, *statements, "COMMIT")
    return ";\n\n".join(parts) + ";\n"


def migration_sql(start: str | None, end: str) -> str:
    """Return the SQL of the migrations after the revision `start`, up to the revision `end`.

    If `start` is None, the SQL begins with the first migration.

    Raises:
        MigrationError: the revision `start` or `end` is unknown.
    """
    from alembic.util import CommandError  # noqa: PLC0415  # slow import

    from alembic import command  # noqa: PLC0415  # slow import

    config = alembic_config()
    config.output_buffer = io.StringIO()
    try:
        command.upgrade(config, f"{start}:{end}" if start else end, sql=True)
    except CommandError as error:
        raise MigrationError(str(error)) from None
    script = config.output_buffer.getvalue()
    return re.sub("^BEGIN;$", f"BEGIN;\n\n{LOCK_TIMEOUT};", script, flags=re.MULTILINE)


async def drift(engine: AsyncEngine) -> list[str]:
    """Return one line for each difference between the schema and the schema's declaration.

    The result omits triggers that tiger_db does not declare, which `tiger-db doctor` reports.

    Raises:
        SchemaMismatch: the database is not at the head revision.
    """
    from alembic.util import AutogenerateDiffsDetected  # noqa: PLC0415  # slow import

    from alembic import command  # noqa: PLC0415  # slow import

    async with engine.connect() as connection:
        (await schema_state(connection)).check()
        differences = await find_differences(connection)
        await connection.rollback()
        differences += await find_grant_differences(connection)
        await connection.rollback()
        changed = [str(difference) for difference in differences if not difference.undeclared]
        try:
            await _run(connection, command.check)
        except AutogenerateDiffsDetected as detected:
            # The list `changed` contains the triggers that the database lacks.
            diffs = [_describe(diff) for diff in detected.diffs if diff[0] != "add_trigger"]
            return [" ".join(diff.split()) for diff in diffs] + changed
    return changed


async def revision(engine: AsyncEngine, message: str, *, autogenerate: bool = True) -> Path:
    """Create the file of a migration that makes the schema match the models. Return its path.

    Raises:
        MigrationError: tiger_db was imported from an installed package instead of a checkout of the
            repository.
        SchemaMismatch: the database is not at the head revision.
        FileError: the file cannot be written.
    """
    if script_location().parent == Path(__file__).parents[1]:
        raise MigrationError(
            "an installed package cannot write migrations: run the command in a checkout"
        )
    from alembic.script import Script  # noqa: PLC0415  # slow import

    from alembic import command  # noqa: PLC0415  # slow import

    write = partial(command.revision, message=message, autogenerate=autogenerate)
    async with engine.connect() as connection:
        if autogenerate:
            (await schema_state(connection)).check()
            await connection.rollback()
        with file_errors():
            script = await _run(connection, write)
    if not isinstance(script, Script):
        raise MigrationError("Alembic wrote no migration")
    scripts.cache_clear()
    return Path(script.path)


def history() -> "list[Script]":
    """Return all migrations, newest first."""
    return list(scripts().walk_revisions())


def _steps(current: Sequence[str], revision: str, *, up: bool) -> "list[RevisionStep]":
    """Return the migrations from the current revisions to the target revision, in order."""
    from alembic.runtime.migration import MigrationStep  # noqa: PLC0415  # slow import
    from alembic.script.revision import RevisionError  # noqa: PLC0415  # slow import

    directory, start = scripts(), tuple(current)
    _head()
    try:
        if up:
            found = directory.iterate_revisions(revision, start, implicit_base=True)
            step, ordered = MigrationStep.upgrade_from_script, list(found)[::-1]
        else:
            found = directory.iterate_revisions(start, revision, select_for_downgrade=True)
            step, ordered = MigrationStep.downgrade_from_script, list(found)
        return [step(directory.revision_map, script) for script in ordered]
    except RevisionError as error:
        raise MigrationError(str(error)) from None


async def _apply(
    engine: AsyncEngine, connection: AsyncConnection, revision: str, report: Report, *, up: bool
) -> list[AppliedMigration]:
    """Run the migrations up or down to a revision. Each migration has its own transaction."""

    async def take_over() -> bool:
        async with connection.begin():
            return await connection.run_sync(take_over_version_table)

    title = "renaming the version table"
    renamed, *_ = await with_lock_retries(engine, connection, title, take_over, report)
    if renamed:
        report(f"renamed the table {FORMER_VERSION_TABLE} of tiger_db to {VERSION_TABLE}")
    current = (await connection.run_sync(_stored)).revisions
    await connection.rollback()
    applied = []
    for step in await asyncio.to_thread(_steps, current, revision, up=up):
        script = step.revision
        title = f"{'' if up else 'undoing '}{script.revision} {script.doc.rstrip('.')}"
        run = partial(_run, connection, partial(_run_step, step))
        _, seconds, attempts = await with_lock_retries(engine, connection, title, run, report)
        current = (await connection.run_sync(_stored)).revisions
        await connection.rollback()
        if not set(step.to_revisions) <= set(current):
            raise MigrationError(
                f"{title} ended at the wrong revision: {', '.join(current) or 'base'}"
            )
        report(f"{title}: {seconds:.1f} s")
        applied.append(AppliedMigration(script.revision, script.doc, round(seconds, 3), attempts))
    return applied


def _run_step(step: "RevisionStep", config: "Config") -> None:
    """Run one migration, as the command `alembic upgrade` does."""
    from alembic.runtime.environment import EnvironmentContext  # noqa: PLC0415  # slow import

    with EnvironmentContext(config, scripts(), fn=lambda _revision, _context: [step]) as context:
        context.script.run_env()


async def _run(connection: AsyncConnection, run: "Callable[[Config], T]") -> T:
    """Run an Alembic command on a connection."""
    from alembic.util import AutogenerateDiffsDetected, CommandError  # noqa: PLC0415  # slow import

    try:
        return await connection.run_sync(lambda sync: run(alembic_config(sync)))
    except AutogenerateDiffsDetected:
        raise
    except CommandError as error:
        raise MigrationError(str(error)) from None


def _describe(difference: object) -> str:
    """Describe a difference that Alembic reported as a tuple or as a list of tuples."""
    if isinstance(difference, list):
        return "; ".join(map(_describe, difference))
    if not isinstance(difference, tuple):
        return str(difference)
    shown = [part for part in difference if part is not None and not isinstance(part, dict)]
    return " ".join(str(getattr(part, "name", None) or part) for part in shown)
