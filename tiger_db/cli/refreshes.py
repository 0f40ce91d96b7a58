"""Token refreshes."""

from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli.input import After, Limit, account_numbers, find_account, query
from tiger_db.cli.output import AsJson, show_page

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

# Those that crud can list: what is to come, and what somebody should look at.
RefreshStatuses = Literal["pending", "failed"]

app = typer.Typer()


@app.command(rich_help_panel="Token refreshes")
def list_refreshes(
    *,
    account: Annotated[
        str | None, typer.Option(help="Only those of this account (number or id).")
    ] = None,
    status: Annotated[RefreshStatuses | None, typer.Option(help="Only these.")] = None,
    limit: Limit = 50,
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
