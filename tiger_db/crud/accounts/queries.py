"""Functions that look up and list accounts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped
from sqlmodel import col

from tiger_db.crud.common import fetch_all, fetch_one, load_options
from tiger_db.crud.filters import (
    Filters,
    OneOrMore,
    Tag,
    as_list,
    has_tag,
    has_text,
    one_of,
    overlaps,
)
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, EntityList, Page, check_limit, paginate
from tiger_db.encryption import fingerprint
from tiger_db.errors import ConfigurationError
from tiger_db.models import (
    AccountStatus,
    AccountType,
    MarketPermission,
    TigerAccount,
    TigerEnvironment,
    TigerLicense,
)
from tiger_db.models.accounts import (
    REFRESH_AHEAD,
    due_tokens,
    normalize_account_number,
    normalize_tiger_id,
)
from tiger_db.models.secrets import key_provider
from tiger_db.public import public


@public
async def get(
    session: AsyncSession, account_id: UUID, *, load: Sequence[str] = ()
) -> TigerAccount | None:
    """Return the account with the given id, or None.

    `load` contains the names of the relationships to load, such as `api_keys` or `token_statuses`.
    """
    return await _get(session, col(TigerAccount.id) == account_id, load)


@public
async def get_by_account_number(
    session: AsyncSession, account_number: str, *, load: Sequence[str] = ()
) -> TigerAccount | None:
    """Return the account with the given account number, or None.

    Older releases stored account numbers that are not normalized. If no account has the normalized
    number, return an account whose stored number equals `account_number`. `load` contains the names
    of the relationships to load, such as `api_keys` or `token_statuses`.
    """
    for number in _normal_first(account_number, normalize_account_number):
        criterion = col(TigerAccount.account_number) == number
        if account := await _get(session, criterion, load):
            return account
    return None


@public
async def list_by_tiger_id(session: AsyncSession, tiger_id: str) -> list[TigerAccount]:
    """Return all accounts with the given Tiger id, oldest account first.

    Raises:
        ConfigurationError: ENCRYPTION_KEYS is not set, so the blind index cannot be computed.
    """
    provider = key_provider(session.sync_session)
    if provider is None:
        raise ConfigurationError("ENCRYPTION_KEYS is not set, so tiger_id cannot be searched")
    try:
        fingerprints = [
            fingerprint(provider, key_id, text, "tiger_accounts.tiger_id")
            for key_id in provider.key_ids
            for text in _normal_first(tiger_id, normalize_tiger_id)
        ]
    except UnicodeEncodeError:  # tiger_id has a lone surrogate, which PostgreSQL cannot store
        return []
    criterion = col(TigerAccount.tiger_id_fingerprint).in_(fingerprints)
    statement = select(TigerAccount).where(criterion).order_by(col(TigerAccount.id))
    return await fetch_all(session, statement)


class AccountFilters(TypedDict, total=False):
    """The filters of a list of accounts.

    A filter with several values selects the accounts that have one or more of the values. A filter
    with the value None selects all accounts. A filter with an empty collection selects no account.

    An item of `tags` is the name of a tag, or a mapping of tags to their values. If `with_errors`
    is true, the accounts with an error count above 0 are selected. If `with_errors` is false, the
    accounts with the error count 0 are selected. `token_expires_within` also selects the accounts
    with an expired access token. `search` is a text in the name, the number or the description of
    an account, regardless of case.
    """

    status: OneOrMore[AccountStatus] | None
    account_type: OneOrMore[AccountType] | None
    environment: OneOrMore[TigerEnvironment] | None
    license: OneOrMore[TigerLicense] | None
    market_permission: OneOrMore[MarketPermission] | None
    tags: OneOrMore[Tag] | None
    with_errors: bool | None
    token_expires_within: timedelta | None
    search: str | None


ACCOUNTS = EntityList(
    "tiger_accounts",
    TigerAccount,
    Filters.of(
        AccountFilters,
        {
            "status": one_of(col(TigerAccount.status)),
            "account_type": one_of(col(TigerAccount.account_type)),
            "environment": one_of(col(TigerAccount.environment)),
            "license": lambda value: one_of(col(TigerAccount.license))(
                [TigerLicense(text) for text in as_list(value)]
            ),
            "market_permission": overlaps(col(TigerAccount.market_permissions)),
            "tags": has_tag(col(TigerAccount.tags)),
            "with_errors": lambda value: (col(TigerAccount.error_count) > 0) == value,
            "token_expires_within": lambda within: and_(
                col(TigerAccount.access_token).is_not(None),
                col(TigerAccount.token_expires_at) <= func.now() + within,
            ),
            "search": has_text(
                col(TigerAccount.account_name),
                col(TigerAccount.account_number),
                col(TigerAccount.description),
            ),
        },
    ),
    orders={"name": "account_name"},
)


@public
async def list_accounts(
    session: AsyncSession,
    *,
    order_by: Literal["newest", "name"] = "newest",
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
    **filters: Unpack[AccountFilters],
) -> Page[TigerAccount]:
    """Return a page of the accounts that match all filters, by default newest account first.

    The order `name` sorts by name and id, and compares names by code point. PostgreSQL uses no
    index for the filters and the order `name`, and reads all accounts. The parameters `after`,
    `before`, `limit`, `count` and `load` are explained in `paginate`.

    Raises:
        InvalidCursor: `after` or `before` is malformed, or belongs to another list, order or set of
            filters.
        InvalidValue: a filter, `limit` or `load` is invalid.
    """
    return await paginate(
        session,
        ACCOUNTS,
        filters=filters,
        order_by=order_by,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@dataclass(frozen=True, slots=True)
class AccountCounts:
    """Numbers of accounts.

    Each dict maps every member of its enum to a number, which can be 0. `with_errors` is the number
    of accounts with an error count above 0. `expiring_tokens` is the number of accounts whose
    access token expires soon or has expired.
    """

    total: int
    by_status: dict[AccountStatus, int]
    by_type: dict[AccountType, int]
    by_environment: dict[TigerEnvironment, int]
    with_errors: int
    expiring_tokens: int


@public
async def counts(session: AsyncSession, *, within: timedelta = timedelta(hours=1)) -> AccountCounts:
    """Count the accounts, closed accounts included.

    `expiring_tokens` counts the access tokens that expire before now + `within`. The filters
    `with_errors` and `token_expires_within` of `list_accounts` select the counted accounts.
    """
    groups = [
        col(TigerAccount.status),
        col(TigerAccount.account_type),
        col(TigerAccount.environment),
    ]
    number, where = func.count(), ACCOUNTS.filters.where
    statement = select(
        *groups,
        number.label("total"),
        number.filter(*where({"with_errors": True})).label("with_errors"),
        number.filter(*where({"token_expires_within": within})).label("expiring_tokens"),
    ).group_by(*groups)
    rows = (await session.execute(statement)).all()
    return AccountCounts(
        total=sum(row.total for row in rows),
        by_status={
            status: sum(row.total for row in rows if row.status == status)
            for status in AccountStatus
        },
        by_type={
            account_type: sum(row.total for row in rows if row.account_type == account_type)
            for account_type in AccountType
        },
        by_environment={
            environment: sum(row.total for row in rows if row.environment == environment)
            for environment in TigerEnvironment
        },
        with_errors=sum(row.with_errors for row in rows),
        expiring_tokens=sum(row.expiring_tokens for row in rows),
    )


@public
async def get_default_trading_account(session: AsyncSession) -> TigerAccount | None:
    """Return the default account for trading, or None."""
    return await _get(session, col(TigerAccount.is_default_trading), ())


@public
async def get_default_data_account(session: AsyncSession) -> TigerAccount | None:
    """Return the default account for market data, or None."""
    return await _get(session, col(TigerAccount.is_default_data), ())


@public
async def get_accounts_needing_token_refresh(
    session: AsyncSession, *, within: timedelta = REFRESH_AHEAD, limit: int = 100
) -> list[TigerAccount]:
    """Return active accounts whose access token is due within the time `within`, soonest first.

    A token is due for a refresh at the account's `token_refresh_at`.
    """
    check_limit(limit)
    soonest = (col(TigerAccount.token_refresh_at), col(TigerAccount.id))
    statement = select(TigerAccount).where(due_tokens(within)).order_by(*soonest).limit(limit)
    return await fetch_all(session, statement)


async def _get(
    session: AsyncSession, criterion: ColumnElement[bool] | Mapped[bool], load: Sequence[str]
) -> TigerAccount | None:
    options = load_options(TigerAccount, load)
    statement = select(TigerAccount).where(criterion).options(*options)
    return await fetch_one(session, statement)


def _normal_first(text: str, normalize: Callable[[str], str]) -> list[str]:
    """Return the normalized form of a text, followed by the text itself.

    If `normalize` raises ValueError, return only the text itself. Callers search for the normalized
    form and for the text itself, because older releases stored texts that are not normalized.
    """
    try:
        return list(dict.fromkeys((normalize(text), text)))
    except ValueError:
        return [text]
