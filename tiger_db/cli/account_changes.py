"""Commands that create, change, close and delete broker accounts."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.cli.accounts import PANEL
from tiger_db.errors import InvalidValue

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

_MarketArgument = Annotated[
    options.Markets, typer.Argument(metavar="MARKET", help="Market: US, HK, CN or SG.")
]
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def create_account(
    *,
    account_name: Annotated[str, typer.Option(help="Display name of the account.")],
    account_number: Annotated[str, typer.Option(help="Tiger's account number.")],
    tiger_id: Annotated[str, typer.Option(help="Tiger's developer id.")],
    private_key: options.PrivateKey = None,
    private_key_file: options.PrivateKeyFile = None,
    account_type: Annotated[
        options.AccountTypes | None,
        typer.Option(help="Account type; by default derived from the account number."),
    ] = None,
    license: Annotated[  # noqa: A002  # the option's name
        options.Licenses | None,
        typer.Option(
            case_sensitive=False, help="License of the account, as in Tiger's configuration file."
        ),
    ] = None,
    environment: Annotated[
        options.Environments,
        typer.Option(
            help="Environment of Tiger's servers. For a paper account, use --account-type paper."
        ),
    ] = "PROD",
    server_url: Annotated[
        str | None, typer.Option(help="URL of a gateway that replaces Tiger's own gateway.")
    ] = None,
    market_permissions: Annotated[
        str | None, typer.Option(metavar="US,HK", help="Markets in which the account may trade.")
    ] = None,
    description: Annotated[str | None, typer.Option(help="Notes about the account.")] = None,
    default_trading: Annotated[
        bool, typer.Option("--default-trading", help="Make the account the default for trading.")
    ] = False,
    default_data: Annotated[
        bool, typer.Option("--default-data", help="Make the account the default for market data.")
    ] = False,
    secret_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Secret key of an institutional trader, or - to read the key from standard input.",
        ),
    ] = None,
    secret_key_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File with the secret key of an institutional trader."),
    ] = None,
    access_token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Current access token, or - to read the token from standard input.",
        ),
    ] = None,
    access_token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the current access token.")
    ] = None,
    token_expires_at: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Expiry of the access token, such as 2026-01-31T12:00:00Z."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Create a broker account, and store its secrets encrypted.

    The RSA private key is PEM or base64 DER, in PKCS#1 or PKCS#8. Without --private-key and
    --private-key-file, the command asks for the private key.
    """
    production = runtime.settings().production
    given: dict[str, Any] = {
        "account_name": account_name,
        "account_number": account_number,
        "tiger_id": tiger_id,
        "account_type": account_type,
        "license": license,
        "environment": environment,
        "server_url": server_url,
        "market_permissions": options.parse_members(
            tiger_db.MarketPermission, market_permissions, "--market-permissions"
        ),
        "description": description,
        "token_expires_at": (
            None
            if token_expires_at is None
            else options.parse_time(token_expires_at, "--token-expires-at")
        ),
        "access_token": options.read_secret("access-token", access_token, access_token_file),
        "secret_key": options.read_secret("secret-key", secret_key, secret_key_file),
    }
    key, warning = _read_private_key(private_key, private_key_file, production=production)
    given |= key
    account = tiger_db.TigerAccount(
        **{name: value for name, value in given.items() if value is not None}
    )

    async def create(session: "AsyncSession") -> tiger_db.TigerAccount:
        await tiger_db.crud.accounts.create(session, account)
        if default_trading:
            await tiger_db.crud.accounts.set_default_trading_account(session, account.id)
        if default_data:
            await tiger_db.crud.accounts.set_default_data_account(session, account.id)
        return account

    created = runtime.in_transaction(create)
    output.print_message(
        f"created account {tiger_db.redaction.mask_account_number(created.account_number)}"
    )
    _print_key_warning(warning)
    output.show_row(created, as_json=as_json)


def _read_private_key(
    value: str | None, file: str | None, *, production: bool
) -> "tuple[dict[str, str | tiger_db.PrivateKeyFormat], str | None]":
    """Read a private key. Return account fields for the key, and a warning if the key is not RSA.

    Raises:
        InvalidValue: the private key is not an RSA key, and `production` is true.
    """
    key = options.read_required_secret("private-key", value, file)
    key_format, warning = tiger_db.PrivateKeyFormat.UNKNOWN, None
    try:
        key, key_format = tiger_db.tiger.parse_private_key(key)
    except InvalidValue as error:
        if production:
            raise
        warning = f"{error}: the private key is stored, but Tiger will refuse the key"
    return {"private_key": key, "private_key_format": key_format}, warning


def _print_key_warning(warning: str | None) -> None:
    """Print the warning that `_read_private_key` returned, after the private key is stored."""
    if warning is not None:
        output.print_warning(warning)


def _change(
    account: str,
    change: "Callable[[AsyncSession, UUID], Awaitable[tiger_db.TigerAccount]]",
    message: str,
    *,
    as_json: bool,
) -> None:
    """Change an account, print `message`, and show the changed account.

    In `message`, `{account}` is the masked account number, and `{status}` is the new status.
    """

    async def run(session: "AsyncSession") -> "tiger_db.TigerAccount":
        return await change(session, (await runtime.find_account(session, account)).id)

    changed = runtime.in_transaction(run)
    number = tiger_db.redaction.mask_account_number(changed.account_number)
    output.print_message(message.format(account=f"account {number}", status=changed.status))
    output.show_row(changed, as_json=as_json)


@app.command(rich_help_panel=PANEL)
def set_default_account(
    account: options.AccountArgument,
    *,
    trading: Annotated[
        bool, typer.Option("--trading", help="Make the account the default for trading.")
    ] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Make the account the default for market data.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make an account the default for trading, for market data, or for both."""
    if not (trading or data):
        raise typer.BadParameter(
            "give at least one of --trading and --data", param_hint="--trading, --data"
        )

    async def set_default(session: "AsyncSession", account_id: UUID) -> "tiger_db.TigerAccount":
        crud = tiger_db.crud.accounts
        if trading:
            changed = await crud.set_default_trading_account(session, account_id)
        if data:
            changed = await crud.set_default_data_account(session, account_id)
        return changed

    uses = " and ".join(["trading"] * trading + ["data"] * data)
    _change(account, set_default, f"{{account}} is now the default for {uses}", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def close_account(
    account: options.AccountArgument, *, yes: options.Yes = False, as_json: options.AsJson = False
) -> None:
    """Close an account: delete its credentials, revoke its API keys and cancel its token refreshes.

    The account and its audit events stay in the database.
    """
    runtime.settings()  # report invalid settings before asking for confirmation
    options.confirm(f"Close account {account} and revoke its API keys?", yes=yes)
    _change(account, tiger_db.crud.accounts.close, "{account} is closed", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def reopen_account(
    account: options.AccountArgument,
    *,
    private_key: options.PrivateKey = None,
    private_key_file: options.PrivateKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Reopen a closed account with a new private key. The account's API keys stay revoked."""
    production = runtime.settings().production
    key, warning = _read_private_key(private_key, private_key_file, production=production)

    async def reopen(session: "AsyncSession", account_id: UUID) -> "tiger_db.TigerAccount":
        return await tiger_db.crud.accounts.reopen(session, account_id, **key)  # type: ignore[arg-type]  # `key` has both fields

    _change(account, reopen, "{account} is open again", as_json=as_json)
    _print_key_warning(warning)


@app.command(rich_help_panel=PANEL)
def delete_account(
    account: options.AccountArgument,
    *,
    reason: options.Reason = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Delete an account permanently, with its API keys and token refreshes.

    To delete an account with API keys or an open refresh, close the account first. The audit events
    of the account stay in the database.
    """
    runtime.settings()  # report invalid settings before asking for confirmation
    options.confirm(f"Delete account {account} permanently?", yes=yes)

    async def delete(session: "AsyncSession", account_id: UUID) -> "tiger_db.TigerAccount":
        deleted = await runtime.find_account(session, str(account_id))
        await tiger_db.crud.accounts.delete(session, account_id, reason=reason)
        return deleted

    _change(account, delete, "{account} is deleted", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def set_account_status(
    account: options.AccountArgument,
    status: Annotated[
        options.OpenStatuses,
        typer.Argument(help="New status. Only an active account serves requests."),
    ],
    *,
    reason: options.Reason = None,
    as_json: options.AsJson = False,
) -> None:
    """Set the status of an account. To close an account, use `close-account`."""
    new = tiger_db.AccountStatus(status)
    change = partial(tiger_db.crud.accounts.update, status=new, reason=reason)
    _change(account, change, "{account} is {status}", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def add_market_permission(
    account: options.AccountArgument,
    permission: _MarketArgument,
    *,
    as_json: options.AsJson = False,
) -> None:
    """Allow an account to trade in a market."""
    market = tiger_db.MarketPermission(permission)
    change = partial(tiger_db.crud.accounts.add_market_permission, permission=market)
    _change(account, change, f"{{account}} may trade in {permission}", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def remove_market_permission(
    account: options.AccountArgument,
    permission: _MarketArgument,
    *,
    as_json: options.AsJson = False,
) -> None:
    """Forbid an account to trade in a market."""
    market = tiger_db.MarketPermission(permission)
    change = partial(tiger_db.crud.accounts.remove_market_permission, permission=market)
    _change(account, change, f"{{account}} may not trade in {permission}", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def reset_account_errors(
    account: options.AccountArgument, *, as_json: options.AsJson = False
) -> None:
    """Set an account's error count to 0. If errors suspended the account, activate the account."""
    change = tiger_db.crud.accounts.reset_errors
    _change(
        account,
        change,
        "the error count of {account} is 0, and the account is {status}",
        as_json=as_json,
    )
