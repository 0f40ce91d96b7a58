"""API keys."""

from datetime import UTC, datetime
from math import ceil
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
    member,
    members,
    moment,
    query,
    required_secret,
    words,
)
from tiger_db.cli.output import AsJson, dump, print_json, show_page, show_row, talk, warn
from tiger_db.errors import AccessDenied, RateLimited

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

KeyStatuses = Literal["active", "inactive", "revoked", "expired"]
_SCOPES = (
    "Separated by commas: mcp, dashboard, account, trade or system, each with :read, :write or"
    " :admin. Admin includes write, write includes read."
)

app = typer.Typer()
PANEL = "API keys"


@app.command(rich_help_panel=PANEL)
def create_api_key(
    *,
    name: Annotated[str, typer.Option(help="What people call it.")],
    scopes: Annotated[str, typer.Option(metavar="mcp:read,mcp:write", help=_SCOPES)],
    account: Annotated[
        str | None,
        typer.Option(help="Number or id of the only account it may act on; else every account."),
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="30d", help="How long it is good for: m, h, d or w.")
    ] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Its end, such as 2026-01-31T12:00:00Z.")
    ] = None,
    rate_limit_per_hour: Annotated[int | None, typer.Option(help="Uses in a clock hour.")] = None,
    rate_limit_per_day: Annotated[int | None, typer.Option(help="Uses in a day (UTC).")] = None,
    allowed_ips: Annotated[
        str | None,
        typer.Option(metavar="10.0.0.0/8,::1", help="Addresses or networks; else any."),
    ] = None,
    allowed_user_agents: Annotated[
        str | None,
        typer.Option(metavar="'claude/*'", help="Clients, * for any characters; else any."),
    ] = None,
    description: Annotated[str | None, typer.Option(help="Notes.")] = None,
    created_by: Annotated[str | None, typer.Option(help="Who creates it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key and show it, once: it cannot be shown again."""
    granted = members(tiger_db.APIKeyScope, scopes, "--scopes")
    ends = end_of_key(expires_in, expires_at)

    async def create(session: "AsyncSession") -> "tuple[tiger_db.APIKey, str]":
        bound = await find_account(session, account) if account is not None else None
        return await tiger_db.crud.api_keys.create_api_key(
            session,
            name=name,
            scopes=granted,
            tiger_account_id=bound.id if bound else None,
            expires_at=ends,
            rate_limit_per_hour=rate_limit_per_hour,
            rate_limit_per_day=rate_limit_per_day,
            allowed_ips=words(allowed_ips),
            allowed_user_agents=words(allowed_user_agents),
            created_by=created_by,
            description=description,
        )

    row, key = query(create)
    talk(f"created API key {row.key_prefix}")
    show_new_key(row, key, as_json=as_json)


@app.command(rich_help_panel=PANEL)
def list_api_keys(
    *,
    status: Annotated[KeyStatuses | None, typer.Option(help="Only these.")] = None,
    account: Annotated[
        str | None, typer.Option(help="Only those bound to this account (number or id).")
    ] = None,
    limit: Limit = DEFAULT_PAGE_SIZE,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List the API keys, newest first."""
    if account is not None and status is not None:
        raise typer.BadParameter("excludes --account", param_hint="--status")

    async def find(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.Page[tiger_db.APIKey], dict[UUID | None, str]]":
        if account is not None:
            bound = await find_account(session, account)
            page = await tiger_db.crud.api_keys.get_keys_for_account(
                session, bound.id, after=after, limit=limit
            )
        else:
            page = await tiger_db.crud.api_keys.list_api_keys(
                session, status=member(tiger_db.APIKeyStatus, status), after=after, limit=limit
            )
        return page, await account_numbers(session, (key.tiger_account_id for key in page))

    page, numbers = query(find)
    show_page(
        page,
        {
            "Prefix": lambda key: key.key_prefix,
            "Name": lambda key: key.name,
            "Status": status_of,
            "Scopes": lambda key: key.scopes,
            "Account": lambda key: numbers.get(key.tiger_account_id, "any"),
            "Expires": lambda key: key.expires_at,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=PANEL)
def verify_api_key(
    key: Annotated[
        str | None,
        typer.Argument(help="The whole key, or - to read it from standard input; else asked for."),
    ] = None,
    *,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the whole key.")
    ] = None,
    ip: Annotated[str | None, typer.Option(help="As if used from this address.")] = None,
    user_agent: Annotated[str | None, typer.Option(help="As if used by this client.")] = None,
    scopes: Annotated[
        str | None, typer.Option(metavar="trade:read", help="What it must allow.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Number or id of the account it must be good for.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether an API key is accepted, and if not, why. An accepted one counts as used."""
    wanted = members(tiger_db.APIKeyScope, scopes, "--scopes")
    raw_key = required_secret("key", key, key_file)

    async def verify(session: "AsyncSession") -> "tiger_db.APIKey":
        target = await find_account(session, account) if account is not None else None
        return await tiger_db.crud.api_keys.authorize_api_key(
            session,
            raw_key,
            scopes=wanted,
            account_id=target.id if target else None,
            ip_address=ip,
            user_agent=user_agent,
        )

    try:
        row = query(verify)
    except AccessDenied as denial:
        talk(f"refused ({type(denial).__name__}): {denial}")
        if isinstance(denial, RateLimited):
            talk(f"the next use may be in {ceil(denial.retry_after.total_seconds())} s")
        raise typer.Exit(1) from None
    talk("accepted")
    show_row(row, as_json=as_json)


def show_new_key(row: "tiger_db.APIKey", raw_key: str, *, as_json: bool) -> None:
    if as_json:
        print_json({**dump(row), "key": raw_key})
    else:
        show_row(row, as_json=False)
        typer.echo(raw_key)
    warn("the key is shown only now: keep it in a safe place")


def status_of(key: "tiger_db.APIKey") -> str:
    """Expiry ends a key without anything being written."""
    active = tiger_db.APIKeyStatus.ACTIVE
    return "expired" if key.status == active and key.is_expired else key.status.value


def end_of_key(expires_in: str | None, expires_at: str | None) -> datetime | None:
    if expires_in is not None and expires_at is not None:
        raise typer.BadParameter("excludes --expires-at", param_hint="--expires-in")
    if expires_in is not None:
        return datetime.now(UTC) + duration(expires_in, "--expires-in")
    end = None if expires_at is None else moment(expires_at, "--expires-at")
    if end is not None and end <= datetime.now(UTC):
        raise typer.BadParameter("has passed", param_hint="--expires-at")
    return end
