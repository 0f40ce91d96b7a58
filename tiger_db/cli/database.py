"""The database itself: making it, migrating it, and whether it is well."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tiger_db
from tiger_db.cli.options import Yes, confirm, finish, settings
from tiger_db.cli.output import AsJson, print_json, show_fields, show_table, talk, warn
from tiger_db.errors import DatabaseUnavailable, SchemaMismatch

if TYPE_CHECKING:
    from alembic.script import Script

app = typer.Typer()
_PANEL = "Database"


@app.command(rich_help_panel=_PANEL)
def init() -> None:
    """Make everything ready: database, schema and encryption key. What is there stays."""
    config = settings()
    keys = tiger_db.keys_in_force
    keys.configured(config, keys.ENCRYPTION_KEYS)  # before anything is made: they may be malformed
    keys.configured(config, keys.API_KEY_PEPPERS)
    keys.configured(config, keys.AUDIT_SIGNING_KEY)

    async def make() -> None:
        import asyncio  # noqa: PLC0415  # slow, and `--help` is to be fast

        if config.embedded:
            await asyncio.to_thread(_start, config)
        if await _create_database(config):
            talk(f"created the database {config.location}")
        await _migrate(config, "head")
        await _make_key(config)

    finish(make())
    talk(f"{config.location} is ready")


@app.command(rich_help_panel=_PANEL)
def migrate(
    *,
    revision: Annotated[str, typer.Option(metavar="ID", help="Go up to this one only.")] = "head",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which would run; change nothing.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL for psql instead; change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the schema up to date, and make the audit trail's partitions of the months ahead.

    Any number of machines may run it at a time: each migration runs once.

    One that waits 2 s for a lock gives way, and is tried again, for up to 5 min.
    """
    config = settings()
    if sql and (dry_run or as_json):
        raise typer.BadParameter("it stands alone", param_hint="--sql")
    if dry_run:
        _show_steps(finish(_pending(config, revision)), as_json=as_json)
    elif sql:
        typer.echo(finish(_pending_sql(config, revision)), nl=False)
    else:
        done = finish(_migrate(config, revision))
        if as_json:
            print_json(asdict(done))


@app.command(rich_help_panel=_PANEL)
def revision(
    *,
    message: Annotated[str, typer.Option("--message", "-m", help="What it changes.")],
    empty: Annotated[
        bool, typer.Option("--empty", help="Write no changes, instead of what the models need.")
    ] = False,
) -> None:
    """Write a migration from the schema in the database to the models; prints its file."""
    config = settings()

    async def write() -> Path:
        async with tiger_db.connections.maintenance_engine(config) as engine:
            with redirect_stdout(sys.stderr):  # Alembic's talk
                return await tiger_db.migrations.revision(engine, message, autogenerate=not empty)

    typer.echo(finish(write()))


@app.command(rich_help_panel=_PANEL, context_settings={"ignore_unknown_options": True})
def downgrade(
    revision: Annotated[str, typer.Argument(help="A revision, -1 for one step, or base.")],
    *,
    yes: Yes = False,
) -> None:
    """Take the schema back to an earlier revision. Data that has no place there is lost."""
    config = settings()
    confirm(f"Downgrade {config.location} to {revision}? Data will be lost.", yes=yes)

    async def run() -> "tiger_db.migrations.SchemaState":
        async with tiger_db.connections.maintenance_engine(config) as engine:
            return await tiger_db.migrations.downgrade(engine, revision, progress=talk)

    talk(f"{config.location} is at {finish(run()).current or 'base'} now")


@app.command(rich_help_panel=_PANEL)
def current(*, as_json: AsJson = False) -> None:
    """Show which revision the database is at."""
    state = finish(_state(settings()))
    if as_json:
        print_json(asdict(state))
    elif state.current:
        typer.echo(f"{state.current} (head)" if state.problem is None else state.current)
    if state.problem:
        talk(state.problem)


@app.command(rich_help_panel=_PANEL)
def history(*, as_json: AsJson = False) -> None:
    """List the migrations, newest first."""
    _show_steps(tiger_db.migrations.history(), as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def check(*, as_json: AsJson = False) -> None:
    """List pending migrations, or how the schema differs from what this release makes.

    Compares tables with the models, then triggers, functions, row security and rules; a line each,
    with the SQL that restores the latter. Triggers that you added are left to `doctor`.
    """
    config = settings()
    state = finish(_state(config))
    if not state.known:
        state.check()

    async def compare() -> list[str]:
        if state.problem:
            scripts = await _pending(config, "head")
            titles = [" ".join(script.doc.split()) for script in scripts]
            return [f"pending {s.revision} {t}" for s, t in zip(scripts, titles, strict=True)]
        async with tiger_db.connections.maintenance_engine(config) as engine:
            return await tiger_db.migrations.drift(engine)

    findings = finish(compare())
    if as_json:
        print_json({"items": findings, "next_cursor": None})
    else:
        typer.echo("".join(f"{finding}\n" for finding in findings), nl=False)
    state.check()
    if findings:
        raise SchemaMismatch(
            "the schema differs: where somebody changed the database, run the SQL that its line"
            " gives, and find out who it was; where the models changed, `tiger-db revision -m ...`"
        )
    talk(f"{config.location} has the schema that the models need")


@app.command(rich_help_panel=_PANEL)
def health_check(
    *,
    live: Annotated[
        bool, typer.Option("--live", help="Look at the settings only, and ask no database.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell whether the database can serve, where it is, and what to do about what is wrong.

    For probes: it fails if the database is not ready, or with --live if the settings are not sound.
    """
    look = tiger_db.health.check_liveness if live else tiger_db.health.check_readiness
    report = asdict(finish(look(settings())))
    if as_json:
        print_json(report)
    else:
        shown = dict(report)
        for group in ("pool", "rows"):
            inner = shown.pop(group)
            shown |= {f"{group}: {name}": value for name, value in inner.items()}
        problems = shown.pop("problems")
        show_fields(shown)
        for problem in problems:
            talk(f"problem: {problem}")
    if not report["live" if live else "ready"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=_PANEL)
def doctor(*, as_json: AsJson = False) -> None:
    """Look at the database for whatever is wrong, and tell what to do about it."""
    findings = finish(tiger_db.doctor.run(settings()))
    if as_json:
        print_json({"items": [asdict(finding) for finding in findings], "next_cursor": None})
    else:
        rows = [(one.check, one.status, one.seen, one.advice) for one in findings]
        show_table(("Check", "Status", "Seen", "What to do"), rows)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel=_PANEL)
def start_embedded() -> None:
    """Start the embedded PostgreSQL, which then stays up."""
    config = settings()
    _start(config)
    if not config.embedded:
        warn("DATABASE_URL or DB_HOST is set, so the other commands do not use it")


@app.command(rich_help_panel=_PANEL)
def stop_embedded() -> None:
    """Stop the embedded PostgreSQL; its data stays."""
    config = settings()
    folder = tiger_db.embedded.home_folder(config)
    stopped = tiger_db.embedded.stop(config)
    talk(f"the embedded PostgreSQL in {folder} " + ("is stopped" if stopped else "was not running"))


def _start(config: "tiger_db.Settings") -> None:
    folder = tiger_db.embedded.home_folder(config)  # which refuses production
    if tiger_db.embedded.running(config):
        talk(f"the embedded PostgreSQL in {folder} is running")
        return
    talk(f"starting the embedded PostgreSQL in {folder}")
    talk(f"started, with its socket in {tiger_db.embedded.start(config).socket_folder}")


async def _create_database(config: "tiger_db.Settings") -> bool:
    """Create the database if it is missing; whether that was so.

    Raises:
        DatabaseUnavailable: the server is out of reach, or does not allow it.
    """
    import asyncpg  # noqa: PLC0415  # slow, and `--help` is to be fast

    try:
        await (await tiger_db.connections.connect_directly(config)).close()
    except DatabaseUnavailable as error:
        if not isinstance(error.__context__, asyncpg.InvalidCatalogNameError):
            raise
    else:
        return False
    server = await tiger_db.connections.connect_directly(config, database="postgres")
    try:
        statement = await server.fetchval(
            "SELECT format('CREATE DATABASE %I', $1::text)", config.database
        )
        await server.execute(statement)
    except (asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
        return False  # another init was faster
    except asyncpg.InsufficientPrivilegeError:
        raise DatabaseUnavailable(
            f"{config.location} does not exist, and this user may not create it: have an"
            f" administrator run {statement}"
        ) from None
    finally:
        await server.close()
    return True


async def _state(config: "tiger_db.Settings") -> "tiger_db.migrations.SchemaState":
    async with (
        tiger_db.connections.maintenance_engine(config) as engine,
        engine.connect() as connection,
    ):
        return await tiger_db.migrations.schema_state(connection)


async def _pending(config: "tiger_db.Settings", revision: str) -> "list[Script]":
    async with tiger_db.connections.maintenance_engine(config) as engine:
        return await tiger_db.migrations.pending(engine, revision)


async def _pending_sql(config: "tiger_db.Settings", revision: str) -> str:
    async with tiger_db.connections.maintenance_engine(config) as engine:
        return await tiger_db.migrations.pending_sql(engine, revision)


def _show_steps(scripts: "list[Script]", *, as_json: bool) -> None:
    items = [
        {"revision": script.revision, "follows": script.down_revision, "message": script.doc}
        for script in scripts
    ]
    if as_json:
        print_json({"items": items, "next_cursor": None})
    else:
        show_table(("Revision", "Follows", "Message"), [list(item.values()) for item in items])


async def _migrate(
    config: "tiger_db.Settings", revision: str
) -> "tiger_db.migrations.UpgradeResult":
    before = await _state(config)
    if before.current is not None and not before.known:
        before.check()
    if before.current != before.head:
        talk(f"migrating {config.location}")
    async with tiger_db.connections.maintenance_engine(config) as engine:
        after = await tiger_db.migrations.upgrade(engine, revision, progress=talk)
    if after.applied:
        talk(f"migrated the schema from {before.current or 'nothing'} to {after.current}")
    else:
        talk(f"the schema is at {after.current} already")
    if after.problem:
        talk(after.problem)
    return after


async def _make_key(config: "tiger_db.Settings") -> None:
    keys = tiger_db.keys_in_force
    if keys.configured(config, keys.API_KEY_PEPPERS) is None and not config.embedded:
        warn(
            "no pepper is set, so API keys cannot be made or checked: set API_KEY_PEPPERS to what"
            " `tiger-db generate-api-key-pepper` prints, and keep it: no key verifies without it"
        )
    if keys.configured(config, keys.AUDIT_SIGNING_KEY) is None and not config.embedded:
        talk(
            "no signing key is set: where `tiger-db seal-audit` shall run, set AUDIT_SIGNING_KEY"
            " to what `tiger-db generate-audit-signing-key` prints"
        )
    if keys.configured(config, keys.ENCRYPTION_KEYS) is not None:
        return
    if not config.embedded:
        warn(
            "no encryption key is set, so accounts cannot be stored: set ENCRYPTION_KEYS to what"
            " `tiger-db generate-encryption-key` prints, and keep it: nothing else decrypts them"
        )
        return
    path = tiger_db.embedded.home_folder(config) / "encryption_keys"
    existed = path.exists()
    async with tiger_db.Database(config) as database:
        await database.check()
    talk(f"the encryption key is in {path}" if existed else f"made an encryption key in {path}")
