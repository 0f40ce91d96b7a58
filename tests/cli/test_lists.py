"""The audit trail and the token refreshes by the command line."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import tiger_db.cli.options
from tests.support.cli_accounts import create as create_account
from tests.support.command_line import CommandLine, Result
from tests.support.sql import write
from tiger_db import (
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
    RefreshTrigger,
    Settings,
    TokenStatus,
    crud,
)
from tiger_db.crud import pagination
from tiger_db.database import AsyncSession


@pytest.fixture
def events(cli: CommandLine, clone_settings: Settings) -> list[AuditLog]:
    """One of each kind that the filters tell apart."""
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
    ]
    rows = [AuditLog(**values) for values in given]

    async def log(session: AsyncSession) -> list[AuditLog]:
        await crud.audit_logs.log_events(session, rows)
        return rows

    return write(clone_settings, log)


@pytest.mark.slow
@pytest.mark.schema_changes
def test_event_filters(cli: CommandLine, events: list[AuditLog]) -> None:
    placed, cancelled, failed, critical, of_user, from_ip, in_session = (
        str(event.id) for event in events
    )
    queries = {failed, critical, of_user, from_ip, in_session}
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
        (("--ip", "10.1.2.3"), {from_ip}),
        (("--ip", "10.0.0.0/8"), {from_ip}),
        (("--session-id", "s1"), {in_session}),
        (("--request-id", "r1"), {in_session}),
        (("--user", "somebody", "--ip", "10.1.2.3"), set()),
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


@pytest.mark.schema_changes
def test_events_for_people(cli: CommandLine, events: list[AuditLog]) -> None:
    shown = cli.ok("list-events", "--action", "trade", "--action", "data").out
    lines = shown.splitlines()
    assert lines[0].split() == [
        "Time", "Action", "Result", "Severity", "Account", "User", "Error"
    ]  # fmt: skip
    assert "trade:place_order" in lines[-1]
    assert "51230321" in lines[-1]
    assert "out of luck" in shown
    assert cli.ok("list-events", "--user", "nobody") == Result(0, "", "there are none\n")


@pytest.mark.schema_changes
def test_events_in_pages(cli: CommandLine, events: list[AuditLog]) -> None:
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


@pytest.mark.schema_changes
def test_events_of_what_is_gone(
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


def test_bad_filters(cli: CommandLine) -> None:
    for option, value, reason in (
        ("--action", "place_order", "trade:place_order"),
        ("--action", "x", "no action"),
        ("--since", "yesterday", "zone"),
        ("--since", "2026-01-01T00:00:00", "zone"),
        ("--since", "2026-01-01", "zone"),
        ("--until", "0h", "30d"),
        ("--result", "good", "--result"),
        ("--severity", "urgent", "--severity"),
    ):
        assert reason in cli.misused("list-events", option, value)
    assert "address nor a network" in cli.fails("list-events", "--ip", "300.1.1.1")
    assert "no account" in cli.fails("list-events", "--account", "nope")
    assert "no API key" in cli.fails("list-events", "--api-key", "nope")


@pytest.mark.slow
def test_refreshes(cli: CommandLine, clone_settings: Settings) -> None:
    assert cli.ok("list-refreshes") == Result(0, "", "there are none\n")
    for number in ("1111111", "2222222"):
        create_account(cli, number)

    async def schedule(session: AsyncSession) -> tuple[TokenStatus, TokenStatus]:
        one, two = [
            await crud.accounts.get_by_account_number(session, number)
            for number in ("1111111", "2222222")
        ]
        assert one is not None
        assert two is not None
        now = datetime.now(UTC)
        failed = await crud.token_status.create_refresh_operation(
            session,
            tiger_account_id=one.id,
            trigger=RefreshTrigger.MANUAL,
            scheduled_at=now - timedelta(hours=1),
            max_retries=1,
        )
        claim, *_ = await crud.token_status.claim_due(session, worker="w")
        assert claim.id == failed.id
        failed = await crud.token_status.fail(session, claim, error="out of luck")
        pending = await crud.token_status.create_refresh_operation(
            session,
            tiger_account_id=two.id,
            trigger=RefreshTrigger.EXPIRY_SOON,
            scheduled_at=now + timedelta(hours=1),
        )
        return failed, pending

    failed, pending = (str(refresh.id) for refresh in write(clone_settings, schedule))
    for options, wanted in (
        ((), [pending, failed]),
        (("--status", "pending"), [pending]),
        (("--status", "failed"), [failed]),
        (("--account", "1111111"), [failed]),
        (("--limit", "1"), [pending]),
    ):
        page = cli.ok("list-refreshes", "--json", *options).json
        assert [item["id"] for item in page["items"]] == wanted
        assert list(page["items"][0]) == list(TokenStatus.model_fields)
    after = ("--after", page["next_cursor"])
    assert cli.ok("list-refreshes", "--json", *after).json["items"][0]["id"] == failed
    _, first, second = cli.ok("list-refreshes").out.splitlines()
    assert first.split()[:3] == ["2222222", "pending", "expiry_soon"]
    assert second.split()[:3] == ["1111111", "failed", "manual"]
    assert "out of luck" in second
    both = ("--status", "failed", "--account", "1111111")
    assert "--status" in cli.misused("list-refreshes", *both)
    assert "--status" in cli.misused("list-refreshes", "--status", "success")
    assert "no account" in cli.fails("list-refreshes", "--account", "nope")


def test_lists_of_commands_and_of_functions_have_one_page_size() -> None:
    assert tiger_db.cli.options.DEFAULT_PAGE_SIZE == pagination.DEFAULT_PAGE_SIZE
