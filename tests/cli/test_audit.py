"""The audit trail kept and followed by the command line."""

import asyncio
import csv
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support import factories
from tests.support.cli_accounts import create as create_account
from tests.support.command_line import COMMAND, CommandLine, Result
from tests.support.devices import device
from tests.support.sql import run_sql, write
from tests.support.waiting import wait_until
from tiger_db import AuditAction, AuditResult, Database, Settings, crud
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.signing import parse_public_key, parse_signing_key, public_pem, public_text

COUNT = 12
REPLICA = "SET session_replication_role = replica"
WAITING = """
SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'audit_logs'::regclass)
"""
INSERT = """
INSERT INTO audit_logs (id, action, result, severity, user_id)
VALUES (gen_random_uuid(), 'data:query', 'success', 'low', $1)
"""
LISTENERS = """
SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'LISTEN%'
"""


def log(settings: Settings, *events: dict[str, Any]) -> None:
    async def run(session: AsyncSession) -> None:
        await crud.audit_logs.log_events(session, [factories.new_event(**e) for e in events])

    write(settings, run)


@pytest.fixture
def signing(cli: CommandLine) -> CommandLine:
    """With a key that signs."""
    cli.env["AUDIT_SIGNING_KEY"] = cli.ok("generate-audit-signing-key").out.strip()
    return cli


@pytest.fixture
def sealed(signing: CommandLine, clone_settings: Settings) -> CommandLine:
    """With 12 sealed events."""
    log(clone_settings, *({"user_id": f"user {number}"} for number in range(COUNT)))
    signing.ok("seal-audit")
    return signing


# Keys.


def test_a_key_is_made_and_its_public_key_shown(bare: CommandLine) -> None:
    made = [bare.ok("generate-audit-signing-key") for _ in range(2)]
    assert made[0].out != made[1].out
    key = parse_signing_key(made[0].out.strip())
    assert "print-audit-public-key" in made[0].err
    env = {"AUDIT_SIGNING_KEY": made[0].out.strip(), "DATABASE_URL": "postgresql://nowhere/x"}
    shown = bare.ok("print-audit-public-key", **env)
    assert shown == Result(0, public_pem(key.public_key()), "")
    assert made[0].out.strip() not in shown.out


def test_no_key(cli: CommandLine, clone_settings: Settings) -> None:
    log(clone_settings, {})
    for command in ("print-audit-public-key", "seal-audit"):
        assert "AUDIT_SIGNING_KEY is not set: make one with" in cli.fails(command)
    assert "give a public key, or set AUDIT_SIGNING_KEY" in cli.fails("verify-audit")
    for key in ("hunter2", "A" * 40, "A" * 44 + "!"):
        reason = cli.fails("seal-audit", AUDIT_SIGNING_KEY=key)
        assert "base64 of 32 bytes" in reason
        assert key not in reason


# Sealed, verified.


def test_seal_and_verify(sealed: CommandLine, clone_settings: Settings) -> None:
    assert sealed.ok("seal-audit") == Result(0, "", "sealed 0 events in 0 seals\n")
    log(clone_settings, {}, {})
    assert sealed.ok("verify-audit") == Result(
        0, "", "12 events verified against 1 seals; 2 events not sealed yet; 0 retired\n"
    )
    assert sealed.ok("seal-audit", "--json").json == {"rows": 2, "seals": 1, "waits_for": []}
    assert sealed.ok("verify-audit", "--json").json == {
        "sound": True, "seals": 2, "rows": 14, "retired": 0, "unsealed": 0, "count": 0,
        "findings": [],
    }  # fmt: skip


@pytest.mark.slow
def test_a_finding_is_named_and_fails(sealed: CommandLine, clone_settings: Settings) -> None:
    run_sql(
        clone_settings,
        REPLICA,
        "UPDATE audit_logs SET user_id = 'eve' WHERE position = 5",
        "DELETE FROM audit_logs WHERE position = 7",
    )
    changed = sealed.ok("list-events", "--user", "eve", "--json").json["items"][0]["id"]
    found = sealed("verify-audit")
    heading, first, second = found.out.splitlines()
    assert heading.split() == ["Position", "Seal", "Finding", "Message"]
    assert first.split()[:3] == ["5", "1", "changed"]
    assert second.split()[:3] == ["7", "1", "deleted"]
    assert found.code == 1
    _, reason = found.err.splitlines()
    assert reason == (
        f"error: changed: the event at position 5 was changed ({changed}); 2 findings in all"
    )
    shown = sealed("verify-audit", "--json")
    assert shown.code == 1
    assert (shown.json["sound"], shown.json["count"]) == (False, 2)
    assert shown.json["findings"][0] == {
        "kind": "changed", "message": "the event at position 5 was changed", "seal": 1,
        "position": 5, "event_id": changed,
    }  # fmt: skip
    process = sealed.process("verify-audit")
    assert (process.code, process.err.splitlines()[-1]) == (1, reason)


@pytest.mark.slow
def test_open_transactions_are_named(signing: CommandLine, clone_settings: Settings) -> None:
    async def run() -> tuple[int, Result, Result]:
        connection = await connect(clone_settings)
        try:
            async with connection.transaction():
                await connection.execute("LOCK audit_logs IN ROW EXCLUSIVE MODE")
                pid = connection.get_server_pid()
                results = [
                    await asyncio.to_thread(signing.process, "seal-audit", "--patience", "0", *json)
                    for json in ((), ("--json",))
                ]
        finally:
            await connection.close()
        return pid, results[0], results[1]

    pid, result, as_json = asyncio.run(run())
    assert (result.code, as_json.code) == (1, 1)
    assert f"still open (processes {pid})" in result.err
    assert as_json.json == {"rows": 0, "seals": 0, "waits_for": [pid]}
    assert "--patience" in signing.misused("seal-audit", "--patience", "-1")


def test_maintain(cli: CommandLine) -> None:
    assert cli.ok("maintain-audit") == Result(0, "", "created 0 partitions\n")
    done = cli.ok("maintain-audit", "--json", AUDIT_RETENTION_MONTHS="12").json
    assert (done["made"], done["retired"], done["kept"]) == (0, [], {})


# Written out.


@pytest.mark.slow
def test_verified_anywhere(sealed: CommandLine, bare: CommandLine, tmp_path: Path) -> None:
    """With the file, the checkpoint and the public key: no database, no secrets."""
    events, head, key = (tmp_path / name for name in ("events.jsonl", "head.json", "key.pem"))
    assert sealed.ok("export-events", "--out", str(events)).err == "exported 12 events\n"
    assert sealed.ok("export-checkpoint", "--out", str(head)) == Result(0, "", "")
    key.write_text(sealed.ok("print-audit-public-key").out, encoding="ascii")
    signing = parse_signing_key(sealed.env["AUDIT_SIGNING_KEY"])
    assert parse_public_key(key.read_text("ascii")) == signing.public_key()
    for file in (events, head):
        assert file.stat().st_mode & 0o777 == 0o600
    assert {*tmp_path.iterdir()} == {events, head, key}

    secret, bare.env = bare.env.pop("AUDIT_SIGNING_KEY"), {}
    options = ("--from", str(events), "--checkpoint", str(head))
    says = "12 events verified against 1 seals; 0 events not sealed yet; 0 retired\n"
    assert bare.ok("verify-audit", *options, "--public-key", str(key)) == Result(0, "", says)
    assert bare.ok("verify-audit", *options, AUDIT_SIGNING_KEY=secret).err == says
    as_text = tmp_path / "key.txt"
    as_text.write_text(public_text(signing.public_key()) + "\n", encoding="ascii")
    assert bare.process("verify-audit", *options, "--public-key", str(as_text)).err == says
    assert "give a public key" in bare.fails("verify-audit", *options)

    lines = events.read_text("utf-8").splitlines(keepends=True)
    events.write_text("".join(lines[:5] + lines[6:]), encoding="utf-8")
    found = bare("verify-audit", *options, "--public-key", str(key))
    assert found.code == 1
    assert "error: deleted: the event at position 5 is missing\n" in found.err
    events.write_text("", encoding="utf-8")
    found = bare("verify-audit", *options, "--public-key", str(key))
    assert found.code == 1
    assert (
        "error: truncated at the end: the seals from 1 to 1, of the checkpoint, are missing"
        in found.err
    )


def test_files_that_are_something_else(
    sealed: CommandLine, bare: CommandLine, tmp_path: Path
) -> None:
    key, head, other = (str(tmp_path / name) for name in ("key", "head", "other"))
    Path(key).write_text(sealed.ok("print-audit-public-key").out, encoding="ascii")
    Path(head).write_text(sealed.ok("export-checkpoint").out, encoding="ascii")
    for content, reason in (
        (b"nonsense", "not an Ed25519 public key, in PEM or as base64 of its 32 bytes"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n", "not an Ed25519 public key"),
        (b"\xff\xfe", "not text"),
        (Path(head).read_bytes(), "not an Ed25519 public key"),
    ):
        Path(other).write_bytes(content)
        said = sealed.fails("verify-audit", "--public-key", other)
        assert said.startswith(f"error: {other}: {reason}")
    for content, reason in (
        (b"nonsense", "not a checkpoint of an audit trail"),
        (b"\xff\xfe", "not text"),
        (b"{}", "not a checkpoint of an audit trail"),
        (Path(key).read_bytes(), "not a checkpoint of an audit trail"),
    ):
        Path(other).write_bytes(content)
        said = sealed.fails("verify-audit", "--checkpoint", other)
        assert said == f"error: {other}: {reason}\n"
        said = bare.fails("verify-audit", "--from", other, "--public-key", key)
        assert said == "error: line 1 is neither an event nor a seal\n"
    for option in ("--from", "--checkpoint", "--public-key"):
        arguments = [option, str(tmp_path / "none"), "--public-key", key]
        assert "No such file" in sealed.fails("verify-audit", *arguments)


def test_a_checkpoint_shows_what_is_missing(sealed: CommandLine, clone_settings: Settings) -> None:
    head = sealed.ok("export-checkpoint").out
    file = os.devnull
    assert {*json.loads(head)} == {"statement", "signature"}
    run_sql(clone_settings, REPLICA, "DELETE FROM audit_seals", "DELETE FROM audit_logs")
    assert sealed.ok("verify-audit").err.startswith("0 events verified against 0 seals;")
    assert "nothing is sealed yet: run `tiger-db seal-audit`" in sealed.fails("export-checkpoint")
    assert "not a checkpoint" in sealed.fails("verify-audit", "--checkpoint", file)


@pytest.mark.slow
def test_export_to_stdout(sealed: CommandLine, clone_settings: Settings) -> None:
    exported = sealed.ok("export-events")
    first, *lines = exported.out.splitlines()
    assert [*json.loads(first)] == ["seal"]
    assert [json.loads(line)["position"] for line in lines] == [*range(1, COUNT + 1)]
    assert exported.err == "exported 12 events\n"
    assert sealed.process("export-events").out == exported.out
    for options in (("--user", "user 7"), ("--user", "user 7", "--since", "1h")):
        (line,) = sealed.ok("export-events", *options).out.splitlines()
        assert json.loads(line)["user_id"] == "user 7"
    assert sealed.ok("export-events", "--until", "1h").out == ""
    log(clone_settings, {"error_message": '=1+1, "x"\ny', "details": {"price": 0.1}})
    shown = sealed.process("export-events", "--format", "csv", "--since", "1h")
    *rest, last = csv.DictReader(io.StringIO(shown.out, newline=""))
    assert len(rest) == COUNT
    assert last["error_message"] == '\'=1+1, "x"\ny'
    assert "--format" in sealed.misused("export-events", "--format", "xml")


@pytest.mark.schema_changes
def test_a_file_appears_when_it_is_complete(
    sealed: CommandLine, clone_settings: Settings, tmp_path: Path
) -> None:
    """And what was there before stays until then."""
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


@pytest.mark.parametrize("command", EXPORTS)
def test_a_file_is_replaced_only_when_told(
    sealed: CommandLine, tmp_path: Path, command: str
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(file)
    for out in (file, link):
        reason = sealed.fails(command, "--out", str(out))
        assert reason == f"error: {out} is there already: --overwrite replaces it\n"
        assert file.read_text() == "mine"
    expected = sealed.ok(command).out
    sealed.ok(command, "--out", str(link), "--overwrite")
    assert file.read_text() == expected
    assert link.readlink() == file
    assert {*tmp_path.iterdir()} == {file, link}


@pytest.mark.parametrize("command", EXPORTS)
def test_a_pipe_is_written_into(sealed: CommandLine, tmp_path: Path, command: str) -> None:
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
def test_what_the_shell_opened_is_written_into(
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
@pytest.mark.skipif(
    sys.platform != "linux", reason="only there is it seen what a process waits for"
)
@pytest.mark.parametrize("command", EXPORTS)
def test_a_pipe_that_nobody_reads_is_waited_for_until_ctrl_c(
    sealed: CommandLine, tmp_path: Path, command: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [*COMMAND, command, "--out", str(pipe)], env=sealed.environment(), stderr=subprocess.PIPE
    ) as process:
        try:
            waits = Path(f"/proc/{process.pid}/wchan")  # where in the kernel: in open()
            wait_until(lambda: waits.read_text() == "wait_for_partner")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10)[1] == b"interrupted\n"
            assert process.returncode == 130
        finally:
            process.kill()
    assert [*tmp_path.iterdir()] == [pipe]


# Listed, counted, followed.


@pytest.mark.slow
def test_lists_by_resource_and_details(cli: CommandLine, clone_settings: Settings) -> None:
    log(
        clone_settings,
        {"resource_type": "order", "resource_id": "7", "details": {"symbol": "AAPL", "n": 1}},
        {"resource_type": "order", "resource_id": "8", "details": {"leg": {"symbol": "AAPL"}}},
        {"resource_type": "key", "resource_id": "7", "user_id": "alice"},
    )
    for options, wanted in (
        (("--resource", "7"), ["key/7", "order/7"]),
        (("--resource", "order"), ["order/8", "order/7"]),
        (("--resource", "order/7"), ["order/7"]),
        (("--resource", "order/9"), []),
        (("--details", '{"symbol": "AAPL"}'), ["order/7"]),
        (("--details", '{"leg": {"symbol": "AAPL"}}'), ["order/8"]),
        (("--details", '{"n": 1, "symbol": "AAPL"}'), ["order/7"]),
        (("--details", '{"n": "1"}'), []),
        (("--details", "{}"), ["order/8", "order/7"]),
        (("--resource", "7", "--user", "alice"), ["key/7"]),
    ):
        items = cli.ok("list-events", "--json", *options).json["items"]
        assert [f"{i['resource_type']}/{i['resource_id']}" for i in items] == wanted, options
        exported = cli.ok("export-events", *options).out.splitlines()
        assert [json.loads(line)["resource_id"] for line in exported] == [
            item["resource_id"] for item in items[::-1]
        ]
    for text in ("x", "[]", '"x"', "1", "", "{"):
        for command in ("list-events", "export-events"):
            assert "give a JSON object" in cli.misused(command, "--details", text)
    assert "details" in cli.fails("list-events", "--details", '{"x": "\\u0000"}')


def test_counts(cli: CommandLine, clone_settings: Settings) -> None:
    assert cli.ok("count-events") == Result(0, "", "there are none\n")
    log(
        clone_settings,
        *[{"action": AuditAction.DATA_QUERY}] * 3,
        {"action": AuditAction.TRADE_PLACE_ORDER, "result": AuditResult.ERROR},
    )
    shown = cli.ok("count-events", "--json").json
    (hour,) = shown.pop("hours").items()
    assert shown == {
        "actions": {"data:query": 3, "trade:place_order": 1},
        "results": {"success": 3, "error": 1},
    }
    assert hour[1] == 4
    at = datetime.fromisoformat(hour[0])
    assert (at.minute, at.utcoffset()) == (0, timedelta(0))
    assert timedelta(0) <= datetime.now(UTC) - at < timedelta(hours=1, minutes=5)
    assert [line.split() for line in cli.ok("count-events").out.splitlines()] == [
        ["Result", "Events"], ["success", "3"], ["error", "1"], [],
        ["Action", "Events"], ["data:query", "3"], ["trade:place_order", "1"],
    ]  # fmt: skip
    for last, bars, form in (
        ("6h", 7, "%m-%d %H:00"),
        ("2d", 49, "%m-%d %H:00"),
        ("2w", 15, "%Y-%m-%d"),
    ):
        lines = cli.ok("count-events", "--chart", "--since", last).out.splitlines()
        assert len(lines) == bars
        (full,) = [line for line in lines if "\u2588" in line]
        assert full.startswith(at.strftime(form))
        assert full.split()[-1] == "4"
        assert all(line.split()[-1] == "0" for line in lines if line != full)
    for last in ("x", "0h", "-1h"):
        assert "--since" in cli.misused("count-events", "--since", last)


@asynccontextmanager
async def following(cli: CommandLine, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that waits for events."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "list-events", "--follow", *options,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = await asyncio.wait_for(process.stderr.readline(), 20)
        assert said.decode() == "waiting for events; Ctrl-C to stop\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 10)).decode()


def follow(
    settings: Settings,
    cli: CommandLine,
    *options: str,
    work: Callable[[asyncio.subprocess.Process, Database], Awaitable[None]],
) -> None:
    """Do something while a process follows, then interrupt it."""

    async def run() -> tuple[int | None, bytes, bytes]:
        async with Database(settings) as database, following(cli, *options) as process:
            await work(process, database)
            process.send_signal(signal.SIGINT)
            out, err = await asyncio.wait_for(process.communicate(), 10)
            return process.returncode, out, err

    assert asyncio.run(run()) == (130, b"", b"interrupted\n")


@pytest.mark.slow
def test_follow(cli: CommandLine, clone_settings: Settings) -> None:
    """What is committed from now on, once, that matches; not what is rolled back."""
    log(clone_settings, {"user_id": "before"})
    create_account(cli, "51230321")
    account = cli.ok("show-account", "51230321", "--json").json["id"]

    async def work(process: asyncio.subprocess.Process, database: Database) -> None:
        async with database.session() as session, database.session() as undone:
            await crud.audit_logs.log_event(undone, action=AuditAction.DATA_QUERY, user_id="undone")
            await crud.audit_logs.log_event(session, action=AuditAction.TRADE_PLACE_ORDER)
            await crud.audit_logs.log_event(
                session, action=AuditAction.DATA_QUERY, user_id="x\x1b[2J", tiger_account_id=account
            )
            await undone.rollback()
        shown = (await line_of(process)).split()
        assert shown[2:] == ["data:query", "success", "low", "51230321", "x\\x1b[2J"]
        async with database.session() as late:
            await crud.audit_logs.log_event(late, action=AuditAction.DATA_QUERY, user_id="late")
            async with database.session() as early:
                await crud.audit_logs.log_event(
                    early, action=AuditAction.DATA_QUERY, user_id="early"
                )
            assert (await line_of(process)).split()[-1] == "early"
        assert (await line_of(process)).split()[-1] == "late"

    follow(clone_settings, cli, "--action", "data:query", work=work)


@pytest.mark.slow
def test_follow_without_notifications(cli: CommandLine, clone_settings: Settings) -> None:
    """As where a pooler is between, or after the connection that listens was lost."""

    async def work(process: asyncio.subprocess.Process, database: Database) -> None:
        watcher = await connect(clone_settings)
        try:
            for number in range(3):
                async with database.session() as session:
                    await crud.audit_logs.log_event(
                        session, action=AuditAction.DATA_QUERY, details={"number": number}
                    )
                shown = json.loads(await line_of(process))
                assert shown["details"] == {"number": number}
                assert len(await watcher.fetch(LISTENERS)) == (number == 0)
        finally:
            await watcher.close()

    follow(clone_settings, cli, "--json", work=work)


@pytest.mark.slow
def test_follow_says_so_when_it_has_begun(cli: CommandLine, clone_settings: Settings) -> None:
    """What is committed after it has said that it waits is shown."""

    async def run() -> None:
        connection = await connect(clone_settings)
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "list-events", "--follow", "--json",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(),
        )  # fmt: skip
        try:
            assert process.stderr is not None
            async with connection.transaction():
                await connection.execute("LOCK audit_logs")
                while not await connection.fetchval(WAITING):
                    assert process.returncode is None
                with pytest.raises(TimeoutError):  # it has not looked at what was there before
                    await asyncio.wait_for(process.stderr.readline(), 0.2)
                await connection.execute(INSERT, "before")
            assert "waiting" in (await asyncio.wait_for(process.stderr.readline(), 10)).decode()
            await connection.execute(INSERT, "after")
            assert json.loads(await line_of(process))["user_id"] == "after"
        finally:
            process.kill()
            await process.wait()
            await connection.close()

    asyncio.run(run())


def test_follow_has_no_end(cli: CommandLine) -> None:
    for option in (("--until", "1h"), ("--after", "x")):
        assert "--follow" in cli.misused("list-events", "--follow", *option)
    assert "no account" in cli.fails("list-events", "-f", "--account", "nope")
    assert "address nor a network" in cli.fails("list-events", "-f", "--ip", "300.1.1.1")


@pytest.mark.slow
def test_a_full_device_is_one_line(
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
