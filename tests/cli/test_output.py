"""Output of commands: files, pipes, full devices, and tables on a terminal."""

import asyncio
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli_accounts import PAPER, create
from tests.support.cli_events import log
from tests.support.command_line import COMMAND, CommandLine
from tests.support.devices import device
from tests.support.sql import run_sql
from tests.support.terminal import Terminal
from tests.support.waiting import wait_until
from tiger_db import AuditAction, AuditLog, Database, Settings, crud

COUNT = 12  # events of the fixture `sealed`


@pytest.mark.slow
def test_a_file_appears_when_it_is_complete(
    sealed: CommandLine, clone_settings: Settings, tmp_path: Path
) -> None:
    """The old file stays until then."""
    out = tmp_path / "events.jsonl"
    out.write_text("before", encoding="utf-8")
    out.chmod(0o644)
    run_sql(clone_settings, "ALTER TABLE audit_seals RENAME TO hidden")
    assert sealed("export-events", "--out", str(out), "--overwrite").code == 1
    assert out.read_text("utf-8") == "before"
    run_sql(clone_settings, "ALTER TABLE hidden RENAME TO audit_seals")
    sealed.ok("export-events", "--out", str(out), "--overwrite")
    assert len(out.read_text("utf-8").splitlines()) == COUNT + 1
    assert out.stat().st_mode & 0o777 == 0o600
    assert [*tmp_path.iterdir()] == [out]
    assert "No such file" in sealed.fails("export-events", "--out", str(tmp_path / "a" / "b"))


EXPORTS = ["export-events", "export-checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize("command", EXPORTS)
def test_a_file_is_replaced_only_with_overwrite(
    sealed: CommandLine, tmp_path: Path, command: str
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(file)
    for out in (file, link):
        reason = sealed.fails(command, "--out", str(out))
        assert reason == f"error: {out} already exists: --overwrite replaces it\n"
        assert file.read_text() == "mine"
    expected = sealed.ok(command).out
    sealed.ok(command, "--out", str(link), "--overwrite")
    assert file.read_text() == expected
    assert link.readlink() == file
    assert {*tmp_path.iterdir()} == {file, link}


@pytest.mark.slow
@pytest.mark.parametrize("command", EXPORTS)
def test_a_pipe_is_written_to(sealed: CommandLine, tmp_path: Path, command: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        try:
            sealed.ok(command, "--out", str(pipe))
            assert reader.communicate(timeout=10)[0] == sealed.ok(command).out
        finally:
            reader.kill()
    assert [*tmp_path.iterdir()] == [pipe]
    assert pipe.is_fifo()


@pytest.mark.slow
@pytest.mark.parametrize("command", EXPORTS)
def test_files_that_the_shell_opened_are_written_to(
    sealed: CommandLine, tmp_path: Path, command: str
) -> None:
    expected = sealed.ok(command).out
    (tmp_path / "appended").write_text("mine\n")
    script = (
        '"$@" --out >(cat >"$0/substituted") && "$@" --out /dev/fd/7 7>"$0/seven"'
        ' && "$@" --out /dev/stdout >>"$0/appended" && "$@" --out /dev/stdout | cat >"$0/piped"'
    )
    run = [shutil.which("bash") or "bash", "-c", script, str(tmp_path), *COMMAND, command]
    subprocess.run(run, check=True, env=sealed.environment(), timeout=60)
    assert (tmp_path / "seven").read_text() == (tmp_path / "piped").read_text() == expected
    wait_until(lambda: (tmp_path / "substituted").read_text() == expected, 10)
    assert (tmp_path / "appended").read_text() == f"mine\n{expected}"
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/PID/wchan")
@pytest.mark.parametrize("command", EXPORTS)
def test_a_pipe_without_a_reader_is_waited_for_until_ctrl_c(
    sealed: CommandLine, tmp_path: Path, command: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [*COMMAND, command, "--out", str(pipe)], env=sealed.environment(), stderr=subprocess.PIPE
    ) as process:
        try:
            waits = Path(
                f"/proc/{process.pid}/wchan"
            )  # the kernel function that the process waits in
            wait_until(lambda: waits.read_text() == "wait_for_partner")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10)[1] == b"interrupted\n"
            assert process.returncode == 130
        finally:
            process.kill()
    assert [*tmp_path.iterdir()] == [pipe]


@pytest.mark.slow
def test_an_export_to_a_full_device_fails_with_one_line(
    sealed: CommandLine, clone_settings: Settings, tmp_path: Path
) -> None:
    log(clone_settings, *({"user_id": "x"} for _ in range(1000)))
    full = device(tmp_path / "full", stat.S_IFCHR, 1, 7)
    ended = subprocess.run(
        [*COMMAND, "export-events", "--out", str(full)],
        env=sealed.environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "No space left on device" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 1000])
def test_a_reader_that_closes_the_pipe_causes_no_message(
    cli: CommandLine, clone_settings: Settings, rows: int
) -> None:
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
            assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.slow
def test_standard_output_on_a_full_device_fails_with_one_line(cli: CommandLine) -> None:
    create(cli)
    with open("/dev/full", "w", encoding="ascii") as full:  # noqa: PTH123  # a device
        done = subprocess.run(
            [*COMMAND, "list-accounts"],
            check=False, stdout=full, stderr=subprocess.PIPE, env=cli.environment(), text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.slow
def test_tables_fit_the_width_of_the_terminal(cli: CommandLine, terminal: Terminal) -> None:
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


@pytest.mark.slow
def test_stored_text_cannot_control_the_terminal(cli: CommandLine) -> None:
    name = "[bold]:smile: \x1b[31m\u202eevil\r\n"
    create(cli, "U1", "--account-name", name)
    for command in (("list-accounts",), ("show-account", "U1")):
        shown = cli.ok(*command).out
        assert "[bold]:smile: \\x1b[31m\\u202eevil\\r\\n" in shown
    assert cli.ok("show-account", "U1", "--json").json["account_name"] == name
