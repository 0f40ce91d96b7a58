"""What becomes of API keys: shown with their uses, extended, rotated, revoked."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

import tiger_db
from tiger_db.cli.api_keys import PANEL, end_of_key, show_new_key, status_of
from tiger_db.cli.encryption import new_id
from tiger_db.cli.options import (
    DEFAULT_PAGE_SIZE,
    SINCE,
    After,
    Limit,
    duration,
    find_api_key,
    past,
    query,
    required_secret,
)
from tiger_db.cli.output import (
    AsJson,
    dump,
    over_time,
    print_json,
    show_bars,
    show_page,
    show_row,
    talk,
)
from tiger_db.errors import NotFound

if TYPE_CHECKING:
    from tiger_db.crud.api_keys import HourlyUsage
    from tiger_db.database import AsyncSession

Key = Annotated[str, typer.Argument(metavar="PREFIX", help="The key's prefix or id.")]

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def show_api_key(
    key: Key,
    *,
    since: Annotated[
        str, typer.Option(metavar="TIME", help=f"Count uses from then on: {SINCE}")
    ] = "24h",
    as_json: AsJson = False,
) -> None:
    """Show an API key and its uses over time: by the hour up to two days, else by the day."""
    now, first = datetime.now(UTC), past(since, "--since")

    async def find(session: "AsyncSession") -> "tuple[tiger_db.APIKey, list[HourlyUsage]]":
        found = await find_api_key(session, key)
        return found, await tiger_db.crud.api_keys.usage(session, found.id, since=first)

    row, used = query(find)
    if as_json:
        usage = [{"hour": hourly.hour.isoformat(), "count": hourly.count} for hourly in used]
        print_json({**dump(row), "usage": usage})
        return
    show_row(row, as_json=False)
    if not used:
        talk(f"not used since {first:%Y-%m-%d %H:%MZ}")
        return
    show_bars(over_time({hourly.hour: hourly.count for hourly in used}, first, now))


@app.command(rich_help_panel=PANEL)
def list_expiring_api_keys(
    *,
    within: Annotated[
        str, typer.Option(metavar="7d", help="How soon they expire: m, h, d or w.")
    ] = "7d",
    limit: Limit = DEFAULT_PAGE_SIZE,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List the API keys that soon expire, soonest first."""
    length = duration(within, "--within")

    async def find(session: "AsyncSession") -> "tiger_db.Page[tiger_db.APIKey]":
        return await tiger_db.crud.api_keys.list_expiring(
            session, within=length, after=after, limit=limit
        )

    show_page(
        query(find),
        {
            "Prefix": lambda key: key.key_prefix,
            "Name": lambda key: key.name,
            "Status": status_of,
            "Expires": lambda key: key.expires_at,
            "Last used": lambda key: key.last_used_at,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=PANEL)
def rotate_api_key(
    key: Key,
    *,
    grace: Annotated[
        str, typer.Option(metavar="24h", help="How long the old key still works; 0: not at all.")
    ] = "24h",
    as_json: AsJson = False,
) -> None:
    """Replace an API key by a new one with the same powers, and show that, once."""
    length = timedelta(0) if grace == "0" else duration(grace, "--grace")

    async def rotate(session: "AsyncSession") -> "tuple[tiger_db.APIKey, str]":
        found = await find_api_key(session, key)
        return await tiger_db.crud.api_keys.rotate(session, found.id, grace=length)

    row, raw_key = query(rotate)
    talk(f"created API key {row.key_prefix} as the successor")
    show_new_key(row, raw_key, as_json=as_json)


@app.command(rich_help_panel=PANEL)
def extend_api_key(
    key: Key,
    *,
    expires_in: Annotated[
        str | None, typer.Option(metavar="30d", help="For how long from now: m, h, d or w.")
    ] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Its end, such as 2026-01-31T12:00:00Z.")
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="Let it never expire.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let an API key expire later."""
    end = end_of_key(expires_in, expires_at)
    if never == (end is not None):
        raise typer.BadParameter(
            "give one of them", param_hint="--expires-in, --expires-at, --never"
        )

    async def extend(session: "AsyncSession") -> "tiger_db.APIKey":
        found = await find_api_key(session, key)
        return await tiger_db.crud.api_keys.extend(session, found.id, expires_at=end)

    row = query(extend)
    talk(f"API key {row.key_prefix} is extended")
    show_row(row, as_json=as_json)


@app.command(rich_help_panel=PANEL)
def revoke_api_key(
    key: Annotated[
        str | None,
        typer.Argument(metavar="PREFIX", help="The key's prefix or id; with --raw, the whole key."),
    ] = None,
    *,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Find a leaked key by its whole text: - or nothing reads or asks for it."
        ),
    ] = False,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the whole key, with --raw.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Refuse an API key from now on, for good."""
    if key_file is not None and not raw:
        raise typer.BadParameter("is for --raw", param_hint="--key-file")
    if key is None and not raw:
        raise typer.BadParameter("is missing", param_hint="PREFIX")
    text = required_secret("key", key, key_file) if raw else ""

    async def revoke(session: "AsyncSession") -> "tiger_db.APIKey":
        if raw:
            found = await tiger_db.crud.api_keys.find_by_raw_key(session, text)
            if found is None:
                raise NotFound("this is no API key of this database; a prefix revokes a key, too")
        else:
            found = await find_api_key(session, key or "")
        return await tiger_db.crud.api_keys.revoke(session, found.id, reason=reason)

    revoked = query(revoke)
    talk(f"API key {revoked.key_prefix} is revoked")
    show_row(revoked, as_json=as_json)


@app.command(rich_help_panel=PANEL)
def print_api_key_pattern() -> None:
    """Print the regular expression of API keys, for secret scanners."""
    typer.echo(tiger_db.crud.api_keys.KEY_PATTERN)


@app.command(rich_help_panel=PANEL)
def generate_api_key_pepper(
    *,
    pepper_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Its id; made of today's date if not given."),
    ] = None,
) -> None:
    """Print a new random pepper, as API_KEY_PEPPERS takes it. It is stored nowhere."""
    typer.echo(tiger_db.encryption.generate_key(pepper_id or new_id()))
    talk(
        "put it first in API_KEY_PEPPERS, before a comma and those that are there, and keep all of"
        " them: a key moves to the first at its next use, and verifies under no other than its own"
    )
