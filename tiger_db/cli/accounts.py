"""Commands that list, count and show broker accounts, and explain their routing."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli import options, output, runtime

if TYPE_CHECKING:
    from tiger_db.crud.accounts import AccountFilters, RoutingReason
    from tiger_db.database import AsyncSession

app = typer.Typer()
PANEL = "Accounts"


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
def explain_routing(
    *,
    permission: Annotated[
        str | None, typer.Option(help="Markets, with commas: the request needs all of them.")
    ] = None,
    trading: Annotated[bool, typer.Option("--trading", help="The request is a trade.")] = False,
    account_type: Annotated[
        options.AccountTypes | None, typer.Option(help="Account type that the request needs.")
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


@app.command(rich_help_panel=PANEL)
def show_account(account: options.AccountArgument, *, as_json: options.AsJson = False) -> None:
    """Show an account with masked secrets."""
    output.show_row(
        runtime.in_transaction(lambda session: runtime.find_account(session, account)),
        as_json=as_json,
    )
