"""Commands for token refreshes."""

import logging
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import InvalidState, RefreshFailed

if TYPE_CHECKING:
    from collections import Counter

    from tiger_db.crud.token_status import RefreshFilters, RefreshStatistics
    from tiger_db.database import AsyncSession

    Groups = dict[str, list[tiger_db.TokenStatus]]

_PANEL = "Token refreshes"
_REDRAW_SECONDS = 1.0
_MAX_ROWS_SHOWN = 100  # maximum number of refreshes shown in each group
_CLEAR_SCREEN = "\033[2J\033[H"
app = typer.Typer()


@app.command(rich_help_panel=_PANEL)
def list_refreshes(
    *,
    account: Annotated[
        str | None, typer.Option(help="Numbers or ids of accounts, with commas.")
    ] = None,
    status: Annotated[
        str | None,
        typer.Option(
            help="One or more of pending, in_progress, success, failed, cancelled and expired,"
            " with commas."
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="One or more of scheduled, manual, on_demand, expiry_soon, expired and error,"
            " with commas."
        ),
    ] = None,
    since: Annotated[str | None, options.SINCE] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End of the period: a time, or an age such as 24h."),
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Text in the name or number of the account.")
    ] = None,
    order_by: Annotated[
        Literal["newest", "schedule"],
        typer.Option(help="Order of the refreshes: newest first, or earliest due time first."),
    ] = "newest",
    limit: options.Limit = options.DEFAULT_PAGE_SIZE,
    after: options.After = None,
    before: options.Before = None,
    count: options.Count = False,
    as_json: options.AsJson = False,
) -> None:
    """List the token refreshes that match all given options, by default all token refreshes."""
    filters: RefreshFilters = {"search": search}
    if status is not None:
        filters["status"] = options.parse_members(tiger_db.TokenRefreshStatus, status, "--status")
    if trigger is not None:
        filters["trigger"] = options.parse_members(tiger_db.RefreshTrigger, trigger, "--trigger")
    if since is not None:
        filters["since"] = options.parse_past(since, "--since")
    if until is not None:
        filters["until"] = options.parse_past(until, "--until")

    async def find(session: "AsyncSession") -> "tiger_db.Page[tiger_db.TokenStatus]":
        if account is not None:
            found = await runtime.find_accounts(session, account)
            filters["account_id"] = [account.id for account in found]
        return await tiger_db.crud.token_status.history(
            session,
            order_by=order_by,
            after=after,
            before=before,
            limit=limit,
            count=count,
            load=["tiger_account"],
            **filters,
        )

    output.show_page(
        runtime.in_transaction(find),
        {
            "Account": lambda refresh: refresh.tiger_account.account_number,
            "Status": lambda refresh: refresh.status,
            "Trigger": lambda refresh: refresh.trigger,
            "Due": lambda refresh: refresh.scheduled_at,
            "Ended": lambda refresh: refresh.completed_at,
            "Failures": lambda refresh: refresh.retry_count,
            "Error": lambda refresh: refresh.error_message or refresh.error_code,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=_PANEL)
def watch_refreshes(
    *,
    live: Annotated[
        bool, typer.Option("--live", help="Update the output every second, until Ctrl-C.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show running, due, waiting and failed token refreshes, and statistics of the last day."""
    if live and as_json:
        raise typer.BadParameter("--live cannot be combined with --json", param_hint="--live")
    if live:
        runtime.with_database(_redraw)
        return
    groups, numbers, day = runtime.in_transaction(_load)
    if as_json:
        rows_of = {name: [output.dump(row) for row in rows] for name, rows in groups.items()}
        output.print_json({**rows_of, "last_24h": asdict(day)})
    else:
        _draw(groups, numbers, day)


async def _redraw(database: "tiger_db.Database") -> None:
    import asyncio  # noqa: PLC0415  # slow import, not needed by `--help`

    while True:
        async with database.session() as session:
            loaded = await _load(session)
        typer.echo(f"{_CLEAR_SCREEN}{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}  Press Ctrl-C to stop\n")
        _draw(*loaded)
        await asyncio.sleep(_REDRAW_SECONDS)


async def _load(
    session: "AsyncSession",
) -> "tuple[Groups, dict[UUID | None, str], RefreshStatistics]":
    since = datetime.now(UTC) - timedelta(days=1)
    groups = await tiger_db.crud.token_status.overview(session, since=since, limit=_MAX_ROWS_SHOWN)
    accounts = (row.tiger_account_id for rows in groups.values() for row in rows)
    day = await tiger_db.crud.token_status.statistics(session, since=since)
    return groups, await runtime.account_numbers(session, accounts), day


def _draw(groups: "Groups", numbers: dict[UUID | None, str], day: "RefreshStatistics") -> None:
    for name, rows in groups.items():
        typer.echo(f"{name.capitalize()}: {len(rows)}{'+' if len(rows) == _MAX_ROWS_SHOWN else ''}")
        if rows:
            output.show_table(
                ("Account", "Due", "Worker", "Lease until", "Failures", "Error"),
                [
                    (
                        numbers[row.tiger_account_id],
                        row.scheduled_at,
                        row.worker if row.lease_expires_at else None,
                        row.lease_expires_at,
                        row.retry_count or None,
                        row.error_message or row.error_code,
                    )
                    for row in rows
                ],
            )
        typer.echo()
    rate = "" if day.success_rate is None else f", {day.success_rate:.0%} of the ended refreshes"
    times = (
        ""
        if day.median_ms is None
        else f"; duration median {day.median_ms:.0f} ms, p95 {day.p95_ms:.0f} ms"
    )
    succeeded = output.count_of(day.succeeded, "refresh", "refreshes")
    typer.echo(f"Last 24 hours: {succeeded} succeeded{rate}{times}")


@app.command(rich_help_panel=_PANEL)
def run_refresh_worker(
    *,
    once: Annotated[bool, typer.Option("--once", help="Exit when no refresh is due.")] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help="Maximum number of refreshes at the same time.")
    ] = 4,
    per_minute: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests per minute for one Tiger id.")
    ] = 10,
) -> None:
    """Run a worker that refreshes access tokens at Tiger when the tokens are due.

    Several workers may run at the same time, on any machines. After SIGTERM or Ctrl-C, the worker
    finishes the running refreshes, and exits.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("tiger_db").setLevel(logging.INFO)

    async def work(database: "tiger_db.Database") -> "Counter[str]":
        worker = tiger_db.RefreshWorker(
            database, tiger_db.tiger.refresh_token, concurrency=concurrency, per_minute=per_minute
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            runtime.on_signal(number, worker.stop)
        await database.check()
        if not once:
            output.print_message("waiting for due refreshes; press Ctrl-C to stop")
        await worker.run(once=once)
        return worker.counts

    from tiger_db.tiger.sdk import load_sdk  # noqa: PLC0415  # slow import, not needed by `--help`

    load_sdk()  # if the SDK is missing, load_sdk() raises an error before the first refresh
    counts = runtime.with_database(work)
    output.print_message(
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no refresh was due"
    )


@app.command(rich_help_panel=_PANEL)
def refresh_token(
    account: options.AccountArgument,
    *,
    wait: Annotated[
        str,
        typer.Option(
            metavar="2m",
            help="Longest wait for another worker that refreshes the token already, such as 30s.",
        ),
    ] = "2m",
    as_json: options.AsJson = False,
) -> None:
    """Refresh the access token of an account at Tiger now.

    If a worker refreshes the token already, the command waits for the worker, and prints the result
    of the worker.
    """
    timeout = options.parse_duration(wait, "--wait")
    # Without the NullHandler, logging would print the error of a failed refresh a second time.
    logging.getLogger("tiger_db").addHandler(logging.NullHandler())

    async def refresh(database: "tiger_db.Database") -> "tiger_db.TokenStatus":
        async with database.session() as session:
            found = await runtime.find_account(session, account)
            opened = await tiger_db.crud.token_status.refresh_now(session, found.id)
        worker = tiger_db.RefreshWorker(database, tiger_db.tiger.refresh_token)
        try:
            return await worker.run_one(opened.id)
        except InvalidState:  # another worker has claimed the refresh, and may have ended it
            return await tiger_db.wait_for_refresh(database, opened.id, timeout=timeout)

    ended = runtime.with_database(refresh)
    if as_json:
        output.print_json(output.dump(ended))
    if ended.status != tiger_db.TokenRefreshStatus.SUCCESS:
        raise RefreshFailed(ended.error_message or f"the refresh is {ended.status}")
    output.print_message(
        f"refreshed the access token; the new token expires at {ended.new_token_expires_at}"
    )


@app.command(rich_help_panel=_PANEL)
def prune_refreshes(
    *,
    older_than: Annotated[
        str,
        typer.Option(
            metavar="90d", help="Minimum age of the refreshes to delete, such as 12h or 90d."
        ),
    ] = "90d",
) -> None:
    """Delete old token refreshes, except refreshes that are pending or in progress."""
    age = options.parse_duration(older_than, "--older-than")

    async def prune(database: "tiger_db.Database") -> int:
        total = 0
        while True:
            async with database.session() as session:
                deleted = await tiger_db.crud.token_status.prune(session, older_than=age)
            total += deleted
            if not deleted:
                return total

    deleted = output.count_of(runtime.with_database(prune), "refresh", "refreshes")
    output.print_message(f"deleted {deleted}")
