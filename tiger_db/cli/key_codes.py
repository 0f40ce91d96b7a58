"""The command that signs the rows of API keys."""

from typing import TYPE_CHECKING

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import InvalidState

if TYPE_CHECKING:
    from tiger_db.crud.api_keys.signing import InvalidCodes
    from tiger_db.database import AsyncSession

app = typer.Typer()
_PANEL = "API keys"


@app.command(rich_help_panel=_PANEL)
def sign_api_keys(*, yes: options.Yes = False, as_json: options.AsJson = False) -> None:
    """List the API keys without an authentication code, and sign them after a confirmation.

    Sign only API keys that you know: anyone who can write to the database can create an unsigned
    row. API keys with a wrong code are named, and are never signed.
    """

    async def find(session: "AsyncSession") -> "tuple[list[tiger_db.APIKey], InvalidCodes]":
        peppers = tiger_db.crud.api_keys.hashing.peppers_of(session.info)
        unsigned = await tiger_db.crud.api_keys.list_unsigned(session)
        return unsigned, await tiger_db.crud.api_keys.signing.find_invalid_codes(session, peppers)

    unsigned, invalid = runtime.in_transaction(find)
    for prefix in invalid.wrong:
        output.print_warning(
            f"the row of API key {prefix} has a wrong authentication code, and is not signed:"
            " revoke or delete the API key, and find out who changed the row"
        )
    if as_json:
        output.print_json({"items": [output.dump(key) for key in unsigned], "wrong": invalid.wrong})
    elif unsigned:
        columns = (
            "Prefix",
            "Name",
            "Status",
            "Scopes",
            "Account",
            "Created",
            "Expires",
            "Networks",
        )
        rows = [
            (key.key_prefix, key.name, key.status, key.scopes, key.tiger_account_id or "any",
             key.created_at, key.expires_at, key.allowed_ips)
            for key in unsigned
        ]  # fmt: skip
        output.show_table(columns, rows)
    if not unsigned:
        output.print_message("no API key is unsigned")
        return
    keys = output.count_of(len(unsigned), "API key")
    options.confirm(f"Sign {keys}? A signed key is accepted with the permissions shown.", yes=yes)
    signed = runtime.in_transaction(lambda session: tiger_db.crud.api_keys.sign(session, unsigned))
    output.print_message(f"signed {output.count_of(len(signed), 'API key')}")
    if left := len(unsigned) - len(signed):
        raise InvalidState(
            f"{output.count_of(left, 'API key')} changed after the list was shown, and was not"
            " signed: run the command again"
        )
