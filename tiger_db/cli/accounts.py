"""Commands for broker accounts."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import InvalidValue

if TYPE_CHECKING:
    from tiger_db.crud.accounts import AccountFilters, RoutingReason
    from tiger_db.database import AsyncSession

# The following types repeat enums of tiger_db.models, because importing tiger_db.models is slow.
AccountTypes = Literal["standard", "prime", "global", "paper"]
AccountStatuses = Literal["active", "inactive", "suspended", "pending_verification", "closed"]
OpenStatuses = Literal["active", "inactive", "suspended", "pending_verification"]
Licenses = Literal["TBNZ", "TBSG", "TBHK", "TBAU", "TBUS"]
Environments = Literal["PROD", "SANDBOX"]

Markets = Literal["US", "HK", "CN", "SG"]

_MarketArgument = Annotated[
    Markets, typer.Argument(metavar="MARKET", help="Market: US, HK, CN or SG.")
]
app = typer.Typer()
_PANEL = "Accounts"


@app.command(rich_help_panel=_PANEL)
def create_account(
    *,
    account_name: Annotated[str, typer.Option(help="Display name of the account.")],
    account_number: Annotated[str, typer.Option(help="Tiger's account number.")],
    tiger_id: Annotated[str, typer.Option(help="Tiger's developer id.")],
    private_key: options.PrivateKey = None,
    private_key_file: options.PrivateKeyFile = None,
    account_type: Annotated[
        AccountTypes | None,
        typer.Option(help="Account type; by default derived from the account number."),
    ] = None,
    license: Annotated[  # noqa: A002  # the option's name
        Licenses | None,
        typer.Option(
            case_sensitive=False, help="License of the account, as in Tiger's configuration file."
        ),
    ] = None,
    environment: Annotated[
        Environments,
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


@app.command(rich_help_panel=_PANEL)
def list_accounts(
    *,
    status: Annotated[
        str | None,
        typer.Option(
            help="Statuses, with commas: active, inactive, suspended, pending_verification, closed."
        ),
    ] = None,
    environment: Annotated[
        str | None, typer.Option(help="Environments, with commas: PROD, SANDBOX.")
    ] = None,
    account_type: Annotated[
        str | None, typer.Option(help="Account types, with commas: standard, prime, global, paper.")
    ] = None,
    license: Annotated[  # noqa: A002  # the name of the column
        str | None, typer.Option(help="Licenses, with commas: TBNZ, TBSG, TBHK, TBAU, TBUS.")
    ] = None,
    market_permission: Annotated[
        str | None,
        typer.Option(help="Markets, with commas: accounts that may trade in one or more of them."),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]", help="Tag of the account. The option can be repeated."
        ),
    ] = None,
    with_errors: Annotated[
        bool | None,
        typer.Option(
            "--with-errors/--without-errors",
            help="Select accounts with an error count above 0, or with the error count 0.",
        ),
    ] = None,
    token_expires_within: Annotated[
        str | None,
        typer.Option(
            metavar="24h", help="Select accounts whose access token has expired or expires soon."
        ),
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Text in the name, number or description of the account.")
    ] = None,
    order_by: Annotated[
        Literal["newest", "name"], typer.Option(help="Order of the accounts.")
    ] = "newest",
    limit: options.Limit = options.DEFAULT_PAGE_SIZE,
    after: options.After = None,
    before: options.Before = None,
    count: options.Count = False,
    as_json: options.AsJson = False,
) -> None:
    """List the accounts that match all given options, by default all accounts, newest first."""
    filters: AccountFilters = {"search": search, "with_errors": with_errors}
    if status is not None:
        filters["status"] = options.parse_members(tiger_db.AccountStatus, status, "--status")
    if environment is not None:
        filters["environment"] = options.parse_members(
            tiger_db.TigerEnvironment, environment, "--environment"
        )
    if account_type is not None:
        filters["account_type"] = options.parse_members(
            tiger_db.AccountType, account_type, "--account-type"
        )
    if license is not None:
        filters["license"] = options.parse_members(tiger_db.TigerLicense, license, "--license")
    if market_permission is not None:
        filters["market_permission"] = options.parse_members(
            tiger_db.MarketPermission, market_permission, "--market-permission"
        )
    if tag:
        filters["tags"] = options.parse_tags(tag)
    if token_expires_within is not None:
        filters["token_expires_within"] = options.parse_duration(
            token_expires_within, "--token-expires-within"
        )
    page = runtime.in_transaction(
        lambda session: tiger_db.crud.accounts.list_accounts(
            session,
            order_by=order_by,
            after=after,
            before=before,
            limit=limit,
            count=count,
            **filters,
        )
    )
    output.show_page(
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
            "Token expires": lambda account: account.token_expires_at,
        },
        as_json=as_json,
    )


@app.command(rich_help_panel=_PANEL)
def count_accounts(*, as_json: options.AsJson = False) -> None:
    """Count the accounts by status, type and environment, and accounts that need attention.

    An expiring token has expired, or expires within an hour.
    """
    found = runtime.in_transaction(tiger_db.crud.accounts.counts)
    if as_json:
        output.print_json(asdict(found))
        return
    output.show_fields(
        {
            "total": found.total,
            **{str(name): count for name, count in found.by_status.items()},
            **{str(name): count for name, count in found.by_type.items()},
            **{str(name): count for name, count in found.by_environment.items()},
            "with errors": found.with_errors,
            "expiring tokens": found.expiring_tokens,
        }
    )


@app.command(rich_help_panel=_PANEL)
def explain_routing(
    *,
    permission: Annotated[
        str | None, typer.Option(help="Markets, with commas: the request needs all of them.")
    ] = None,
    trading: Annotated[bool, typer.Option("--trading", help="The request is a trade.")] = False,
    account_type: Annotated[
        AccountTypes | None, typer.Option(help="Account type that the request needs.")
    ] = None,
    environment: Annotated[str, typer.Option(help="Environments, with commas, or `any`.")] = "PROD",
    api_key: Annotated[
        str | None,
        typer.Option(metavar="PREFIX", help="Prefix or id of the API key that sends the request."),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Numbers or ids of accounts to omit, with commas.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which accounts can serve a request now, and why the other accounts cannot serve it.

    Accounts that can serve the request come first, best account first.
    """
    environments = (
        None
        if environment == "any"
        else options.parse_members(tiger_db.TigerEnvironment, environment, "--environment")
    )

    async def explain(
        session: "AsyncSession",
    ) -> "tuple[dict[UUID, list[RoutingReason]], dict[UUID | None, str]]":
        key = None if api_key is None else await runtime.find_api_key(session, api_key)
        excluded = await runtime.find_accounts(session, exclude)
        found = await tiger_db.crud.accounts.explain_for_operation(
            session,
            permission=options.parse_members(tiger_db.MarketPermission, permission, "--permission"),
            trading=trading,
            account_type=options.parse_member(tiger_db.AccountType, account_type),
            environment=environments,
            exclude=[account.id for account in excluded],
            allowed_for=key,
        )
        return found, await runtime.account_numbers(session, found)

    found, numbers = runtime.in_transaction(explain)
    items = [
        {"account_id": account_id, "account_number": numbers.get(account_id), "reasons": reasons}
        for account_id, reasons in sorted(found.items(), key=lambda item: bool(item[1]))
    ]
    if as_json:
        output.print_values(items)
        return
    output.show_table(
        ["Account", "Reasons"],
        [[item["account_number"], item["reasons"] or "can serve the request"] for item in items],
    )


@app.command(rich_help_panel=_PANEL)
def show_account(account: options.AccountArgument, *, as_json: options.AsJson = False) -> None:
    """Show an account with masked secrets."""
    output.show_row(
        runtime.in_transaction(lambda session: runtime.find_account(session, account)),
        as_json=as_json,
    )


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


@app.command(rich_help_panel=_PANEL)
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


@app.command(rich_help_panel=_PANEL)
def close_account(
    account: options.AccountArgument, *, yes: options.Yes = False, as_json: options.AsJson = False
) -> None:
    """Close an account: delete its credentials, revoke its API keys and cancel its token refreshes.

    The account and its audit events stay in the database.
    """
    runtime.settings()  # report invalid settings before asking for confirmation
    options.confirm(f"Close account {account} and revoke its API keys?", yes=yes)
    _change(account, tiger_db.crud.accounts.close, "{account} is closed", as_json=as_json)


@app.command(rich_help_panel=_PANEL)
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


@app.command(rich_help_panel=_PANEL)
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


@app.command(rich_help_panel=_PANEL)
def set_account_status(
    account: options.AccountArgument,
    status: Annotated[
        OpenStatuses, typer.Argument(help="New status. Only an active account serves requests.")
    ],
    *,
    reason: options.Reason = None,
    as_json: options.AsJson = False,
) -> None:
    """Set the status of an account. To close an account, use `close-account`."""
    new = tiger_db.AccountStatus(status)
    change = partial(tiger_db.crud.accounts.update, status=new, reason=reason)
    _change(account, change, "{account} is {status}", as_json=as_json)


@app.command(rich_help_panel=_PANEL)
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


@app.command(rich_help_panel=_PANEL)
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


@app.command(rich_help_panel=_PANEL)
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
