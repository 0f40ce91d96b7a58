"""What only a process of its own shows: exit codes, streams, signals, terminals, imports."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from enum import StrEnum
from typing import get_args

import pytest

from tests.support.cli_accounts import NUMBER, PAPER, REQUIRED, create, stored
from tests.support.command_line import COMMAND, CommandLine
from tests.support.factories import plain
from tests.support.sql import run_sql
from tests.support.terminal import Terminal
from tiger_db import AuditAction, AuditLog, Database, Settings, crud
from tiger_db import __all__ as names
from tiger_db import models as enums
from tiger_db.cli import accounts, api_keys, audit_events, refreshes
from tiger_db.connections import connect
from tiger_db.tiger import parse_private_key

COMMANDS = (
    "init", "migrate", "revision", "downgrade", "current", "history", "check", "health-check",
    "doctor", "start-embedded", "stop-embedded", "create-account", "list-accounts", "show-account",
    "set-default-account", "close-account", "reopen-account", "set-account-status",
    "reset-account-errors",
    "create-api-key", "list-api-keys", "verify-api-key", "show-api-key", "list-expiring-api-keys",
    "rotate-api-key", "extend-api-key", "revoke-api-key", "print-api-key-pattern",
    "generate-api-key-pepper", "list-events", "count-events", "export-events",
    "generate-audit-signing-key", "print-audit-public-key", "seal-audit", "verify-audit",
    "export-checkpoint", "maintain-audit", "list-refreshes", "watch-refreshes",
    "run-refresh-worker",
    "refresh-token", "prune-refreshes", "generate-encryption-key", "list-encryption-keys",
    "rotate-encryption-key", "import-account", "export-account",
)  # fmt: skip
SLOW = {
    "alembic", "asyncio", "asyncpg", "cryptography", "passlib", "pydantic", "sqlalchemy",
    "sqlmodel",
}  # fmt: skip
LOADED = (
    "import sys; sys.argv[0] = 'tiger-db'\n"
    "try:\n"
    "    from tiger_db.cli import main; main()\n"
    "finally:\n"
    "    print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
)


@pytest.fixture(scope="module")
def pem() -> str:
    made = subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, check=True, text=True)
    return made.stdout


@pytest.mark.parametrize("command", [None, "create-account", "list-events", "init"])
def test_help_imports_nothing_slow(bare: CommandLine, command: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED, *([command] if command else []), "--help"],
        capture_output=True, check=True, text=True, env=bare.environment(),
    )  # fmt: skip
    loaded = set(done.stderr.split())
    assert "tiger_db" in loaded
    # typer itself takes pydantic to look at a command's options.
    assert not loaded & (SLOW - {"pydantic"} if command else SLOW)


def test_help(bare: CommandLine) -> None:
    shown = bare.ok("--help").out
    assert max(map(len, shown.splitlines())) <= 80
    assert bare.ok("--version").out.startswith("tiger-db ")
    for name in COMMANDS:
        assert re.search(rf"│ {name} ", shown), name
        assert "Usage: tiger-db " + name in bare.ok(name, "--help").out
    for panel in (
        "Database", "Accounts", "API keys", "Audit trail", "Token refreshes", "Encryption keys",
        "Tiger's files",
    ):  # fmt: skip
        assert f"─ {panel} ─" in shown
    listed = re.findall(r"^│ ([a-z][a-z-]+)", shown, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert bare().out.strip() == shown.strip()


def test_wrong_usage(bare: CommandLine) -> None:
    assert "No such command" in bare.misused("nonsense")
    assert "No such option" in bare.misused("list-accounts", "--nonsense")
    assert "--account-name" in bare.misused("create-account")
    process = bare.process("nonsense")
    assert (process.code, process.out) == (2, "")


@pytest.mark.parametrize(
    ("choices", "enum"),
    [
        (accounts.AccountTypes, enums.AccountType),
        (accounts.AccountStatuses, enums.AccountStatus),
        (accounts.Licenses, enums.TigerLicense),
        (accounts.Environments, enums.TigerEnvironment),
        (api_keys.KeyStatuses, enums.APIKeyStatus),
        (audit_events.Results, enums.AuditResult),
        (audit_events.Severities, enums.AuditSeverity),
    ],
)
def test_choices_are_those_of_the_enum(choices: object, enum: type[StrEnum]) -> None:
    assert list(get_args(choices)) == [member.value for member in enum]


def test_some_choices_are_fewer() -> None:
    assert set(get_args(refreshes.RefreshStatuses)) < {*enums.TokenRefreshStatus}
    assert {*enums.AccountStatus} - set(get_args(accounts.OpenStatuses)) == {"closed"}


@pytest.mark.slow
def test_package_loads_names_when_asked(bare: CommandLine) -> None:
    code = (
        "import sys, tiger_db\n"
        f"assert not {SLOW!r} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "assert set(tiger_db.__all__) < set(dir(tiger_db))\n"
        "from tiger_db import *\n"
        f"assert all(getattr(tiger_db, name) is globals()[name] for name in {names!r})\n"
        "assert tiger_db.TigerAccount is tiger_db.models.TigerAccount\n"
        "assert tiger_db.crud.accounts.create and tiger_db.errors.NotFound\n"
        "assert tiger_db.settings.Settings is tiger_db.Settings\n"
        "assert not hasattr(tiger_db, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=bare.environment())


@pytest.mark.slow
def test_streams_and_exit_codes(cli: CommandLine) -> None:
    options = (*REQUIRED, "--account-number", NUMBER, "--private-key", "test_key", "--json")
    done = cli.process("create-account", *options)
    assert done.code == 0
    assert done.json["account_number"] == NUMBER
    assert [line.partition(" ")[0] for line in done.err.splitlines()] == [
        "warning:", "warning:", "created"
    ]  # fmt: skip
    failed = cli.process("create-account", *options)
    assert (failed.code, failed.out) == (1, "")
    assert "exists already" in failed.err
    for command in ("list-events", "health-check", "init"):
        done = cli.process(command)
        assert done.code == 0, done.err
        assert "warning" not in done.err.lower()
        assert "\x1b" not in done.out + done.err


@pytest.mark.slow
def test_statements_are_logged_to_stderr(cli: CommandLine) -> None:
    create(cli)
    done = cli.process("show-account", NUMBER, "--json", DB_DEBUG="1")
    assert done.json["account_number"] == NUMBER
    assert "FROM tiger_accounts" in done.err
    assert NUMBER not in done.err
    done = cli.process(
        "create-account", *REQUIRED, "--account-number", "1", "--private-key", "-",
        stdin="hunter2", DB_DEBUG="1",
    )  # fmt: skip
    assert "INSERT INTO tiger_accounts" in done.err
    assert "hunter2" not in done.err


@pytest.mark.schema_changes
@pytest.mark.slow
def test_what_nobody_expected(cli: CommandLine, clone_settings: Settings) -> None:
    create(cli, NUMBER, "--secret-key", "hunter2")
    run_sql(
        clone_settings,
        "ALTER TYPE account_type ADD VALUE 'gold'",
        "UPDATE tiger_accounts SET account_type = 'gold'",
    )
    reason = cli.fails("list-accounts")
    assert "unexpected LookupError" in reason
    assert "DB_DEBUG=1" in reason
    done = subprocess.run(
        [*COMMAND, "list-accounts"],
        capture_output=True, check=False, env=cli.environment(DB_DEBUG="1"), text=True,
    )  # fmt: skip
    assert "in list_accounts" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")
    assert "hunter2" not in done.stderr


@pytest.mark.slow
def test_interrupt(cli: CommandLine, clone_settings: Settings) -> None:
    async def interrupt() -> tuple[int | None, str]:
        connection = await connect(clone_settings)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE tiger_accounts")
                process = await asyncio.create_subprocess_exec(
                    *COMMAND, "list-accounts",
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(),
                )  # fmt: skip
                while not await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted"
                    " AND relation = 'tiger_accounts'::regclass)"
                ):
                    assert process.returncode is None
                process.send_signal(signal.SIGINT)
                out, err = await asyncio.wait_for(process.communicate(), 10)
                assert out == b""
                return process.returncode, err.decode()
        finally:
            await connection.close()

    assert asyncio.run(interrupt()) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 1000])
def test_reader_that_has_seen_enough(cli: CommandLine, clone_settings: Settings, rows: int) -> None:
    async def fill() -> None:
        async with Database(clone_settings) as database, database.session() as session:
            await crud.audit_logs.log_events(
                session, [AuditLog(action=AuditAction.DATA_QUERY) for _ in range(rows)]
            )

    asyncio.run(fill())
    for option in (["--json"], []):
        with subprocess.Popen(
            [*COMMAND, "list-events", "--limit", "1000", *option],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(), text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 1


@pytest.mark.slow
def test_full_disk(cli: CommandLine) -> None:
    create(cli)
    with open("/dev/full", "w", encoding="ascii") as full:  # noqa: PTH123  # a device
        done = subprocess.run(
            [*COMMAND, "list-accounts"],
            check=False, stdout=full, stderr=subprocess.PIPE, env=cli.environment(), text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.slow
def test_secret_is_asked_for_without_echo(cli: CommandLine, terminal: Terminal, pem: str) -> None:
    bare_key, _ = parse_private_key(pem)
    for number, typed in (("1", "hunter2\n"), ("2", bare_key + "\n"), ("3", pem)):
        command = ("create-account", *REQUIRED, "--account-number", number, "--json")
        with terminal.program(cli, *command) as program:
            terminal.wait_for("private key (hidden): ")
            assert not terminal.echoes
            terminal.type(typed)
            assert terminal.end(program) == 0, terminal.seen
        assert terminal.echoes
        kept = plain(stored(cli, number).private_key)
        assert kept == ("hunter2" if number == "1" else bare_key)
        os.set_blocking(terminal.screen, True)
        assert not any(line in terminal.seen for line in typed.split())
        terminal.seen = ""


@pytest.mark.slow
@pytest.mark.parametrize("length", [4094, 4095, 5000])
def test_what_a_terminal_may_have_cut_is_refused(
    cli: CommandLine, terminal: Terminal, length: int
) -> None:
    """It hands over 4095 bytes of a line at most, and drops the others without a word."""
    command = ("create-account", *REQUIRED, "--account-number", NUMBER, "--private-key", "-")
    with terminal.program(cli, *command) as program:
        terminal.wait_for("private key (hidden): ")
        terminal.type("x" * length + "\n")
        code = terminal.end(program)
    if length == 4094:
        assert (code, plain(stored(cli).private_key)) == (0, "x" * length)
    else:
        assert code == 1
        assert "the line is too long for a terminal: use --private-key-file" in terminal.seen
        assert cli.ok("list-accounts", "--json").json["items"] == []


@pytest.mark.slow
def test_interrupt_while_asked(cli: CommandLine, terminal: Terminal) -> None:
    with terminal.program(cli, "verify-api-key") as program:
        terminal.wait_for("key (hidden): ")
        program.send_signal(signal.SIGINT)
        assert terminal.end(program) == 130
    assert terminal.echoes
    assert "interrupted" in terminal.seen
    assert "Traceback" not in terminal.seen


@pytest.mark.slow
def test_nothing_is_typed(cli: CommandLine, terminal: Terminal) -> None:
    with terminal.program(cli, "verify-api-key", "-") as program:
        terminal.wait_for("key (hidden): ")
        terminal.type("\x04")
        assert terminal.end(program) == 1
    assert "the key is empty" in terminal.seen


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y", "n"])
def test_confirmation(cli: CommandLine, terminal: Terminal, answer: str) -> None:
    create(cli)
    with terminal.program(cli, "close-account", NUMBER) as program:
        terminal.wait_for("[y/N]")
        terminal.type(answer + "\n")
        assert terminal.end(program) == (0 if answer == "y" else 1)
    assert stored(cli).status == ("closed" if answer == "y" else "active")


@pytest.mark.slow
def test_tables_fit_a_terminal(cli: CommandLine, terminal: Terminal) -> None:
    create(cli, PAPER, "--account-name", "A name of quite some length " * 2, "--default-trading",
           "--license", "TBSG", "--access-token", "x",
           "--token-expires-at", "2027-01-31T12:00:00Z")  # fmt: skip
    cli.ok("create-api-key", "--name", "x" * 60, "--scopes", "dashboard:admin,system:admin",
           "--account", PAPER, "--expires-in", "30d")  # fmt: skip
    prefix = cli.ok("list-api-keys", "--json").json["items"][0]["key_prefix"]
    for command, whole in (
        ("list-accounts", [PAPER]),
        ("list-api-keys", [prefix]),
        ("list-events", ["account:set_default", PAPER]),
        ("health-check", []),
    ):
        terminal.seen = ""
        with terminal.program(cli, command) as program:
            assert terminal.end(program) == 0
        lines = re.sub(r"\x1b\[\d*m", "", terminal.seen).splitlines()
        assert max(map(len, lines)) <= 80
        assert all(any(word in line for line in lines) for word in whole), lines
        os.set_blocking(terminal.screen, True)
