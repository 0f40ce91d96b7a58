"""Migrations of a system in use: concurrent machines, long transactions, bad migrations."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests import squawk
from tests.support import factories
from tests.support.command_line import COMMAND, SECRETS, CommandLine
from tests.support.servers import create_database
from tiger_db import Database, Settings, migrations
from tiger_db.connections import connect, maintenance_engine
from tiger_db.migrations import MONTHS_AHEAD, alembic_scripts, history, locks, scripts, upgrade
from tiger_db.migrations.locks import MIGRATION_LOCK_ID
from tiger_db.testing import databases

HEAD = scripts().get_current_head()
MIGRATE_FROM = """
import pathlib, sys
from tiger_db.cli import main
from tiger_db.migrations import alembic_scripts
folder = pathlib.Path(sys.argv.pop(1))
alembic_scripts.script_location = lambda: folder
main()
"""
MIGRATION = '''"""{title}."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = {follows!r}


def upgrade():
    {body}


def downgrade():
    pass
'''


@pytest.fixture
def alembic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the migrations that replaces them, to which tests add migrations."""
    folder = tmp_path / "alembic"
    shutil.copytree(migrations.script_location(), folder)
    monkeypatch.setattr(alembic_scripts, "script_location", lambda: folder)
    scripts.cache_clear()
    yield folder
    scripts.cache_clear()


def write(alembic: Path, revision: str, follows: object, title: str, *body: str) -> None:
    text = MIGRATION.format(
        title=title, revision=revision, follows=follows, body="\n    ".join(body)
    )
    (alembic / "versions" / f"x_{revision}.py").write_text(text)


def url_of(settings: Settings) -> str:
    assert settings.database_url is not None
    return settings.database_url.get_secret_value()


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clone_settings: Settings
) -> CommandLine:
    return CommandLine(monkeypatch, capsys, {"DATABASE_URL": url_of(clone_settings), **SECRETS})


async def start(settings: Settings, *command: str) -> Process:
    env = os.environ | {"DATABASE_URL": url_of(settings)}
    return await asyncio.create_subprocess_exec(*command, env=env, stdout=PIPE, stderr=PIPE)


@asynccontextmanager
async def killed_at_the_end(*processes: Process) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def read_until(process: Process, text: str) -> str:
    """Return the standard error of a process up to the line with the text."""
    assert process.stderr is not None
    lines = ""
    async with asyncio.timeout(60):
        while text not in lines:
            line = await process.stderr.readline()
            assert line, lines
            lines += line.decode()
    return lines


# Concurrent machines


@pytest.mark.slow
async def test_four_machines_that_deploy_at_once_run_each_migration_once(
    empty_database: Settings,
) -> None:
    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0001")
    gate = await connect(empty_database)
    await gate.execute(
        "CREATE TABLE steps (number serial, revision text);"
        "CREATE FUNCTION step() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO steps (revision) VALUES (NEW.version_num); RETURN NULL; END $$;"
        "CREATE TRIGGER step AFTER UPDATE ON tiger_db_alembic_version FOR EACH ROW"
        " EXECUTE FUNCTION step()"
    )
    await gate.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK_ID)
    machines = [await start(empty_database, *COMMAND, "migrate") for _ in range(4)]
    async with killed_at_the_end(*machines):
        waiting = f"waiting for process {gate.get_server_pid()} ("
        await asyncio.gather(*(read_until(machine, waiting) for machine in machines))
        async with asyncio.timeout(20):  # a waiting machine has no open transaction
            await gate.execute("CREATE INDEX CONCURRENTLY ON steps (revision)")
        await gate.execute("SELECT pg_advisory_unlock($1)", MIGRATION_LOCK_ID)
        told = [(await machine.communicate())[1].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * 4, told
    steps = await gate.fetch("SELECT revision FROM steps ORDER BY number")
    await gate.close()
    assert [row["revision"] for row in steps] == [s.revision for s in history()[::-1][1:]]
    assert sum(f"migrated the schema from revision 0001 to {HEAD}" in text for text in told) == 1
    assert sum(f"the schema is already at revision {HEAD}" in text for text in told) == 3


# Locks


@pytest.mark.slow
async def test_queries_continue_while_a_long_transaction_blocks_a_migration(
    alembic: Path, clone: Database
) -> None:
    add = 'op.add_column("tiger_accounts", sa.Column("nickname", sa.Text()))'
    write(alembic, "9006", HEAD, "Nicknames", add)
    async with clone.session() as session:
        accounts = [(await factories.account(session)).id for _ in range(4)]
    long = await connect(clone.settings)
    transaction = long.transaction()
    await transaction.start()
    await long.fetch("SELECT * FROM tiger_accounts")
    took, ended = list[float](), asyncio.Event()
    passed: asyncio.Queue[float] = asyncio.Queue()

    async def traffic(account: object) -> None:
        connection = await connect(clone.settings)
        while not ended.is_set():
            start = time.monotonic()
            await connection.fetch("SELECT account_name FROM tiger_accounts")
            await connection.execute(
                "UPDATE tiger_accounts SET error_count = error_count + 1 WHERE id = $1", account
            )
            took.append(time.monotonic() - start)
            passed.put_nowait(took[-1])
            await asyncio.sleep(0.01)
        await connection.close()

    command = [sys.executable, "-c", MIGRATE_FROM, str(alembic), "migrate", "--json"]
    migrate = await start(clone.settings, *command)
    async with killed_at_the_end(migrate), asyncio.timeout(60), asyncio.TaskGroup() as group:
        for account in accounts:
            group.create_task(traffic(account))
        blocked_by = await read_until(migrate, "was blocked by")
        while await passed.get() < 1:  # the query that waited behind the migration
            pass
        for _ in range(20):
            await passed.get()
        await transaction.rollback()
        out, err = await migrate.communicate()
        ended.set()
    await long.close()
    assert (
        f"9006 Nicknames: attempt 1 was blocked by process {long.get_server_pid()} (" in blocked_by
    )
    assert "idle in transaction, in a transaction for" in blocked_by
    assert migrate.returncode == 0, err
    (applied,) = json.loads(out)["applied"]
    assert (applied["revision"], applied["message"]) == ("9006", "Nicknames.")
    assert applied["attempts"] > 1
    assert max(took) < 2 + 2


@pytest.mark.slow
async def test_a_migration_that_gives_up_names_the_blocker_and_is_rolled_back(
    alembic: Path, cli: CommandLine, clone_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_LOCK_RETRY_SECONDS", 0.5)
    write(alembic, "9006", HEAD, "Done", 'op.execute("CREATE TABLE done ()")')
    write(
        alembic, "9007", "9006", "Half done", 'op.execute("CREATE TABLE half_done ()")',
        'op.execute("ALTER TABLE api_keys ADD nickname text")',
    )  # fmt: skip
    long = await connect(clone_settings)
    await long.execute("SET application_name = 'monthly report'")
    who = f"process {long.get_server_pid()} (monthly report, "
    async with long.transaction():
        await long.execute("SELECT FROM api_keys")
        blocked = await asyncio.to_thread(cli, "migrate", "--json")
    assert (blocked.code, blocked.out) == (1, "")
    error = blocked.err.splitlines()[-1]
    assert error.startswith(
        f"error: 9007 Half done: gave up after attempt 1, which was blocked by {who}"
    )
    assert await long.fetchval("SELECT version_num FROM tiger_db_alembic_version") == "9006"
    assert await long.fetchval("SELECT to_regclass('half_done')") is None

    async with long.transaction():
        await long.execute("LOCK TABLE audit_logs")
        blocked = await asyncio.to_thread(cli, "migrate")
    assert blocked.code == 1
    assert "9007 Half done: 0." in blocked.err
    assert f"creating audit partitions: gave up after attempt 1, which was blocked by {who}" in (
        blocked.err
    )
    await long.close()
    assert (
        "the schema is already at revision 9007" in (await asyncio.to_thread(cli.ok, "migrate")).err
    )


# Transactions, and the script for psql


NOTE = "op.execute(\"INSERT INTO notes VALUES ('{}', pg_current_xact_id()::text)\")"
CONCURRENTLY = (
    "with op.get_context().autocommit_block():",
    '    op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_x")',
    '    op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_x ON api_keys (name)")',
)


@pytest.fixture
def three_more(alembic: Path) -> Path:
    """Add three migrations; the second has an autocommit block."""
    make = 'op.execute("CREATE TABLE notes (revision text, transaction text)")'
    write(alembic, "9006", HEAD, "Notes", make, NOTE.format("9006"))
    again = NOTE.format("9007 again")
    write(alembic, "9007", "9006", "Index", NOTE.format("9007"), *CONCURRENTLY, again)
    write(alembic, "9008", "9007", "More", NOTE.format("9008"))
    return alembic


async def check_notes(settings: Settings) -> None:
    """Check that each of the three ran in its own transaction, and that months were created."""
    connection = await connect(settings)
    try:
        notes = dict(await connection.fetch("SELECT * FROM notes"))
        assert sorted(notes) == ["9006", "9007", "9007 again", "9008"]
        assert len(set(notes.values())) == 4
        assert await connection.fetchval(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_x'::regclass"
        )
        assert (
            await connection.fetchval("SELECT version_num FROM tiger_db_alembic_version") == "9008"
        )
        months = await connection.fetchval(
            "SELECT count(*) FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass"
        )
        assert months == MONTHS_AHEAD + 2  # the current month, and the default partition
    finally:
        await connection.close()


@pytest.mark.slow
def test_each_migration_has_a_transaction_of_its_own(
    three_more: Path, cli: CommandLine, clone_settings: Settings
) -> None:
    planned = cli.ok("migrate", "--dry-run", "--json").json["items"]
    assert [step["revision"] for step in planned] == ["9006", "9007", "9008"]
    assert "Index." in cli.ok("migrate", "--dry-run").out
    pending = cli("check")
    assert pending.code == 1
    titles = ("9006: Notes.", "9007: Index.", "9008: More.")
    assert pending.out == "".join(f"pending migration {title}\n" for title in titles)
    assert pending.err.startswith(f"error: the schema (revision {HEAD}) is older")
    assert "run `tiger-db migrate`" in pending.err

    done = cli.ok("migrate").err
    for title in ("9006 Notes: 0.", "9007 Index: 0.", "9008 More: 0."):
        assert title in done
    asyncio.run(check_notes(clone_settings))
    undone = cli.ok("downgrade", "-2", "--yes").err
    assert undone.index("undoing 9008 More: 0.") < undone.index("undoing 9007 Index: 0.")
    write(three_more, "9008", "9007", "More", "op.get_bind().exec_driver_sql('SELECT 1 / 0')")
    scripts.cache_clear()
    failed = cli("migrate")
    assert failed.code == 1
    assert (
        "9008 More: the migration failed and was rolled back\nerror: the database refused"
        in failed.err
    )
    assert cli.ok("current", "--json").json["current"] == "9007"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
@pytest.mark.parametrize("begin", ["empty", "migrated"])
def test_the_script_for_psql_has_the_result_of_migrate(
    three_more: Path, cli: CommandLine, clone_settings: Settings, server_url: str, begin: str
) -> None:
    name = f"{clone_settings.database}_sql"
    template = clone_settings.database if begin == "migrated" else None
    target = asyncio.run(create_database(server_url, name, template))
    try:
        url = url_of(target)
        script = cli.ok("migrate", "--sql", DATABASE_URL=url)
        assert script.err == ""
        pinned = 'SET search_path = "public", pg_temp;\n\n'
        assert script.out.startswith(f"{pinned}BEGIN;\n\nSET LOCAL lock_timeout")
        assert ("CREATE TABLE tiger_db_alembic_version" in script.out) == (begin == "empty")
        psql = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", url]
        subprocess.run(psql, input=script.out, check=True, text=True, capture_output=True)
        asyncio.run(check_notes(target))
        assert "already at revision 9008" in cli.ok("migrate", DATABASE_URL=url).err
    finally:
        asyncio.run(databases.drop(server_url, name))


@pytest.mark.slow
def test_printing_the_script_or_the_plan_changes_nothing(
    cli: CommandLine, empty_database: Settings
) -> None:
    cli.env["DATABASE_URL"] = url_of(empty_database)
    plan = cli.ok("migrate", "--dry-run", "--json").json["items"]
    assert [step["revision"] for step in plan] == [s.revision for s in history()[::-1]]
    two = cli.ok("migrate", "--sql", "--revision", "0002").out
    assert "version_num='0002'" in two
    assert "0003" not in two
    assert two.count("SELECT make_audit_months(") == 1, "0001 makes the first ones"
    assert "--sql" in cli.misused("migrate", "--sql", "--json")
    assert cli.ok("current", "--json").json["current"] is None


@pytest.mark.slow
def test_more_than_one_head_is_an_error_of_one_line(alembic: Path, cli: CommandLine) -> None:
    write(alembic, "9006a", HEAD, "Mine", "pass")
    write(alembic, "9006b", HEAD, "Yours", "pass")
    for command in ("check", "migrate", "current", "list-accounts"):
        error = cli.fails(command)
        assert "2 heads (9006a, 9006b): merge the heads with `alembic merge heads" in error
    write(alembic, "9007", ("9006a", "9006b"), "Joined", "pass")
    scripts.cache_clear()
    assert f"from revision {HEAD} to 9007" in cli.ok("migrate").err
    assert cli.ok("check").out == ""


# squawk


BAD = {
    "ALTER TABLE api_keys ADD color text NOT NULL": "adding-required-field",
    "CREATE INDEX ix_y ON api_keys (name)": "require-concurrent-index-creation",
    "ALTER TABLE api_keys ALTER name TYPE varchar(9)": "changing-column-type",
    "ALTER TABLE api_keys DROP COLUMN description": "ban-drop-column",
    "ALTER TABLE api_keys ADD CONSTRAINT c CHECK (name <> '')": "constraint-missing-not-valid",
}


@pytest.mark.slow
def test_lint_refuses_migrations_that_block_running_code(
    alembic: Path, clone_settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    async def revision() -> Path:
        async with maintenance_engine(clone_settings) as engine:
            return await migrations.revision(engine, "allowed", autogenerate=False)

    file = asyncio.run(revision())
    template = file.read_text()
    for rule in ("CONCURRENTLY", "NOT VALID", "lock_timeout", "later release"):
        assert rule in template
    *_, drop, _ = BAD
    body = "\n    ".join([*CONCURRENTLY, f'op.execute("{drop}")'])
    ignored = 'squawk_ignore = {"ban-drop-column": "nothing reads it since 1.0"}\n'
    file.write_text(template.replace("    pass", f"    {body}", 1) + ignored)
    scripts.cache_clear()
    assert squawk.main() == 0
    follows = history()[0].revision
    for number, statement in enumerate(BAD):
        write(alembic, f"{number}", follows, "Bad", f'op.execute("{statement}")')
        follows = f"{number}"
    scripts.cache_clear()
    capfd.readouterr()
    assert squawk.main() == 1
    told = re.sub(r"\x1b(\[[\d;]*m|\]8;;.*?\x1b\\)", "", capfd.readouterr().out)  # colours, links
    found = set(re.findall(r"^warning\[([a-z-]+)\].*?(\w+)\.sql", told, re.DOTALL | re.MULTILINE))
    assert found >= {(rule, f"x_{number}") for number, rule in enumerate(BAD.values())}, told
    assert {name for _, name in found} == {f"x_{number}" for number in range(len(BAD))}
