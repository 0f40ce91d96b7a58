"""Functions that run migrations, and that print the SQL of pending migrations."""

import asyncio
import io
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tiger_db.errors import MigrationError
from tiger_db.migrations.alembic_scripts import (
    alembic_config,
    find_steps,
    head_revision,
    run_alembic,
    scripts,
)
from tiger_db.migrations.db_schema import (
    configured_schema,
    create_schema,
    is_missing,
    search_path_sql,
)
from tiger_db.migrations.grants import (
    apply_grants,
    find_granted_roles,
    find_objects,
    grant_statements,
)
from tiger_db.migrations.locks import LOCK_TIMEOUT, Report, migration_lock, with_lock_retries
from tiger_db.migrations.state import (
    SchemaState,
    schema_state,
    stored_revisions,
    take_over_version_table,
)
from tiger_db.migrations.version_table import FORMER_VERSION_TABLE, TAKEOVER, VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.runtime.migration import RevisionStep
    from alembic.script import Script

MONTHS_AHEAD = 12


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
    current = (await connection.run_sync(stored_revisions)).revisions
    await connection.rollback()
    applied = []
    for step in await asyncio.to_thread(find_steps, current, revision, up=up):
        script = step.revision
        title = f"{'' if up else 'undoing '}{script.revision} {script.doc.rstrip('.')}"
        run = partial(run_alembic, connection, partial(_run_step, step))
        _, seconds, attempts = await with_lock_retries(engine, connection, title, run, report)
        current = (await connection.run_sync(stored_revisions)).revisions
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


async def pending(engine: AsyncEngine, revision: str = "head") -> "list[Script]":
    """Return the pending migrations, in the order in which `upgrade` would run them.

    Raises:
        MigrationError: the target revision is unknown.
        SchemaMismatch: the database schema is newer than this tiger_db release.
    """
    async with engine.connect() as connection:
        state = await schema_state(connection)
        current = (await connection.run_sync(stored_revisions)).revisions
    if state.lost or (current and not state.known):
        state.check()
    return [
        step.revision for step in await asyncio.to_thread(find_steps, current, revision, up=True)
    ]


async def pending_sql(engine: AsyncEngine, revision: str = "head") -> str:
    """Return the SQL that `upgrade` would execute, as a script for `psql -v ON_ERROR_STOP=1`.

    Raises:
        MigrationError: the target revision is unknown, or the database is at several revisions.
        SchemaMismatch: the database schema is newer than this tiger_db release.
    """
    steps = await pending(engine, revision)
    async with engine.connect() as connection:
        schema = await connection.run_sync(configured_schema)
        script = ""
        if schema is not None:
            missing = await connection.run_sync(is_missing, schema)
            script = search_path_sql(schema, create=missing)
        if (await connection.run_sync(stored_revisions)).former:
            script += _transaction_sql(*TAKEOVER)
        grants = await _grants_of_roles(connection)
    if steps:
        start = steps[0].down_revision
        if not (start is None or isinstance(start, str)):
            raise MigrationError(
                "the database has several revisions, but an SQL script can start at only one"
            )
        script += migration_sql(start, steps[-1].revision)
    if not steps or steps[-1].revision == head_revision():
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
