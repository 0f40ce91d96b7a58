"""Commands for broker accounts."""

import asyncio
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support import factories
from tests.support.cli_accounts import NUMBER, PAPER, REQUIRED, create, stored
from tests.support.command_line import CommandLine, Result
from tests.support.concurrency import lock_until_waiting
from tests.support.factories import plain
from tests.support.private_keys import SHORT_BITS, short_pem
from tiger_db import Database, PrivateKeyFormat, Settings, TigerAccount, crud
from tiger_db.tiger import parse_private_key


@pytest.fixture(scope="module")
def pem() -> str:
    made = subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, check=True, text=True)
    return made.stdout


@pytest.fixture
def key_file(pem: str, tmp_path: Path) -> str:
    path = tmp_path / "key.pem"
    path.write_text(pem)
    return str(path)


@pytest.mark.slow
def test_an_account_is_created_with_all_options(
    cli: CommandLine, key_file: str, pem: str, tmp_path: Path
) -> None:
    for name, text in (("secret", "s3cret\n"), ("token", " t0ken \n")):
        (tmp_path / name).write_text(text)
    result = create(
        cli, PAPER,
        "--private-key-file", key_file, "--account-type", "prime", "--license", "TBSG",
        "--environment", "SANDBOX", "--server-url", "https://example.com",
        "--market-permissions", "US, HK", "--description", "notes", "--default-trading",
        "--default-data", "--secret-key-file", str(tmp_path / "secret"),
        "--access-token-file", str(tmp_path / "token"),
        "--token-expires-at", "2027-01-31T20:00:00+08:00", "--json",
    )  # fmt: skip
    assert result.err == f"created account {'*' * 13}8300\n"
    account = stored(cli, PAPER)
    der, form = parse_private_key(pem)
    assert plain(account.private_key) == der
    assert account.private_key_format == form
    assert account.tiger_id.get_secret_value() == "20150001"
    assert account.secret_key is not None
    assert account.secret_key.get_secret_value() == "s3cret"
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == "t0ken"
    assert account.token_expires_at == datetime(2027, 1, 31, 12, tzinfo=UTC)
    assert result.json == account.model_dump(mode="json")
    assert list(result.json) == list(TigerAccount.model_fields)
    assert result.json == {
        **result.json,
        "account_name": "Main", "account_number": PAPER, "account_type": "prime",
        "license": "TBSG", "environment": "SANDBOX", "server_url": "https://example.com",
        "market_permissions": ["US", "HK"], "description": "notes", "is_default_trading": True,
        "is_default_data": True, "private_key": "**********", "secret_key": "**********",
        "access_token": "**********", "tiger_id": "**********",
    }  # fmt: skip


def test_a_new_account_is_shown_without_secrets(cli: CommandLine) -> None:
    result = create(cli)
    assert NUMBER in result.out
    assert "account type" in result.out
    assert "standard" in result.out
    assert "test_key" not in result.out + result.err
    assert NUMBER not in result.err
    assert "****0321" in result.err


def test_a_key_that_is_not_rsa_is_stored_outside_production(cli: CommandLine) -> None:
    result = create(cli)
    assert "Tiger will refuse the key" in result.err
    assert plain(stored(cli).private_key) == "test_key"
    assert stored(cli).private_key_format == PrivateKeyFormat.UNKNOWN


def test_production_refuses_a_key_that_is_not_rsa(cli: CommandLine, key_file: str) -> None:
    options = ("create-account", *REQUIRED, "--account-number", NUMBER)
    production = {"ENVIRONMENT": "production", "DB_ALLOW_UNVERIFIED_TLS": "true"}
    reason = cli.fails(*options, "--private-key", "-", stdin="test_key", **production)
    assert "not an RSA key" in reason
    assert "test_key" not in reason
    assert cli.ok("list-accounts", "--json").json["items"] == []
    created = cli.ok(*options, "--private-key-file", key_file, **production)
    assert "refuse" not in created.err


@pytest.mark.slow
def test_a_secret_is_read_from_standard_input(cli: CommandLine, pem: str) -> None:
    for number, option in (("U1", "--private-key"), ("U2", "--private-key-file")):
        result = create(cli, number, option, "-", stdin=pem)
        assert "warning" not in result.err
        assert plain(stored(cli, number).private_key) == parse_private_key(pem)[0]


def test_a_secret_on_the_command_line_causes_a_warning(cli: CommandLine, key_file: str) -> None:
    for number, option in (
        ("U1", "--private-key"),
        ("U2", "--secret-key"),
        ("U3", "--access-token"),
    ):
        private = () if option == "--private-key" else ("--private-key-file", key_file)
        result = create(cli, number, *private, option, "hunter2")
        assert f"{option}-file" in result.err
        assert "other users of this machine can see" in result.err
        assert "hunter2" not in result.out + result.err


def test_a_missing_or_unreadable_secret_is_an_error(cli: CommandLine, tmp_path: Path) -> None:
    options = ("create-account", *REQUIRED, "--account-number", NUMBER)
    assert "--private-key-file" in cli.misused(*options)
    given = ("--private-key", "a", "--private-key-file", "b")
    assert "not both" in cli.misused(*options, *given)
    assert "No such file" in cli.fails(*options, "--private-key-file", str(tmp_path / "none"))
    assert "directory" in cli.fails(*options, "--private-key-file", str(tmp_path))
    (tmp_path / "key.der").write_bytes(b"\x30\x82\xff")
    assert "is not text" in cli.fails(*options, "--private-key-file", str(tmp_path / "key.der"))
    assert "is not text" in cli.fails(*options, "--private-key", "-", stdin="\udcff\udc82")
    assert "key is empty" in cli.fails(*options, "--private-key-file", "-", stdin="\n")
    assert "key is empty" in cli.fails(*options, "--private-key-file", "/dev/null")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "more"])
@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.slow
def test_a_secret_is_stored_whole_or_refused(
    cli: CommandLine, tmp_path: Path, source: str, end: str
) -> None:
    text = "é" * 999_999 + "!" + end
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8", newline="")
    given = ("--access-token-file", str(file) if source == "file" else "-")
    if end != "more":
        create(cli, NUMBER, *given, stdin=text)
        assert plain(stored(cli).access_token) == text.strip()
        return
    options = ("create-account", *REQUIRED, "--account-number", NUMBER)
    for name in ("private-key", "secret-key", "access-token"):
        others = () if name == "private-key" else ("--private-key-file", "/dev/null")
        reason = cli.fails(*options, *others, f"--{name}-file", given[1], stdin=text)
        assert reason == f"error: the {name.replace('-', ' ')} has more than 1,000,000 characters\n"
    assert cli.ok("list-accounts", "--json").json["items"] == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--account-name", "x" * 101),
        ("--account-name", ""),
        ("--account-number", "9" * 51),
        ("--description", "x" * 501),
        ("--server-url", "x" * 501),
        ("--tiger-id", ""),
    ],
)
def test_an_error_names_the_option_of_an_invalid_value(
    cli: CommandLine, option: str, value: str
) -> None:
    options = dict(zip(REQUIRED[::2], REQUIRED[1::2], strict=True))
    options |= {"--account-number": NUMBER, "--private-key-file": "-", option: value}
    given = [part for pair in options.items() for part in pair]
    reason = cli.fails("create-account", *given, stdin="test_key")
    assert reason.startswith(f"error: {option}: ")
    assert "test_key" not in reason
    assert cli.ok("list-accounts", "--json").json["items"] == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--account-type", "gold"),
        ("--license", "TBXX"),
        ("--environment", "prod"),
        ("--market-permissions", "US,XX"),
        ("--token-expires-at", "2027-01-31T12:00:00"),
        ("--token-expires-at", "tomorrow"),
        ("--token-expires-at", "9999-12-31T23:59:59-12:00"),
    ],
)
def test_an_error_names_the_option_of_a_malformed_value(
    cli: CommandLine, option: str, value: str
) -> None:
    options = ("create-account", *REQUIRED, "--account-number", NUMBER, "--private-key", "x")
    assert option in cli.misused(*options, option, value)


@pytest.mark.slow
def test_an_account_is_found_by_each_spelling_of_its_number(cli: CommandLine) -> None:
    made = create(cli, " u12300123\N{NO-BREAK SPACE}", "--json").json
    assert made["account_number"] == "U12300123"
    spelling = "\N{ZERO WIDTH SPACE}u123\N{FULLWIDTH DIGIT ZERO}0123 "
    new_key = ("create-api-key", "--name", "assistant", "--scopes", "mcp:read")
    key = cli.ok(*new_key, "--account", spelling, "--json").json
    assert key["tiger_account_id"] == made["id"]
    for command in ("list-api-keys", "list-events"):
        listed = cli.ok(command, "--account", spelling, "--json").json["items"]
        assert {row["tiger_account_id"] for row in listed} == {made["id"]}
    assert cli.ok("list-refreshes", "--account", spelling, "--json").json["items"] == []
    assert made["id"] in cli.ok("export-events", "--account", spelling).out
    verified = cli.ok("verify-api-key", "--account", spelling, "-", "--json", stdin=key["key"])
    assert verified.json["id"] == key["id"]
    assert "no account" not in cli.fails("refresh-token", spelling)
    for arguments in (
        ("show-account", spelling),
        ("set-default-account", spelling, "--data"),
        ("set-account-status", spelling, "inactive"),
        ("reset-account-errors", spelling),
        ("close-account", spelling, "--yes"),
        ("reopen-account", spelling, "--private-key", "test_key"),
    ):
        assert cli.ok(*arguments, "--json").json["id"] == made["id"]
    options = ("create-account", *REQUIRED, "--private-key", "test_key")
    result = cli(*options, "--account-number", spelling)
    assert (result.code, "already exists" in result.err) == (1, True)


@pytest.mark.slow
def test_a_short_rsa_key_is_refused(cli: CommandLine) -> None:
    short = short_pem()
    options = ("create-account", *REQUIRED, "--account-number", NUMBER, "--private-key-file", "-")
    reason = cli.fails(*options, stdin=short)
    assert (
        reason
        == f"error: --private-key: an RSA key must have 1024 bits or more, but has {SHORT_BITS}\n"
    )
    create(cli)
    cli.ok("close-account", NUMBER, "--yes")
    again = ("reopen-account", NUMBER, "--private-key-file", "-")
    assert "1024 bits" in cli.fails(*again, stdin=short)


def test_an_account_number_can_be_used_only_once(cli: CommandLine) -> None:
    create(cli)
    options = ("create-account", *REQUIRED, "--account-number", NUMBER)
    reason = cli.fails(*options, "--private-key", "-", stdin="test_key")
    exists = "an account with this account number already exists"
    assert reason == f"error: {exists} (uq_tiger_accounts_account_number)\n"


def test_a_new_default_replaces_the_old_one(cli: CommandLine) -> None:
    create(cli, "U1", "--default-trading", "--default-data")
    create(cli, "U2", "--default-trading")
    flags = [
        (account["account_number"], account["is_default_trading"], account["is_default_data"])
        for account in cli.ok("list-accounts", "--json").json["items"]
    ]
    assert flags == [("U2", True, False), ("U1", False, True)]


@pytest.mark.slow
def test_accounts_are_listed_in_pages(cli: CommandLine) -> None:
    assert cli.ok("list-accounts") == Result(0, "", "no rows found\n")
    assert cli.ok("list-accounts", "--json").json == {
        "items": [],
        "next_cursor": None,
        "previous_cursor": None,
    }
    for number in ("1111111", "U2222222", PAPER):
        create(cli, number)
    listed = cli.ok("list-accounts")
    assert listed.err == ""
    assert [line.split()[0] for line in listed.out.splitlines()] == [
        "Number", PAPER, "U2222222", "1111111"
    ]  # fmt: skip
    first = cli.ok("list-accounts", "--limit", "2", "--json").json
    assert [account["account_number"] for account in first["items"]] == [PAPER, "U2222222"]
    assert list(first["items"][0]) == list(TigerAccount.model_fields)
    rest = cli.ok("list-accounts", "--limit", "2", "--json", "--after", first["next_cursor"]).json
    assert [account["account_number"] for account in rest["items"]] == ["1111111"]
    assert rest["next_cursor"] is None
    hint = cli.ok("list-accounts", "--limit", "2").err
    assert f"--after {first['next_cursor']}" in hint


@pytest.mark.slow
def test_accounts_are_filtered(cli: CommandLine) -> None:
    create(cli, "1111111")
    create(cli, PAPER, "--environment", "SANDBOX")
    cli.ok("close-account", "1111111", "--yes")
    for option, value, number in (
        ("--status", "closed", "1111111"),
        ("--status", "active", PAPER),
        ("--environment", "PROD", "1111111"),
        ("--account-type", "paper", PAPER),
    ):
        items = cli.ok("list-accounts", option, value, "--json").json["items"]
        assert [item["account_number"] for item in items] == [number]


@pytest.mark.slow
def test_accounts_are_filtered_by_several_values(cli: CommandLine) -> None:
    create(cli, "1111111", "--account-name", "zebra", "--license", "TBNZ")
    create(cli, "U2222222", "--account-name", "Desk_A", "--license", "tbhk")
    create(cli, PAPER, "--environment", "SANDBOX")
    for options, numbers in (
        (("--environment", "PROD,SANDBOX", "--order-by", "name"), ["U2222222", PAPER, "1111111"]),
        (("--account-type", "paper,global"), [PAPER, "U2222222"]),
        (("--license", "TBNZ,tbhk", "--search", "K_"), ["U2222222"]),
        (("--market-permission", "US"), []),
        (("--tag", "desk", "--tag", "team=A"), []),
        (("--without-errors", "--status", "active"), [PAPER, "U2222222", "1111111"]),
        (("--with-errors",), []),
        (("--token-expires-within", "1h"), []),
    ):
        page = cli.ok("list-accounts", *options, "--count", "--json").json
        assert [item["account_number"] for item in page["items"]] == numbers
        assert page["total"] == len(numbers)
    assert "--license" in cli.misused("list-accounts", "--license", "TBXX")


@pytest.mark.slow
def test_accounts_are_counted(cli: CommandLine) -> None:
    create(cli)
    create(cli, PAPER, "--environment", "SANDBOX")
    found = cli.ok("count-accounts", "--json").json
    assert (found["total"], found["by_status"]["active"], found["with_errors"]) == (2, 2, 0)
    assert found["by_environment"] == {"PROD": 1, "SANDBOX": 1}
    assert "expiring tokens" in cli.ok("count-accounts").out


@pytest.mark.slow
def test_the_routing_of_a_request_is_explained(cli: CommandLine) -> None:
    create(cli)
    create(cli, PAPER, "--environment", "SANDBOX")
    items = cli.ok("explain-routing", "--json").json["items"]
    assert [(item["account_number"], item["reasons"]) for item in items] == [
        (NUMBER, []), (PAPER, ["other_environment"])
    ]  # fmt: skip
    told = cli.ok("explain-routing", "--environment", "any", "--permission", "US,HK").out
    assert told.count("missing_permission") == 2
    assert "can serve the request" in cli.ok("explain-routing").out
    assert "--permission" in cli.misused("explain-routing", "--permission", "XX")
    [main, _] = cli.ok("explain-routing", "--exclude", NUMBER, "--json").json["items"]
    assert (main["account_number"], main["reasons"]) == (NUMBER, ["excluded"])


def test_malformed_options_of_a_list_are_refused(cli: CommandLine) -> None:
    assert "--limit" in cli.misused("list-accounts", "--limit", "0")
    assert "--limit" in cli.misused("list-accounts", "--limit", "1001")
    assert "--status" in cli.misused("list-accounts", "--status", "happy")
    assert "cursor is not from this list" in cli.fails("list-accounts", "--after", "nonsense")


@pytest.mark.slow
def test_an_account_is_shown_by_number_and_by_id(cli: CommandLine) -> None:
    create(cli)
    shown = cli.ok("show-account", NUMBER, "--json").json
    assert shown["account_number"] == NUMBER
    assert cli.ok("show-account", shown["id"], "--json").json == shown
    assert "**********" in cli.ok("show-account", NUMBER).out
    assert "no account" in cli.fails("show-account", "0")
    assert "no account" in cli.fails("show-account", "01a2090b-d025-77ee-b352-1c8a2d49097f")


@pytest.mark.slow
def test_a_number_of_32_digits_is_not_an_id(cli: CommandLine) -> None:
    number = "10000000000000000000000000000032"
    made = create(cli, number, "--json").json
    assert cli.ok("show-account", number, "--json").json == made
    for command in (("list-events", "--json"), ("export-events",)):
        assert made["id"] in cli.ok(*command, "--account", number).out
    assert "no account" in cli.fails("list-events", "--account", made["id"].replace("-", ""))


@pytest.mark.slow
def test_an_account_is_made_the_default(cli: CommandLine) -> None:
    create(cli, "U1", "--default-trading", "--default-data")
    create(cli, "U2")
    result = cli.ok("set-default-account", "U2", "--trading", "--data", "--json")
    assert result.json["is_default_trading"]
    assert result.json["is_default_data"]
    assert "default for trading and data" in result.err
    assert not stored(cli, "U1").is_default_trading
    assert "--trading" in cli.misused("set-default-account", "U1")
    cli.ok("close-account", "U1", "--yes")
    assert "closed" in cli.fails("set-default-account", "U1", "--data")


@pytest.mark.slow
def test_an_account_is_closed(cli: CommandLine) -> None:
    create(cli)
    assert "--yes" in cli.misused("close-account", NUMBER, stdin="y\n")
    assert stored(cli).status == "active"
    closed = cli.ok("close-account", NUMBER, "--yes", "--json")
    assert closed.json["status"] == "closed"
    assert stored(cli).status == "closed"
    assert "no account" in cli.fails("close-account", "0", "--yes")


@pytest.mark.slow
def test_a_closed_account_is_deleted(cli: CommandLine) -> None:
    create(cli)
    key = ("create-api-key", "--name", "assistant", "--scopes", "mcp:read", "--account", NUMBER)
    cli.ok(*key)
    assert "--yes" in cli.misused("delete-account", NUMBER, stdin="y\n")
    assert "must be closed" in cli.fails("delete-account", NUMBER, "--yes")
    closed = cli.ok("close-account", NUMBER, "--yes", "--json").json
    deleted = cli.ok("delete-account", NUMBER, "--yes", "--reason", "moved away", "--json")
    assert deleted.json == closed
    assert deleted.err == "account ****0321 is deleted\n"
    assert "no account" in cli.fails("show-account", closed["id"])
    assert cli.ok("list-api-keys", "--json").json["items"] == []
    of_account, of_key = cli.ok("list-events", "--limit", "2", "--json").json["items"]
    assert (of_account["action"], of_key["action"]) == ("account:delete", "api_key:delete")
    assert of_account["details"]["reason"] == "moved away"
    assert of_account["user_type"] == "cli"
    assert "no account" in cli.fails("delete-account", NUMBER, "--yes")


@pytest.mark.slow
def test_a_new_status_has_its_reason_on_record(cli: CommandLine) -> None:
    create(cli)
    cli.ok("set-account-status", NUMBER, "inactive", "--reason", "on holiday")
    event = cli.ok("list-events", "--limit", "1", "--json").json["items"][0]
    assert (event["action"], event["details"]) == (
        "account:status_change", {"reason": "on holiday"}
    )  # fmt: skip


@pytest.mark.slow
def test_market_permissions_are_added_and_removed(cli: CommandLine) -> None:
    create(cli, NUMBER, "--market-permissions", "US")
    added = cli.ok("add-market-permission", NUMBER, "HK", "--json")
    assert added.json["market_permissions"] == ["US", "HK"]
    assert added.err == "account ****0321 may trade in HK\n"
    removed = cli.ok("remove-market-permission", NUMBER, "US", "--json")
    assert removed.json["market_permissions"] == ["HK"]
    assert removed.err == "account ****0321 may not trade in US\n"
    events = cli.ok("list-events", "--json").json["items"]
    assert cli.ok("remove-market-permission", NUMBER, "US", "--json").json == removed.json
    assert cli.ok("list-events", "--json").json["items"] == events
    for command in ("add-market-permission", "remove-market-permission"):
        assert "MARKET" in cli.misused(command, NUMBER, "XX")
        assert "no account" in cli.fails(command, "0", "US")


@pytest.mark.slow
async def test_two_processes_that_add_market_permissions_lose_none(
    cli: CommandLine, clone: Database
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    async with lock_until_waiting(clone, "tiger_accounts", waiting=2):
        adding = [
            asyncio.create_task(
                asyncio.to_thread(
                    cli.process, "add-market-permission", account.account_number, market
                )
            )
            for market in ("US", "HK")
        ]
    assert [result.code for result in await asyncio.gather(*adding)] == [0, 0]
    async with clone.session() as session:
        stored = await crud.accounts.get(session, account.id)
        assert stored is not None
        assert sorted(stored.market_permissions) == ["HK", "US"]
        assert len(await factories.events(session)) == 3


@pytest.mark.slow
def test_a_closed_account_can_be_reopened(cli: CommandLine, key_file: str, pem: str) -> None:
    create(cli)
    assert "only a closed account" in cli.fails(
        "reopen-account", NUMBER, "--private-key-file", key_file
    )
    cli.ok("close-account", NUMBER, "--yes")
    assert stored(cli).private_key is None
    again = ("--account-number", NUMBER, "--private-key-file", key_file)
    assert "already" in cli.fails("create-account", *REQUIRED, *again)
    opened = cli.ok("reopen-account", NUMBER, "--private-key", "-", "--json", stdin=pem)
    assert opened.err == "account ****0321 is open again\n"
    assert (opened.json["status"], opened.json["private_key"]) == ("active", "**********")
    assert plain(stored(cli).private_key) == parse_private_key(pem)[0]


@pytest.mark.slow
def test_the_status_of_an_account_is_set(cli: CommandLine) -> None:
    create(cli)
    for status in ("suspended", "pending_verification", "inactive", "active", "suspended"):
        changed = cli.ok("set-account-status", NUMBER, status, "--json")
        assert changed.json["status"] == status
        assert changed.err == f"account ****0321 is {status}\n"
    assert "suspended" in cli.ok("reset-account-errors", NUMBER).err
    assert stored(cli).status == "suspended"
    assert "closed" in cli.misused("set-account-status", NUMBER, "closed")
    cli.ok("close-account", NUMBER, "--yes")
    assert "reopen" in cli.fails("set-account-status", NUMBER, "active")


@pytest.mark.slow
def test_the_errors_of_an_account_are_reset(cli: CommandLine) -> None:
    create(cli)

    async def fail() -> None:
        settings = Settings(
            database_url=cli.env["DATABASE_URL"], encryption_keys=cli.env["ENCRYPTION_KEYS"]
        )
        async with Database(settings) as database, database.session() as session:
            account = await crud.accounts.get_by_account_number(session, NUMBER)
            assert account is not None
            for _ in range(10):
                await crud.accounts.record_error(session, account.id, message="boom")

    asyncio.run(fail())
    shown = cli.ok("show-account", NUMBER, "--json").json
    assert (shown["status"], shown["error_count"], shown["last_error"]) == ("suspended", 10, "boom")
    told = cli.ok("reset-account-errors", NUMBER, "--json")
    assert told.err == "the error count of account ****0321 is 0, and the account is active\n"
    assert (told.json["status"], told.json["error_count"]) == ("active", 0)
