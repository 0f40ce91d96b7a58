"""Commands for token refreshes, with a gateway of the tests."""

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from tigeropen.common.util.web_utils import http_pool

from tests.support import factories
from tests.support.cli_accounts import NUMBER, stored
from tests.support.cli_accounts import create as create_account
from tests.support.command_line import COMMAND, CommandLine, Result
from tests.support.private_keys import KEY
from tests.support.refresh_gateway import Gateway, serving
from tests.support.sql import run_sql, write
from tests.support.terminal import Terminal
from tests.support.tiger_files import PK8
from tests.support.tiger_tokens import tiger_token
from tests.support.waiting import wait_until
from tiger_db import (
    AccountStatus,
    Database,
    RefreshTrigger,
    Settings,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.database import AsyncSession

S = TokenRefreshStatus
TIGER_ID = "20150001"
LISTENING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'LISTEN%'
"""
OLDER = """
UPDATE token_statuses SET id = uuid7_floor(now() - interval '100 days') WHERE status = 'success'
"""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with serving(KEY.public_key()) as gateway:
        yield gateway
        http_pool.clear()


def add(
    settings: Settings,
    gateway: Gateway,
    number: str = NUMBER,
    tiger_id: str = TIGER_ID,
    **fields: Any,
) -> None:
    """Create an account whose token is due."""
    token = gateway.add(tiger_id, fields.pop("access_token", None))

    async def write() -> None:
        async with Database(settings) as database, database.session() as session:
            await factories.account(
                session, account_number=number, tiger_id=tiger_id, access_token=token,
                private_key=PK8, server_url=gateway.url, **fields,
            )  # fmt: skip

    asyncio.run(write())


def refreshes(settings: Settings) -> list[TokenStatus]:
    async def read() -> list[TokenStatus]:
        async with Database(settings) as database, database.session() as session:
            return (await crud.token_status.history(session)).items

    return asyncio.run(read())


def assert_no_secret(gateway: Gateway, *results: Result) -> None:
    tokens = {token for r in gateway.refreshes for token in (r.token, r.made) if token}
    tokens |= {known.token for known in gateway.known.values() if known.token}
    for result in results:
        for secret in (PK8, PK8[100:140], TIGER_ID, *tokens):
            assert secret not in result.out + result.err


# Running


@pytest.mark.slow
def test_a_worker_with_once_refreshes_what_is_due(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)
    add(clone_settings, gateway, "51230322", "20150002")
    add(clone_settings, gateway, "51230323", "20150003", access_token=tiger_token(_now()))
    gateway.plan("20150002", "refused")
    done = cli.process("run-refresh-worker", "--once")
    assert (done.code, done.out) == (0, "")
    told = done.err.splitlines()
    assert set(told[-1].split(", ")) == {"1 refreshed", "1 failed"}
    assert (
        sum(
            "account ****0321 has a new token; the next refresh is due at " in line for line in told
        )
        == 1
    )
    assert sum("****0322: the refresh failed: code=1000 msg=common" in line for line in told) == 1
    assert_no_secret(gateway, done)
    assert stored(cli).readable_token() == gateway.known[TIGER_ID].token
    assert stored(cli, "51230322").status == AccountStatus.SUSPENDED
    assert [refresh.tiger_id for refresh in gateway.refreshes].count("20150003") == 0
    again = cli.process("run-refresh-worker", "--once", "--concurrency", "1", "--per-minute", "1")
    assert again == Result(0, "", "no refresh was due\n")
    assert len(gateway.refreshes) == 2


def _now() -> datetime:
    return datetime.now(UTC)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_refresh_finish(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway, end: signal.Signals
) -> None:
    add(clone_settings, gateway)
    gateway.plan(TIGER_ID, "gate after")
    with subprocess.Popen(
        [*COMMAND, "run-refresh-worker"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(), text=True,
    ) as process:  # fmt: skip
        try:
            gateway.wait_for(1, 30)
            process.send_signal(end)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            gateway.gates[TIGER_ID].set()
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert err.startswith("waiting for due refreshes; press Ctrl-C to stop\n")
    assert err.endswith("\n1 refreshed\n")
    assert_no_secret(gateway, Result(0, out, err))
    (refresh,) = refreshes(clone_settings)
    assert refresh.status == S.SUCCESS
    assert stored(cli).readable_token() == gateway.known[TIGER_ID].token


def test_a_worker_needs_a_schema(empty: CommandLine) -> None:
    assert "tiger-db" in empty.fails("run-refresh-worker", "--once")
    assert "--concurrency" in empty.misused("run-refresh-worker", "--concurrency", "0")
    assert "--per-minute" in empty.misused("run-refresh-worker", "--per-minute", "0")


# One account


@pytest.mark.slow
def test_one_account_is_refreshed(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)
    done = cli.ok("refresh-token", NUMBER)
    account = stored(cli)
    assert done.out == ""
    assert done.err.splitlines()[-1] == (
        f"refreshed the access token; the new token expires at {account.token_expires_at}"
    )
    assert account.readable_token() == gateway.known[TIGER_ID].token
    again = cli.ok("refresh-token", str(account.id), "--json")
    assert again.json["status"] == "success"
    assert again.json["trigger"] == "manual"
    assert stored(cli).readable_token() == gateway.known[TIGER_ID].token != account.readable_token()
    assert len(gateway.refreshes) == 2
    assert_no_secret(gateway, done, again)


@pytest.mark.slow
def test_a_failed_refresh_of_one_account_is_reported(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)
    for answer, why in (
        ("HTTP 500", "HTTP 500"),
        ("drop before", "answer was lost"),
        ("refused", "code=1000 msg=common param error"),
    ):
        gateway.plan(TIGER_ID, answer)
        said = cli.fails("refresh-token", NUMBER)
        assert said.startswith("error: ")
        assert why in said
        assert_no_secret(gateway, Result(1, "", said))
    assert len(gateway.refreshes) == 3
    assert "the answer to an earlier attempt was lost" in said
    assert stored(cli).status == AccountStatus.SUSPENDED
    # A manual refresh is allowed for each status but closed.
    cli.ok("refresh-token", NUMBER)
    assert stored(cli).readable_token() == gateway.known[TIGER_ID].token


@pytest.mark.slow
def test_a_failure_is_printed_as_json(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)
    gateway.plan(TIGER_ID, "limited 5")
    failed = cli("refresh-token", NUMBER, "--json")
    assert (failed.code, failed.err) == (1, "error: code=5 msg=too often\n")
    assert (failed.json["status"], failed.json["error_code"]) == ("pending", "RefreshLimited")
    assert_no_secret(gateway, failed)


@pytest.mark.slow
def test_a_refresh_prints_no_warning(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    """In the process, every warning is an error, also those of the SDK's modules."""
    add(clone_settings, gateway)
    gateway.plan(TIGER_ID, "forbidden")
    failed = cli.process("refresh-token", NUMBER)
    assert (failed.code, failed.out) == (1, "")
    assert failed.err == "error: code=4 msg=access forbidden\n"


@pytest.mark.slow
def test_an_unknown_or_closed_account_is_not_refreshed(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    assert "no account" in cli.fails("refresh-token", "nope")
    add(clone_settings, gateway)
    cli.ok("close-account", NUMBER, "--yes")
    assert "closed" in cli.fails("refresh-token", NUMBER)
    assert gateway.refreshes == []


def claim_due(settings: Settings) -> TokenStatus:
    """Claim the refresh of the only account, which is due, as another worker does."""

    async def claim(session: AsyncSession) -> TokenStatus:
        (opened,) = await crud.token_status.schedule_due(session)
        return await crud.token_status.claim(session, opened.id, worker="w")

    return write(settings, claim)


@pytest.mark.slow
def test_an_account_is_not_refreshed_twice_at_a_time(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)
    claim_due(clone_settings)
    said = cli.fails("refresh-token", NUMBER, "--wait", "1s")
    assert said == "error: the refresh did not end within 0:00:01: it goes on\n"
    assert gateway.refreshes == []
    assert "--wait" in cli.misused("refresh-token", NUMBER, "--wait", "soon")


@pytest.mark.slow
def test_the_result_of_another_worker_is_printed(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)
    claim = claim_due(clone_settings)

    async def is_waited_for(session: AsyncSession) -> bool:
        return bool(await session.scalar(text(LISTENING)))

    with subprocess.Popen(
        [*COMMAND, "refresh-token", NUMBER, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment(), text=True,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: write(clone_settings, is_waited_for))
            write(
                clone_settings,
                lambda session: crud.token_status.complete(
                    session, claim, access_token=tiger_token(_now())
                ),
            )
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert err.startswith("refreshed the access token; the new token expires at ")
    assert (json.loads(out)["id"], json.loads(out)["status"]) == (str(claim.id), "success")
    assert gateway.refreshes == []


@pytest.mark.slow
def test_a_planned_refresh_is_made_now(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    add(clone_settings, gateway)

    async def plan(session: AsyncSession) -> TokenStatus:
        (account,) = await crud.accounts.list_accounts(session)
        return await factories.refresh(session, account, scheduled_at=_now() + timedelta(days=1))

    planned = write(clone_settings, plan)
    assert cli.ok("refresh-token", NUMBER, "--json").json["id"] == str(planned.id)
    assert len(gateway.refreshes) == 1


# Showing


def fill(settings: Settings, gateway: Gateway) -> None:
    """Create a refresh of each group."""
    for number in range(5):
        add(settings, gateway, str(51230321 + number), f"2015{number:04}")

    async def write() -> None:
        async with Database(settings) as database, database.session() as session:
            page = await crud.accounts.list_accounts(session)
            accounts = sorted(page.items, key=lambda account: account.account_number or "")
            opened = [
                await factories.refresh(
                    session, account,
                    scheduled_at=_now() + timedelta(hours=1) if number == 2 else None,
                )
                for number, account in enumerate(accounts)
            ]  # fmt: skip
            claims = [
                await crud.token_status.claim(session, opened[number].id, worker="host:1:abc")
                for number in (0, 3, 4)
            ]
            await crud.token_status.fail(
                session, claims[1], message="code=1000 msg=no", credentials_refused=True
            )
            await crud.token_status.complete(session, claims[2], access_token=tiger_token(_now()))

    asyncio.run(write())


@pytest.mark.slow
def test_refreshes_are_shown_by_group(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    nothing = cli.ok("watch-refreshes")
    assert nothing.out.split("\n\n") == [
        "Running: 0", "Due: 0", "Waiting: 0", "Failed: 0", "Last 24 hours: 0 refreshes succeeded\n"
    ]  # fmt: skip
    fill(clone_settings, gateway)
    shown = cli.ok("watch-refreshes")
    running, due, waiting, failed, day = shown.out.split("\n\n")
    for part, title, words in (
        (running, "Running: 1\n", ["51230321", "host:1:abc"]),
        (due, "Due: 1\n", ["51230322"]),
        (waiting, "Waiting: 1\n", ["51230323"]),
        (failed, "Failed: 1\n", ["51230324", "code=1000"]),
    ):
        assert part.startswith(title)
        assert all(word in part for word in words)
    assert day.startswith(
        "Last 24 hours: 1 refresh succeeded, 50% of the ended refreshes; duration median "
    )
    as_json = cli.ok("watch-refreshes", "--json")
    groups = as_json.json
    day_json = groups.pop("last_24h")
    assert {name: len(rows) for name, rows in groups.items()} == {
        "running": 1, "due": 1, "waiting": 1, "failed": 1
    }  # fmt: skip
    assert groups["running"][0]["worker"] == "host:1:abc"
    assert (day_json["total"], day_json["succeeded"], day_json["success_rate"]) == (5, 1, 0.5)
    assert_no_secret(gateway, shown, as_json)
    assert "--live" in cli.misused("watch-refreshes", "--live", "--json")


@pytest.mark.slow
def test_live_output_is_redrawn(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway, terminal: Terminal
) -> None:
    with terminal.program(cli, "watch-refreshes", "--live") as program:
        terminal.wait_for("Last 24 hours")
        assert "Due: 0" in terminal.seen
        assert "Ctrl-C to stop" in terminal.seen
        fill(clone_settings, gateway)
        terminal.wait_for("1 refresh succeeded")
        assert "Due: 1" in terminal.seen
        assert terminal.seen.count("\x1b[2J\x1b[H") > 1
        program.send_signal(signal.SIGINT)
        assert terminal.end(program) == 130
    assert "interrupted" in terminal.seen
    assert "Traceback" not in terminal.seen
    assert_no_secret(gateway, Result(0, terminal.seen, ""))


# Pruning


@pytest.mark.slow
def test_old_refreshes_are_pruned(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway
) -> None:
    fill(clone_settings, gateway)
    assert cli.ok("prune-refreshes") == Result(0, "", "deleted 0 refreshes\n")
    run_sql(clone_settings, OLDER)
    assert cli.ok("prune-refreshes", "--older-than", "101d").err == "deleted 0 refreshes\n"
    assert cli.ok("prune-refreshes").err == "deleted 1 refresh\n"
    assert sorted(refresh.status for refresh in refreshes(clone_settings)) == [
        S.FAILED, S.IN_PROGRESS, S.PENDING, S.PENDING
    ]  # fmt: skip
    run_sql(clone_settings, "UPDATE token_statuses SET id = uuid7_floor(now() - interval '9 years')"
        " WHERE status = 'in_progress'")  # fmt: skip
    assert cli.ok("prune-refreshes", "--older-than", "1d").err == "deleted 0 refreshes\n"
    assert "--older-than" in cli.misused("prune-refreshes", "--older-than", "soon")


@pytest.mark.slow
def test_a_missing_sdk_causes_no_failed_refresh(
    cli: CommandLine, clone_settings: Settings, gateway: Gateway, tmp_path: Path
) -> None:
    add(clone_settings, gateway)
    (tmp_path / "tigeropen.py").write_text("raise ImportError")
    ended = subprocess.run(
        [*COMMAND, "run-refresh-worker", "--once"],
        env=cli.environment(PYTHONPATH=str(tmp_path)),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Tiger's SDK is not installed" in ended.stderr
    assert cli.ok("list-refreshes", "--json").json["items"] == []


@pytest.mark.slow
def test_refreshes_are_listed(cli: CommandLine, clone_settings: Settings) -> None:
    assert cli.ok("list-refreshes") == Result(0, "", "no rows found\n")
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
        failed = await crud.token_status.fail(session, claim, message="out of luck")
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
        (("--status", "failed,pending"), [pending, failed]),
        (("--status", "in_progress"), []),
        (("--trigger", "expiry_soon"), [pending]),
        (("--trigger", "manual, expiry_soon"), [pending, failed]),
        (("--account", "1111111"), [failed]),
        (("--account", "1111111,2222222"), [pending, failed]),
        (("--account", "1111111", "--status", "pending"), []),
        (("--search", "1111"), [failed]),
        (("--since", "1h", "--until", "2100-01-01T00:00:00Z"), [pending, failed]),
        (("--until", "1h"), []),
        (("--order-by", "schedule"), [failed, pending]),
        (("--limit", "1"), [pending]),
    ):
        page = cli.ok("list-refreshes", "--json", *options).json
        assert [item["id"] for item in page["items"]] == wanted
        assert "total" not in page
    assert list(page["items"][0]) == list(TokenStatus.model_fields)
    after = ("--after", page["next_cursor"])
    page = cli.ok("list-refreshes", "--json", "--count", *after).json
    assert (page["items"][0]["id"], page["next_cursor"], page["total"]) == (failed, None, 2)
    before = ("--before", page["previous_cursor"], "--limit", "1")
    page = cli.ok("list-refreshes", "--json", *before).json
    assert (page["items"][0]["id"], page["previous_cursor"]) == (pending, None)
    said = cli.ok("list-refreshes", "--count", *after).err
    assert said.startswith(
        "number of rows on all pages: 2\nto see the previous page, add --before "
    )
    _, first, second = cli.ok("list-refreshes").out.splitlines()
    assert first.split()[:3] == ["2222222", "pending", "expiry_soon"]
    assert second.split()[:3] == ["1111111", "failed", "manual"]
    assert "out of luck" in second
    for option in ("--status", "--trigger", "--since", "--until", "--order-by"):
        assert option in cli.misused("list-refreshes", option, "nonsense")
    assert "no account" in cli.fails("list-refreshes", "--account", "nope")
