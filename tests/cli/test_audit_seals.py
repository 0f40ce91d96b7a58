"""Commands that seal, verify and maintain the audit trail."""

import asyncio
import json
import os
import re
from pathlib import Path

import pytest

from tests.support.cli_events import log
from tests.support.command_line import CommandLine, Result
from tests.support.months import month, put
from tests.support.sql import run_sql
from tests.support.terminal import Terminal
from tiger_db import Settings
from tiger_db.connections import connect
from tiger_db.signing import parse_public_key, parse_signing_key, public_pem, public_text

REPLICA = "SET session_replication_role = replica"


def test_a_signing_key_is_generated_and_its_public_key_printed(bare: CommandLine) -> None:
    made = [bare.ok("generate-audit-signing-key") for _ in range(2)]
    assert made[0].out != made[1].out
    key = parse_signing_key(made[0].out.strip())
    assert "print-audit-public-key" in made[0].err
    env = {"AUDIT_SIGNING_KEY": made[0].out.strip(), "DATABASE_URL": "postgresql://nowhere/x"}
    shown = bare.ok("print-audit-public-key", **env)
    assert shown == Result(0, public_pem(key.public_key()), "")
    assert made[0].out.strip() not in shown.out


def test_a_missing_or_malformed_signing_key_is_an_error(
    cli: CommandLine, clone_settings: Settings
) -> None:
    log(clone_settings, {})
    for command in ("print-audit-public-key", "seal-audit"):
        assert "AUDIT_SIGNING_KEY is not set: set it to the key of this audit trail" in cli.fails(
            command
        )
    assert "give a public key (`--public-key`)" in cli.fails("verify-audit")
    for key in ("hunter2", "A" * 40, "A" * 44 + "!"):
        reason = cli.fails("seal-audit", AUDIT_SIGNING_KEY=key)
        assert "base64 of 32 bytes" in reason
        assert key not in reason


@pytest.mark.slow
def test_events_are_sealed_and_verified(sealed: CommandLine, clone_settings: Settings) -> None:
    assert sealed.ok("seal-audit") == Result(0, "", "sealed 0 events in 0 seals\n")
    log(clone_settings, {}, {})
    found = sealed.ok("verify-audit")
    assert (found.code, found.out) == (0, "")
    key = parse_signing_key(sealed.env["AUDIT_SIGNING_KEY"])
    first, chain, *rest = found.err.splitlines()
    assert first == (
        "verified 12 events against 1 seal; not sealed yet: 2 events;"
        " removed by `tiger-db maintain-audit`: 0 events"
    )
    assert re.fullmatch("chain: 1 seal, unbroken; origin: [0-9a-f]{32}", chain)
    assert rest == [
        f"signatures: {public_text(key.public_key())}",
        "checkpoint folder: not set, see AUDIT_CHECKPOINTS",
        "checkpoint given: none",
    ]
    assert sealed.ok("seal-audit", "--json").json == {
        "rows": 2, "seals": 1, "waits_for": [], "verified": 0,
    }  # fmt: skip
    verified = sealed.ok("verify-audit", "--json").json
    basis = verified.pop("basis")
    assert [line.partition(":")[0] for line in basis] == [
        "chain", "signatures", "checkpoint folder", "checkpoint given",
    ]  # fmt: skip
    assert verified == {
        "sound": True, "seals": 2, "rows": 14, "archived": 0, "retired": 0, "unsealed": 0,
        "count": 0, "findings": [], "warnings": [],
    }  # fmt: skip
    run_sql(
        clone_settings,
        "INSERT INTO audit_logs (id, created_at, action, result, severity) VALUES"
        " (gen_random_uuid(), now() - interval '1 hour', 'data:query', 'success', 'low')",
    )
    warned = sealed.ok("verify-audit")
    assert "15 3 clock went back the event at position 15" in " ".join(warned.out.split())
    assert "1 warning: see the table" in warned.err


@pytest.mark.slow
def test_sealing_shows_its_progress_on_a_terminal(
    sealed: CommandLine, clone_settings: Settings, terminal: Terminal
) -> None:
    log(clone_settings, *[{}] * 3)
    with terminal.program(sealed, "seal-audit") as program:
        assert terminal.end(program) == 0
    before, _, result = terminal.seen.partition("sealed 3 events in 1 seal")
    assert "3 events" in before
    assert result


@pytest.mark.slow
def test_verify_fails_and_names_the_first_finding(
    sealed: CommandLine, clone_settings: Settings
) -> None:
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
    reason = found.err.splitlines()[-1]
    assert reason == (
        f"error: changed: the event at position 5 was changed ({changed}); 2 findings in total"
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
    assert f"still open (server processes: {pid})" in result.err
    assert as_json.json == {"rows": 0, "seals": 0, "waits_for": [pid], "verified": 0}
    assert "--patience" in signing.misused("seal-audit", "--patience", "-1")


def test_maintain_reports_what_it_did(cli: CommandLine) -> None:
    assert cli.ok("maintain-audit") == Result(0, "", "created 0 partitions\n")
    done = cli.ok("maintain-audit", "--json", AUDIT_RETENTION_MONTHS="12").json
    assert (done["made"], done["retired"], done["kept"]) == (0, [], {})


@pytest.mark.slow
def test_an_export_is_verified_without_a_database(
    sealed: CommandLine, bare: CommandLine, tmp_path: Path
) -> None:
    """The export, the checkpoint and the public key are enough."""
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
    says = (
        "verified 12 events against 1 seal; not sealed yet: 0 events;"
        " removed by `tiger-db maintain-audit`: 0 events\n"
    )
    shown = bare.ok("verify-audit", *options, "--public-key", str(key))
    assert (shown.code, shown.out) == (0, "")
    assert shown.err.startswith(says)
    assert shown.err.endswith("\ncheckpoint given: seal 1 is in the chain\n")
    assert bare.ok("verify-audit", *options, AUDIT_SIGNING_KEY=secret).err == shown.err
    as_text = tmp_path / "key.txt"
    as_text.write_text(public_text(signing.public_key()) + "\n", encoding="ascii")
    assert bare.process("verify-audit", *options, "--public-key", str(as_text)).err == shown.err
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
        "error: truncated at the end: seal 1 is missing, according to the checkpoint" in found.err
    )


def test_malformed_files_are_refused(
    sealed: CommandLine, bare: CommandLine, tmp_path: Path
) -> None:
    key, head, other = (str(tmp_path / name) for name in ("key", "head", "other"))
    Path(key).write_text(sealed.ok("print-audit-public-key").out, encoding="ascii")
    Path(head).write_text(sealed.ok("export-checkpoint").out, encoding="ascii")
    for content, reason in (
        (b"nonsense", "the text is not an Ed25519 public key in PEM or base64 of 32 bytes"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n", "the text is not an Ed25519 public key"),
        (b"\xff\xfe", "the file is not UTF-8 text"),
        (Path(head).read_bytes(), "the text is not an Ed25519 public key"),
    ):
        Path(other).write_bytes(content)
        said = sealed.fails("verify-audit", "--public-key", other)
        assert said.startswith(f"error: {other}: {reason}")
    for content, reason in (
        (b"nonsense", "the text is not a checkpoint from `tiger-db export-checkpoint`"),
        (b"\xff\xfe", "the file is not UTF-8 text"),
        (b"{}", "the text is not a checkpoint from `tiger-db export-checkpoint`"),
        (Path(key).read_bytes(), "the text is not a checkpoint from `tiger-db export-checkpoint`"),
    ):
        Path(other).write_bytes(content)
        said = sealed.fails("verify-audit", "--checkpoint", other)
        assert said == f"error: {other}: {reason}\n"
        said = bare.fails("verify-audit", "--from", other, "--public-key", key)
        assert said == (
            "error: line 1 of the export is neither an event nor a seal:"
            " the file is damaged, or is not an export in JSON Lines\n"
        )
    for option in ("--from", "--checkpoint", "--public-key"):
        arguments = [option, str(tmp_path / "none"), "--public-key", key]
        assert "No such file" in sealed.fails("verify-audit", *arguments)


@pytest.mark.slow
def test_a_checkpoint_requires_a_seal(sealed: CommandLine, clone_settings: Settings) -> None:
    head = sealed.ok("export-checkpoint").out
    file = os.devnull
    assert {*json.loads(head)} == {"statement", "signature"}
    run_sql(clone_settings, REPLICA, "DELETE FROM audit_seals", "DELETE FROM audit_logs")
    assert sealed.ok("verify-audit").err.startswith("verified 0 events against 0 seals;")
    assert "the audit trail has no seal yet: run `tiger-db seal-audit`" in sealed.fails(
        "export-checkpoint"
    )
    assert "not a checkpoint" in sealed.fails("verify-audit", "--checkpoint", file)


@pytest.mark.slow
def test_the_sealer_says_what_it_verified_repaired_and_refused(
    sealed: CommandLine, clone_settings: Settings, tmp_path: Path
) -> None:
    sealed.env["AUDIT_CHECKPOINTS"] = str(tmp_path)
    saved = "verified the chain of 1 seal, and saved the first checkpoint in AUDIT_CHECKPOINTS\n"
    assert sealed.ok("seal-audit").err == f"{saved}sealed 0 events in 0 seals\n"
    assert sealed.ok("seal-audit", "--repair-sequence").err == (
        "the sequence of positions is not behind the newest seal\nsealed 0 events in 0 seals\n"
    )
    run_sql(clone_settings, "SELECT setval('audit_logs_position_seq', 5)")
    assert "run `tiger-db seal-audit --repair-sequence`" in sealed.fails("seal-audit")
    assert sealed.ok("seal-audit", "--repair-sequence").err == (
        "moved the sequence of positions from 5 to 12\nsealed 1 event in 1 seal\n"
    )
    run_sql(clone_settings, REPLICA, "DELETE FROM audit_seals WHERE number = 2")
    assert "the newest seals are missing, from seal 2 on" in sealed.fails("seal-audit")
    found = sealed("verify-audit")
    assert (found.code, "seal 2 is missing, according to the checkpoint" in found.err) == (1, True)


@pytest.mark.slow
def test_a_signing_key_is_changed(sealed: CommandLine, tmp_path: Path) -> None:
    file, public = tmp_path / "new.key", tmp_path / "old.pem"
    public.write_text(sealed.ok("print-audit-public-key").out, encoding="ascii")
    file.write_text(sealed.ok("generate-audit-signing-key").out, encoding="ascii")
    shown = sealed.ok("change-audit-signing-key", "--new-key", str(file))
    assert shown.err.startswith("seal 2 introduces the new signing key: set AUDIT_SIGNING_KEY to")
    assert file.read_text("ascii").strip() not in shown.err
    assert "set AUDIT_SIGNING_KEY to the new key" in sealed.fails("seal-audit")
    sealed.env["AUDIT_SIGNING_KEY"] = file.read_text("ascii").strip()
    assert sealed.ok("seal-audit").err == "sealed 1 event in 1 seal\n"
    assert sealed.ok("verify-audit").code == 0
    assert sealed.ok("verify-audit", "--public-key", str(public)).code == 0
    reason = sealed.fails("change-audit-signing-key", "--new-key", str(file))
    assert "the new signing key is the key in force" in reason
    assert "base64 of 32 bytes" in sealed.fails(
        "change-audit-signing-key", "--new-key", str(public)
    )


@pytest.mark.slow
def test_sealing_goes_on_after_a_restore(
    sealed: CommandLine, clone_settings: Settings, tmp_path: Path
) -> None:
    sealed.env["AUDIT_CHECKPOINTS"] = str(tmp_path)
    assert "or its loss is recorded" in sealed.ok("seal-audit", "--after-restore").err
    run_sql(clone_settings, REPLICA, "DELETE FROM audit_seals", "DELETE FROM audit_logs")
    assert "see docs/backup.md" in sealed.fails("seal-audit")
    said = sealed.ok("seal-audit", "--after-restore").err.splitlines()
    assert re.fullmatch(
        r"seal 1 is lost by a restore, which seal 2 records: positions from 1 to \d+ were sealed"
        r" there; 0 events can be sealed again",
        said[0],
    ), said
    assert said[-1] == "sealed 1 event in 1 seal"
    assert "lost by a restore" in sealed.ok("verify-audit").out


@pytest.mark.slow
def test_a_month_is_archived_and_verified(
    cli: CommandLine, clone_settings: Settings, tmp_path: Path
) -> None:
    folder = {"AUDIT_ARCHIVE": str(tmp_path)} | cli_key()
    assert "AUDIT_ARCHIVE is not set" in cli.fails("archive-audit", "--month", "2020-01")
    for text in ("January", "2026-13", "2026-1", "202601", "2026-01-01", "0000-01", ""):
        message = cli.misused("archive-audit", "--month", text, **folder)
        assert "Invalid value for --month: give a year and a month, such as 2026-01" in message
    done = cli.ok("archive-audit", "--month", "2020-01", **folder)
    assert done.err == "the database has no events of 2020-01\n"
    done = cli.ok("verify-audit", "--archive", **folder)
    assert "of which 0 are in the archive" in done.err
    assert f"archive: {tmp_path}: 0 signed files, 0 retired events" in done.err


def cli_key() -> dict[str, str]:
    return {"AUDIT_SIGNING_KEY": "A" * 43 + "="}


@pytest.mark.slow
def test_maintain_names_each_month_that_stays(
    signing: CommandLine, clone_settings: Settings
) -> None:
    """Late events keep two months, and not the month between them."""

    async def put_months() -> None:
        connection = await connect(clone_settings)
        for ago in (16, 15, 14):
            await put(connection, ago)
        for ago in (16, 14):
            await put(connection, ago, 1, now=True, minute=1)
        await connection.execute("SELECT make_audit_months(0)")
        await connection.close()

    asyncio.run(put_months())
    signing.ok("seal-audit")
    done = signing("maintain-audit", AUDIT_RETENTION_MONTHS="12")
    first, *lines = done.err.splitlines()
    assert (done.code, first) == (1, f"created 0 partitions; removed {month(15)}")
    assert [line.partition(" that ")[0] for line in lines] == [
        f"error: the events of {month(ago)} were not removed: the month holds events"
        for ago in (16, 14)
    ]
    signing.ok("verify-audit")
