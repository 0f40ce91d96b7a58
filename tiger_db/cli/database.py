"""Commands for the database: creation, migrations, checks, and the embedded server."""

import sys
from collections.abc import Awaitable, Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import DatabaseUnavailable, SchemaMismatch

if TYPE_CHECKING:
    from alembic.script import Script
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
app = typer.Typer()
PANEL = "Database"


@app.command(rich_help_panel=PANEL)
def init() -> None:
    """Create the database, the schema and the embedded server's keys if they are missing."""
    config = runtime.settings()
    keys = tiger_db.keys_in_force
    pepper = keys.configured(config, keys.API_KEY_PEPPERS)
    signing_key = keys.configured(config, keys.AUDIT_SIGNING_KEY)
    encryption_keys = keys.configured(config, keys.ENCRYPTION_KEYS)

    async def create() -> None:
        import asyncio  # noqa: PLC0415  # slow import, not needed by `--help`

        if config.embedded:
            await asyncio.to_thread(_start, config)
        if await _create_database(config):
            output.print_message(f"created the database {config.location}")
        await _migrate(config, "head")
        if config.embedded and encryption_keys is None:
            await _generate_encryption_key(config)

    runtime.run_async(create())
    if pepper is None and not config.embedded:
        output.print_warning(
            "no pepper is set, so API keys cannot be created or checked: set API_KEY_PEPPERS to the"
            " output of `tiger-db generate-api-key-pepper`, and keep the pepper in a safe place"
        )
    if signing_key is None and not config.embedded:
        output.print_message(
            "no signing key is set: for `tiger-db seal-audit`, set AUDIT_SIGNING_KEY to the output"
            " of `tiger-db generate-audit-signing-key`"
        )
    if encryption_keys is None and not config.embedded:
        output.print_warning(
            "no encryption key is set, so accounts cannot be stored: set ENCRYPTION_KEYS to the"
            " output of `tiger-db generate-encryption-key`, and keep the key in a safe place"
        )
    output.print_message(f"{config.location} is ready")


@app.command(rich_help_panel=PANEL)
def migrate(
    *,
    revision: Annotated[
        str, typer.Option(metavar="ID", help="Revision id of the last migration to run.")
    ] = "head",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the pending migrations without running them.")
    ] = False,
    sql: Annotated[
        bool,
        typer.Option("--sql", help="Print the SQL of the pending migrations for psql."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run the pending migrations, and create audit partitions for the next months.

    Several machines may run this command at the same time: each migration runs once.

    A migration that waits 2 s for a lock is rolled back, and tried again for up to 5 min.
    """
    config = runtime.settings()
    if sql and (dry_run or as_json):
        raise typer.BadParameter(
            "--sql cannot be combined with --dry-run or --json", param_hint="--sql"
        )
    if dry_run:
        _show_scripts(runtime.run_async(_pending(config, revision)), as_json=as_json)
    elif sql:
        work = tiger_db.migrations.pending_sql
        typer.echo(
            runtime.run_async(with_engine(config, lambda engine: work(engine, revision))), nl=False
        )
    else:
        result = runtime.run_async(_migrate(config, revision))
        if as_json:
            output.print_json(asdict(result))


@app.command(rich_help_panel=PANEL)
def revision(
    *,
    message: Annotated[str, typer.Option("--message", "-m", help="Description of the changes.")],
    empty: Annotated[
        bool, typer.Option("--empty", help="Write a migration without changes.")
    ] = False,
) -> None:
    """Write a migration that makes the schema match the models, and print the new file's path."""
    work = tiger_db.migrations.revision
    with redirect_stdout(sys.stderr):  # keep the messages of Alembic out of stdout
        path = runtime.run_async(
            with_engine(
                runtime.settings(), lambda engine: work(engine, message, autogenerate=not empty)
            )
        )
    typer.echo(path)


@app.command(rich_help_panel=PANEL, context_settings={"ignore_unknown_options": True})
def downgrade(
    revision: Annotated[
        str, typer.Argument(help="Revision id, or -1 (previous revision), or base (no tables).")
    ],
    *,
    yes: options.Yes = False,
) -> None:
    """Downgrade the schema to an earlier revision. The data of dropped columns is lost."""
    config, work = runtime.settings(), tiger_db.migrations.downgrade
    options.confirm(f"Downgrade {config.location} to {revision}? Data will be lost.", yes=yes)
    state = runtime.run_async(
        with_engine(config, lambda engine: work(engine, revision, report=output.print_message))
    )
    output.print_message(
        f"the schema of {config.location} is now at revision {state.current or 'base'}"
    )


@app.command(rich_help_panel=PANEL)
def current(*, as_json: options.AsJson = False) -> None:
    """Show the revision of the database schema."""
    state = runtime.run_async(with_engine(runtime.settings(), _load_state))
    if as_json:
        output.print_json(asdict(state))
    elif state.current:
        typer.echo(f"{state.current} (head)" if state.problem is None else state.current)
    if state.problem:
        output.print_message(state.problem)


@app.command(rich_help_panel=PANEL)
def history(*, as_json: options.AsJson = False) -> None:
    """List the migrations, newest first."""
    _show_scripts(tiger_db.migrations.history(), as_json=as_json)


@app.command(rich_help_panel=PANEL)
def check(*, as_json: options.AsJson = False) -> None:
    """List the pending migrations, or differences between the schema and this release.

    Differences are listed only if no migration is pending. The command compares tables with the
    models. For triggers, functions, row security and rules, the command also prints the SQL that
    repairs a difference. Only `tiger-db doctor` lists triggers that were added to the schema.
    """
    config = runtime.settings()
    state = runtime.run_async(with_engine(config, _load_state))
    if not state.known:
        state.check()
    if state.problem:
        scripts = runtime.run_async(_pending(config, "head"))
        lines = [
            f"pending migration {script.revision}: {' '.join(script.doc.split())}"
            for script in scripts
        ]
    else:
        lines = runtime.run_async(with_engine(config, tiger_db.migrations.drift))
    output.show_lines(lines, as_json=as_json)
    state.check()
    if lines:
        raise SchemaMismatch(
            "the schema differs from this release. If the database was changed, run the listed SQL,"
            " and find out who changed the database. If the models were changed, run"
            " `tiger-db revision -m ...`"
        )
    output.print_message(f"{config.location} has the schema of this release")


@app.command(rich_help_panel=PANEL)
def health_check(
    *,
    live: Annotated[
        bool, typer.Option("--live", help="Check only settings and keys, without a database.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check whether the database can serve requests, and print advice on problems.

    The command is for liveness and readiness probes. The command fails if the database is not
    ready. With --live, the command fails only if a setting or key is not valid.
    """
    check = tiger_db.health.check_liveness if live else tiger_db.health.check_readiness
    report = asdict(runtime.run_async(check(runtime.settings())))
    failed = not report["live" if live else "ready"]
    if as_json:
        output.print_json(report)
    else:
        problems, paused = report.pop("problems"), report.pop("trading_pause")
        for group in ("pool", "rows"):
            report |= {f"{group}: {name}": value for name, value in report.pop(group).items()}
        if paused is not None:
            report |= {f"trading pause: {name}": value for name, value in paused.items()}
        output.show_fields(report)
        for problem in problems:
            output.print_message(f"problem: {problem}")
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def doctor(*, as_json: options.AsJson = False) -> None:
    """Check the installation of tiger_db, and print advice on each problem."""
    results = runtime.run_async(tiger_db.doctor.run(runtime.settings()))
    items = [asdict(result) for result in results]
    output.show_items(("Check", "Status", "Result", "Advice"), items, as_json=as_json)
    if any(result.status == "problem" for result in results):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def start_embedded() -> None:
    """Start the embedded PostgreSQL server, which runs until `tiger-db stop-embedded`."""
    config = runtime.settings()
    _start(config)
    if not config.embedded:
        output.print_warning(
            "DATABASE_URL or DB_HOST is set, so other commands do not use the embedded PostgreSQL"
        )


@app.command(rich_help_panel=PANEL)
def stop_embedded() -> None:
    """Stop the embedded PostgreSQL server, and keep the server's data."""
    config = runtime.settings()
    folder = tiger_db.embedded.home_folder(config)
    result = "is stopped" if tiger_db.embedded.stop(config) else "was not running"
    output.print_message(f"the embedded PostgreSQL in {folder} {result}")


def _start(config: "tiger_db.Settings") -> None:
    folder = tiger_db.embedded.home_folder(config)
    if tiger_db.embedded.running(config):
        output.print_message(f"the embedded PostgreSQL in {folder} is running")
        return
    output.print_message(f"starting the embedded PostgreSQL in {folder}")
    socket_folder = tiger_db.embedded.start(config).socket_folder
    output.print_message(f"started the embedded PostgreSQL; its socket is in {socket_folder}")


async def _create_database(config: "tiger_db.Settings") -> bool:
    """Create the database if it is missing. Return whether this call created the database.

    Only the owner of the new database, and superusers, can connect to it.

    Raises:
        DatabaseUnavailable: the database server cannot be reached, or the database user lacks the
            privilege to create databases.
    """
    import asyncpg  # noqa: PLC0415  # slow import, not needed by `--help`

    try:
        await (await tiger_db.connections.connect_directly(config)).close()
    except DatabaseUnavailable as error:
        if not isinstance(error.__context__, asyncpg.InvalidCatalogNameError):
            raise
    else:
        return False
    server = await tiger_db.connections.connect_directly(config, database="postgres")
    try:
        name = await server.fetchval("SELECT quote_ident($1)", config.database)
        statement = f"CREATE DATABASE {name}"
        await server.execute(statement)
        # Any role that can connect can send notifications on any channel.
        await server.execute(f"REVOKE CONNECT, TEMPORARY ON DATABASE {name} FROM PUBLIC")
    except (asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
        return False  # another `tiger-db init` process created the database first
    except asyncpg.InsufficientPrivilegeError:
        raise DatabaseUnavailable(
            f"the database {config.location} does not exist, and this user may not create"
            f" databases: ask an administrator to run {statement}"
        ) from None
    finally:
        await server.close()
    return True


async def with_engine(
    config: "tiger_db.Settings", work: "Callable[[AsyncEngine], Awaitable[T]]"
) -> T:
    async with tiger_db.connections.maintenance_engine(config) as engine:
        return await work(engine)


async def _load_state(engine: "AsyncEngine") -> "tiger_db.migrations.SchemaState":
    async with engine.connect() as connection:
        return await tiger_db.migrations.schema_state(connection)


async def _pending(config: "tiger_db.Settings", revision: str) -> "list[Script]":
    work = tiger_db.migrations.pending
    return await with_engine(config, lambda engine: work(engine, revision))


def _show_scripts(scripts: "list[Script]", *, as_json: bool) -> None:
    items = [
        {"revision": script.revision, "follows": script.down_revision, "message": script.doc}
        for script in scripts
    ]
    output.show_items(("Revision", "Follows", "Message"), items, as_json=as_json)


async def _migrate(
    config: "tiger_db.Settings", revision: str
) -> "tiger_db.migrations.UpgradeResult":
    before = await with_engine(config, _load_state)
    if before.current is not None and not before.known:
        before.check()
    if before.current != before.head:
        output.print_message(f"migrating {config.location}")
    after = await with_engine(
        config,
        lambda engine: tiger_db.migrations.upgrade(engine, revision, report=output.print_message),
    )
    if after.applied:
        output.print_message(
            f"migrated the schema from revision {before.current or 'base'} to {after.current}"
        )
    else:
        output.print_message(f"the schema is already at revision {after.current}")
    if after.problem:
        output.print_message(after.problem)
    elif unsigned := await with_engine(config, _count_unsigned):
        output.print_warning(
            f"{output.count_of(unsigned, 'API key')} without an authentication code, which servers"
            " of this release refuse: when all processes have this release, run `tiger-db"
            " sign-api-keys`. Until then, set API_KEYS_ALLOW_UNSIGNED_UNTIL"
        )
    return after


async def _count_unsigned(engine: "AsyncEngine") -> int:
    """Count the API keys without an authentication code, except revoked API keys."""
    async with engine.connect() as connection:
        result = await connection.exec_driver_sql(
            "SELECT count(*) FROM api_keys WHERE mac IS NULL AND status <> 'revoked'"
        )
        return int(result.scalar_one())


async def _generate_encryption_key(config: "tiger_db.Settings") -> None:
    """Generate the encryption key of the embedded server if the encryption key is missing."""
    path = tiger_db.embedded.home_folder(config) / "encryption_keys"
    existed = path.exists()
    async with tiger_db.Database(config) as database:
        await database.check()
    output.print_message(
        f"the encryption key is in {path}" if existed else f"generated an encryption key in {path}"
    )
