"""Commands that list, show and verify API keys."""

from dataclasses import asdict
from datetime import UTC, datetime
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import AccessDenied, RateLimited

if TYPE_CHECKING:
    from tiger_db.crud.api_keys import APIKeyFilters, Limit, TradingPause, UsageCount
    from tiger_db.database import AsyncSession

app = typer.Typer()
PANEL = "API keys"


@app.command(rich_help_panel=PANEL)
def list_api_keys(
    *,
    status: Annotated[
        str | None,
        typer.Option(
            help="List API keys with these statuses, separated by commas: active, inactive, revoked"
            " or expired."
        ),
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Numbers or ids of accounts, with commas.")
    ] = None,
    expired: Annotated[
        bool | None,
        typer.Option(
            "--expired/--not-expired", help="Select API keys that have, or have not, expired."
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="List API keys that permit one of these scopes, separated by commas."),
    ] = None,
    created_by: Annotated[
        str | None, typer.Option(help="List API keys of these creators, separated by commas.")
    ] = None,
    unused_since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="List API keys created before a time (or an age such as 90d) and not used since.",
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="List API keys with this text in their name, prefix or notes."),
    ] = None,
    order_by: Annotated[
        Literal["newest", "name"], typer.Option(help="Order of the API keys.")
    ] = "newest",
    limit: options.Limit = options.DEFAULT_PAGE_SIZE,
    after: options.After = None,
    before: options.Before = None,
    count: options.Count = False,
    as_json: options.AsJson = False,
) -> None:
    """List the API keys that match all given options, by default all API keys, newest first.

    If trading is paused, the command also prints the reason and the start of the pause.
    """
    filters: APIKeyFilters = {"search": search, "expired": expired}
    if status is not None:
        filters["status"] = options.parse_members(tiger_db.APIKeyStatus, status, "--status")
    if scope is not None:
        filters["scope"] = options.parse_members(tiger_db.APIKeyScope, scope, "--scope")
    if created_by is not None:
        filters["created_by"] = options.split_words(created_by)
    if unused_since is not None:
        filters["unused_since"] = options.parse_past(unused_since, "--unused-since")

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.APIKey], TradingPause | None]":
        if account is not None:
            found = await runtime.find_accounts(session, account)
            filters["account_id"] = [bound.id for bound in found]
        page = await tiger_db.crud.api_keys.list_api_keys(
            session,
            order_by=order_by,
            after=after,
            before=before,
            limit=limit,
            count=count,
            load=["tiger_account"],
            **filters,
        )
        return page, await tiger_db.crud.api_keys.current_pause(session)

    page, paused = runtime.in_transaction(find)
    if paused is not None:
        since_and_reason = str(paused)
        output.print_warning(f"trading has been paused {since_and_reason}")
    output.show_page(
        page,
        {
            "Prefix": lambda key: key.key_prefix,
            "Name": lambda key: key.name,
            "Status": _status,
            "Scopes": lambda key: key.scopes,
            "Account": lambda key: key.tiger_account.account_number if key.tiger_account else "any",
            "Expires": lambda key: key.expires_at,
        },
        as_json=as_json,
        more={"trading_pause": paused.as_json() if paused is not None else None},
    )


def _status(key: "tiger_db.APIKey") -> str:
    """Return the status of an API key, or `expired` for an expired key that is stored as active."""
    active = tiger_db.APIKeyStatus.ACTIVE
    return "expired" if key.status == active and key.is_expired else str(key.status)


@app.command(rich_help_panel=PANEL)
def verify_api_key(
    key: Annotated[
        str | None,
        typer.Argument(
            help="Whole API key, or - to read the key from standard input. By default, the command"
            " asks for the key."
        ),
    ] = None,
    *,
    key_file: options.KeyFile = None,
    ip_address: Annotated[
        str | None, typer.Option(help="Check whether requests from this IP address are allowed.")
    ] = None,
    user_agent: Annotated[
        str | None, typer.Option(help="Check whether requests with this user agent are allowed.")
    ] = None,
    scopes: Annotated[
        str | None, typer.Option(metavar="trade:read", help="Scopes that the API key must have.")
    ] = None,
    account: options.AccountOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Count no use of the API key, and record no audit event."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check an API key. Count a use if the key is accepted, or show why the key is refused."""
    requested = options.parse_members(tiger_db.APIKeyScope, scopes, "--scopes")
    raw_key = options.read_required_secret("key", key, key_file)

    async def verify(session: "AsyncSession") -> "tiger_db.APIKey":
        target = await runtime.find_account(session, account) if account is not None else None
        if dry_run:
            _write_in_transaction(session)
        try:
            found = await tiger_db.crud.api_keys.authorize_api_key(
                session,
                raw_key,
                scopes=requested,
                account_id=target.id if target else None,
                ip_address=ip_address,
                user_agent=user_agent,
            )
        finally:
            if dry_run:
                await session.rollback()
        if dry_run:
            await session.refresh(found)
        return found

    try:
        found = runtime.in_transaction(verify)
    except AccessDenied as denial:
        output.print_message(f"refused ({type(denial).__name__}): {denial}")
        if isinstance(denial, RateLimited):
            seconds = ceil(denial.retry_after.total_seconds())
            output.print_message(f"the API key can be used again in {seconds} s")
        raise typer.Exit(1) from None
    output.print_message("accepted")
    output.show_row(found, as_json=as_json)


def _write_in_transaction(session: "AsyncSession") -> None:
    """Make `session` write usage counts and audit events in its transaction, not out of band.

    The caller rolls the transaction back, so that a dry run changes nothing.
    """
    from tiger_db.crud.common import context_of  # noqa: PLC0415  # slow import, not needed by `--help`

    context = context_of(session.info)._replace(out_of_band=None, count_use=None)
    session.info[tiger_db.models.secrets.CONTEXT] = context


@app.command(rich_help_panel=PANEL)
def show_api_key(
    key: options.KeyArgument,
    *,
    since: Annotated[str, options.SINCE] = "24h",
    as_json: options.AsJson = False,
) -> None:
    """Show an API key, the remaining uses of its limits, and a chart of its uses.

    The chart has a bar for each hour if --since is at most two days ago, or else for each day.
    """
    now, start = datetime.now(UTC), options.parse_past(since, "--since")

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.APIKey, list[UsageCount], dict[str, Limit | None]]":
        found = await runtime.find_api_key(session, key)
        usage = await tiger_db.crud.api_keys.usage(session, found.id, since=start)
        limits = await tiger_db.crud.api_keys.limits(session, found.id)
        return found, usage, {"hour": limits.hour, "day": limits.day}

    found, usage, limits = runtime.in_transaction(find)
    hours = {uses.start: uses.count for uses in usage if uses.start is not None}
    if as_json:
        items = [
            {"hour": uses.start.isoformat(), "count": uses.count} for uses in usage if uses.start
        ]
        left = {
            period: limit and {**asdict(limit), "resets_at": limit.resets_at.isoformat()}
            for period, limit in limits.items()
        }
        output.print_json({**output.dump(found), "limits": left, "usage": items})
        return
    output.show_row(found, as_json=False)
    for period, limit in limits.items():
        if limit is not None:
            output.print_message(
                f"remaining uses this {period}: {limit.remaining} of {limit.limit}, until"
                f" {limit.resets_at:%Y-%m-%d %H:%MZ}"
            )
    if hours:
        unit = output.unit_of_chart(start, now)
        output.show_bars(output.count_by_period(hours, start, now, unit))
    else:
        output.print_message(f"the API key has not been used since {start:%Y-%m-%d %H:%MZ}")


@app.command(rich_help_panel=PANEL)
def list_expiring_api_keys(
    *,
    within: Annotated[
        str,
        typer.Option(
            metavar="7d", help="List API keys that expire within this time, such as 12h or 7d."
        ),
    ] = "7d",
    limit: options.Limit = options.DEFAULT_PAGE_SIZE,
    after: options.After = None,
    as_json: options.AsJson = False,
) -> None:
    """List the API keys that expire soon, in the order of expiry."""
    length = options.parse_duration(within, "--within")
    page = runtime.in_transaction(
        lambda session: tiger_db.crud.api_keys.list_expiring(
            session, within=length, after=after, limit=limit
        )
    )
    output.show_page(
        page,
        {
            "Prefix": lambda key: key.key_prefix,
            "Name": lambda key: key.name,
            "Status": _status,
            "Expires": lambda key: key.expires_at,
            "Last used": lambda key: key.last_used_at,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=PANEL)
def print_api_key_pattern() -> None:
    """Print the regular expression that matches API keys, for secret scanners."""
    typer.echo(tiger_db.crud.api_keys.KEY_PATTERN)


@app.command(rich_help_panel=PANEL)
def generate_api_key_pepper(*, pepper_id: options.KeyId = None) -> None:
    """Print a new random pepper for API_KEY_PEPPERS, without storing the pepper."""
    typer.echo(tiger_db.encryption.generate_key(pepper_id or options.new_key_id()))
    output.print_message(
        "add the new pepper at the end of API_KEY_PEPPERS in every process, after a comma. When"
        " every process has the new pepper, move the pepper to the beginning of API_KEY_PEPPERS."
        " The next use of an API key hashes the key again with the first pepper. Keep all old"
        " peppers: without the pepper of its hash, an API key is refused"
    )
