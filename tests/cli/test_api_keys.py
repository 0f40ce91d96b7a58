"""Commands for API keys."""

import asyncio
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from uuid_utils.compat import uuid7

from tests.support.cli_accounts import create as create_account
from tests.support.cli_api_keys import create, refusal
from tests.support.command_line import KEYS, CommandLine, Result
from tests.support.sql import run_sql
from tests.support.terminal import Terminal
from tiger_db import APIKey
from tiger_db.connections import connect
from tiger_db.crud.api_keys.key_format import checksum
from tiger_db.encryption import KeyRing
from tiger_db.settings import Settings


@pytest.mark.slow
def test_a_key_is_created_with_all_options(cli: CommandLine) -> None:
    create_account(cli, "51230321")
    before = datetime.now(UTC)
    row = create(
        cli,
        "--scopes", "trade:read, mcp:write", "--account", "51230321", "--expires-in", "30d",
        "--rate-limit-per-hour", "10", "--rate-limit-per-day", "100",
        "--allowed-ips", "10.0.0.0/8,::1", "--allowed-user-agents", "claude/*,curl*",
        "--description", "notes", "--created-by", "me",
    )  # fmt: skip
    assert [*row] == [
        *(name for name, field in APIKey.model_fields.items() if not field.exclude),
        "key",
    ]
    account = cli.ok("show-account", "51230321", "--json").json
    assert row == {
        **row,
        "scopes": ["trade:read", "mcp:write"], "tiger_account_id": account["id"],
        "rate_limit_per_hour": 10, "rate_limit_per_day": 100,
        "allowed_ips": ["10.0.0.0/8", "::1/128"], "allowed_user_agents": ["claude/*", "curl*"],
        "description": "notes", "created_by": "me", "status": "active",
    }  # fmt: skip
    assert row["key"].startswith(row["key_prefix"])
    ends = datetime.fromisoformat(row["expires_at"])
    assert abs(ends - before - timedelta(days=30)) < timedelta(minutes=1)
    by_id = create(cli, "--account", account["id"])
    assert by_id["tiger_account_id"] == account["id"]


@pytest.mark.slow
def test_a_key_is_shown_once(cli: CommandLine) -> None:
    result = cli.ok("create-api-key", "--name", "assistant", "--scopes", "mcp:read")
    key = result.out.splitlines()[-1]
    assert cli.ok("verify-api-key", "-", stdin=key)
    assert result.out.count(key) == 1
    assert key not in result.err
    assert "shown only now" in result.err
    shown = [cli.ok("list-api-keys"), cli.ok("list-api-keys", "--json"), cli.ok("list-events")]
    shown += [cli.ok("list-events", "--json"), cli.ok("verify-api-key", "-", stdin=key)]
    secret = key.rpartition("_")[2]
    assert not any(secret in result.out + result.err for result in shown)


def test_a_key_expires_at_the_given_time(cli: CommandLine) -> None:
    row = create(cli, "--expires-at", "2099-01-31T20:00:00+08:00")
    assert row["expires_at"] == "2099-01-31T12:00:00Z"
    options = ("create-api-key", "--name", "x", "--scopes", "mcp:read")
    for option, value in (
        ("--expires-at", "2020-01-31T12:00:00Z"),
        ("--expires-at", "2099-01-31T12:00:00"),
        ("--expires-at", "30d"),
        ("--expires-in", "30"),
        ("--expires-in", "0d"),
        ("--expires-in", "-1d"),
        ("--expires-in", "999999999w"),
    ):
        assert option in cli.misused(*options, option, value)
    both = ("--expires-in", "1h", "--expires-at", "2099-01-31T12:00:00Z")
    assert "cannot be combined with" in cli.misused(*options, *both)


@pytest.mark.parametrize("text", ["90s", "90m", "36h", "2d", "3w"])
def test_each_unit_of_time_is_accepted(cli: CommandLine, text: str) -> None:
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[text[-1]] * int(text[:-1])
    ends = datetime.fromisoformat(create(cli, "--expires-in", text)["expires_at"])
    assert abs((ends - datetime.now(UTC)).total_seconds() - seconds) < 30


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--allowed-ips", "10.0.0.0/99"),
        ("--allowed-ips", "10.0.0.1/8"),
        ("--rate-limit-per-hour", "0"),
        ("--rate-limit-per-day", "99999999999999999999"),
        ("--name", ""),
        ("--name", "x" * 101),
        ("--scopes", ","),
    ],
)
def test_an_error_names_the_option_of_an_invalid_value(
    cli: CommandLine, option: str, value: str
) -> None:
    options = {"--name": "x", "--scopes": "mcp:read", option: value}
    given = [part for pair in options.items() for part in pair]
    said = cli.fails("create-api-key", *given)
    assert f"error: {option}: " in said
    assert ("host bits: write 10.0.0.0/8" in said) == (value == "10.0.0.1/8")
    assert cli.ok("list-api-keys", "--json").json["items"] == []


def test_an_unknown_scope_or_account_is_refused(cli: CommandLine) -> None:
    options = ("create-api-key", "--name", "x", "--scopes")
    reason = cli.misused(*options, "mcp:read,mcp:nope")
    assert "--scopes" in reason
    assert "trade:admin" in reason
    assert "no account" in cli.fails(*options, "mcp:read", "--account", "nope")


@pytest.mark.slow
def test_keys_are_listed_in_pages_and_filtered(cli: CommandLine, clone_settings: Settings) -> None:
    create_account(cli, "51230321")
    assert cli.ok("list-api-keys") == Result(0, "", "no rows found\n")
    bound, free = create(cli, "--account", "51230321"), create(cli)
    listed = cli.ok("list-api-keys").out.splitlines()
    assert [line.split()[0] for line in listed] == [
        "Prefix", free["key_prefix"], bound["key_prefix"]
    ]  # fmt: skip
    assert "51230321" in listed[2]
    assert "any" in listed[1]
    page = cli.ok("list-api-keys", "--limit", "1", "--json").json
    free.pop("key")
    assert page["items"] == [free]
    after = ("--after", page["next_cursor"], "--json")
    assert cli.ok("list-api-keys", *after).json["items"][0]["id"] == bound["id"]
    items = cli.ok("list-api-keys", "--account", "51230321", "--json").json["items"]
    assert [item["id"] for item in items] == [bound["id"]]
    cli.ok("revoke-api-key", free["key_prefix"])
    items = cli.ok("list-api-keys", "--status", "revoked", "--json").json["items"]
    assert [item["id"] for item in items] == [free["id"]]
    run_sql(clone_settings, f"UPDATE api_keys SET expires_at = now() WHERE id = '{bound['id']}'")
    for status, expected in (("active", []), ("expired", [bound["id"]])):
        items = cli.ok("list-api-keys", "--status", status, "--json").json["items"]
        assert [item["id"] for item in items] == expected
    both = ("--status", "active,expired", "--account", "51230321", "--count", "--json")
    assert cli.ok("list-api-keys", *both).json["total"] == 1
    assert "choose from active, " in cli.misused("list-api-keys", "--status", "active,gone")
    for options, expected in (
        (("--scope", "mcp:read"), [free["id"], bound["id"]]),
        (("--scope", "trade:read"), []),
        (("--search", "ASSIST", "--order-by", "name"), [bound["id"], free["id"]]),
        (("--created-by", "nobody"), []),
        (("--unused-since", "1d"), []),
    ):
        items = cli.ok("list-api-keys", *options, "--json").json["items"]
        assert [item["id"] for item in items] == expected
    last = cli.ok("list-api-keys", *after)
    previous = ("--before", last.json["previous_cursor"], "--json")
    (item,) = cli.ok("list-api-keys", *previous).json["items"]
    assert item["id"] == free["id"]
    assert "no account" in cli.fails("list-api-keys", "--account", "nope")


@pytest.mark.slow
def test_an_expired_key_is_listed_as_expired(cli: CommandLine) -> None:
    create(cli, "--expires-in", "1s")
    time.sleep(1.1)
    assert " expired " in cli.ok("list-api-keys").out


@pytest.mark.slow
def test_a_key_is_verified(cli: CommandLine, tmp_path: Path) -> None:
    row = create(cli, "--scopes", "trade:write")
    verified = cli.ok("verify-api-key", "-", "--scopes", "trade:read", "--json", stdin=row["key"])
    assert verified.json["id"] == row["id"]
    assert verified.err == "accepted\n"
    assert cli.ok("show-api-key", row["id"], "--json").json["usage_count"] == 1
    (tmp_path / "key").write_text(row["key"] + "\n")
    assert cli.ok("verify-api-key", "--key-file", str(tmp_path / "key")).err == "accepted\n"
    warned = cli.ok("verify-api-key", row["key"])
    assert "--key-file" in warned.err
    assert row["key"] not in warned.err
    assert "--key-file" in cli.misused("verify-api-key")
    assert "not both" in cli.misused("verify-api-key", "x", "--key-file", "y")


@pytest.mark.slow
def test_the_reason_of_a_refusal_is_shown(cli: CommandLine) -> None:
    for number in ("1111111", "2222222"):
        create_account(cli, number)
    key = create(
        cli, "--account", "1111111", "--allowed-ips", "10.0.0.0/8", "--allowed-user-agents", "a*",
    )["key"]  # fmt: skip
    good = ("--ip-address", "10.1.2.3", "--user-agent", "abc")
    assert cli.ok("verify-api-key", "-", *good, "--account", "1111111", stdin=key)
    assert "AddressNotAllowed" in refusal(
        cli, key, "--ip-address", "11.1.2.3", "--user-agent", "abc"
    )
    assert "UserAgentNotAllowed" in refusal(
        cli, key, "--ip-address", "10.1.2.3", "--user-agent", "x"
    )
    assert "lacks the scope mcp:admin" in refusal(cli, key, *good, "--scopes", "mcp:admin")
    assert "AccountNotAllowed" in refusal(cli, key, *good, "--account", "2222222")
    wrong = key[:-1] + ("y" if key.endswith("x") else "x")
    assert "InvalidAPIKey" in refusal(cli, wrong, *good)
    assert "InvalidAPIKey" in refusal(cli, "nonsense")
    assert "--scopes" in cli.misused("verify-api-key", "-", "--scopes", "nope", stdin=key)
    cli.ok("close-account", "1111111", "--yes")
    assert "APIKeyRevoked" in refusal(cli, key, *good)


@pytest.mark.slow
def test_the_time_until_the_end_of_a_limit_is_shown(cli: CommandLine) -> None:
    key = create(cli, "--rate-limit-per-day", "1")["key"]
    cli.ok("verify-api-key", "-", stdin=key)
    limited, when = refusal(cli, key).splitlines()
    assert "RateLimited" in limited
    assert 0 < int(when.split()[-2]) <= 86400


def everything_stored(settings: Settings) -> list[list[tuple[object, ...]]]:
    """Return the rows of all tables that a use of a key can change."""

    async def read() -> list[list[tuple[object, ...]]]:
        connection = await connect(settings)
        try:
            return [
                [tuple(row) for row in await connection.fetch(f"SELECT * FROM {table} ORDER BY 1")]
                for table in ("api_keys", "api_key_limits", "api_key_usage", "audit_logs")
            ]
        finally:
            await connection.close()

    return asyncio.run(read())


@pytest.mark.slow
def test_a_dry_run_writes_nothing(cli: CommandLine, clone_settings: Settings) -> None:
    row = create(cli, "--rate-limit-per-hour", "1", "--scopes", "mcp:read")
    key, dry = row["key"], ("verify-api-key", "-", "--dry-run", "--json")
    before = everything_stored(clone_settings)
    for _ in range(2):
        accepted = cli.ok(*dry, stdin=key)
        assert (accepted.err, accepted.json["usage_count"]) == ("accepted\n", 0)
    older = f"{KeyRing.parse(KEYS).key_ids[0]}2:{KEYS.split(':')[1]}"
    peppers = f"{older},{cli.env['API_KEY_PEPPERS']}"  # a use would replace the hash
    cli.ok(*dry, stdin=key, API_KEY_PEPPERS=peppers)
    wrong = key[:-7] + ("x" if key[-7] != "x" else "y")
    for text, options, reason in (
        (key, ("--scopes", "mcp:write"), "ScopeMissing"),
        (wrong + checksum(wrong), (), "InvalidAPIKey"),
        ("nonsense", (), "InvalidAPIKey"),
    ):
        assert reason in refusal(cli, text, "--dry-run", *options)
    assert everything_stored(clone_settings) == before
    cli.ok("verify-api-key", "-", stdin=key)
    before = everything_stored(clone_settings)
    assert "RateLimited" in refusal(cli, key, "--dry-run")
    assert everything_stored(clone_settings) == before


@pytest.mark.slow
def test_a_key_is_revoked_by_prefix_and_by_id(cli: CommandLine) -> None:
    first, second = create(cli), create(cli)
    revoked = cli.ok("revoke-api-key", first["key_prefix"], "--reason", "leaked", "--json").json
    assert revoked["status"] == "revoked"
    assert revoked["revocation_reason"] == "leaked"
    assert "APIKeyRevoked" in refusal(cli, first["key"])
    assert second["key_prefix"] in cli.ok("revoke-api-key", second["id"]).out
    assert "APIKeyRevoked" in refusal(cli, second["key"])
    assert "no API key" in cli.fails("revoke-api-key", "tdb_test_000000000000")
    assert "no API key" in cli.fails("revoke-api-key", str(uuid7()))
    mistaken = cli.fails("revoke-api-key", create(cli)["key"])
    assert "tdb_" not in mistaken


@pytest.mark.slow
@pytest.mark.parametrize("how", ["standard input", "file", "argument"])
def test_a_leaked_key_is_revoked_by_its_text(cli: CommandLine, tmp_path: Path, how: str) -> None:
    row = create(cli)
    text = row["key"]
    (tmp_path / "leak").write_text(f"{text}\n")
    given = {
        "standard input": ("-",),
        "file": ("--key-file", str(tmp_path / "leak")),
        "argument": (text,),
    }[how]
    result = cli.ok(
        "revoke-api-key", "--raw", *given, "--reason", "on GitHub", "--json", stdin=text
    )
    assert (result.json["id"], result.json["status"]) == (row["id"], "revoked")
    assert text not in result.out + result.err
    assert ("--key-file" in result.err) == (how == "argument")
    assert "APIKeyRevoked" in refusal(cli, text)
    again = cli.ok("revoke-api-key", "--raw", "-", "--reason", "another", stdin=text)
    assert again.err.startswith("nothing is changed in API key ")
    assert again.err.endswith(" is revoked already (reason: on GitHub)\n")


@pytest.mark.slow
def test_a_text_that_is_not_a_key_revokes_nothing(cli: CommandLine) -> None:
    row, other = create(cli), create(cli)
    forged = row["key_prefix"] + other["key"].removeprefix(other["key_prefix"])
    for text in (forged, row["key"][:-1], row["key_prefix"], "nonsense"):
        reason = cli.fails("revoke-api-key", "--raw", "-", stdin=text)
        assert "the database does not contain this API key" in reason
        assert text not in reason
    assert "--raw" in cli.misused("revoke-api-key", "x", "--key-file", "y")
    assert "PREFIX" in cli.misused("revoke-api-key")
    statuses = {item["status"] for item in cli.ok("list-api-keys", "--json").json["items"]}
    assert statuses == {"active"}


@pytest.mark.slow
def test_the_uses_of_a_key_are_shown_as_bars(cli: CommandLine) -> None:
    row = create(cli)
    unused = cli.ok("show-api-key", row["key_prefix"])
    assert "the API key has not been used since 20" in unused.err
    for _ in range(2):
        cli.ok("verify-api-key", "-", stdin=row["key"])
    shown = cli.ok("show-api-key", row["key_prefix"], "--since", "2h")
    *_, one, two, three = shown.out.splitlines()
    bars = [line.split() for line in (one, two, three)]
    now = datetime.now(UTC)
    assert bars[2][:2] == [f"{now:%m-%d}", f"{now:%H:00}"]
    assert [line[-1] for line in bars] == ["0", "0", "2"]
    assert set(bars[2][2]) == {"\u2588"}
    as_json = cli.ok("show-api-key", row["key_prefix"], "--json").json
    assert [hourly["count"] for hourly in as_json["usage"]] == [2]
    assert as_json["limits"] == {"hour": None, "day": None}
    limited = create(cli, "--rate-limit-per-hour", "3")
    cli.ok("verify-api-key", "-", stdin=limited["key"])
    shown = cli.ok("show-api-key", limited["key_prefix"])
    assert "remaining uses this hour: 2 of 3, until 20" in shown.err
    limits = cli.ok("show-api-key", limited["key_prefix"], "--json").json["limits"]
    assert (limits["hour"]["limit"], limits["hour"]["used"], limits["day"]) == (3, 1, None)
    assert "no API key" in cli.fails("show-api-key", "nope")
    assert "--since" in cli.misused("show-api-key", row["key_prefix"], "--since", "0h")


@pytest.mark.slow
def test_a_key_is_rotated(cli: CommandLine) -> None:
    row = create(cli)
    new = cli.ok("rotate-api-key", row["key_prefix"], "--grace", "1h", "--json").json
    for key in (row["key"], new["key"]):
        assert cli.ok("verify-api-key", "-", stdin=key)
    at_once = cli.ok("rotate-api-key", new["id"], "--grace", "0")
    assert "APIKeyExpired" in refusal(cli, new["key"])
    assert cli.ok("verify-api-key", "-", stdin=at_once.out.splitlines()[-1])
    assert "shown only now" in at_once.err
    assert "only an active API key" in cli.fails("rotate-api-key", new["id"])
    assert "was replaced by" in cli.fails("rotate-api-key", row["id"])
    assert "--grace" in cli.misused("rotate-api-key", row["id"], "--grace", "soon")


@pytest.mark.slow
def test_expiring_keys_are_listed_and_given_another_expiry(cli: CommandLine) -> None:
    late, soon = create(cli, "--expires-in", "5d"), create(cli, "--expires-in", "2d")
    create(cli)

    def expiring(*options: str) -> list[str]:
        page = cli.ok("list-expiring-api-keys", *options, "--json").json
        return [item["id"] for item in page["items"]]

    assert expiring() == [soon["id"], late["id"]]
    assert expiring("--within", "3d") == [soon["id"]]
    assert soon["key_prefix"] in cli.ok("list-expiring-api-keys").out
    extended = cli.ok("update-api-key", soon["key_prefix"], "--expires-in", "6d", "--json").json
    assert extended["expires_at"] > late["expires_at"]
    assert expiring() == [late["id"], soon["id"]]
    assert cli.ok("update-api-key", late["id"], "--never", "--json").json["expires_at"] is None
    assert expiring() == [soon["id"]]
    cli.ok("update-api-key", soon["id"], "--expires-in", "1h")
    assert expiring("--within", "1d") == [soon["id"]]


@pytest.mark.slow
def test_the_pattern_finds_keys_and_a_pepper_is_generated(cli: CommandLine) -> None:
    pattern = cli.ok("print-api-key-pattern").out.strip()
    key = create(cli)["key"]
    assert re.findall(pattern, f'API_KEY="{key}"; {key[:-1]}') == [key]
    made = cli.ok("generate-api-key-pepper", "--id", "p2")
    assert made.out.startswith("p2:")
    assert "API_KEY_PEPPERS" in made.err
    peppers = f"{made.out.strip()},{cli.env['API_KEY_PEPPERS']}"
    assert cli.ok("verify-api-key", "-", stdin=key, API_KEY_PEPPERS=peppers)
    assert cli.ok(
        "verify-api-key", "-", stdin=key, API_KEY_PEPPERS=made.out.strip()
    )  # has this pepper now
    assert "InvalidAPIKey" in refusal(cli, key)


def test_bars_are_to_scale(cli: CommandLine, clone_settings: Settings) -> None:
    row = create(cli)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    times = [hour - timedelta(hours=ago) for ago in (3, 2, 1)]
    run_sql(
        clone_settings,
        *(
            f"INSERT INTO api_key_usage VALUES ('{row['id']}', '{time}', {count})"
            for time, count in ((times[0], 1200), (times[2], 1))
        ),
        f"INSERT INTO api_key_usage VALUES ('{row['id']}', '{hour - timedelta(days=9)}', 9000)",
    )
    shown = cli.ok("show-api-key", row["id"], "--since", "5h").out.splitlines()
    lines = [next(line for line in shown if line.startswith(f"{t:%m-%d %H:00}")) for t in times]
    most, none, least = (line[len("MM-DD HH:00") :].split() for line in lines)
    assert most[-1] == "1,200"
    assert set(most[0]) == {"\u2588"}
    assert none == ["0"]
    assert least[-1] == "1"
    assert max(map(len, shown[-6:])) == 100
    usage = cli.ok("show-api-key", row["id"], "--since", "5h", "--json").json["usage"]
    assert [(datetime.fromisoformat(hourly["hour"]), hourly["count"]) for hourly in usage] == [
        (times[0], 1200), (times[2], 1)
    ]  # fmt: skip


def test_a_guessed_secret_revokes_nothing(cli: CommandLine) -> None:
    row = create(cli)
    key = row["key"]
    start = key[:-7] + ("x" if key[-7] != "x" else "y")
    guessed = start + checksum(start)  # a well-formed key with a wrong secret
    reason = cli.fails("revoke-api-key", "--raw", "-", stdin=guessed)
    assert "the database does not contain this API key" in reason
    assert "tdb_" not in reason
    assert cli.ok("show-api-key", row["id"], "--json").json["status"] == "active"


def test_finding_a_leaked_key_counts_no_use(cli: CommandLine) -> None:
    row = create(cli)
    cli.ok("revoke-api-key", "--raw", "-", stdin=row["key"])
    found = cli.ok("show-api-key", row["id"], "--json").json
    assert (found["usage_count"], found["last_used_at"], found["usage"]) == (0, None, [])


def test_a_missing_or_doubled_text_of_a_leaked_key_is_refused(
    cli: CommandLine, tmp_path: Path
) -> None:
    row = create(cli)
    assert "--key-file" in cli.misused("revoke-api-key", "--raw")  # there is no terminal
    both = ("--raw", row["key"], "--key-file", "y")
    reason = cli.misused("revoke-api-key", *both)
    assert "not both" in reason
    assert row["key"] not in reason
    assert "the key is empty" in cli.fails("revoke-api-key", "--raw", "-", stdin="\n")
    assert "No such file" in cli.fails(
        "revoke-api-key", "--raw", "--key-file", str(tmp_path / "none")
    )
    unset = cli.fails("revoke-api-key", "--raw", "-", stdin=row["key"], API_KEY_PEPPERS="")
    assert "API_KEY_PEPPERS" in unset
    assert row["key"] not in unset
    assert cli.ok("show-api-key", row["id"], "--json").json["status"] == "active"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("show-api-key",),
        ("rotate-api-key",),
        ("update-api-key", "--never"),
        ("activate-api-key",),
        ("deactivate-api-key",),
        ("revoke-api-key",),
        ("delete-api-key", "--yes"),
    ],
)
def test_a_whole_key_in_place_of_its_prefix_is_not_repeated(
    cli: CommandLine, command: tuple[str, ...]
) -> None:
    key = create(cli, "--expires-in", "1d")["key"]
    for text in (key, str(uuid7()), "tdb_test_000000000000"):
        reason = cli.fails(*command, text)
        assert "there is no API key with this prefix or id" in reason
        assert ("a whole API key" in reason) == (text == key)
        assert ("`tiger-db revoke-api-key --raw`" in reason) == (text == key)
        assert text not in reason
    process = cli.process(*command, key, DB_DEBUG="1")  # statements are logged
    assert (process.code, process.out) == (1, "")
    assert key not in process.err


@pytest.mark.slow
def test_a_leaked_key_is_not_logged(cli: CommandLine) -> None:
    row = create(cli)
    secret = row["key"].rpartition("_")[2]
    done = cli.process("revoke-api-key", "--raw", "-", stdin=row["key"], DB_DEBUG="1")
    assert done.code == 0
    assert "UPDATE api_keys" in done.err
    assert secret not in done.out + done.err
    assert f"API key {row['key_prefix']} is revoked" in done.err


@pytest.mark.slow
def test_a_rotated_key_has_the_same_permissions_and_is_shown_once(cli: CommandLine) -> None:
    create_account(cli, "51230321")
    old = create(
        cli, "--scopes", "trade:read", "--account", "51230321", "--expires-in", "30d",
        "--rate-limit-per-hour", "10", "--allowed-ips", "10.0.0.0/8", "--description", "notes",
    )  # fmt: skip
    result = cli.ok("rotate-api-key", old["key_prefix"], "--json")
    new = result.json
    assert [*new] == [*old]
    own = {"id", "root_id", "key_prefix", "key", "created_at", "updated_at"}
    assert new["root_id"] == old["id"]
    assert {name for name in new if new[name] != old[name]} == own
    assert new["key"].startswith(new["key_prefix"] + "_")
    assert new["key"] not in result.err
    left = datetime.fromisoformat(
        cli.ok("show-api-key", old["id"], "--json").json["expires_at"]
    ) - datetime.now(UTC)
    assert abs(left - timedelta(hours=24)) < timedelta(minutes=1)
    text = cli.ok("rotate-api-key", new["key_prefix"])
    key = text.out.splitlines()[-1]
    assert text.out.count(key) == 1
    secrets = [each.rpartition("_")[2] for each in (old["key"], new["key"], key)]
    assert not any(secret in text.err for secret in secrets)
    assert not any(secret in text.out for secret in secrets[:2])
    listed = [cli.ok("list-events", "--json"), cli.ok("list-api-keys", "--json")]
    assert not any(secret in result.out for secret in secrets for result in listed)
    prefix = key.rpartition("_")[0]
    for grace in ("-1h", "0h", "1", "", "99999w"):
        assert "--grace" in cli.misused("rotate-api-key", prefix, f"--grace={grace}")


@pytest.mark.slow
def test_the_expiry_of_a_key_is_changed(cli: CommandLine) -> None:
    row = create(cli, "--expires-in", "1d")
    options = ("update-api-key", row["key_prefix"])
    shown = cli.ok(*options, "--expires-at", "2099-01-31T20:00:00+08:00")
    assert "2099-01-31 12:00:00Z" in shown.out
    assert shown.err == f"API key {row['key_prefix']} is updated\n"
    again = cli.ok(*options, "--expires-at", "2099-01-31T12:00:00Z")
    told = (
        f"nothing is changed in API key {row['key_prefix']}:"
        " the API key has the requested values already\n"
    )
    assert again.err == told
    for given in (
        ("--expires-in", "1h", "--expires-at", "2099-01-31T12:00:00Z"),
        ("--never", "--expires-at", "2099-01-31T12:00:00Z"),
        ("--expires-in", "soon"),
        ("--expires-at", "2020-01-31T12:00:00Z"),
        ("--expires-at", "2099-02-01T12:00:00"),
    ):
        assert "--expires-" in cli.misused(*options, *given)
    earlier = cli.ok(*options, "--expires-in", "1w", "--json").json
    assert earlier["expires_at"] < "2099"
    assert cli.ok(*options, "--never", "--json").json["expires_at"] is None
    cli.ok("revoke-api-key", row["id"])
    assert "the API key is revoked" in cli.fails(*options, "--expires-in", "1w")


@pytest.mark.slow
def test_the_fields_of_a_key_are_changed_and_cleared(cli: CommandLine) -> None:
    row = create(
        cli, "--rate-limit-per-hour", "10", "--allowed-ips", "10.0.0.0/8", "--description", "notes",
    )  # fmt: skip
    key = row.pop("key")
    options = ("update-api-key", row["id"], "--json")
    result = cli.ok(
        *options, "--name", "trader", "--scopes", "trade:read, mcp:write",
        "--rate-limit-per-day", "100", "--allowed-user-agents", "claude/*,curl*",
        "--allowed-ips", "::1", "--description", "new", "--rate-limit-per-hour", "20",
    )  # fmt: skip
    changed = {
        "name": "trader", "scopes": ["trade:read", "mcp:write"],
        "rate_limit_per_hour": 20, "rate_limit_per_day": 100,
        "allowed_ips": ["::1/128"], "allowed_user_agents": ["claude/*", "curl*"],
        "description": "new",
    }  # fmt: skip
    assert result.json == {**row, **changed, "updated_at": result.json["updated_at"]}
    assert key not in result.out + result.err
    cleared = cli.ok(
        *options, "--description", "", "--rate-limit-per-hour", "none",
        "--rate-limit-per-day", "none", "--allowed-ips", "all", "--allowed-user-agents", "all",
    ).json  # fmt: skip
    assert cleared == {
        **row, **changed, "updated_at": cleared["updated_at"], "description": None,
        "rate_limit_per_hour": None, "rate_limit_per_day": None, "allowed_ips": [],
        "allowed_user_agents": [],
    }  # fmt: skip
    events = cli.ok("list-events", "--json").json["items"]
    assert [event["action"] for event in events] == ["api_key:update"] * 2 + ["api_key:create"]
    assert cli.ok(*options, "--name", "trader").json == cleared
    assert cli.ok("list-events", "--json").json["items"] == events


@pytest.mark.slow
def test_an_invalid_change_of_a_key_changes_nothing(cli: CommandLine) -> None:
    row = create(cli, "--allowed-ips", "10.0.0.0/8")
    row.pop("key")
    options = ("update-api-key", row["id"], "--name", "new")
    for option, value in (
        ("--scopes", "mcp:nope"),
        ("--rate-limit-per-hour", "many"),
        ("--rate-limit-per-day", ""),
        ("--allowed-ips", ""),  # as of an empty variable of the shell
        ("--allowed-user-agents", " , "),
    ):
        assert option in cli.misused(*options, option, value)
    for option, value in (
        ("--scopes", ","),
        ("--rate-limit-per-hour", "0"),
        ("--allowed-ips", "10.0.0.1/8"),
        ("--name", ""),
    ):
        assert f"error: {option}: " in cli.fails(*options, option, value)
    assert "give at least one option" in cli.misused("update-api-key", row["id"])
    shown = cli.ok("show-api-key", row["id"], "--json").json
    limits = {"hour": None, "day": None}
    assert shown == {**row, "limits": limits, "usage": []}


@pytest.mark.parametrize("option", ["--allowed-ips", "--allowed-user-agents"])
def test_an_empty_restriction_creates_no_key(cli: CommandLine, option: str) -> None:
    options = ("create-api-key", "--name", "x", "--scopes", "mcp:read", option, "")
    assert option in cli.misused(*options)
    assert cli.ok("list-api-keys", "--json").json["items"] == []


@pytest.mark.slow
def test_a_key_is_switched_off_and_on(cli: CommandLine) -> None:
    row = create(cli)
    off = cli.ok("deactivate-api-key", row["key_prefix"], "--reason", "on holiday", "--json")
    assert (off.json["status"], off.err) == (
        "inactive", f"API key {row['key_prefix']} is inactive\n",
    )  # fmt: skip
    assert "APIKeyRevoked" in refusal(cli, row["key"])
    again = cli.ok("deactivate-api-key", row["id"])
    assert again.err == (
        f"nothing is changed in API key {row['key_prefix']}: the API key is inactive already\n"
    )
    on = cli.ok("activate-api-key", row["id"], "--json")
    assert (on.json["status"], on.err) == ("active", f"API key {row['key_prefix']} is active\n")
    assert cli.ok("verify-api-key", "-", stdin=row["key"])
    events = cli.ok("list-events", "--json").json["items"]
    assert [event["action"] for event in events] == [
        "api_key:activate", "api_key:deny", "api_key:deactivate", "api_key:create"
    ]  # fmt: skip
    assert events[2]["details"] == {"reason": "on holiday"}
    assert {event["user_type"] for event in events} == {"cli"}
    cli.ok("revoke-api-key", row["id"])
    for command in ("activate-api-key", "deactivate-api-key"):
        assert "the API key is revoked" in cli.fails(command, row["id"])


@pytest.mark.slow
def test_a_key_is_deleted_after_a_confirmation(cli: CommandLine) -> None:
    row = create(cli)
    delete = ("delete-api-key", row["key_prefix"], "--reason", "no longer needed")
    assert "--yes" in cli.misused(*delete, stdin="y\n")  # there is no terminal
    deleted = cli.ok(*delete, "--yes", "--json")
    row.pop("key")
    assert (deleted.json, deleted.err) == (row, f"API key {row['key_prefix']} is deleted\n")
    assert cli.ok("list-api-keys", "--json").json["items"] == []
    event = cli.ok("list-events", "--json").json["items"][0]
    assert (event["action"], event["api_key_id"]) == ("api_key:delete", row["id"])
    assert event["details"] == {"reason": "no longer needed"}
    assert "no API key" in cli.fails(*delete, "--yes")


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y", "n"])
def test_the_deletion_of_a_key_is_confirmed_at_a_terminal(
    cli: CommandLine, terminal: Terminal, answer: str
) -> None:
    row = create(cli)
    with terminal.program(cli, "delete-api-key", row["id"]) as program:
        terminal.wait_for("Delete this API key")
        terminal.type(f"{answer}\n")
        assert (terminal.end(program) == 0) == (answer == "y")
    assert (cli.ok("list-api-keys", "--json").json["items"] == []) == (answer == "y")


@pytest.mark.slow
def test_expiring_keys_are_listed_in_pages(cli: CommandLine) -> None:
    assert cli.ok("list-expiring-api-keys") == Result(0, "", "no rows found\n")
    rows = [create(cli, "--expires-in", f"{days}d") for days in (3, 1, 2)]
    soonest = [rows[1]["id"], rows[2]["id"], rows[0]["id"]]
    cli.ok("revoke-api-key", create(cli, "--expires-in", "1h")["id"])
    first = cli.ok("list-expiring-api-keys", "--limit", "2", "--json").json
    assert [item["id"] for item in first["items"]] == soonest[:2]
    after = ("--after", first["next_cursor"], "--json")
    last = cli.ok("list-expiring-api-keys", *after).json
    assert [item["id"] for item in last["items"]] == soonest[2:]
    assert last["next_cursor"] is None
    more = cli.ok("list-expiring-api-keys", "--limit", "1")
    assert "add --after" in more.err
    assert not any(row["key"].rpartition("_")[2] in more.out for row in rows)
    for within in ("0d", "soon", "99999w"):
        assert "--within" in cli.misused("list-expiring-api-keys", "--within", within)
    cli.fails("list-expiring-api-keys", "--after", "nonsense")


def test_each_generated_pepper_is_one_line_and_unique(bare: CommandLine) -> None:
    made = [bare.ok("generate-api-key-pepper") for _ in range(2)]
    assert made[0].out != made[1].out
    for result in made:
        assert result.out.count("\n") == 1
        assert len(KeyRing.parse(result.out).key_ids) == 1
        assert "add the new pepper at the end of API_KEY_PEPPERS" in result.err
        assert result.out.strip().partition(":")[2] not in result.err
    assert "key id" in bare.fails("generate-api-key-pepper", "--id", "a b")


def test_the_pattern_is_printed_without_a_database(bare: CommandLine) -> None:
    result = bare.ok("print-api-key-pattern")
    assert result.err == ""
    assert result.out.count("\n") == 1
    sample = f"tdb_live_{'a' * 12}_{'B' * 49}"
    text = f"x {sample}, {sample}c tdb_prod_{sample[9:]}"
    assert re.findall(result.out.strip(), text) == [sample]
