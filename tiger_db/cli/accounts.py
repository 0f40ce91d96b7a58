"""Broker accounts."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import tiger_db
from tiger_db.cli.options import (
    DEFAULT_PAGE_SIZE,
    After,
    Limit,
    Yes,
    confirm,
    find_account,
    member,
    members,
    moment,
    query,
    required_secret,
    secret,
    settings,
)
from tiger_db.cli.output import AsJson, show_page, show_row, talk, warn
from tiger_db.errors import InvalidValue
from tiger_db.redaction import mask_account_number

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

# As the enums of tiger_db.models have them, which `--help` has no time to import.
AccountTypes = Literal["standard", "prime", "global", "paper"]
AccountStatuses = Literal["active", "inactive", "suspended", "pending_verification", "closed"]
OpenStatuses = Literal["active", "inactive", "suspended", "pending_verification"]
Licenses = Literal["TBNZ", "TBSG", "TBHK", "TBAU", "TBUS"]
Environments = Literal["PROD", "SANDBOX"]

app = typer.Typer()
_PANEL = "Accounts"
Account = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Account number or id.")]


@app.command(rich_help_panel=_PANEL)
def create_account(
    *,
    account_name: Annotated[str, typer.Option(help="What people call it.")],
    account_number: Annotated[str, typer.Option(help="Tiger's number of it.")],
    tiger_id: Annotated[str, typer.Option(help="Tiger's id of the developer.")],
    private_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="RSA private key, or - to read it from standard input."),
    ] = None,
    private_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the RSA private key.")
    ] = None,
    account_type: Annotated[
        AccountTypes | None, typer.Option(help="Follows from the account number if not given.")
    ] = None,
    license: Annotated[Licenses | None, typer.Option(help="Tiger's licence of it.")] = None,  # noqa: A002  # the option's name
    environment: Annotated[
        Environments, typer.Option(help="Paper trading is chosen by the account number instead.")
    ] = "PROD",
    server_url: Annotated[str | None, typer.Option(help="Gateway, if not the usual one.")] = None,
    market_permissions: Annotated[
        str | None, typer.Option(metavar="US,HK", help="Markets it may trade in.")
    ] = None,
    description: Annotated[str | None, typer.Option(help="Notes.")] = None,
    default_trading: Annotated[
        bool, typer.Option("--default-trading", help="Make it the default for trading.")
    ] = False,
    default_data: Annotated[
        bool, typer.Option("--default-data", help="Make it the default for data.")
    ] = False,
    secret_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Institutional trader's key, or -.")
    ] = None,
    secret_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with that key.")
    ] = None,
    access_token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Current access token, or -.")
    ] = None,
    access_token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with that token.")
    ] = None,
    token_expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Its end, such as 2026-01-31T12:00:00Z.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store a broker account; its secrets are encrypted.

    The private key is PEM or base64 DER, PKCS#1 or PKCS#8; where none is given, it is asked for.
    """
    production = settings().production
    given: dict[str, Any] = {
        "account_name": account_name,
        "account_number": account_number,
        "tiger_id": tiger_id,
        "account_type": account_type,
        "license": license,
        "environment": environment,
        "server_url": server_url,
        "market_permissions": members(
            tiger_db.MarketPermission, market_permissions, "--market-permissions"
        ),
        "description": description,
        "token_expires_at": (
            moment(token_expires_at, "--token-expires-at") if token_expires_at is not None else None
        ),
        "access_token": secret("access-token", access_token, access_token_file),
        "secret_key": secret("secret-key", secret_key, secret_key_file),
    }
    key = required_secret("private-key", private_key, private_key_file)
    given["private_key"], given["private_key_format"] = _checked(key, production=production)
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

    created = query(create)
    talk(f"created account {mask_account_number(created.account_number)}")
    show_row(created, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def list_accounts(
    *,
    status: Annotated[AccountStatuses | None, typer.Option(help="Only these.")] = None,
    environment: Annotated[Environments | None, typer.Option(help="Only these.")] = None,
    account_type: Annotated[AccountTypes | None, typer.Option(help="Only these.")] = None,
    limit: Limit = DEFAULT_PAGE_SIZE,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List the accounts, newest first."""
    page = query(
        lambda session: tiger_db.crud.accounts.list_accounts(
            session,
            status=member(tiger_db.AccountStatus, status),
            environment=member(tiger_db.TigerEnvironment, environment),
            account_type=member(tiger_db.AccountType, account_type),
            after=after,
            limit=limit,
        )
    )
    show_page(
        page,
        {
            "Number": lambda account: account.account_number,
            "Name": lambda account: account.account_name,
            "Type": lambda account: account.account_type,
            "Status": lambda account: account.status,
            "License": lambda account: account.license,
            "Default": lambda account: (
                ["trading"] * account.is_default_trading + ["data"] * account.is_default_data
            ),
            "Token until": lambda account: account.token_expires_at,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=_PANEL)
def show_account(account: Account, *, as_json: AsJson = False) -> None:
    """Show an account; its secrets stay hidden."""
    show_row(query(lambda session: find_account(session, account)), as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def set_default_account(
    account: Account,
    *,
    trading: Annotated[bool, typer.Option("--trading", help="For trading.")] = False,
    data: Annotated[bool, typer.Option("--data", help="For data.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make an account the default, in place of the one that was."""
    if not (trading or data):
        raise typer.BadParameter("say for what", param_hint="--trading, --data")

    async def set_default(session: "AsyncSession") -> "tiger_db.TigerAccount":
        found = await find_account(session, account)
        if trading:
            found = await tiger_db.crud.accounts.set_default_trading_account(session, found.id)
        if data:
            found = await tiger_db.crud.accounts.set_default_data_account(session, found.id)
        return found

    changed = query(set_default)
    uses = " and ".join(["trading"] * trading + ["data"] * data)
    talk(f"account {mask_account_number(changed.account_number)} is now the default for {uses}")
    show_row(changed, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def close_account(account: Account, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Close an account: its credentials are destroyed, its API keys revoked, its refreshes end.

    The account and its audit trail stay.
    """

    async def close(session: "AsyncSession") -> "tiger_db.TigerAccount":
        found = await find_account(session, account)
        return await tiger_db.crud.accounts.close(session, found.id)

    settings()  # what is wrong with these is told before anything is asked
    confirm(f"Close account {account} and revoke its API keys?", yes=yes)
    closed = query(close)
    talk(f"account {mask_account_number(closed.account_number)} is closed")
    show_row(closed, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def reopen_account(
    account: Account,
    *,
    private_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="RSA private key, or - to read it from standard input."),
    ] = None,
    private_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the RSA private key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Open a closed account again, with a new private key. Its API keys stay revoked."""
    production = settings().production
    given = required_secret("private-key", private_key, private_key_file)
    key, key_format = _checked(given, production=production)

    async def reopen(session: "AsyncSession") -> "tiger_db.TigerAccount":
        found = await find_account(session, account)
        return await tiger_db.crud.accounts.reopen(
            session, found.id, private_key=key, private_key_format=key_format
        )

    opened = query(reopen)
    talk(f"account {mask_account_number(opened.account_number)} is open again")
    show_row(opened, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def set_account_status(
    account: Account,
    status: Annotated[OpenStatuses, typer.Argument(help="Only an active one serves requests.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Suspend an account, activate it, and the like. Closing is `close-account`'s."""

    async def change(session: "AsyncSession") -> "tiger_db.TigerAccount":
        found = await find_account(session, account)
        return await tiger_db.crud.accounts.update(session, found.id, status=status)

    changed = query(change)
    talk(f"account {mask_account_number(changed.account_number)} is {changed.status.value}")
    show_row(changed, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def reset_account_errors(account: Account, *, as_json: AsJson = False) -> None:
    """Forget an account's errors, and lift the suspension that they have caused."""

    async def reset(session: "AsyncSession") -> "tiger_db.TigerAccount":
        found = await find_account(session, account)
        return await tiger_db.crud.accounts.reset_errors(session, found.id)

    changed = query(reset)
    number = mask_account_number(changed.account_number)
    talk(f"account {number} has no errors and is {changed.status.value}")
    show_row(changed, as_json=as_json)


def _checked(key: str, *, production: bool) -> "tuple[str, tiger_db.PrivateKeyFormat]":
    """In production only what Tiger takes; elsewhere also what serves a try."""
    try:
        return tiger_db.tiger.parse_private_key(key)
    except InvalidValue as error:
        if production:
            raise
        warn(f"{error}: it is stored, but Tiger will refuse it")
        return key, tiger_db.PrivateKeyFormat.UNKNOWN
