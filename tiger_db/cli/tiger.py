"""The files that Tiger gives out for its SDKs."""

import stat
from pathlib import Path
from typing import Annotated

import typer

import tiger_db
from tiger_db.cli.accounts import Account
from tiger_db.cli.options import find_account, finish, query, settings
from tiger_db.cli.output import AsJson, Overwrite, print_json, show_row, talk, warn
from tiger_db.redaction import mask_account_number

app = typer.Typer()
_PANEL = "Tiger's files"


@app.command(rich_help_panel=_PANEL)
def import_account(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Its tiger_openapi_config.properties.")
    ],
    *,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its tiger_openapi_token.properties, if it has one."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What people call it; at first its number if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store the account of Tiger's files, or change the stored one where it differs.

    What the files do not mention stays as it is.
    """
    found = query(
        lambda session: tiger_db.tiger.import_account(
            session, file, token_file=token_file, name=name
        )
    )
    known_as = f"account {mask_account_number(found.account.account_number)}"
    if found.created:
        talk(f"created {known_as}")
    elif found.changed:
        talk(f"changed {known_as}: {', '.join(found.changed)}")
    else:
        talk(f"{known_as} is stored like this already: nothing was changed")
    if found.token_kept:
        warn("its stored access token is newer than the given one, and stays")
    if found.ignored:
        warn(f"{file} has lines that Tiger does not know, left out: {', '.join(found.ignored)}")
    for path in filter(None, (file, token_file)):
        _warn_of_readers(path)
    show_row(found.account, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def export_account(
    account: Account,
    *,
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the files go; made if it is missing.")
    ],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an account's files for Tiger's SDKs, and print their paths. They hold its secrets."""

    async def export() -> "tuple[tiger_db.TigerAccount, list[Path]]":
        async with tiger_db.Database(settings()) as database:
            async with database.session() as session:
                found = await find_account(session, account)
            paths = await tiger_db.tiger.export_account(
                database, found.id, folder=to, overwrite=overwrite
            )
            return found, paths

    exported, paths = finish(export())
    number = mask_account_number(exported.account_number)
    talk(f"exported account {number}: keep its private key to yourself")
    if as_json:
        print_json({"items": [str(path) for path in paths], "next_cursor": None})
    else:
        for path in paths:
            typer.echo(str(path))


def _warn_of_readers(path: Path) -> None:
    """What holds a secret is for its owner alone."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) and mode & 0o077:
        warn(f"others on this machine may read the secrets in {path}: chmod 600 {path}")
