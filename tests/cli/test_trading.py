"""Commands that pause and resume trading."""

from datetime import datetime

import pytest

from tests.support.cli_api_keys import create, refusal
from tests.support.command_line import CommandLine


@pytest.mark.slow
def test_trading_is_paused_and_resumed(cli: CommandLine) -> None:
    key = create(cli, "--scopes", "trade:write,mcp:read")["key"]
    listed = cli.ok("list-api-keys", "--json")
    assert (listed.json["trading_pause"], listed.err) == (None, "")
    assert "--reason" in cli("pause").err
    assert cli("pause").code == 2
    assert "reason must be a text of 1 to 500 characters" in cli.fails("pause", "--reason", " ")

    paused = cli.ok("--actor", "alice", "pause", "--reason", "runaway\n", "--json")
    pause = paused.json["trading_pause"]
    assert (pause["reason"], pause["paused_by"]) == ("runaway\n", "alice")
    since = datetime.fromisoformat(pause["paused_at"])
    told = f"trading has been paused since {since:%Y-%m-%d %H:%M:%SZ} by alice: runaway\n"
    assert paused.err == told
    again = cli.ok("--actor", "bob", "pause", "--reason", "another")
    assert (again.out, again.err) == ("", f"nothing is changed: {told}")

    assert "TradingPaused" in refusal(cli, key, "--scopes", "trade:read")
    assert "TradingPaused" in refusal(cli, key, "--scopes", "trade:read", "--dry-run")
    cli.ok("verify-api-key", "-", "--scopes", "mcp:read", stdin=key)
    for more in ((), ("--limit", "1")):
        assert cli.ok("list-api-keys", *more).err == f"warning: {told}"
    listed = cli.ok("list-api-keys", "--json")
    assert (listed.json["trading_pause"], listed.err) == (pause, f"warning: {told}")
    assert len(listed.json["items"]) == 1

    healthy = cli.ok("health-check", "--json").json
    assert (healthy["trading_pause"], healthy["problems"]) == (pause, [])
    assert "trading pause: reason" in cli.ok("health-check").out
    checks = {item["check"]: item for item in cli.ok("doctor", "--json").json["items"]}
    assert checks["trading"]["status"] == "warning"
    assert checks["trading"]["seen"].startswith("paused since ")
    assert "`tiger-db resume`" in checks["trading"]["advice"]

    ended = cli.ok("--actor", "bob", "resume", "--reason", "mended")
    assert (ended.out, ended.err) == (
        "", f"trading is resumed; trading had {told.removeprefix('trading has ')}"
    )  # fmt: skip
    assert cli.ok("resume", "--json").json == {"trading_pause": None}
    assert cli.ok("resume").err == "trading was not paused\n"
    cli.ok("verify-api-key", "-", "--scopes", "trade:read", stdin=key)
    assert cli.ok("health-check", "--json").json["trading_pause"] is None
    events = cli.ok("list-events", "--action", "trading", "--json").json["items"]
    assert [(event["action"], event["user_id"]) for event in events] == [
        ("trading:resume", "bob"), ("trading:pause", "alice")
    ]  # fmt: skip
