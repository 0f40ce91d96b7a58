"""The audit trail."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli.input import (
    After,
    Limit,
    account_numbers,
    as_uuid,
    find_account,
    find_api_key,
    moment,
    query,
)
from tiger_db.cli.output import AsJson, show_page

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

Results = Literal["success", "failure", "partial", "error"]
Severities = Literal["low", "medium", "high", "critical"]
_WHEN = "such as 2026-01-31T12:00:00Z, or how long ago, such as 24h or 7d."

app = typer.Typer()


@app.command(rich_help_panel="Audit trail")
def list_events(
    *,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help=f"From then on: {_WHEN}")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Before then, in the same forms.")
    ] = None,
    action: Annotated[
        list[str] | None,
        typer.Option(help="Only this, such as trade:place_order, or a family such as trade."),
    ] = None,
    result: Annotated[Results | None, typer.Option(help="Only these.")] = None,
    severity: Annotated[Severities | None, typer.Option(help="Only these.")] = None,
    account: Annotated[str | None, typer.Option(help="Number or id of an account.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Prefix or id of an API key.")] = None,
    user: Annotated[str | None, typer.Option(help="Id of a user.")] = None,
    ip: Annotated[str | None, typer.Option(help="Address or network, such as 10.0.0.0/8.")] = None,
    session_id: Annotated[str | None, typer.Option(help="Id of a session.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Id of a request.")] = None,
    limit: Limit = 50,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List what was done, newest first: the events that match every option given."""
    start = moment(since, "--since", ago=True)
    end = moment(until, "--until", ago=True)
    actions = _actions(action or ())

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.AuditLog], dict[UUID | None, str]]":
        # By id, events outlive what they are about.
        account_id = as_uuid(account) if account is not None else None
        if account is not None and account_id is None:
            account_id = (await find_account(session, account)).id
        key_id = as_uuid(api_key) if api_key is not None else None
        if api_key is not None and key_id is None:
            key_id = (await find_api_key(session, api_key)).id
        page = await tiger_db.crud.audit_logs.search(
            session,
            since=start,
            until=end,
            actions=actions,
            results=[tiger_db.AuditResult(result)] if result else (),
            severities=[tiger_db.AuditSeverity(severity)] if severity else (),
            account_id=account_id,
            api_key_id=key_id,
            user_id=user,
            ip=ip,
            session_id=session_id,
            request_id=request_id,
            after=after,
            limit=limit,
        )
        return page, await account_numbers(session, (event.tiger_account_id for event in page))

    page, numbers = query(find)
    show_page(
        page,
        {
            "Time": lambda event: event.created_at,
            "Action": lambda event: event.action,
            "Result": lambda event: event.result,
            "Severity": lambda event: event.severity,
            "Account": lambda event: numbers.get(event.tiger_account_id),
            "User": lambda event: event.user_id,
            "Error": lambda event: event.error_message or event.error_code,
        },
        as_json=as_json,
    )


def _actions(names: Iterable[str]) -> "list[tiger_db.AuditAction]":
    found = []
    for name in names:
        matching = [
            action for action in tiger_db.AuditAction if name in (action.value, action.family)
        ]
        if not matching:
            near = get_close_matches(name, tiger_db.AuditAction, n=3)
            raise typer.BadParameter(
                f"there is no action {name!r}" + f"; is it {' or '.join(near)}?" * bool(near),
                param_hint="--action",
            )
        found += matching
    return found
