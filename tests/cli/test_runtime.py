"""Execution of commands: exit codes, streams, logs, unexpected errors, and Ctrl-C."""

import asyncio
import os
import pwd
import signal
import subprocess

import pytest

from tests.support.cli_accounts import NUMBER, REQUIRED, create
from tests.support.command_line import COMMAND, CommandLine
from tests.support.sql import run_sql
from tests.support.waiting import WAITING_LOCKS
from tiger_db import Settings
from tiger_db.connections import connect


@pytest.mark.slow
def test_wrong_usage_is_exit_code_2(bare: CommandLine) -> None:
    assert "No such command" in bare.misused("nonsense")
    assert "No such option" in bare.misused("list-accounts", "--nonsense")
    assert "--account-name" in bare.misused("create-account")
    process = bare.process("nonsense")
    assert (process.code, process.out) == (2, "")


@pytest.mark.slow
def test_the_audit_trail_names_who_runs_a_command(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment cannot change the name of the operating system's user."""
    options = ("create-api-key", "--name", "assistant", "--scopes", "mcp:read")
    cli.ok("--actor", "alice", *options)
    cli.ok(*options, LOGNAME="mallory", USER="mallory")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # as in a container
    cli.ok(*options)
    events = cli.ok("list-events", "--action", "api_key:create", "--json").json["items"]
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert [(event["user_id"], event["user_type"]) for event in events] == [
        ("4000000", "cli"), (user, "cli"), ("alice", "cli")
    ]  # fmt: skip
    assert "--actor" in cli.misused("--actor", " ", *options)
    assert "unattributed" not in cli.ok("list-events").out


@pytest.mark.slow
def test_data_goes_to_stdout_and_messages_to_stderr(cli: CommandLine) -> None:
    options = (*REQUIRED, "--account-number", NUMBER, "--private-key", "test_key", "--json")
    done = cli.process("create-account", *options)
    assert done.code == 0
    assert done.json["account_number"] == NUMBER
    assert [line.partition(" ")[0] for line in done.err.splitlines()] == [
        "warning:", "created", "warning:"
    ]  # fmt: skip
    failed = cli.process("create-account", *options)
    assert (failed.code, failed.out) == (1, "")
    assert "already exists" in failed.err
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
        "create-account", *REQUIRED, "--account-number", "U1", "--private-key", "-",
        stdin="hunter2", DB_DEBUG="1",
    )  # fmt: skip
    assert "INSERT INTO tiger_accounts" in done.err
    assert "hunter2" not in done.err


@pytest.mark.slow
def test_an_unexpected_error_is_one_line_without_values(
    cli: CommandLine, clone_settings: Settings
) -> None:
    create(cli, NUMBER, "--secret-key", "hunter2")
    run_sql(
        clone_settings,
        "ALTER TABLE tiger_accounts ALTER environment DROP DEFAULT,"
        " ALTER environment TYPE text[] USING '{PROD}'",
    )
    reason = cli.fails("list-accounts")
    assert "unexpected TypeError" in reason
    assert "DB_DEBUG=1" in reason
    done = subprocess.run(
        [*COMMAND, "list-accounts"],
        capture_output=True, check=False, env=cli.environment(DB_DEBUG="1"), text=True,
    )  # fmt: skip
    assert "in list_accounts" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")
    assert "hunter2" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_is_exit_code_130(cli: CommandLine, clone_settings: Settings) -> None:
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
                    f"SELECT EXISTS (SELECT FROM {WAITING_LOCKS}"
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
