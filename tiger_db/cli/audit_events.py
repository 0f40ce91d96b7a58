"""The audit trail as it is read: listed, followed, drawn, exported."""

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
    Limit,
    account_numbers,
    as_uuid,
    find_account,
    find_api_key,
    finish,
    past,
    query,
    settings,
)
from tiger_db.cli.output import (
    AsJson,
    Out,
    Overwrite,
    counter,
    dump,
    output,
    over_time,
    print_json,
    show_bars,
    show_line,
    show_page,
    show_table,
    talk,
)

if TYPE_CHECKING:
    from tiger_db.crud.audit_logs import Criteria
    from tiger_db.database import AsyncSession

Results = Literal["success", "failure", "partial", "error"]
Severities = Literal["low", "medium", "high", "critical"]
PANEL = "Audit trail"

Since = Annotated[str | None, SINCE]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Before then, in the same forms.")]
Action = Annotated[
    list[str] | None,
    typer.Option(help="Only this, such as trade:place_order, or a family such as trade."),
]
ResultOption = Annotated[Results | None, typer.Option("--result", help="Only these.")]
Severity = Annotated[Severities | None, typer.Option(help="Only these.")]
Account = Annotated[str | None, typer.Option(help="Number or id of an account.")]
ApiKey = Annotated[str | None, typer.Option(help="Prefix or id of an API key.")]
User = Annotated[str | None, typer.Option(help="Id of a user.")]
Ip = Annotated[str | None, typer.Option(help="Address or network, such as 10.0.0.0/8.")]
Session = Annotated[str | None, typer.Option("--session-id", help="Id of a session.")]
Request = Annotated[str | None, typer.Option("--request-id", help="Id of a request.")]
Resource = Annotated[str | None, typer.Option(help="Kind of a thing, its id, or both as KIND/ID.")]
Details = Annotated[
    str | None, typer.Option(metavar="JSON", help='What the details contain: {"symbol": "AAPL"}.')
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
        bool,
        typer.Option("--follow", "-f", help="Wait for new events and show each."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what was done, newest first: the events that match every option given.

    With --follow, those that come from now on; as JSON, an object on each line.
    """
    wanted = _wanted(locals())
    if follow:
        if until is not None or after is not None:
            raise typer.BadParameter("has no end", param_hint="--follow")
        finish(_follow(wanted, as_json=as_json))
        return

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.AuditLog], dict[UUID | None, str]]":
        page = await tiger_db.crud.audit_logs.search(
            session, **await wanted(session), after=after, limit=limit
        )
        return page, await account_numbers(session, (event.tiger_account_id for event in page))

    page, numbers = query(find)
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
    wanted: "Callable[[AsyncSession], Awaitable[Criteria]]", *, as_json: bool
) -> None:
    async with tiger_db.Database(settings()) as database:
        async with database.session() as session:
            criteria = await wanted(session)
        following = tiger_db.audit.follow(
            database, begun=lambda: talk("waiting for events; Ctrl-C ends it"), **criteria
        )
        async with aclosing(following) as events:
            async for event in events:
                if as_json:
                    sys.stdout.write(json.dumps(dump(event)) + "\n")
                else:
                    async with database.session() as session:
                        numbers = await account_numbers(session, [event.tiger_account_id])
                    show_line([show(event) for show in _columns(numbers).values()])
                sys.stdout.flush()


@app.command(rich_help_panel=PANEL)
def count_events(
    *,
    since: Annotated[str, SINCE] = "24h",
    chart: Annotated[bool, typer.Option("--chart", help="Draw them over time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the events since a time, by default of 24 hours: by action, by result, over time."""
    until, start = datetime.now(UTC), past(since, "--since")
    counts = query(lambda session: tiger_db.crud.audit_logs.statistics(session, since=start))
    if as_json:
        print_json(
            {
                "actions": counts.actions,
                "results": counts.results,
                "hours": {hour.isoformat(): count for hour, count in counts.hours.items()},
            }
        )
    elif not counts.actions:
        talk("there are none")
    elif chart:
        show_bars(over_time(counts.hours, start, until))
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
        Literal["jsonl", "csv"], typer.Option("--format", help="JSON Lines, or for spreadsheets.")
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
    """Write events out, however many: those that match every option given, oldest first.

    Without options, all of them and their seals: `verify-audit --from` checks such a file.
    """
    wanted = _wanted(locals())

    count = 0

    async def run(file: IO[str]) -> None:
        with counter("events") as tell:

            def advance(events: int) -> None:
                nonlocal count
                count += events
                tell(count)

            async with tiger_db.Database(settings()) as database:
                async with database.session() as session:
                    criteria = await wanted(session)
                export = tiger_db.audit.export(database, form=form, advance=advance, **criteria)
                async with aclosing(export) as lines:
                    async for line in lines:
                        file.write(line)

    with output(out, overwrite=overwrite) as file:  # a pipe without a reader is waited for here
        finish(run(file))
    talk(f"{count} events were exported")


def _wanted(options: dict[str, Any]) -> "Callable[[AsyncSession], Awaitable[Criteria]]":
    """The criteria that a command's options make, once a session can look for names in them."""
    start, end = (
        past(text, f"--{name}") if (text := options[name]) is not None else None
        for name in ("since", "until")
    )
    actions = _actions(options["action"] or ())
    details = _json(options["details"])
    result, severity = options["result"], options["severity"]

    async def find(session: "AsyncSession") -> "Criteria":
        # By id, events outlive what they are about.
        account, api_key = options["account"], options["api_key"]
        account_id = as_uuid(account) if account is not None else None
        if account is not None and account_id is None:
            account_id = (await find_account(session, account)).id
        key_id = as_uuid(api_key) if api_key is not None else None
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

    return find


def _json(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(
            'give a JSON object, such as {"symbol": "AAPL"}', param_hint="--details"
        )
    return found


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
