"""Routing: functions that choose the accounts for a request, and explain the choice."""

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, inspect, not_, or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased
from sqlmodel import col

from tiger_db.crud.common import fetch_all, refuse_readonly
from tiger_db.crud.filters import OneOrMore, as_list
from tiger_db.crud.pagination import check_limit
from tiger_db.models import (
    AccountStatus,
    AccountType,
    APIKey,
    MarketPermission,
    TigerAccount,
    TigerEnvironment,
)
from tiger_db.models.accounts import LICENSES_WITH_TOKEN
from tiger_db.public import public


class RoutingReason(StrEnum):
    """A reason why an account is not chosen for a request."""

    NOT_ACTIVE = "not_active"
    NO_VALID_TOKEN = "no_valid_token"  # noqa: S105  # a reason
    FAILING = "failing"
    OTHER_ENVIRONMENT = "other_environment"
    MISSING_PERMISSION = "missing_permission"
    OTHER_TYPE = "other_type"
    PAPER_OR_REAL = "paper_or_real"
    EXCLUDED = "excluded"
    NOT_ALLOWED = "not_allowed"


@public
async def find_for_operation(
    session: AsyncSession,
    *,
    permission: OneOrMore[MarketPermission] | None = None,
    trading: bool = False,
    account_type: AccountType | None = None,
    environment: OneOrMore[TigerEnvironment] | None = TigerEnvironment.PROD,
    exclude: Collection[UUID] = (),
    allowed_for: APIKey | None = None,
    limit: int = 10,
) -> list[TigerAccount]:
    """Return the accounts that can serve a request now, best account first.

    Each returned account is active and not failing (`is_failing`). An account whose license
    requires an access token is returned only if the account has a valid token. The next
    arguments are further conditions for the returned accounts:

    - `permission`: only accounts that have all given market permissions are returned.
    - `account_type`: only accounts of the given type are returned.
    - `environment`: only accounts of the given environments are returned. None means any.
    - `exclude`: ids of accounts to omit, such as the accounts that have already been tried.
    - `allowed_for`: the given API key can access the account. The function does not authorize the
      key.

    If `trading` is true and `account_type` is None, the list contains either only paper accounts or
    only real accounts. Paper accounts are returned if the default account for trading is a paper
    account.

    The list begins with the default account, for trading or for data, if this account can serve the
    request. All other accounts are sorted by error count, then by age, oldest account first.

    Raises:
        InvalidState: the session is readonly.
        InvalidValue: `limit` is not from 1 to 1000.
    """
    refuse_readonly(session)
    check_limit(limit)
    reasons = _reasons(
        permission=permission,
        trading=trading,
        account_type=account_type,
        environment=environment,
        exclude=exclude,
        allowed_for=allowed_for,
    )
    # A condition that is NULL excludes no account, as in `explain_for_operation`.
    eligible = (condition.is_not(true()) for condition in reasons.values())
    statement = (
        select(TigerAccount).where(*eligible).order_by(*_sort_keys(trading=trading)).limit(limit)
    )
    return await fetch_all(session, statement)


@public
async def explain_for_operation(
    session: AsyncSession,
    *,
    permission: OneOrMore[MarketPermission] | None = None,
    trading: bool = False,
    account_type: AccountType | None = None,
    environment: OneOrMore[TigerEnvironment] | None = TigerEnvironment.PROD,
    exclude: Collection[UUID] = (),
    allowed_for: APIKey | None = None,
) -> dict[UUID, list[RoutingReason]]:
    """Return, for the id of each account, the reasons why the account cannot serve a request.

    With the same arguments, `find_for_operation` returns only accounts for which
    `explain_for_operation` returns an empty list of reasons. The ids are in the order in which
    `find_for_operation` returns accounts.
    """
    reasons = _reasons(
        permission=permission,
        trading=trading,
        account_type=account_type,
        environment=environment,
        exclude=exclude,
        allowed_for=allowed_for,
    )
    statement = select(col(TigerAccount.id), *reasons.values()).order_by(
        *_sort_keys(trading=trading)
    )
    return {
        account_id: [reason for reason, applies in zip(reasons, applied, strict=True) if applies]
        for account_id, *applied in await session.execute(statement)
    }


def _reasons(
    *,
    permission: OneOrMore[MarketPermission] | None,
    trading: bool,
    account_type: AccountType | None,
    environment: OneOrMore[TigerEnvironment] | None,
    exclude: Collection[UUID],
    allowed_for: APIKey | None,
) -> Mapping[RoutingReason, ColumnElement[bool]]:
    """Return the reasons for which an account can be omitted, each with its SQL condition."""
    has_valid_token = and_(
        col(TigerAccount.access_token).is_not(None),
        or_(
            col(TigerAccount.token_expires_at).is_(None),
            col(TigerAccount.token_expires_at) > func.now(),
        ),
    )
    reasons: dict[RoutingReason, ColumnElement[bool]] = {
        RoutingReason.NOT_ACTIVE: col(TigerAccount.status) != AccountStatus.ACTIVE,
        RoutingReason.NO_VALID_TOKEN: and_(
            col(TigerAccount.license).in_(LICENSES_WITH_TOKEN), not_(has_valid_token)
        ),
        RoutingReason.FAILING: col(TigerAccount.failing_until) > func.now(),
    }
    if environment is not None:
        reasons[RoutingReason.OTHER_ENVIRONMENT] = col(TigerAccount.environment).not_in(
            as_list(environment)
        )
    if permission is not None:
        reasons[RoutingReason.MISSING_PERMISSION] = not_(
            col(TigerAccount.market_permissions).contains(as_list(permission))
        )
    if account_type is not None:
        reasons[RoutingReason.OTHER_TYPE] = col(TigerAccount.account_type) != account_type
    elif trading:
        default = aliased(TigerAccount)
        trades_on_paper = (
            select(col(default.account_type) == AccountType.PAPER)
            .where(col(default.is_default_trading))
            .scalar_subquery()
        )
        reasons[RoutingReason.PAPER_OR_REAL] = (
            col(TigerAccount.account_type) == AccountType.PAPER
        ) != func.coalesce(trades_on_paper, False)
    if exclude:
        reasons[RoutingReason.EXCLUDED] = col(TigerAccount.id).in_(as_list(exclude))
    if allowed_for is not None and allowed_for.tiger_account_id is not None:
        reasons[RoutingReason.NOT_ALLOWED] = col(TigerAccount.id) != allowed_for.tiger_account_id
    return reasons


def _sort_keys(*, trading: bool) -> list[ColumnElement[Any]]:
    """Return the sort keys of accounts: default account first, then error count, then age."""
    columns = inspect(TigerAccount).columns
    is_default = columns.is_default_trading if trading else columns.is_default_data
    return [is_default.desc(), columns.error_count, columns.id]
