"""Commands that read the audit trail: list, follow, count and export events."""

import asyncio
import csv
import io
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_accounts import create as create_account
from tests.support.cli_events import log
from tests.support.command_line import COMMAND, CommandLine, Result
from tests.support.newer_release import NEWER_EVENT, NEWER_SCHEMA, NEWER_VALUES
from tests.support.sql import run_sql, write
from tests.support.waiting import WAITING_LOCKS, wait_until
from tiger_db import (
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
    Database,
    Settings,
    crud,
)
from tiger_db.connections import connect
from tiger_db.database import AsyncSession

COUNT = 12  # events of the fixture `sealed`
WAITING = f"""
SELECT EXISTS (SELECT FROM {WAITING_LOCKS} AND relation = 'audit_logs'::regclass)
"""
INSERT = """
INSERT INTO audit_logs (id, action, result, severity, user_id)
VALUES (gen_random_uuid(), 'data:query', 'success', 'low', $1)
"""
LISTENERS = """
SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'LISTEN%'
"""


@pytest.fixture
def events(cli: CommandLine, clone_settings: Settings) -> list[AuditLog]:
    """Return events that differ in the fields of the filters."""
    create_account(cli, "51230321")
    account = cli.ok("show-account", "51230321", "--json").json
    key = cli.ok("create-api-key", "--name", "x", "--scopes", "mcp:read", "--json").json
    given: list[dict[str, Any]] = [
        {"action": AuditAction.TRADE_PLACE_ORDER, "tiger_account_id": account["id"]},
        {"action": AuditAction.TRADE_CANCEL_ORDER, "api_key_id": key["id"]},
        {
            "action": AuditAction.DATA_QUERY,
            "result": AuditResult.ERROR,
            "error_message": "out of luck",
        },
        {"action": AuditAction.DATA_QUERY, "severity": AuditSeverity.CRITICAL},
        {"action": AuditAction.DATA_QUERY, "user_id": "somebody"},
        {"action": AuditAction.DATA_QUERY, "ip_address": "10.1.2.3"},
        {"action": AuditAction.DATA_QUERY, "session_id": "s1", "request_id": "r1"},
        {
            "action": AuditAction.DATA_QUERY,
            "user_type": "admin",
            "error_code": "E1",
            "tags": {"desk": "A"},
        },
    ]
    rows = [AuditLog(**values) for values in given]

    async def log(session: AsyncSession) -> list[AuditLog]:
        await crud.audit_logs.log_events(session, rows)
        return rows

    return write(clone_settings, log)


@pytest.mark.slow
def test_events_are_filtered(cli: CommandLine, events: list[AuditLog]) -> None:
    placed, cancelled, failed, critical, of_user, from_ip, in_session, tagged = (
        str(event.id) for event in events
    )
    queries = {failed, critical, of_user, from_ip, in_session, tagged}
    key = str(events[1].api_key_id)
    for options, wanted in (
        (("--action", "trade:place_order"), {placed}),
        (("--action", "trade"), {placed, cancelled}),
        (("--action", "trade", "--action", "data:query"), {placed, cancelled} | queries),
        (("--action", "trade", "--account", "51230321"), {placed}),
        (("--action", "trade", "--account", str(events[0].tiger_account_id)), {placed}),
        (("--action", "trade", "--api-key", key), {cancelled}),
        (("--result", "error"), {failed}),
        (("--severity", "critical"), {critical}),
        (("--user", "somebody"), {of_user}),
        (("--action", "trade,data:query"), {placed, cancelled} | queries),
        (("--severity", "critical", "--result", "success, error"), {critical}),
        (("--user", "nobody,somebody"), {of_user}),
        (("--user", ""), set()),
        (("--user-type", "admin"), {tagged}),
        (("--error-code", "E0,E1"), {tagged}),
        (("--tag", "desk"), {tagged}),
        (("--tag", "desk=B", "--tag", "desk=A"), {tagged}),
        (("--tag", "desk=B"), set()),
        (("--ip-address", "10.1.2.3"), {from_ip}),
        (("--ip-address", "11.0.0.0/8,10.0.0.0/8"), {from_ip}),
        (("--session-id", "s1"), {in_session}),
        (("--request-id", "r1"), {in_session}),
        (("--user", "somebody", "--ip-address", "10.1.2.3"), set()),
        (("--action", "trade", "--since", "1h"), {placed, cancelled}),
        (("--action", "trade", "--until", "1h"), set()),
        (("--action", "trade", "--since", "2099-01-01T00:00:00Z"), set()),
        (("--action", "trade", "--until", "2099-01-01T00:00:00+08:00"), {placed, cancelled}),
    ):  # fmt: skip
        items = cli.ok("list-events", "--json", *options).json["items"]
        assert {item["id"] for item in items} == wanted, options
    prefix = cli.ok("list-api-keys", "--json").json["items"][0]["key_prefix"]
    items = cli.ok("list-events", "--api-key", prefix, "--json").json["items"]
    assert [item["action"] for item in items] == ["trade:cancel_order", "api_key:create"]


@pytest.mark.slow
def test_events_are_shown_as_a_table(cli: CommandLine, events: list[AuditLog]) -> None:
    shown = cli.ok("list-events", "--action", "trade", "--action", "data").out
    lines = shown.splitlines()
    assert lines[0].split() == [
        "Time", "Action", "Result", "Severity", "Account", "User", "Error"
    ]  # fmt: skip
    assert "trade:place_order" in lines[-1]
    assert "51230321" in lines[-1]
    assert "out of luck" in shown
    assert cli.ok("list-events", "--user", "nobody") == Result(0, "", "no rows found\n")


@pytest.mark.slow
def test_events_are_listed_in_pages(cli: CommandLine, events: list[AuditLog]) -> None:
    seen: list[dict[str, Any]] = []
    after: tuple[str, ...] = ()
    while True:
        page = cli.ok("list-events", "--limit", "3", "--json", *after).json
        assert list(page["items"][0]) == list(AuditLog.model_fields)
        seen += page["items"]
        if page["next_cursor"] is None:
            break
        after = ("--after", page["next_cursor"])
    assert seen == cli.ok("list-events", "--json").json["items"]
    assert len(seen) == len(events) + 2
    before = ("--before", page["previous_cursor"])
    previous = cli.ok("list-events", "--limit", "3", "--json", "--count", *before).json
    assert previous["items"] == seen[-len(page["items"]) - 3 : -len(page["items"])]
    assert previous["total"] == len(seen)
    counted = cli.ok("list-events", "--limit", "3", "--count")
    assert "number of rows on all pages: 10\n" in counted.err
    assert "to see the next page, add --after" in counted.err


@pytest.mark.slow
def test_events_of_a_deleted_account_are_listed(
    cli: CommandLine, clone_settings: Settings, events: list[AuditLog]
) -> None:
    async def delete(session: AsyncSession) -> None:
        account = await crud.accounts.get_by_account_number(session, "51230321")
        await session.delete(account)

    write(clone_settings, delete)
    account_id = str(events[0].tiger_account_id)
    listed = cli.ok("list-events", "--account", account_id)
    assert account_id in listed.out
    assert "trade:place_order" in listed.out


@pytest.mark.slow
def test_events_with_unknown_values_are_shown(cli: CommandLine, clone_settings: Settings) -> None:
    """A newer release has recorded them, or an application."""
    run_sql(clone_settings, *NEWER_SCHEMA, NEWER_EVENT)
    log(clone_settings, {"action": "backup:run", "result": "pending"})
    (line,) = cli.ok("list-events", "--action", "mcp").out.splitlines()[1:]
    assert line.split()[-3:] == [*NEWER_VALUES]
    (found,) = cli.ok("list-events", "--action", "mcp:future", "--json").json["items"]
    assert (found["action"], found["result"], found["severity"]) == NEWER_VALUES
    for option in (("--action", "backup"), ("--action", "backup:run"), ("--result", "pending")):
        listed = cli.ok("list-events", "--json", *option)
        assert [item["action"] for item in listed.json["items"]] == ["backup:run"]
        assert listed.err == ""
    counted = cli.ok("count-events", "--json").json["items"]
    assert counted == [
        {"action": "backup:run", "result": "pending", "count": 1},
        {"action": "mcp:future", "result": "deferred", "count": 1},
    ]
    assert '"result":"deferred"' in cli.ok("export-events").out


def test_a_misspelt_action_causes_a_warning(cli: CommandLine) -> None:
    for name, meant in (("trade:place_ordre", "trade:place_order"), ("trad", "trade")):
        listed = cli.ok("list-events", "--action", name)
        assert f"the action {name}; did you mean {meant}" in listed.err


def test_malformed_filters_are_refused(cli: CommandLine) -> None:
    for option, value, reason in (
        ("--action", "Trade:place_order", "trade:place_order"),
        ("--action", "trade:", "a family of actions, such as trade"),
        ("--since", "yesterday", "zone"),
        ("--since", "2026-01-01T00:00:00", "zone"),
        ("--since", "2026-01-01", "zone"),
        ("--until", "0h", "30d"),
        ("--result", "good", "choose from success"),
        ("--severity", "urgent", "choose from low"),
    ):
        assert reason in cli.misused("list-events", option, value)
    assert "must be an IP address or network" in cli.fails(
        "list-events", "--ip-address", "300.1.1.1"
    )
    assert "no account" in cli.fails("list-events", "--account", "nope")
    reason = cli.fails("list-events", "--api-key", "nope")
    assert "no API key" in reason
    assert "list-events --action api_key:delete --json" in reason


@pytest.mark.slow
def test_events_are_exported_to_standard_output(
    sealed: CommandLine, clone_settings: Settings
) -> None:
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
    marked = sealed.process(
        "export-events", "--format", "csv", "--since", "1h", "--byte-order-mark"
    )
    assert marked.out == f"\ufeff{shown.out}"
    assert "give --format csv" in sealed.misused("export-events", "--byte-order-mark")


@pytest.mark.slow
def test_events_are_filtered_by_resource_and_details(
    cli: CommandLine, clone_settings: Settings
) -> None:
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


@pytest.mark.slow
def test_events_are_counted(cli: CommandLine, clone_settings: Settings) -> None:
    assert cli.ok("count-events") == Result(0, "", "no events found\n")
    log(
        clone_settings,
        *[{"action": AuditAction.DATA_QUERY}] * 3,
        {"action": AuditAction.TRADE_PLACE_ORDER, "result": AuditResult.ERROR},
    )
    assert cli.ok("count-events", "--json").json == {
        "items": [
            {"action": "data:query", "result": "success", "count": 3},
            {"action": "trade:place_order", "result": "error", "count": 1},
        ],
        "next_cursor": None,
    }
    assert [line.split() for line in cli.ok("count-events").out.splitlines()] == [
        ["Action", "Result", "Events"],
        ["data:query", "success", "3"],
        ["trade:place_order", "error", "1"],
    ]
    (hour,) = cli.ok("count-events", "--by", "hour", "--json").json["items"]
    assert hour["count"] == 4
    at = datetime.fromisoformat(hour["start"])
    assert (at.minute, at.utcoffset()) == (0, timedelta(0))
    assert timedelta(0) <= datetime.now(UTC) - at < timedelta(hours=1, minutes=5)
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


@pytest.mark.slow
def test_events_are_counted_by_fields_with_filters(
    cli: CommandLine, events: list[AuditLog]
) -> None:
    def counted(*options: str) -> list[list[str]]:
        return [line.split() for line in cli.ok("count-events", *options).out.splitlines()]

    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert counted("--by", "family", "--result", "success", "--limit", "1") == [
        ["Family", "Events"], ["data", "5"]
    ]  # fmt: skip
    first, *rows = counted("--by", "day,account_id", "--action", "trade", "--since", "2d")
    assert first == ["Day", "Account", "Events"]
    assert sorted(row[2:] for row in rows) == [["1"], ["51230321", "1"]]
    assert rows[-1][0] == today
    assert counted("--by", "user_id", "--user", "somebody,nobody") == [
        ["User", "Events"], ["somebody", "1"]
    ]  # fmt: skip
    assert counted("--until", "1h") == []
    chart = counted("--chart", "--by", "ip_address", "--action", "data")
    assert [(row[0], row[-1]) for row in chart] == [("none", "5"), ("10.1.2.3", "1")]
    assert len(counted("--chart", "--by", "day")) in {2, 3}
    (item,) = cli.ok("count-events", "--by", "api_key_id,action", "--action", "trade:cancel_order",
                     "--json").json["items"]  # fmt: skip
    assert item == {
        "api_key_id": str(events[1].api_key_id), "action": "trade:cancel_order", "count": 1
    }  # fmt: skip
    for by in ("month", "hour,day", "action,action"):
        assert "choose from hour, day, action" in cli.misused("count-events", "--by", by)
    assert "--by" in cli.misused("count-events", "--chart", "--by", "day,action")


@asynccontextmanager
async def following(cli: CommandLine, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process that waits for events."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "list-events", "--follow", *options,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = await asyncio.wait_for(process.stderr.readline(), 20)
        assert said.decode() == "waiting for new events; press Ctrl-C to stop\n"
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
    """Run `work` while a process follows events, then interrupt the process."""

    async def run() -> tuple[int | None, bytes, bytes]:
        async with Database(settings) as database, following(cli, *options) as process:
            await work(process, database)
            process.send_signal(signal.SIGINT)
            out, err = await asyncio.wait_for(process.communicate(), 10)
            return process.returncode, out, err

    assert asyncio.run(run()) == (130, b"", b"interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["list-events", "--follow"], ["watch-refreshes", "--live"]], ids=" ".join
)
def test_sigterm_ends_a_command_that_runs_until_it_is_stopped(
    cli: CommandLine, command: list[str]
) -> None:
    """The code shows a handler: the default action, which does not exist for PID 1, gives -15."""
    with subprocess.Popen(
        [*COMMAND, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=cli.environment(), text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert "press ctrl-c to stop" in process.stdout.readline().lower()
            process.terminate()
            out, _ = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert out.endswith("terminated\n")


@pytest.mark.slow
def test_sigterm_ends_a_command_that_waits_for_input(cli: CommandLine) -> None:
    with subprocess.Popen(
        [*COMMAND, "verify-api-key", "-"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(), text=True,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: catches_sigterm(process.pid))
            process.terminate()
            assert process.wait(10) == 128 + signal.SIGTERM
            assert process.stderr is not None
            assert process.stderr.read() == "terminated\n"
        finally:
            process.kill()


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_follow_shows_each_committed_event_once(cli: CommandLine, clone_settings: Settings) -> None:
    """Only matching events are shown, and no event of a rolled back transaction."""
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
def test_follow_works_without_notifications(cli: CommandLine, clone_settings: Settings) -> None:
    """A pooler, or the loss of the listening connection, prevents notifications."""

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
def test_follow_shows_all_events_after_its_first_message(
    cli: CommandLine, clone_settings: Settings
) -> None:
    """All events that are committed after the message are shown."""

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
                with pytest.raises(TimeoutError):  # the lock delays the first read
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


def test_follow_refuses_an_end(cli: CommandLine) -> None:
    for option in (("--until", "1h"), ("--after", "x"), ("--before", "x"), ("--count",)):
        assert "--follow" in cli.misused("list-events", "--follow", *option)
    assert "no account" in cli.fails("list-events", "-f", "--account", "nope")
    assert "must be an IP address or network" in cli.fails("list-events", "-f", "--ip-address", "x")
