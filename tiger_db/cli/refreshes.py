"""Token refreshes."""

import logging
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli.options import (
    DEFAULT_PAGE_SIZE,
    After,
    Limit,
    account_numbers,
    duration,
    find_account,
    finish,
    query,
    settings,
)
from tiger_db.cli.output import AsJson, dump, print_json, show_page, show_table, talk
from tiger_db.errors import RefreshFailed

if TYPE_CHECKING:
    from collections import Counter

    from tiger_db.crud.token_status import RefreshStatistics
    from tiger_db.database import AsyncSession

    Groups = dict[str, list[tiger_db.TokenStatus]]

# Those that crud can list: what is to come, and what somebody should look at.
RefreshStatuses = Literal["pending", "failed"]

PANEL = "Token refreshes"
_REDRAW = 1.0  # seconds
_SHOWN = 100  # refreshes of each kind
_CLEAR = "\033[2J\033[H"  # the terminal's screen
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def list_refreshes(
    *,
    account: Annotated[
        str | None, typer.Option(help="Only those of this account (number or id).")
    ] = None,
    status: Annotated[RefreshStatuses | None, typer.Option(help="Only these.")] = None,
    limit: Limit = DEFAULT_PAGE_SIZE,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List the token refreshes, newest first."""
    if account is not None and status is not None:
        raise typer.BadParameter("excludes --account", param_hint="--status")

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.TokenStatus], dict[UUID | None, str]]":
        refreshes = tiger_db.crud.token_status
        if status == "pending":
            page = await refreshes.get_pending_refreshes(session, after=after, limit=limit)
        elif status == "failed":
            page = await refreshes.get_failed_refreshes(session, after=after, limit=limit)
        else:
            of = (await find_account(session, account)).id if account is not None else None
            page = await refreshes.history(session, account_id=of, after=after, limit=limit)
        return page, await account_numbers(session, (row.tiger_account_id for row in page))

    page, numbers = query(find)
    show_page(
        page,
        {
            "Account": lambda refresh: numbers[refresh.tiger_account_id],
            "Status": lambda refresh: refresh.status,
            "Trigger": lambda refresh: refresh.trigger,
            "Due": lambda refresh: refresh.scheduled_at,
            "Ended": lambda refresh: refresh.completed_at,
            "Failures": lambda refresh: refresh.retry_count,
            "Error": lambda refresh: refresh.error_message or refresh.error_code,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=PANEL)
def watch_refreshes(
    *,
    live: Annotated[
        bool, typer.Option("--live", help="Show it anew every second, until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is running, due and failing, account by account, and how the last day went."""
    if not live:
        groups, numbers, day = query(_look)
        if as_json:
            print_json(
                {
                    **{name: [dump(row) for row in rows] for name, rows in groups.items()},
                    "last_24h": asdict(day),
                }
            )
        else:
            _draw(groups, numbers, day)
        return
    if as_json:
        raise typer.BadParameter("is for people", param_hint="--live")

    async def run() -> None:
        import asyncio  # noqa: PLC0415  # slow, and `--help` is to be fast

        async with tiger_db.Database(settings()) as database:
            while True:
                async with database.session() as session:
                    seen = await _look(session)
                typer.echo(f"{_CLEAR}{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}  Ctrl-C ends it\n")
                _draw(*seen)
                await asyncio.sleep(_REDRAW)

    finish(run())


async def _look(
    session: "AsyncSession",
) -> "tuple[Groups, dict[UUID | None, str], RefreshStatistics]":
    since = datetime.now(UTC) - timedelta(days=1)
    groups = await tiger_db.crud.token_status.overview(session, since=since, limit=_SHOWN)
    accounts = (row.tiger_account_id for rows in groups.values() for row in rows)
    day = await tiger_db.crud.token_status.statistics(session, since=since)
    return groups, await account_numbers(session, accounts), day


def _draw(groups: "Groups", numbers: dict[UUID | None, str], day: "RefreshStatistics") -> None:
    for name, rows in groups.items():
        typer.echo(f"{name.capitalize()}: {len(rows)}{'+' if len(rows) == _SHOWN else ''}")
        if rows:
            show_table(
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
    rate = "" if day.success_rate is None else f", {day.success_rate:.0%} of those that ended"
    times = "" if day.p50_ms is None else f"; p50 {day.p50_ms:.0f} ms, p95 {day.p95_ms:.0f} ms"
    typer.echo(f"Last 24 hours: {day.succeeded} succeeded{rate}{times}")


@app.command(rich_help_panel=PANEL)
def run_refresh_worker(
    *,
    once: Annotated[
        bool, typer.Option("--once", help="End when nothing is due, in place of waiting.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help="How many accounts at a time.")
    ] = 4,
    per_minute: Annotated[
        int, typer.Option(min=1, help="How often a minute for one tiger_id at most.")
    ] = 10,
) -> None:
    """Refresh access tokens at Tiger as they become due. Run any number, on any machines.

    SIGTERM and Ctrl-C end it when what is under way is finished.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("tiger_db").setLevel(logging.INFO)

    async def run() -> "Counter[str]":
        import asyncio  # noqa: PLC0415  # slow, and `--help` is to be fast

        from tiger_db.tiger.sdk import load_sdk  # noqa: PLC0415  # the same

        load_sdk()  # if it is missing, no account must count that as a failed refresh
        async with tiger_db.Database(settings()) as database:
            worker = tiger_db.RefreshWorker(
                database,
                tiger_db.tiger.refresh_token,
                concurrency=concurrency,
                per_minute=per_minute,
            )
            loop = asyncio.get_running_loop()
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(name, worker.stop)
            await database.check()
            if not once:
                talk("waiting for what is due; Ctrl-C ends it")
            await worker.run(once=once)
            return worker.counts

    _tell(finish(run()))


def _tell(counts: "Counter[str]") -> None:
    talk(", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing was due")


@app.command(rich_help_panel=PANEL)
def refresh_token(
    account: Annotated[str, typer.Argument(help="The account's number or id.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Refresh an account's access token at Tiger now."""
    # The error says it: not the log as well, which would be shown for want of a handler.
    logging.getLogger("tiger_db").addHandler(logging.NullHandler())

    async def run() -> "tiger_db.TokenStatus":
        async with tiger_db.Database(settings()) as database:
            async with database.session() as session:
                found = await find_account(session, account)
                opened = await tiger_db.crud.token_status.create_refresh_operation(
                    session,
                    tiger_account_id=found.id,
                    trigger=tiger_db.RefreshTrigger.MANUAL,
                )
            worker = tiger_db.RefreshWorker(database, tiger_db.tiger.refresh_token)
            await worker.run_one(opened.id)
            async with database.session() as session:
                done = await tiger_db.crud.token_status.get(session, opened.id)
            assert done is not None
            return done

    done = finish(run())
    if as_json:
        print_json(dump(done))
    if done.status != tiger_db.TokenRefreshStatus.SUCCESS:
        raise RefreshFailed(done.error_message or f"the refresh is {done.status.value}")
    talk(f"refreshed; the new token expires at {done.new_token_expires_at}")


@app.command(rich_help_panel=PANEL)
def prune_refreshes(
    *,
    older_than: Annotated[
        str, typer.Option(metavar="90d", help="Those opened so long ago: d or w.")
    ] = "90d",
) -> None:
    """Delete the history of refreshes that ended long ago. Nothing that is open goes."""
    age = duration(older_than, "--older-than")

    async def run() -> int:
        total = 0
        async with tiger_db.Database(settings()) as database:
            while True:
                async with database.session() as session:
                    gone = await tiger_db.crud.token_status.prune(session, older_than=age)
                total += gone
                if not gone:
                    return total

    talk(f"{finish(run())} refreshes were deleted")
