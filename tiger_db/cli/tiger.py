"""Commands for the configuration files of Tiger's SDKs."""

import stat
from pathlib import Path
from typing import Annotated

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.files import HAS_FILE_MODES

app = typer.Typer()
_PANEL = "Tiger's files"


@app.command(rich_help_panel=_PANEL)
def import_account(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Path of tiger_openapi_config.properties.")
    ],
    *,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Path of tiger_openapi_token.properties. Default: this file in the folder of FILE,"
            " if the configuration file has no token.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Display name of the account. Default for a new account: the account number."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Create or update an account from the configuration files of Tiger's SDKs.

    An update changes only the fields that the files contain.
    """
    result = runtime.in_transaction(
        lambda session: tiger_db.tiger.import_account(
            session, file, token_file=token_file, name=name
        )
    )
    account = f"account {tiger_db.redaction.mask_account_number(result.account.account_number)}"
    if result.created:
        output.print_message(f"created {account}")
    elif result.changed:
        output.print_message(f"changed {account}: {', '.join(result.changed)}")
    else:
        output.print_message(
            f"{account} was not changed, because the account already has the values of the files"
        )
    if token_file is None and result.token_file is not None:
        output.print_message(f"the access token is from {result.token_file}")
    for warning in result.warnings:
        output.print_warning(warning)
    for path in filter(None, (file, result.token_file)):
        mode = path.stat().st_mode
        if HAS_FILE_MODES and stat.S_ISREG(mode) and mode & 0o077:
            output.print_warning(
                f"other users of this machine can read the secrets in {path}: run chmod 600 {path}"
            )
    output.show_row(result.account, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def export_account(
    account: options.AccountArgument,
    *,
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for the written files, created if missing."),
    ],
    overwrite: options.Overwrite = False,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Do not write the access token.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the configuration files of an account for Tiger's SDKs, and print the files' paths.

    The written files contain secrets.
    """

    async def export(
        database: "tiger_db.Database",
    ) -> "tuple[tiger_db.TigerAccount, list[Path]]":
        async with database.session() as session:
            found = await runtime.find_account(session, account)
        paths = await tiger_db.tiger.export_account(
            database, found.id, folder=out, overwrite=overwrite, with_token=not without_token
        )
        return found, paths

    exported, paths = runtime.with_database(export)
    number = tiger_db.redaction.mask_account_number(exported.account_number)
    output.print_message(f"exported account {number}: keep the files secret")
    output.show_lines([str(path) for path in paths], as_json=as_json)
