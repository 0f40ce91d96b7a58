"""The command sign-api-keys, and what `migrate` says about unsigned API keys."""

import pytest

from tests.support.cli_api_keys import create, refusal
from tests.support.command_line import CommandLine
from tests.support.sql import run_sql
from tiger_db.settings import Settings

UNSIGNED = "UPDATE api_keys SET mac = NULL"


@pytest.mark.slow
def test_unsigned_keys_are_listed_and_signed_after_a_confirmation(
    cli: CommandLine, clone_settings: Settings
) -> None:
    assert cli.ok("sign-api-keys").err == "no API key is unsigned\n"
    row = create(cli, "--scopes", "trade:read")
    run_sql(clone_settings, UNSIGNED)
    assert "InvalidAPIKey" in refusal(cli, row["key"])
    shown = cli("sign-api-keys")
    assert (shown.code, row["key_prefix"] in shown.out) == (2, True)
    assert "--yes" in " ".join(shown.err.split())
    assert "InvalidAPIKey" in refusal(cli, row["key"])
    result = cli.ok("--actor", "alice", "sign-api-keys", "--yes")
    assert row["key_prefix"] in result.out
    assert "trade:read" in result.out
    assert result.err == "signed 1 API key\n"
    cli.ok("verify-api-key", "-", stdin=row["key"])
    (signed,) = cli.ok("list-events", "--action", "api_key:sign", "--json").json["items"]
    assert (signed["api_key_id"], signed["user_id"]) == (row["id"], "alice")
    assert cli.ok("sign-api-keys", "--yes", "--json").json == {"items": [], "wrong": []}


def test_a_wrong_code_is_named_and_not_signed(cli: CommandLine, clone_settings: Settings) -> None:
    row = create(cli)
    run_sql(clone_settings, "UPDATE api_keys SET scopes = '{trade:admin}'")
    result = cli.ok("sign-api-keys", "--yes", "--json")
    assert result.json == {"items": [], "wrong": [row["key_prefix"]]}
    assert f"API key {row['key_prefix']} has a wrong authentication code" in result.err
    assert "InvalidAPIKey" in refusal(cli, row["key"])


@pytest.mark.slow
def test_migrate_ends_with_the_line_to_run(cli: CommandLine, clone_settings: Settings) -> None:
    create(cli)
    assert "sign-api-keys" not in cli.ok("migrate").err
    run_sql(clone_settings, UNSIGNED)
    last = cli.ok("migrate").err.splitlines()[-1]
    assert last.startswith("warning: 1 API key without an authentication code")
    assert "run `tiger-db sign-api-keys`" in last
    run_sql(clone_settings, "UPDATE api_keys SET status = 'revoked'")
    assert "sign-api-keys" not in cli.ok("migrate").err
