"""Commands that read the audit trail: list, follow, count and export events."""

import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli.options import (
    DEFAULT_PAGE_SIZE,
    SINCE,
    After,
    AsJson,
    Limit,
    Out,
    Overwrite,
    parse_past,
)
from tiger_db.cli.output import (
    count_by_period,
    counter,
    dump,
    open_output,
    print_json,
    print_message,
    show_bars,
    show_line,
    show_page,
    show_table,
)
from tiger_db.cli.runtime import (
    account_numbers,
    find_account,
    find_api_key,
    in_transaction,
    parse_uuid,
    with_database,
)

if TYPE_CHECKING:
    from tiger_db.crud.audit_logs import Criteria
    from tiger_db.database import AsyncSession

    FindCriteria = Callable[[AsyncSession], Awaitable[Criteria]]

Results = Literal["success", "failure", "partial", "error"]
Severities = Literal["low", "medium", "high", "critical"]
PANEL = "Audit trail"

Since = Annotated[str | None, SINCE]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="End, in the same forms.")]
Action = Annotated[
    list[str] | None,
    typer.Option(help="An action such as trade:place_order, or a family such as trade."),
]
ResultOption = Annotated[Results | None, typer.Option("--result", help="Only this result.")]
Severity = Annotated[Severities | None, typer.Option(help="Only this severity.")]
Account = Annotated[str | None, typer.Option(help="Number or id of an account.")]
ApiKey = Annotated[str | None, typer.Option(help="Prefix or id of an API key.")]
User = Annotated[str | None, typer.Option(help="Id of a user.")]
Ip = Annotated[str | None, typer.Option(help="Address or network, such as 10.0.0.0/8.")]
Session = Annotated[str | None, typer.Option("--session-id", help="Id of a session.")]
Request = Annotated[str | None, typer.Option("--request-id", help="Id of a request.")]
Resource = Annotated[str | None, typer.Option(help="Resource: its type, its id, or TYPE/ID.")]
Details = Annotated[
    str | None, typer.Option(metavar="JSON", help='Part of the details: {"symbol": "AAPL"}.')
]
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def list_events(
    *,
    since: Since = None,
    until: Until = None,
    action: Action = None,
    result: ResultOption = None,
    severity: Severity = None,
    account: Account = None,
    api_key: ApiKey = None,
    user: User = None,
    ip: Ip = None,
    session_id: Session = None,
    request_id: Request = None,
    resource: Resource = None,
    details: Details = None,
    limit: Limit = DEFAULT_PAGE_SIZE,
    after: After = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for new events, and show each.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the events that match all options, newest first.

    With --follow, only new events are shown. With --json, each is an object on one line.
    """
    find_criteria = _parse_filters(locals())
    if follow:
        if until is not None or after is not None:
            raise typer.BadParameter("excludes --until and --after", param_hint="--follow")
        with_database(lambda database: _follow(database, find_criteria, as_json=as_json))
        return

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.AuditLog], dict[UUID | None, str]]":
        page = await tiger_db.crud.audit_logs.search(
            session, **await find_criteria(session), after=after, limit=limit
        )
        return page, await account_numbers(session, (event.tiger_account_id for event in page))

    page, numbers = in_transaction(find)
    show_page(page, _columns(numbers), as_json=as_json)


def _columns(
    numbers: dict[UUID | None, str],
) -> "dict[str, Callable[[tiger_db.AuditLog], object]]":
    return {
        "Time": lambda event: event.created_at,
        "Action": lambda event: event.action,
        "Result": lambda event: event.result,
        "Severity": lambda event: event.severity,
        "Account": lambda event: numbers.get(event.tiger_account_id),
        "User": lambda event: event.user_id,
        "Error": lambda event: event.error_message or event.error_code,
    }


async def _follow(
    database: "tiger_db.Database", find_criteria: "FindCriteria", *, as_json: bool
) -> None:
    async with database.session() as session:
        criteria = await find_criteria(session)
    following = tiger_db.audit.follow(
        database, begun=lambda: print_message("waiting for events; Ctrl-C to stop"), **criteria
    )
    async with aclosing(following) as events:
        async for event in events:
            if as_json:
                sys.stdout.write(json.dumps(dump(event)) + "\n")
            else:
                async with database.session() as session:
                    numbers = await account_numbers(session, [event.tiger_account_id])
                show_line([column(event) for column in _columns(numbers).values()])
            sys.stdout.flush()


@app.command(rich_help_panel=PANEL)
def count_events(
    *,
    since: Annotated[str, SINCE] = "24h",
    chart: Annotated[bool, typer.Option("--chart", help="Draw a chart over time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the events since a time by action and by result, or over time."""
    until, start = datetime.now(UTC), parse_past(since, "--since")
    counts = in_transaction(
        lambda session: tiger_db.crud.audit_logs.statistics(session, since=start)
    )
    if as_json:
        hours = {hour.isoformat(): count for hour, count in counts.hours.items()}
        print_json({"actions": counts.actions, "results": counts.results, "hours": hours})
    elif not counts.actions:
        print_message("there are none")
    elif chart:
        show_bars(count_by_period(counts.hours, start, until))
    else:
        show_table(("Result", "Events"), list(counts.results.items()))
        typer.echo()
        show_table(("Action", "Events"), list(counts.actions.items()))


@app.command(rich_help_panel=PANEL)
def export_events(
    *,
    out: Out = None,
    overwrite: Overwrite = False,
    form: Annotated[
        Literal["jsonl", "csv"], typer.Option("--format", help="JSON Lines, or CSV.")
    ] = "jsonl",
    since: Since = None,
    until: Until = None,
    action: Action = None,
    result: ResultOption = None,
    severity: Severity = None,
    account: Account = None,
    api_key: ApiKey = None,
    user: User = None,
    ip: Ip = None,
    session_id: Session = None,
    request_id: Request = None,
    resource: Resource = None,
    details: Details = None,
) -> None:
    """Export the events that match all options, oldest first, in any number.

    Without filters, the seals are exported too. `verify-audit --from` verifies such a file.
    """
    find_criteria = _parse_filters(locals())
    count = 0

    async def export(database: "tiger_db.Database", file: IO[str]) -> None:
        with counter("events") as update:

            def advance(events: int) -> None:
                nonlocal count
                count += events
                update(count)

            async with database.session() as session:
                criteria = await find_criteria(session)
            exported = tiger_db.audit.export(database, form=form, advance=advance, **criteria)
            async with aclosing(exported) as lines:
                async for line in lines:
                    file.write(line)

    with open_output(out, overwrite=overwrite) as file:  # waits for the reader of a pipe
        with_database(lambda database: export(database, file))
    print_message(f"exported {count} events")


def _parse_filters(options: dict[str, Any]) -> "FindCriteria":
    """Parse the filter options of a command.

    Returns a function that looks up the account and the API key in a session, and returns the
    criteria. An id is not looked up, because events outlive accounts and keys.
    """
    start, end = (
        parse_past(text, f"--{name}") if (text := options[name]) is not None else None
        for name in ("since", "until")
    )
    actions = _parse_actions(options["action"] or ())
    details = _parse_details(options["details"])
    result, severity = options["result"], options["severity"]
    account, api_key = options["account"], options["api_key"]

    async def find_criteria(session: "AsyncSession") -> "Criteria":
        account_id = parse_uuid(account or "")
        if account is not None and account_id is None:
            account_id = (await find_account(session, account)).id
        key_id = parse_uuid(api_key or "")
        if api_key is not None and key_id is None:
            key_id = (await find_api_key(session, api_key)).id
        return {
            "since": start,
            "until": end,
            "actions": actions,
            "results": [tiger_db.AuditResult(result)] if result else (),
            "severities": [tiger_db.AuditSeverity(severity)] if severity else (),
            "account_id": account_id,
            "api_key_id": key_id,
            "user_id": options["user"],
            "ip": options["ip"],
            "session_id": options["session_id"],
            "request_id": options["request_id"],
            "resource": options["resource"],
            "details": details,
        }

    return find_criteria


def _parse_details(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        details = json.loads(text)
    except ValueError:
        details = None
    if not isinstance(details, dict):
        raise typer.BadParameter(
            'give a JSON object, such as {"symbol": "AAPL"}', param_hint="--details"
        )
    return details


def _parse_actions(names: Iterable[str]) -> "list[tiger_db.AuditAction]":
    actions = []
    for name in names:
        matching = [
            action for action in tiger_db.AuditAction if name in (action.value, action.family)
        ]
        if not matching:
            near = get_close_matches(name, tiger_db.AuditAction, n=3)
            suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
            raise typer.BadParameter(
                f"there is no action {name!r}{suggestion}", param_hint="--action"
            )
        actions += matching
    return actions
