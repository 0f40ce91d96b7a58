"""Commands for the configuration files of Tiger's SDKs."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.cli_accounts import create, stored
from tests.support.command_line import CommandLine
from tests.support.factories import plain
from tests.support.tiger_files import (
    EVERYTHING,
    NEW,
    NUMBER,
    OLD,
    PK8,
    REQUIRED,
    config,
    mode,
    names,
)
from tests.support.tiger_files import token as tiger_token
from tiger_db import TigerAccount
from tiger_db.tiger import CONFIG_FILE, TOKEN_FILE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration file with all fields, readable by its owner only."""
    path = config(tmp_path, EVERYTHING)
    path.chmod(0o600)
    return path


@pytest.mark.slow
def test_an_account_is_imported_and_exported(cli: CommandLine, file: Path, tmp_path: Path) -> None:
    valid = tiger_token(datetime.now(UTC))
    token = config(tmp_path, {"token": valid}, "token.properties")
    token.chmod(0o600)
    files = (str(file), "--token-file", str(token))
    created = cli.ok("import-account", *files, "--name", "Main", "--json")
    assert created.err == "created account ****0321\n"
    account = stored(cli)
    assert created.json == account.model_dump(mode="json")
    assert list(created.json) == list(TigerAccount.model_fields)
    assert (account.account_name, plain(account.private_key)) == ("Main", PK8)
    assert plain(account.access_token) == valid

    folder = tmp_path / "out"
    exported = cli.ok("export-account", NUMBER, "--out", str(folder))
    assert exported.out == f"{folder / CONFIG_FILE}\n{folder / TOKEN_FILE}\n"
    assert exported.err == "exported account ****0321: keep the files secret\n"
    bare = tmp_path / "without_token"
    exported_bare = cli.ok("export-account", NUMBER, "--out", str(bare), "--without-token")
    assert exported_bare.out == f"{bare / CONFIG_FILE}\n"
    assert not (bare / TOKEN_FILE).exists()
    assert (folder / CONFIG_FILE).read_text() == file.read_text()
    assert (folder / TOKEN_FILE).read_text() == token.read_text()
    assert [mode(folder / name) for name in names(folder)] == [0o600, 0o600]

    for paths, told in (
        (files, []),
        ((exported.out.split()[0],), [f"the access token is from {folder / TOKEN_FILE}"]),
        ((exported_bare.out.strip(),), []),
    ):
        again = cli.ok("import-account", *paths)
        unchanged = (
            "account ****0321 was not changed, because the account already has the values of the"
            " files"
        )
        assert again.err.splitlines() == [unchanged, *told]
    assert stored(cli) == account
    events = cli.ok("list-events", "--json").json["items"]
    assert [event["action"] for event in events] == [
        "account:export", "account:export", "account:import", "account:create"
    ]  # fmt: skip


def test_an_imported_account_is_shown_without_secrets(cli: CommandLine, file: Path) -> None:
    result = cli.ok("import-account", str(file))
    assert NUMBER in result.out
    assert "TBHK" in result.out
    for secret in (PK8[:20], "s3cret", "20150001"):
        assert secret not in result.out + result.err


@pytest.mark.slow
def test_import_warns_of_a_license_that_needs_a_token(cli: CommandLine, file: Path) -> None:
    warning = (
        "warning: the account serves no requests, because the license TBHK needs a valid access"
        f" token: import the account again with its file {TOKEN_FILE}"
    )
    assert cli.ok("import-account", str(file)).err.splitlines() == [
        "created account ****0321", warning
    ]  # fmt: skip
    token = config(file.parent, {"token": tiger_token(datetime.now(UTC))}, TOKEN_FILE)
    token.chmod(0o644)
    changed, source, warned = cli.ok("import-account", str(file)).err.splitlines()
    assert changed == "changed account ****0321: access_token"
    assert source == f"the access token is from {token}"
    assert warned.endswith(f"can read the secrets in {token}: run chmod 600 {token}")


@pytest.mark.slow
def test_import_prints_the_changed_fields(cli: CommandLine, file: Path) -> None:
    cli.ok("import-account", str(file))
    config(file.parent, EVERYTHING | {"license": "TBSG", "timeout": "30"})
    result = cli.ok("import-account", str(file), "--name", "New", "--json")
    changes = "license, client_options, account_name"
    assert result.err == f"changed account ****0321: {changes}\n"
    assert result.json["account_name"] == "New"


@pytest.mark.slow
def test_import_prints_the_ignored_lines(cli: CommandLine, file: Path) -> None:
    lines = EVERYTHING | {"license": "TBSG"}
    config(file.parent, lines | {"token": NEW})
    cli.ok("import-account", str(file))
    config(file.parent, lines | {"token": OLD, "colour": "red"})
    assert cli.ok("import-account", str(file)).err.splitlines() == [
        "account ****0321 was not changed, because the account already has the values of the files",
        "warning: the stored access token was kept, because the token in the file is older",
        f"warning: unknown lines in {file} were ignored: colour",
    ]
    assert plain(stored(cli).access_token) == NEW


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_import_warns_of_files_that_other_users_can_read(
    cli: CommandLine, file: Path, tmp_path: Path, bits: int
) -> None:
    token = config(tmp_path, {"token": NEW}, TOKEN_FILE)
    for path in (file, token):
        path.chmod(bits)
    result = cli.ok("import-account", str(file), "--token-file", str(token))
    for path in (file, token):
        assert f"warning: other users of this machine can read the secrets in {path}" in result.err
        assert f"chmod 600 {path}\n" in result.err


def test_a_malformed_file_is_refused(cli: CommandLine, file: Path, tmp_path: Path) -> None:
    for lines, reason in (
        (
            REQUIRED | {"private_key_pk8": PK8[:-8]},
            "private_key_pk8: the private key is not an RSA key",
        ),
        (REQUIRED | {"env": "EVERYWHERE"}, "env: Input should be 'PROD' or 'SANDBOX'"),
        (REQUIRED | {"tiger_id": ""}, "the property tiger_id is missing"),
    ):
        config(tmp_path, lines)
        error = cli.fails("import-account", str(file))
        assert error.startswith(f"error: {file}: {reason}")
        assert PK8[:20] not in error
    missing = str(tmp_path / "none")
    assert cli.fails("import-account", missing) == f"error: {missing}: No such file or directory\n"
    assert "--name" not in cli.misused("import-account")
    assert cli.ok("list-accounts", "--json").json["items"] == []


@pytest.mark.slow
def test_a_closed_account_is_neither_imported_nor_exported(cli: CommandLine, file: Path) -> None:
    cli.ok("import-account", str(file))
    cli.ok("close-account", NUMBER, "--yes")
    assert "tiger-db reopen-account" in cli.fails("import-account", str(file))
    assert "is closed" in cli.fails("export-account", NUMBER, "--out", str(file.parent / "out"))


def test_exported_paths_are_printed_as_json(cli: CommandLine, file: Path, tmp_path: Path) -> None:
    account = cli.ok("import-account", str(file), "--json").json
    folder = tmp_path / "a folder\n"
    result = cli.ok("export-account", account["id"], "--out", str(folder), "--json")
    assert result.json == {"items": [str(folder / CONFIG_FILE)], "next_cursor": None}


@pytest.mark.slow
def test_export_replaces_files_only_with_overwrite(
    cli: CommandLine, file: Path, tmp_path: Path
) -> None:
    cli.ok("import-account", str(file))
    mine = file.read_text() + "# mine"
    file.write_text(mine)
    export = ("export-account", NUMBER, "--out", str(tmp_path))
    assert cli.fails(*export) == f"error: {file} already exists: --overwrite replaces it\n"
    assert file.read_text() == mine
    cli.ok(*export, "--overwrite")
    assert file.read_text() != mine


def test_an_unknown_account_or_a_key_that_is_not_rsa_is_not_exported(
    cli: CommandLine, tmp_path: Path
) -> None:
    to = ("--out", str(tmp_path / "out"))
    assert "no account" in cli.fails("export-account", NUMBER, *to)
    create(cli)
    assert "not an RSA key" in cli.fails("export-account", NUMBER, *to)
    assert "--out" in cli.misused("export-account", NUMBER)
    assert names(tmp_path) == []
