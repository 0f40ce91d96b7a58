"""Commands for the database: creation, migrations, checks, and the embedded server."""

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import uuid4

import pytest

from tests.support.command_line import COMMAND, SECRETS, CommandLine, Result
from tests.support.servers import settings_for
from tests.support.sql import months, run_sql
from tiger_db import embedded
from tiger_db.connections import connect
from tiger_db.settings import Settings
from tiger_db.testing import databases

REPOSITORY = Path(__file__).parents[2]


def url_of(server_url: str, database: str, user: str | None = None) -> str:
    parts = urlsplit(server_url)
    if user is not None:
        parts = parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}")
    return urlunsplit(parts._replace(path=f"/{quote(database)}"))


@pytest.fixture
def new_database(server_url: str) -> Iterator[str]:
    """The name of a database that does not exist yet."""
    name = f'tiger_db_new_ä "{uuid4().hex[:12]}%'
    yield name
    asyncio.run(databases.drop(server_url, name.replace('"', '""')))


@pytest.fixture
def nobody(server_url: str) -> Iterator[str]:
    """A role without privileges."""
    name = f"tiger_db_nobody_{uuid4().hex[:12]}"
    postgres = settings_for(server_url, "postgres")
    run_sql(postgres, f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
    yield f"{name}:hunter2"
    run_sql(postgres, f"DROP ROLE {name}")


@pytest.fixture
def home(bare: CommandLine) -> Iterator[Path]:
    """The folder of an embedded server, which the server's user can reach."""
    base = Path(tempfile.mkdtemp(prefix="tiger-")).resolve()
    base.chmod(0o755)
    home = base / "home"
    bare.env["TIGER_DB_HOME"] = str(home)
    yield home
    embedded.stop(Settings(tiger_db_home=home))
    shutil.rmtree(base)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package, for new migrations."""
    for part in ("tiger_db", "alembic"):
        shutil.copytree(REPOSITORY / part, tmp_path / part)
    return tmp_path


@pytest.mark.slow
def test_init_creates_what_is_missing(
    bare: CommandLine, server_url: str, new_database: str, nobody: str
) -> None:
    bare.env = {"DATABASE_URL": url_of(server_url, new_database), **SECRETS}
    assert "run `tiger-db init`" in bare.fails("current")
    first = bare.ok("init")
    assert first.out == ""
    assert "created the database" in first.err
    assert "migrated the schema from revision base to" in first.err
    bare.ok("create-account", "--account-name", "x", "--account-number", "U1",
            "--tiger-id", "1", "--private-key", "x")  # fmt: skip
    again = bare.ok("init")
    assert "created" not in again.err
    assert "migrated" not in again.err
    assert "already" in again.err
    assert bare.ok("list-accounts", "--json").json["items"]
    assert bare.ok("health-check").err == ""
    bare.env["DATABASE_URL"] = url_of(server_url, new_database, nobody)
    refusal = bare.fails("current")
    assert "permission denied for database" in refusal
    assert "`tiger-db grant`" in refusal


@pytest.mark.slow
def test_init_leaves_the_privileges_of_an_existing_database(
    bare: CommandLine, server_url: str, empty_database: Settings, nobody: str
) -> None:
    bare.env = {"DATABASE_URL": url_of(server_url, empty_database.database), **SECRETS}
    bare.ok("init")
    bare.env["DATABASE_URL"] = url_of(server_url, empty_database.database, nobody)
    assert "permission denied for database" not in bare("current").err


@pytest.mark.slow
def test_init_explains_how_to_set_an_encryption_key(empty: CommandLine) -> None:
    del empty.env["ENCRYPTION_KEYS"]
    told = empty.ok("init").err
    assert "warning: no encryption key is set" in told
    made = empty.ok("generate-encryption-key")
    assert "`tiger-db generate-encryption-key`" in told
    assert "warning" not in empty.ok("init", ENCRYPTION_KEYS=made.out.strip()).err


@pytest.mark.slow
def test_init_explains_how_to_set_a_pepper(empty: CommandLine) -> None:
    del empty.env["API_KEY_PEPPERS"]
    told = empty.ok("init").err
    assert "warning: no pepper is set" in told
    assert "`tiger-db generate-api-key-pepper`" in told
    made = empty.ok("generate-api-key-pepper").out.strip()
    assert "warning" not in empty.ok("init", API_KEY_PEPPERS=made).err
    assert "API_KEY_PEPPERS" in empty.fails("init", API_KEY_PEPPERS="p1:nonsense")


@pytest.mark.slow
def test_init_explains_how_to_set_a_signing_key(empty: CommandLine) -> None:
    told = empty.ok("init").err
    assert "no signing key is set" in told
    assert "`tiger-db generate-audit-signing-key`" in told
    made = empty.ok("generate-audit-signing-key").out.strip()
    assert "signing" not in empty.ok("init", AUDIT_SIGNING_KEY=made).err
    assert "AUDIT_SIGNING_KEY" in empty.fails("init", AUDIT_SIGNING_KEY="nonsense")


def test_init_refuses_a_malformed_key_before_it_creates_anything(empty: CommandLine) -> None:
    assert "ENCRYPTION_KEYS" in empty.fails("init", ENCRYPTION_KEYS="k1:nonsense")
    del empty.env["ENCRYPTION_KEYS"]
    assert "ENCRYPTION_KEYS" in empty.fails(
        "init", ENVIRONMENT="production", DB_ALLOW_UNVERIFIED_TLS="true"
    )
    assert empty.ok("current").out == ""


@pytest.mark.slow
def test_concurrent_inits_create_one_database(
    bare: CommandLine, server_url: str, new_database: str
) -> None:
    bare.env = {"DATABASE_URL": url_of(server_url, new_database), **SECRETS}

    async def race() -> list[tuple[int | None, str]]:
        gate = await connect(settings_for(server_url, "postgres"))
        try:
            async with gate.transaction():
                await gate.execute("LOCK TABLE pg_database IN SHARE ROW EXCLUSIVE MODE")
                inits = [
                    await asyncio.create_subprocess_exec(
                        *COMMAND, "init", env=bare.environment(), stderr=subprocess.PIPE
                    )
                    for _ in range(3)
                ]
                while await gate.fetchval(
                    "SELECT count(*) FROM pg_locks"
                    " WHERE relation = 'pg_database'::regclass AND NOT granted"
                ) < len(inits):
                    assert all(init.returncode is None for init in inits)
            told = [(await init.communicate())[1].decode() for init in inits]
            return [(init.returncode, text) for init, text in zip(inits, told, strict=True)]
        finally:
            await gate.close()

    results = asyncio.run(race())
    assert [code for code, _ in results] == [0] * 3, results
    assert sum("created the database" in told for _, told in results) == 1
    assert bare.ok("check")


def test_init_without_the_privilege_to_create_a_database_fails(
    bare: CommandLine, server_url: str, new_database: str, nobody: str
) -> None:
    bare.env = {"DATABASE_URL": url_of(server_url, new_database, nobody)}
    reason = bare.fails("init", **SECRETS)
    assert "may not create databases" in reason
    assert "CREATE DATABASE" in reason
    assert "hunter2" not in reason


def test_migrate_without_the_privilege_to_create_tables_fails(
    bare: CommandLine, server_url: str, empty_database: Settings, nobody: str
) -> None:
    run_sql(empty_database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    bare.env = {"DATABASE_URL": url_of(server_url, empty_database.database, nobody)}
    result = bare("migrate")
    assert result.code == 1
    assert "error: permission denied for schema public: connect as another role" in result.err
    assert "hunter2" not in result.err


@pytest.mark.slow
def test_the_schema_is_migrated_and_downgraded(empty: CommandLine) -> None:
    assert "no tiger_db schema: run `tiger-db init`" in empty.fails("list-accounts")
    assert "no tiger_db schema: run `tiger-db init`" in empty.fails("check")
    assert empty.ok("current") == Result(
        0, "", "the database has no tiger_db schema: run `tiger-db init`\n"
    )
    assert "from revision base to" in empty.ok("migrate").err
    assert "already" in empty.ok("migrate").err
    state = empty.ok("current", "--json").json
    assert state["current"] == state["head"]
    assert empty.ok("current").out == f"{state['head']} (head)\n"
    assert "--yes" in empty.misused("downgrade", "base")
    assert empty.ok("current", "--json").json == state
    assert "now at revision base" in empty.ok("downgrade", "base", "--yes").err
    assert empty.ok("current", "--json").json["current"] is None


def test_an_unknown_revision_is_an_error(cli: CommandLine) -> None:
    for command in (("migrate", "--revision", "zzz"), ("downgrade", "zzz", "--yes")):
        assert "zzz" in cli.fails(*command)


@pytest.mark.slow
def test_history_lists_the_migrations(bare: CommandLine) -> None:
    history = bare.ok("history", "--json").json
    assert history["next_cursor"] is None
    assert history["items"][-1]["follows"] is None
    for script in history["items"]:
        assert script["revision"] in bare.ok("history").out


@pytest.mark.slow
def test_check_lists_differences(cli: CommandLine, clone_settings: Settings) -> None:
    assert cli.ok("check").out == ""
    assert cli.ok("check", "--json").json == {"items": [], "next_cursor": None}
    run_sql(
        clone_settings,
        "ALTER TABLE api_keys DROP COLUMN description",
        "DROP INDEX ix_token_statuses_failed",
    )
    result = cli("check")
    assert result.code == 1
    assert result.err.startswith("error: the schema differs")
    lines = result.out.splitlines()
    assert any("description" in line for line in lines)
    assert any("ix_token_statuses_failed" in line for line in lines)
    assert cli("check", "--json").json["items"] == lines


@pytest.mark.slow
def test_a_newer_schema_is_refused(cli: CommandLine, clone_settings: Settings) -> None:
    run_sql(clone_settings, "UPDATE tiger_db_alembic_version SET version_num = 'from_the_future'")
    for command in ("list-accounts", "migrate", "check", "init"):
        assert "upgrade tiger_db" in cli.fails(command)
    current = cli.ok("current")
    assert current.out == "from_the_future\n"
    assert "upgrade tiger_db" in current.err


@pytest.mark.slow
def test_migrations_are_written_in_a_checkout(
    checkout: Path, cli: CommandLine, clone_settings: Settings
) -> None:
    def run(*arguments: str) -> Result:
        done = subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True, check=False, cwd=checkout, env=cli.environment(), text=True,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    written = run("revision", "-m", "nothing much", "--empty")
    assert written.code == 0, written.err
    file = Path(written.out.strip())
    assert file.parent == checkout / "alembic" / "versions"
    assert "nothing_much" in file.name
    newest, before = [item["revision"] for item in run("history", "--json").json["items"][:2]]
    assert newest in file.name
    behind = run("check")
    assert (behind.code, behind.err.count("\n")) == (1, 1)
    assert "run `tiger-db migrate`" in behind.err
    assert f"from revision {before} to {newest}" in run("migrate").err
    assert f"now at revision {before}" in run("downgrade", "-1", "-y").err
    run("migrate")
    run_sql(clone_settings, "ALTER TABLE api_keys DROP COLUMN description")
    repair = run("revision", "--message", "repair")
    assert repair.code == 0, repair.err
    assert "add_column" in Path(repair.out.strip()).read_text()
    assert run("migrate").code == 0
    assert run("check").code == 0


@pytest.mark.slow
def test_check_prints_the_sql_that_restores_changes(
    cli: CommandLine, clone_settings: Settings
) -> None:
    run_sql(
        clone_settings,
        "ALTER TABLE api_keys DISABLE TRIGGER notify_update",
        "CREATE OR REPLACE FUNCTION notify_api_key_change() RETURNS trigger LANGUAGE plpgsql"
        " SECURITY DEFINER SET search_path = public, pg_temp AS 'BEGIN RETURN NULL; END'",
        "ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY",
    )
    ill = cli("check")
    assert ill.code == 1
    assert "run the listed SQL" in ill.err
    lines = ill.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        (
            "function notify_api_key_change (used by api_keys, tiger_accounts)"
            " has `SECURITY DEFINER` and lacks `DECLARE`"
        ),
        "row security of audit_logs is enabled",
        "trigger notify_update on api_keys is disabled",
    ]
    assert cli("check", "--json").json["items"] == lines
    report = cli.ok("health-check", "--json").json
    assert "trigger notify_update on api_keys is disabled" in report["problems"][0]
    assert report["ready"]
    assert cli("doctor").code == 1
    run_sql(clone_settings, *(line.partition(": ")[2] for line in lines))
    assert cli.ok("check").out == ""
    assert cli.ok("health-check", "--json").json["problems"] == []
    cli.ok("doctor")


@pytest.mark.slow
def test_health_check_fails_if_the_schema_is_newer(
    cli: CommandLine, clone_settings: Settings
) -> None:
    healthy = cli.ok("health-check")
    assert healthy.err == ""
    for name in ("server version", "latency ms", "revision", "pool: size", "rows: audit logs"):
        assert name in healthy.out
    assert cli.ok("health-check", "--json").json["problems"] == []
    run_sql(clone_settings, "UPDATE tiger_db_alembic_version SET version_num = 'from_the_future'")
    ill = cli("health-check")
    assert ill.code == 1
    assert ill.err.startswith("problem: ")
    assert "upgrade tiger_db" in ill.err
    ill = cli("health-check", "--json")
    assert (ill.code, ill.err) == (1, "")
    assert "upgrade tiger_db" in ill.json["problems"][0]


def test_liveness_connects_to_no_database(bare: CommandLine) -> None:
    nowhere = {"DB_HOST": "localhost", "DB_PORT": "1"}
    live = bare.ok("health-check", "--live", "--json", **nowhere, **SECRETS).json
    assert (live["live"], live["ready"], live["problems"]) == (True, None, [])
    ill = bare("health-check", "--json", **nowhere, **SECRETS)
    assert (ill.code, ill.json["live"], ill.json["ready"]) == (1, True, False)
    keys = {**SECRETS, "ENCRYPTION_KEYS": "k1:hunter2"}
    dead = bare("health-check", "--live", "--json", **nowhere, **keys)
    assert (dead.code, dead.json["live"]) == (1, False)
    assert "ENCRYPTION_KEYS" in dead.json["problems"][0]
    assert "hunter2" not in dead.out


@pytest.mark.slow
def test_missed_upkeep_does_not_make_a_server_unready(
    cli: CommandLine, clone_settings: Settings
) -> None:
    report = cli.ok("health-check", "--json").json
    assert (report["live"], report["ready"]) == (True, True)
    run_sql(clone_settings, f"DROP TABLE {', '.join(months(1, 12))}")
    report = cli.ok("health-check", "--json").json
    assert report["ready"]
    assert "run `tiger-db migrate`" in report["problems"][0]


@pytest.mark.slow
def test_doctor_fails_on_a_problem_and_gives_advice(
    cli: CommandLine, clone_settings: Settings
) -> None:
    well = cli.ok("doctor")
    assert well.err == ""
    assert "search path" in well.out
    report = cli.ok("doctor", "--json").json
    assert report["next_cursor"] is None
    assert {*report["items"][0]} == {"check", "status", "seen", "advice"}
    run_sql(clone_settings, f"DROP TABLE {', '.join(months(1, 12))}")
    ill = cli("doctor", "--json")
    assert (ill.code, ill.err) == (1, "")
    problems = [item for item in ill.json["items"] if item["status"] == "problem"]
    assert [item["check"] for item in problems] == ["audit partitions"]
    assert "maintain-audit" in cli("doctor").out


def test_doctor_starts_no_server(bare: CommandLine, home: Path) -> None:
    ill = bare("doctor")
    assert ill.code == 1
    assert "run `tiger-db start-embedded`" in ill.out
    assert not home.exists()


@pytest.mark.parametrize(
    ("env", "advice"),
    [
        ({"DB_HOST": "localhost", "DB_PORT": "1"}, "is the server running?"),
        ({"DB_HOST": "nowhere.invalid"}, "is the server running?"),
        ({"DATABASE_URL": "postgresql://u:hunter2@localhost:1/x"}, "is the server running?"),
        ({"DB_HOST": "/nowhere"}, "is the server running?"),
        ({"DB_PORT": "many"}, "DB_PORT"),
        ({"DB_SSL_MODE": "sometimes"}, "DB_SSL_MODE"),
        ({"DATABASE_URL": "mysql://u:hunter2@localhost/x"}, "DATABASE_URL"),
        ({"ENVIRONMENT": "production"}, "DB_HOST or DATABASE_URL is required"),
        (
            {"ENVIRONMENT": "production", "DATABASE_URL": "postgresql://u:hunter2@db.example/x"},
            "DB_SSL_MODE must be verify-full",
        ),
    ],
)
@pytest.mark.parametrize("command", ["init", "migrate", "current", "list-accounts"])
def test_wrong_settings_are_reported_with_advice(
    bare: CommandLine, command: str, env: dict[str, str], advice: str
) -> None:
    reason = bare.fails(command, **env)
    assert advice in reason
    assert "hunter2" not in reason


def test_a_wrong_password_is_reported_with_advice(bare: CommandLine, server_url: str) -> None:
    url = url_of(server_url, "postgres", "tiger_db_unknown_role:hunter2")
    for command in ("init", "current", "list-events"):
        reason = bare.fails(command, DATABASE_URL=url)
        assert "check DATABASE_URL, or DB_USER and DB_PASSWORD" in reason
        assert "hunter2" not in reason


@pytest.mark.slow
def test_the_embedded_server_is_created_started_and_stopped(bare: CommandLine, home: Path) -> None:
    ill = bare("health-check")
    assert ill.code == 1
    assert str(home) in ill.out
    assert f"{home} is not running: run `tiger-db start-embedded`" in ill.err
    assert not home.exists()

    first = bare.ok("init")
    for done in (f"starting the embedded PostgreSQL in {home}", "created the database",
                 "migrated the schema", f"generated an encryption key in {home}"):  # fmt: skip
        assert done in first.err
    key = (home / "encryption_keys").read_text()
    assert key not in first.err
    again = bare.ok("init").err
    assert "is running" in again
    assert f"the encryption key is in {home}" in again
    assert (home / "encryption_keys").read_text() == key

    bare.ok("create-account", "--account-name", "x", "--account-number", "U1",
            "--tiger-id", "1", "--private-key", "x")  # fmt: skip
    report = bare.ok("health-check", "--json").json
    assert report["embedded_folder"] == str(home)
    assert Path(report["embedded_socket_folder"]).is_dir()
    assert report["embedded_pid"] > 0

    assert f"{home} is running" in bare.ok("start-embedded").err
    assert f"{home} is stopped" in bare.ok("stop-embedded").err
    assert f"{home} was not running" in bare.ok("stop-embedded").err
    assert bare("health-check").code == 1
    assert f"starting the embedded PostgreSQL in {home}" in bare.ok("start-embedded").err
    bare.ok("stop-embedded")
    assert bare.ok("list-accounts", "--json").json["items"], "a command starts the server"


@pytest.mark.parametrize("command", ["start-embedded", "stop-embedded"])
def test_production_has_no_embedded_server(bare: CommandLine, command: str) -> None:
    for env in ({}, {"DB_HOST": "localhost"}):
        assert "production" in bare.fails(command, ENVIRONMENT="production", **env)


@pytest.mark.slow
def test_start_embedded_warns_if_another_server_is_set(cli: CommandLine, home: Path) -> None:
    assert "other commands do not use the embedded PostgreSQL" in cli.ok("start-embedded").err
    assert "stopped" in cli.ok("stop-embedded").err


def test_a_folder_that_cannot_be_created_is_an_error(bare: CommandLine, home: Path) -> None:
    home.write_text("a file")
    result = bare("init")
    assert result.code == 1
    assert str(home) in result.err.splitlines()[-1]
