"""Commands that read the audit trail: list, follow, count and export events."""

import inspect
import json
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from difflib import get_close_matches
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import NotFound

if TYPE_CHECKING:
    from tiger_db.crud.audit_logs import EventCount, EventDimension, EventFieldFilters
    from tiger_db.database import AsyncSession

    FindFilters = Callable[[AsyncSession], Awaitable[EventFieldFilters]]

S = TypeVar("S", bound=StrEnum)
T = TypeVar("T")
C_ = TypeVar("C_", bound=Callable[..., None])
PANEL = "Audit trail"


def _several(what: str, metavar: str = "TEXT") -> Any:  # noqa: ANN401  # a type that typer reads
    """Return the type of a filter option with one value or several values."""
    help_text = f"Select only events {what}, separated by commas."
    return Annotated[list[str] | None, typer.Option(metavar=metavar, help=help_text)]


# The options of these names and types are the filters of events.
_FILTERS: dict[str, Any] = {
    "since": Annotated[str | None, options.SINCE],
    "until": Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="End of the period: a time or an age, written as for --since."
        ),
    ],
    "action": _several("of these actions (trade:place_order) or families of actions (trade)"),
    "result": _several("with one of these results: success, failure, partial, error, pending"),
    "severity": _several("with one of these severities: low, medium, high, critical"),
    "account": _several("of the accounts with these numbers or ids"),
    "api_key": _several("of the API keys with these prefixes or ids"),
    "user": _several("of the users with these ids"),
    "user_type": _several("of users of these types, such as admin"),
    "ip_address": _several("from these IP addresses or networks, such as 10.0.0.0/8"),
    "session_id": _several("of the sessions with these ids"),
    "request_id": _several("of the requests with these ids"),
    "resource": _several("of the resources with these types, ids, or TYPE/ID"),
    "error_code": _several("with one of these error codes"),
    "tag": _several("with one of these tags, of any value or of the given value", "NAME[=VALUE]"),
    "details": Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Select only events whose details contain a JSON object: {"symbol": "AAPL"}.',
        ),
    ],
}
# The values of --by, with the heading of each in a table.
_DIMENSIONS: dict["EventDimension", str] = {
    "hour": "Hour",
    "day": "Day",
    "action": "Action",
    "family": "Family",
    "result": "Result",
    "severity": "Severity",
    "account_id": "Account",
    "api_key_id": "API key",
    "user_id": "User",
    "ip_address": "IP address",
}
app = typer.Typer()


def _with_filters(command: C_) -> C_:
    """Give a command the options in `_FILTERS`, which the command collects with `**`."""
    signature = inspect.signature(command)
    own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _FILTERS.items()
        if name not in own
    ]
    command.__signature__ = signature.replace(parameters=[*own.values(), *shared])  # type: ignore[attr-defined]  # typer reads it
    return command


@app.command(rich_help_panel=PANEL)
@_with_filters
def list_events(
    *,
    limit: options.Limit = options.DEFAULT_PAGE_SIZE,
    after: options.After = None,
    before: options.Before = None,
    count: options.Count = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for new events, and show each new event.")
    ] = False,
    as_json: options.AsJson = False,
    **filters: Any,  # noqa: ANN401  # the options in _FILTERS
) -> None:
    """List the audit events that match all options, newest first.

    With --follow, the command shows only new events. With --follow and --json, the command prints
    each event as one line of JSON.
    """
    since, until = _parse_period(filters)
    find_filters = _parse_filters(filters)
    if follow:
        if until is not None or after is not None or before is not None or count:
            raise typer.BadParameter(
                "--follow cannot be combined with --until, --after, --before or --count",
                param_hint="--follow",
            )
        runtime.with_database(
            lambda database: _follow(database, since, find_filters, as_json=as_json)
        )
        return

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.AuditLog], dict[UUID | None, str]]":
        page = await tiger_db.crud.audit_logs.search(
            session,
            since=since,
            until=until,
            **await find_filters(session),
            after=after,
            before=before,
            limit=limit,
            count=count,
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
    database: "tiger_db.Database",
    since: datetime | None,
    find_filters: "FindFilters",
    *,
    as_json: bool,
) -> None:
    async with database.session() as session:
        filters = await find_filters(session)

    def tell(count: int, _total: int | None) -> None:
        if count == 0:
            output.print_message("waiting for new events; press Ctrl-C to stop")

    following = tiger_db.audit.follow(
        database,
        progress=tell,
        since=since,
        **filters,
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
@_with_filters
def count_events(
    *,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Group the events by these fields, separated by commas: hour, day, action, family,"
            " result, severity, account_id, api_key_id, user_id or ip_address. Default:"
            " action,result.",
        ),
    ] = None,
    since: Annotated[str, options.SINCE] = "24h",
    limit: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Maximum number of groups.")
    ] = None,
    chart: Annotated[
        bool, typer.Option("--chart", help="Draw a bar chart with a bar for each group.")
    ] = False,
    as_json: options.AsJson = False,
    **filters: Any,  # noqa: ANN401  # the options in _FILTERS
) -> None:
    """Count the audit events that match all options, in groups such as one group for each action.

    With --chart, the events are grouped by one field only. The default of a chart is one bar for
    each hour or day.
    """
    now = datetime.now(UTC)
    start = options.parse_past(since, "--since")
    _, until = _parse_period(filters)
    find_filters = _parse_filters(filters)
    dimensions = _parse_dimensions(by)
    if chart and len(dimensions) > 1:
        raise typer.BadParameter("a chart shows the groups of one field only", param_hint="--by")
    if not dimensions:
        dimensions = [output.unit_of_chart(start, until or now)] if chart else ["action", "result"]

    async def find(
        session: "AsyncSession",
    ) -> "tuple[list[EventCount], dict[UUID | None, str]]":
        found = await tiger_db.crud.audit_logs.statistics(
            session,
            by=dimensions,
            since=start,
            until=until,
            limit=limit,
            **await find_filters(session),
        )
        numbers = await runtime.account_numbers(session, (group.account_id for group in found))
        return found, numbers

    found, numbers = runtime.in_transaction(find)
    fields = ["start" if name in ("hour", "day") else name for name in dimensions]
    items = [{name: getattr(group, name) for name in (*fields, "count")} for group in found]
    if as_json:
        output.print_values(items)
        return
    for item in items:
        if "account_id" in item:
            item["account_id"] = numbers.get(item["account_id"])
    if not found:
        output.print_message("no events found")
    elif not chart:
        headings = [_DIMENSIONS[name] for name in dimensions]
        output.show_table([*headings, "Events"], [list(item.values()) for item in items])
    elif (unit := dimensions[0]) in ("hour", "day"):
        starts = {group.start: group.count for group in found if group.start is not None}
        output.show_bars(output.count_by_period(starts, start, until or now, unit))
    else:
        (name,) = fields
        output.show_bars({str(item[name] or "none"): item["count"] for item in items})


def _parse_dimensions(names: str | None) -> "list[EventDimension]":
    wanted = options.split_words(names)
    found = [name for name in _DIMENSIONS if name in wanted]
    if len(found) != len(wanted) or {"hour", "day"} <= {*wanted}:
        raise typer.BadParameter(
            f"choose from {', '.join(_DIMENSIONS)}, and not both hour and day", param_hint="--by"
        )
    return sorted(found, key=wanted.index)


@app.command(rich_help_panel=PANEL)
@_with_filters
def export_events(
    *,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    form: Annotated[
        Literal["jsonl", "csv"],
        typer.Option("--format", help="Format of the export, JSON Lines or CSV."),
    ] = "jsonl",
    byte_order_mark: Annotated[
        bool,
        typer.Option(
            "--byte-order-mark",
            help="Begin the CSV with a byte order mark, so that Excel reads the text as UTF-8.",
        ),
    ] = False,
    archive: Annotated[
        bool,
        typer.Option("--archive", help="Include the events that left for AUDIT_ARCHIVE."),
    ] = False,
    **filters: Any,  # noqa: ANN401  # the options in _FILTERS
) -> None:
    """Export all audit events that match all options, oldest first.

    Without filters, an export as JSON Lines also contains the seals that `verify-audit --from`
    needs.
    """
    if byte_order_mark and form != "csv":
        raise typer.BadParameter("give --format csv too", param_hint="--byte-order-mark")
    since, until = _parse_period(filters)
    find_filters = _parse_filters(filters)
    count = 0

    async def export(database: "tiger_db.Database", file: IO[str]) -> None:
        with output.progress("Exporting") as update:

            def progress(events: int, _total: int | None) -> None:
                nonlocal count
                count = events
                update(description=output.count_of(count, "event"))

            async with database.session() as session:
                given = await find_filters(session)
            exported = tiger_db.audit.export(
                database,
                form=form,
                byte_order_mark=byte_order_mark,
                archive=archive,
                progress=progress,
                since=since,
                until=until,
                **given,
            )
            async with aclosing(exported) as lines:
                async for line in lines:
                    file.write(line)

    # Open the output before a database session: if `out` is a named pipe, open_output() waits for a
    # reader of the pipe.
    with output.open_output(out, overwrite=overwrite) as file:
        runtime.with_database(lambda database: export(database, file))
    output.print_message(f"exported {output.count_of(count, 'event')}")


def _parse_period(given: Mapping[str, Any]) -> tuple[datetime | None, datetime | None]:
    """Parse the options --since and --until. A missing option becomes None."""
    since, until = (
        options.parse_past(text, f"--{name}") if (text := given.get(name)) is not None else None
        for name in ("since", "until")
    )
    return since, until


def _parse_filters(given: Mapping[str, Any]) -> "FindFilters":
    """Parse the filter options of a command, and return a function that returns the filters.

    The returned function looks up account numbers and API key prefixes in the database. The
    function does not look up ids, because audit events stay when accounts and API keys are deleted.
    """
    words = {
        name: [word for text in texts for word in options.split_words(text)]
        for name, texts in given.items()
        if isinstance(texts, list)
    }
    parsed: EventFieldFilters = {
        "action": _parse_actions(words.get("action")),
        "result": _parse_members(tiger_db.AuditResult, words, "result"),
        "severity": _parse_members(tiger_db.AuditSeverity, words, "severity"),
        "user_id": words.get("user"),
        "user_type": words.get("user_type"),
        "ip_address": words.get("ip_address"),
        "session_id": words.get("session_id"),
        "request_id": words.get("request_id"),
        "resource": words.get("resource"),
        "error_code": words.get("error_code"),
        "tags": options.parse_tags(words["tag"]) if "tag" in words else None,
        "details": _parse_details(given["details"]),
    }

    async def find_filters(session: "AsyncSession") -> "EventFieldFilters":
        filters = parsed.copy()
        if (accounts := words.get("account")) is not None:
            filters["account_id"] = [
                runtime.parse_uuid(text)
                or (await _find(runtime.find_account(session, text), "account")).id
                for text in accounts
            ]
        if (keys := words.get("api_key")) is not None:
            filters["api_key_id"] = [
                runtime.parse_uuid(text)
                or (await _find(runtime.find_api_key(session, text), "api_key")).id
                for text in keys
            ]
        return filters

    return find_filters


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


def _parse_members(enum: type[S], words: Mapping[str, list[str]], name: str) -> list[S] | None:
    if name not in words:
        return None
    return options.parse_members(enum, ",".join(words[name]), f"--{name}")


def _parse_actions(names: Sequence[str] | None) -> Sequence[str] | None:
    """Check that each name has the form of an action, such as `a:b`, or of a family, such as `a`.

    Print a warning for each name that may be misspelt. An unknown action is not an error, because
    applications and newer releases of tiger_db can record other actions.
    """
    if names is None:
        return None
    known = {*tiger_db.AuditAction, *(action.family for action in tiger_db.AuditAction)}
    for name in names:
        if not re.fullmatch(tiger_db.crud.audit_logs.queries.ACTION_OR_FAMILY, name):
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
