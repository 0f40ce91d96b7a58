"""Commands for API keys."""

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal, cast
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import AccessDenied, NotFound, RateLimited

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tiger_db.crud.api_keys import APIKeyFilters, KeyChanges, Limit, TradingPause, UsageCount
    from tiger_db.database import AsyncSession

KeyArgument = Annotated[str, typer.Argument(metavar="PREFIX", help="Prefix or id of the API key.")]
KeyFile = Annotated[str | None, typer.Option(metavar="FILE", help="File with the whole API key.")]
_SCOPES = (
    "Scopes of the API key, separated by commas: mcp, dashboard, account, trade or system, each"
    " with :read, :write or :admin. An admin scope includes write, and a write scope includes read."
)

app = typer.Typer()
_PANEL = "API keys"


@app.command(rich_help_panel=_PANEL)
def create_api_key(
    *,
    name: Annotated[str, typer.Option(help="Display name of the API key.")],
    scopes: Annotated[str, typer.Option(metavar="mcp:read,mcp:write", help=_SCOPES)],
    account: Annotated[
        str | None,
        typer.Option(help="Number or id of the only account that the API key may access."),
    ] = None,
    expires_in: options.ExpiresIn = None,
    expires_at: options.ExpiresAt = None,
    rate_limit_per_hour: Annotated[
        int | None, typer.Option(help="Maximum number of uses of the API key per clock hour.")
    ] = None,
    rate_limit_per_day: Annotated[
        int | None, typer.Option(help="Maximum number of uses of the API key per UTC day.")
    ] = None,
    allowed_ips: Annotated[
        str,
        typer.Option(metavar="10.0.0.0/8,::1", help="Allowed IP addresses and networks."),
    ] = "all",
    allowed_user_agents: Annotated[
        str,
        typer.Option(metavar="'claude/*'", help="Patterns of allowed user agents."),
    ] = "all",
    description: Annotated[str | None, typer.Option(help="Notes about the API key.")] = None,
    created_by: Annotated[
        str | None, typer.Option(help="Person or program that creates the API key.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Create an API key, and show the raw key. The raw key cannot be shown again."""
    granted = options.parse_members(tiger_db.APIKeyScope, scopes, "--scopes")
    expiry = options.parse_expiry(expires_in, expires_at)
    networks = _parse_allowed(allowed_ips, "--allowed-ips")
    user_agents = _parse_allowed(allowed_user_agents, "--allowed-user-agents")

    async def create(session: "AsyncSession") -> "tuple[tiger_db.APIKey, str]":
        bound = await runtime.find_account(session, account) if account is not None else None
        return await tiger_db.crud.api_keys.create_api_key(
            session,
            name=name,
            scopes=granted,
            tiger_account_id=bound.id if bound else None,
            expires_at=expiry,
            rate_limit_per_hour=rate_limit_per_hour,
            rate_limit_per_day=rate_limit_per_day,
            allowed_ips=networks,
            allowed_user_agents=user_agents,
            created_by=created_by,
            description=description,
        )

    key, raw_key = runtime.in_transaction(create)
    output.print_message(f"created API key {key.key_prefix}")
    _show_new_key(key, raw_key, as_json=as_json)


def _show_new_key(key: "tiger_db.APIKey", raw_key: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json({**output.dump(key), "key": raw_key})
    else:
        output.show_row(key, as_json=False)
        typer.echo(raw_key)
    output.print_warning("the API key is shown only now: store the key in a safe place")


@app.command(rich_help_panel=_PANEL)
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


@app.command(rich_help_panel=_PANEL)
def verify_api_key(
    key: Annotated[
        str | None,
        typer.Argument(
            help="Whole API key, or - to read the key from standard input. By default, the command"
            " asks for the key."
        ),
    ] = None,
    *,
    key_file: KeyFile = None,
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

    context = replace(context_of(session.info), out_of_band=None, count_use=None)
    session.info[tiger_db.models.secrets.CONTEXT] = context


@app.command(rich_help_panel=_PANEL)
def show_api_key(
    key: KeyArgument,
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


@app.command(rich_help_panel=_PANEL)
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


def _change(
    key: str,
    change: "Callable[[AsyncSession, UUID], Awaitable[object]]",
    participle: str,
    *,
    unchanged: str | None = None,
    as_json: bool,
) -> None:
    """Change an API key, print whether the key is changed, and show the key.

    `participle` names the change in the message, such as `deleted`. `unchanged` is the reason to
    print if nothing is changed, by default a text such as `the API key is revoked already`.
    """

    async def run(session: "AsyncSession") -> "tuple[tiger_db.APIKey, bool]":
        found = await runtime.find_api_key(session, key)
        before = found.model_dump()
        await change(session, found.id)
        return found, found not in session or found.model_dump() != before

    found, is_changed = runtime.in_transaction(run)
    if is_changed:
        output.print_message(f"API key {found.key_prefix} is {participle}")
    else:
        reason = unchanged or f"the API key is {participle} already"
        output.print_message(f"nothing is changed in API key {found.key_prefix}: {reason}")
    output.show_row(found, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def update_api_key(
    key: KeyArgument,
    *,
    name: Annotated[str | None, typer.Option(help="New display name.")] = None,
    description: Annotated[
        str | None, typer.Option(help="New notes. An empty text removes the notes.")
    ] = None,
    scopes: Annotated[
        str | None,
        typer.Option(
            metavar="mcp:read,mcp:write", help="New scopes, which replace the old scopes."
        ),
    ] = None,
    expires_in: options.ExpiresIn = None,
    expires_at: options.ExpiresAt = None,
    never: Annotated[
        bool, typer.Option("--never", help="Remove the expiry of the API key.")
    ] = False,
    rate_limit_per_hour: Annotated[
        str | None,
        typer.Option(metavar="N|none", help="New maximum number of uses per clock hour."),
    ] = None,
    rate_limit_per_day: Annotated[
        str | None, typer.Option(metavar="N|none", help="New maximum number of uses per UTC day.")
    ] = None,
    allowed_ips: Annotated[
        str | None,
        typer.Option(
            metavar="10.0.0.0/8,::1|all", help="New list of allowed IP addresses and networks."
        ),
    ] = None,
    allowed_user_agents: Annotated[
        str | None,
        typer.Option(metavar="'claude/*'|all", help="New list of patterns of allowed user agents."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Change an API key. Each option changes one field, and all other fields stay unchanged."""
    expiry = options.parse_expiry(expires_in, expires_at)
    if never and expiry is not None:
        raise typer.BadParameter(
            "--never cannot be combined with --expires-in or --expires-at", param_hint="--never"
        )
    fields: dict[str, tuple[str | None, Callable[[str, str], object]]] = {
        "name": (name, lambda text, _: text),
        "description": (description, lambda text, _: text or None),
        "scopes": (scopes, partial(options.parse_members, tiger_db.APIKeyScope)),
        "rate_limit_per_hour": (rate_limit_per_hour, _parse_limit),
        "rate_limit_per_day": (rate_limit_per_day, _parse_limit),
        "allowed_ips": (allowed_ips, _parse_allowed),
        "allowed_user_agents": (allowed_user_agents, _parse_allowed),
    }
    changes = {
        field: parse(text, "--" + field.replace("_", "-"))
        for field, (text, parse) in fields.items()
        if text is not None
    }
    if never or expiry is not None:
        changes["expires_at"] = expiry
    if not changes:
        raise typer.BadParameter(
            "give at least one option that changes a field", param_hint="OPTIONS"
        )

    async def update(session: "AsyncSession", key_id: UUID) -> None:
        await tiger_db.crud.api_keys.update(session, key_id, **cast("KeyChanges", changes))

    _change(
        key,
        update,
        "updated",
        unchanged="the API key has the requested values already",
        as_json=as_json,
    )


def _parse_limit(text: str, option: str) -> int | None:
    """Parse a rate limit. Return None (no limit) for the text `none`."""
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter("give a number, or the word none", param_hint=option) from None


def _parse_allowed(text: str, option: str) -> list[str]:
    """Split a list of networks or user agents at commas.

    For the text `all`, return an empty list, which stands for no restriction. An empty text is
    refused, because an empty shell variable must not remove a restriction.
    """
    words = options.split_words(text)
    if not words:
        raise typer.BadParameter(
            "the list is empty: give at least one item, or the word all", param_hint=option
        )
    return [] if words == ["all"] else words


@app.command(rich_help_panel=_PANEL)
def activate_api_key(key: KeyArgument, *, as_json: options.AsJson = False) -> None:
    """Activate an API key that was deactivated."""
    _change(key, tiger_db.crud.api_keys.activate, "active", as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def deactivate_api_key(
    key: KeyArgument, *, reason: options.Reason = None, as_json: options.AsJson = False
) -> None:
    """Deactivate an API key until it is activated again."""
    change = partial(tiger_db.crud.api_keys.deactivate, reason=reason)
    _change(key, change, "inactive", as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def rotate_api_key(
    key: KeyArgument,
    *,
    grace: Annotated[
        str,
        typer.Option(
            metavar="24h",
            help="Grace period of the old API key, such as 24h, or 0 for no grace period.",
        ),
    ] = "24h",
    as_json: options.AsJson = False,
) -> None:
    """Replace an API key by a new key with the same permissions, and show the new key once."""
    length = timedelta(0) if grace == "0" else options.parse_duration(grace, "--grace")

    async def rotate(session: "AsyncSession") -> "tuple[tiger_db.APIKey, str]":
        found = await runtime.find_api_key(session, key)
        return await tiger_db.crud.api_keys.rotate(session, found.id, grace=length)

    replacement, raw_key = runtime.in_transaction(rotate)
    output.print_message(f"created API key {replacement.key_prefix} to replace the rotated key")
    _show_new_key(replacement, raw_key, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def revoke_api_key(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="PREFIX",
            help="Prefix or id of the API key. With --raw: the whole key, or - for standard input.",
        ),
    ] = None,
    *,
    raw: Annotated[
        bool, typer.Option("--raw", help="Find the API key by the whole key, not by its prefix.")
    ] = False,
    key_file: KeyFile = None,
    reason: Annotated[
        str | None, typer.Option(help="Reason for the revocation, stored with the API key.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Revoke an API key. A revocation cannot be undone."""
    if key_file is not None and not raw:
        raise typer.BadParameter("--key-file requires --raw", param_hint="--key-file")
    if key is None and not raw:
        raise typer.BadParameter("the prefix is missing", param_hint="PREFIX")
    raw_key = options.read_required_secret("key", key, key_file) if raw else ""

    async def revoke(session: "AsyncSession") -> "tuple[tiger_db.APIKey, bool]":
        if raw:
            found = await tiger_db.crud.api_keys.find_by_raw_key(session, raw_key)
            if found is None:
                raise NotFound(
                    "the database does not contain this API key: try the key's prefix without --raw"
                )
        else:
            found = await runtime.find_api_key(session, key or "")
        was_revoked = found.status == tiger_db.APIKeyStatus.REVOKED
        return await tiger_db.crud.api_keys.revoke(session, found.id, reason=reason), was_revoked

    revoked, was_revoked = runtime.in_transaction(revoke)
    if was_revoked:
        reason_in_force = revoked.revocation_reason or "none"
        output.print_message(
            f"nothing is changed in API key {revoked.key_prefix}: the API key is revoked already"
            f" (reason: {reason_in_force})"
        )
    else:
        output.print_message(f"API key {revoked.key_prefix} is revoked")
    output.show_row(revoked, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def delete_api_key(
    key: KeyArgument,
    *,
    reason: options.Reason = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Delete an API key and its usage counts. The audit events of the API key stay."""
    runtime.settings()  # report invalid settings before asking for confirmation
    options.confirm("Delete this API key and its usage counts?", yes=yes)
    change = partial(tiger_db.crud.api_keys.delete, reason=reason)
    _change(key, change, "deleted", as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def print_api_key_pattern() -> None:
    """Print the regular expression that matches API keys, for secret scanners."""
    typer.echo(tiger_db.crud.api_keys.KEY_PATTERN)


@app.command(rich_help_panel=_PANEL)
def generate_api_key_pepper(*, pepper_id: options.KeyId = None) -> None:
    """Print a new random pepper for API_KEY_PEPPERS, without storing the pepper."""
    typer.echo(tiger_db.encryption.generate_key(pepper_id or options.new_key_id()))
    output.print_message(
        "add the new pepper at the end of API_KEY_PEPPERS in every process, after a comma. When"
        " every process has the new pepper, move the pepper to the beginning of API_KEY_PEPPERS."
        " The next use of an API key hashes the key again with the first pepper. Keep all old"
        " peppers: without the pepper of its hash, an API key is refused"
    )
