"""Commands that create, change, rotate, revoke and delete API keys."""

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, cast
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.cli.api_keys import PANEL
from tiger_db.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tiger_db.crud.api_keys import KeyChanges
    from tiger_db.database import AsyncSession

_SCOPES = (
    "Scopes of the API key, separated by commas: mcp, dashboard, account, trade or system, each"
    " with :read, :write or :admin. An admin scope includes write, and a write scope includes read."
)

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
def update_api_key(
    key: options.KeyArgument,
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


@app.command(rich_help_panel=PANEL)
def activate_api_key(key: options.KeyArgument, *, as_json: options.AsJson = False) -> None:
    """Activate an API key that was deactivated."""
    _change(key, tiger_db.crud.api_keys.activate, "active", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def deactivate_api_key(
    key: options.KeyArgument, *, reason: options.Reason = None, as_json: options.AsJson = False
) -> None:
    """Deactivate an API key until it is activated again."""
    change = partial(tiger_db.crud.api_keys.deactivate, reason=reason)
    _change(key, change, "inactive", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def rotate_api_key(
    key: options.KeyArgument,
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


@app.command(rich_help_panel=PANEL)
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
    key_file: options.KeyFile = None,
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


@app.command(rich_help_panel=PANEL)
def delete_api_key(
    key: options.KeyArgument,
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
