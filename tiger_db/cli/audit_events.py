"""Commands that read the audit trail: list, follow, count and export events."""

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import NotFound

if TYPE_CHECKING:
    from tiger_db.crud.audit_logs import EventFilters
    from tiger_db.database import AsyncSession

    FindCriteria = Callable[[AsyncSession], Awaitable[EventFilters]]

T = TypeVar("T")
Results = Literal["success", "failure", "partial", "error", "pending"]
Severities = Literal["low", "medium", "high", "critical"]
PANEL = "Audit trail"

Since = Annotated[str | None, options.SINCE]
Until = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="End of the period: a time or an age, written as for --since."
    ),
]
Action = Annotated[
    list[str] | None,
    typer.Option(
        help="Select only events of this action (trade:place_order) or family of actions (trade)."
    ),
]
ResultOption = Annotated[
    Results | None, typer.Option("--result", help="Select only events with this result.")
]
Severity = Annotated[Severities | None, typer.Option(help="Select only events with this severity.")]
ApiKey = Annotated[
    str | None, typer.Option(help="Select only events of the API key with this prefix or id.")
]
User = Annotated[str | None, typer.Option(help="Select only events of the user with this id.")]
Ip = Annotated[
    str | None,
    typer.Option(help="Select only events from this IP address or network, such as 10.0.0.0/8."),
]
Session = Annotated[
    str | None, typer.Option("--session-id", help="Select only events of the session with this id.")
]
Request = Annotated[
    str | None, typer.Option("--request-id", help="Select only events of the request with this id.")
]
Resource = Annotated[
    str | None,
    typer.Option(
        help="Select only events of the resource with this type, with this id, or with TYPE/ID."
    ),
]
Details = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Select only events whose details contain a JSON object, such as {"symbol": "AAPL"}.',
    ),
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
    account: options.AccountOption = None,
    api_key: ApiKey = None,
    user: User = None,
    ip: Ip = None,
    session_id: Session = None,
    request_id: Request = None,
    resource: Resource = None,
    details: Details = None,
    limit: options.Limit = options.DEFAULT_PAGE_SIZE,
    after: options.After = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for new events, and show each new event.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """List the audit events that match all options, newest first.

    With --follow, the command shows only new events. With --follow and --json, the command prints
    each event as one line of JSON.
    """
    find_criteria = _parse_filters(locals())
    if follow:
        if until is not None or after is not None:
            raise typer.BadParameter(
                "--follow cannot be combined with --until or --after", param_hint="--follow"
            )
        runtime.with_database(lambda database: _follow(database, find_criteria, as_json=as_json))
        return

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.AuditLog], dict[UUID | None, str]]":
        page = await tiger_db.crud.audit_logs.search(
            session, **await find_criteria(session), after=after, limit=limit
        )
        return page, await runtime.account_numbers(
            session, (event.tiger_account_id for event in page)
        )

    page, numbers = runtime.in_transaction(find)
    output.show_page(page, _columns(numbers), as_json=as_json)


def _columns(
    numbers: dict[UUID | None, str],
) -> "dict[str, Callable[[tiger_db.AuditLog], object]]":
    return {
        "Time": lambda event: event.created_at,
        "Action": lambda event: event.action,
        "Result": lambda event: event.result,
        "Severity": lambda event: event.severity,
        "Account": lambda event: numbers.get(event.tiger_account_id),
        "User": lambda event: event.user_id or event.user_type,
        "Error": lambda event: event.error_message or event.error_code,
    }


async def _follow(
    database: "tiger_db.Database", find_criteria: "FindCriteria", *, as_json: bool
) -> None:
    async with database.session() as session:
        criteria = await find_criteria(session)
    following = tiger_db.audit.follow(
        database,
        begun=lambda: output.print_message("waiting for new events; press Ctrl-C to stop"),
        **criteria,
    )
    async with aclosing(following) as events:
        async for event in events:
            if as_json:
                sys.stdout.write(json.dumps(output.dump(event)) + "\n")
            else:
                async with database.session() as session:
                    numbers = await runtime.account_numbers(session, [event.tiger_account_id])
                output.show_line([column(event) for column in _columns(numbers).values()])
            sys.stdout.flush()


@app.command(rich_help_panel=PANEL)
def count_events(
    *,
    since: Annotated[str, options.SINCE] = "24h",
    chart: Annotated[
        bool,
        typer.Option(
            "--chart", help="Draw a bar chart of the number of events in each hour or day."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Count the audit events by result and by action. With --chart, count events by hour or day."""
    until, start = datetime.now(UTC), options.parse_past(since, "--since")
    counts = runtime.in_transaction(
        lambda session: tiger_db.crud.audit_logs.statistics(session, since=start)
    )
    if as_json:
        hours = {hour.isoformat(): count for hour, count in counts.hours.items()}
        output.print_json({"actions": counts.actions, "results": counts.results, "hours": hours})
    elif not counts.actions:
        output.print_message("no events found")
    elif chart:
        output.show_bars(output.count_by_period(counts.hours, start, until))
    else:
        output.show_table(("Result", "Events"), list(counts.results.items()))
        typer.echo()
        output.show_table(("Action", "Events"), list(counts.actions.items()))


@app.command(rich_help_panel=PANEL)
def export_events(
    *,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    form: Annotated[
        Literal["jsonl", "csv"],
        typer.Option("--format", help="Format of the export, JSON Lines or CSV."),
    ] = "jsonl",
    since: Since = None,
    until: Until = None,
    action: Action = None,
    result: ResultOption = None,
    severity: Severity = None,
    account: options.AccountOption = None,
    api_key: ApiKey = None,
    user: User = None,
    ip: Ip = None,
    session_id: Session = None,
    request_id: Request = None,
    resource: Resource = None,
    details: Details = None,
) -> None:
    """Export all audit events that match all options, oldest first.

    Without filters, an export as JSON Lines also contains the seals that `verify-audit --from`
    needs.
    """
    find_criteria = _parse_filters(locals())
    count = 0

    async def export(database: "tiger_db.Database", file: IO[str]) -> None:
        with output.progress("Exporting") as update:

            def advance(events: int) -> None:
                nonlocal count
                count += events
                update(description=output.count_of(count, "event"))

            async with database.session() as session:
                criteria = await find_criteria(session)
            exported = tiger_db.audit.export(database, form=form, advance=advance, **criteria)
            async with aclosing(exported) as lines:
                async for line in lines:
                    file.write(line)

    # Open the output before a database session: if `out` is a named pipe, open_output() waits for a
    # reader of the pipe.
    with output.open_output(out, overwrite=overwrite) as file:
        runtime.with_database(lambda database: export(database, file))
    output.print_message(f"exported {output.count_of(count, 'event')}")


def _parse_filters(given: dict[str, Any]) -> "FindCriteria":
    """Parse the filter options of a command, and return a function that returns search criteria.

    The returned function looks up account numbers and API key prefixes in the database. The
    function does not look up ids, because audit events stay when accounts and API keys are deleted.
    """
    start, end = (
        options.parse_past(text, f"--{name}") if (text := given[name]) is not None else None
        for name in ("since", "until")
    )
    actions = _parse_actions(given["action"]) if given["action"] else None
    details = _parse_details(given["details"])
    result, severity = given["result"], given["severity"]
    account, api_key = given["account"], given["api_key"]

    async def find_criteria(session: "AsyncSession") -> "EventFilters":
        account_id = runtime.parse_uuid(account or "")
        if account is not None and account_id is None:
            account_id = (await _find(runtime.find_account(session, account), "account")).id
        key_id = runtime.parse_uuid(api_key or "")
        if api_key is not None and key_id is None:
            key_id = (await _find(runtime.find_api_key(session, api_key), "api_key")).id
        return {
            "since": start,
            "until": end,
            "action": actions,
            "result": tiger_db.AuditResult(result) if result else None,
            "severity": tiger_db.AuditSeverity(severity) if severity else None,
            "account_id": account_id,
            "api_key_id": key_id,
            "user_id": given["user"],
            "ip_address": given["ip"],
            "session_id": given["session_id"],
            "request_id": given["request_id"],
            "resource": given["resource"],
            "details": details,
        }

    return find_criteria


async def _find(search: Awaitable[T], family: str) -> T:
    """Await a search for an account or API key.

    Raises:
        NotFound: the search finds no row. The error message explains how to find the audit events
            of a deleted row.
    """
    try:
        return await search
    except NotFound as error:
        raise NotFound(
            f"{error}; to find the events of a deleted account or API key, give its id:"
            f" `tiger-db list-events --action {family}:delete --json` shows the ids"
        ) from None


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


def _parse_actions(names: Sequence[str]) -> Sequence[str]:
    """Check that each name has the form of an action, such as `a:b`, or of a family, such as `a`.

    Print a warning for each name that may be misspelt. An unknown action is not an error, because
    applications and newer releases of tiger_db can record other actions.
    """
    known = {*tiger_db.AuditAction, *(action.family for action in tiger_db.AuditAction)}
    for name in names:
        if not tiger_db.crud.audit_logs.queries.ACTION_OR_FAMILY.fullmatch(name):
            raise typer.BadParameter(
                f"{name!r} is not an action, such as trade:place_order, or a family of actions,"
                " such as trade",
                param_hint="--action",
            )
        if name not in known and (near := get_close_matches(name, known, n=3)):
            output.print_warning(
                f"tiger_db itself does not record the action {name}; did you mean"
                f" {' or '.join(near)}?"
            )
    return names
