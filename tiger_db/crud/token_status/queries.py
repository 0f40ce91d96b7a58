"""Functions that look up, list and count token refreshes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.elements import SQLCoreOperations
from sqlmodel import col

from tiger_db.crud.common import fetch_all, fetch_one, require_aware
from tiger_db.crud.filters import Filters, OneOrMore, has_text, one_of
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, EntityList, Page, check_limit, paginate
from tiger_db.models import RefreshTrigger, TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.models.token_status import OPEN_STATUSES
from tiger_db.public import public

# IS_OPEN and _IS_FAILED equal the predicates of partial indexes, so PostgreSQL uses the indexes.
IS_OPEN = text("token_statuses.status IN ('pending', 'in_progress')")
_IS_FAILED = text("token_statuses.status = 'failed'")


@dataclass(frozen=True, slots=True)
class RefreshStatistics:
    """Counts and durations of token refreshes."""

    total: int
    succeeded: int
    failed: int
    open: int
    success_rate: float | None  # succeeded / (succeeded + failed), or None if both numbers are 0
    p50_ms: float | None
    p95_ms: float | None
    by_trigger: dict[str, int]
    by_error: dict[str, int]


@public
async def get(session: AsyncSession, refresh_id: UUID) -> TokenStatus | None:
    """Return the refresh with the given id, or None."""
    return await newest(session, col(TokenStatus.id) == refresh_id)


@public
async def get_latest_status(session: AsyncSession, account_id: UUID) -> TokenStatus | None:
    """Return the newest refresh of an account, or None."""
    return await newest(session, col(TokenStatus.tiger_account_id) == account_id)


class RefreshFilters(TypedDict, total=False):
    """The filters of a list of token refreshes.

    A filter with several values selects the refreshes that have one or more of the values. A filter
    with the value None selects all refreshes. A filter with an empty collection selects no refresh.

    `since` and `until` are aware datetimes, and select the refreshes that were opened from `since`
    (inclusive) to `until` (exclusive). `search` is a text in the name or the number of the account,
    regardless of case.
    """

    account_id: OneOrMore[UUID] | None
    status: OneOrMore[TokenRefreshStatus] | None
    trigger: OneOrMore[RefreshTrigger] | None
    since: datetime | None
    until: datetime | None
    search: str | None


_of_account = has_text(col(TigerAccount.account_name), col(TigerAccount.account_number))
_FILTERS = Filters.of(
    RefreshFilters,
    {
        "account_id": one_of(col(TokenStatus.tiger_account_id)),
        "status": one_of(col(TokenStatus.status)),
        "trigger": one_of(col(TokenStatus.trigger)),
        "since": lambda at: col(TokenStatus.id) >= func.uuid7_floor(at),
        "until": lambda at: col(TokenStatus.id) < func.uuid7_floor(at),
        "search": lambda text: col(TokenStatus.tiger_account_id).in_(
            select(col(TigerAccount.id)).where(_of_account(text))
        ),
    },
)
_ORDERS = {"schedule": "scheduled_at"}
REFRESHES = EntityList("token_statuses", TokenStatus, _FILTERS, _ORDERS)
PENDING_REFRESHES = EntityList("pending_refreshes", TokenStatus, _FILTERS, _ORDERS)
FAILED_REFRESHES = EntityList("failed_refreshes", TokenStatus, _FILTERS, _ORDERS)


@public
async def get_pending_refreshes(
    session: AsyncSession,
    *,
    order_by: Literal["newest", "schedule"] = "newest",
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
    **filters: Unpack[RefreshFilters],
) -> Page[TokenStatus]:
    """Return a page of the pending refreshes that match all filters, by default newest first.

    The order `schedule` sorts by `scheduled_at`, earliest first. The parameters `after`, `before`,
    `limit`, `count` and `load` are explained in `paginate`.

    Raises:
        InvalidCursor: `after` or `before` is malformed, or belongs to another list, order or set of
            filters.
        InvalidValue: a filter, `limit` or `load` is invalid.
    """
    return await paginate(
        session,
        PENDING_REFRESHES,
        IS_OPEN,
        col(TokenStatus.status) == TokenRefreshStatus.PENDING,
        filters=filters,
        order_by=order_by,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def get_failed_refreshes(
    session: AsyncSession,
    *,
    order_by: Literal["newest", "schedule"] = "newest",
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
    **filters: Unpack[RefreshFilters],
) -> Page[TokenStatus]:
    """Return a page of the refreshes with the status `failed`, by default newest first.

    The order `schedule` sorts by `scheduled_at`, earliest first. The parameters `after`, `before`,
    `limit`, `count` and `load` are explained in `paginate`.

    Raises:
        InvalidCursor: `after` or `before` is malformed, or belongs to another list, order or set of
            filters.
        InvalidValue: a filter, `limit` or `load` is invalid.
    """
    return await paginate(
        session,
        FAILED_REFRESHES,
        _IS_FAILED,
        filters=filters,
        order_by=order_by,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def history(
    session: AsyncSession,
    *,
    order_by: Literal["newest", "schedule"] = "newest",
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
    **filters: Unpack[RefreshFilters],
) -> Page[TokenStatus]:
    """Return a page of the refreshes that match all filters, by default newest first.

    The order `schedule` sorts by `scheduled_at`, earliest first. The parameters `after`, `before`,
    `limit`, `count` and `load` are explained in `paginate`.

    Raises:
        InvalidCursor: `after` or `before` is malformed, or belongs to another list, order or set of
            filters.
        InvalidValue: a filter, `limit` or `load` is invalid.
    """
    return await paginate(
        session,
        REFRESHES,
        filters=filters,
        order_by=order_by,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def overview(
    session: AsyncSession, *, since: datetime, limit: int = DEFAULT_PAGE_SIZE
) -> dict[str, list[TokenStatus]]:
    """Return the lists `running`, `due`, `waiting` and `failed` of refreshes.

    A running refresh is in progress. A due refresh is pending, and its `scheduled_at` has passed. A
    waiting refresh is pending, and its `scheduled_at` is in the future. The lists of running, due
    and waiting refreshes are ordered by `scheduled_at`. The list `failed` contains refreshes that
    were opened after the aware datetime `since`, newest refresh first. Each list has at most
    `limit` items.

    Raises:
        InvalidValue: `since` is a naive datetime, or `limit` is not from 1 to 1000.
    """
    check_limit(limit)
    pending = col(TokenStatus.status) == TokenRefreshStatus.PENDING
    at = col(TokenStatus.scheduled_at)
    groups: dict[str, tuple[ColumnElement[bool], ColumnElement[Any]]] = {
        "running": (
            and_(IS_OPEN, col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS),
            at.asc(),
        ),
        "due": (and_(IS_OPEN, pending, at <= func.clock_timestamp()), at.asc()),
        "waiting": (and_(IS_OPEN, pending, at > func.clock_timestamp()), at.asc()),
        "failed": (
            and_(
                _IS_FAILED, col(TokenStatus.id) >= func.uuid7_floor(require_aware("since", since))
            ),
            col(TokenStatus.id).desc(),
        ),
    }
    return {
        name: await fetch_all(
            session,
            select(TokenStatus).where(criterion).order_by(order, col(TokenStatus.id)).limit(limit),
        )
        for name, (criterion, order) in groups.items()
    }


@public
async def statistics(session: AsyncSession, *, since: datetime) -> RefreshStatistics:
    """Return statistics of the refreshes that were opened after the aware datetime `since`.

    Raises:
        InvalidValue: `since` is a naive datetime.
    """
    recent = col(TokenStatus.id) >= func.uuid7_floor(require_aware("since", since))
    succeeded = col(TokenStatus.status) == TokenRefreshStatus.SUCCESS
    failed = col(TokenStatus.status) == TokenRefreshStatus.FAILED
    duration = col(TokenStatus.duration_ms)
    totals = (
        await session.execute(
            select(
                func.count(),
                func.count().filter(succeeded),
                func.count().filter(failed),
                func.count().filter(col(TokenStatus.status).in_(OPEN_STATUSES)),
                func.percentile_cont(0.5).within_group(duration).filter(succeeded),
                func.percentile_cont(0.95).within_group(duration).filter(succeeded),
            ).where(recent)
        )
    ).one()
    total, ok, bad, still_open, p50, p95 = totals
    return RefreshStatistics(
        total=total,
        succeeded=ok,
        failed=bad,
        open=still_open,
        success_rate=ok / (ok + bad) if ok + bad else None,
        p50_ms=p50,
        p95_ms=p95,
        by_trigger=await _counts(session, col(TokenStatus.trigger), recent),
        by_error=await _counts(
            session, func.coalesce(col(TokenStatus.error_code), "unknown"), and_(recent, failed)
        ),
    )


async def newest(session: AsyncSession, criterion: ColumnElement[bool]) -> TokenStatus | None:
    """Return the newest refresh that meets the criterion, or None."""
    return await fetch_one(
        session, select(TokenStatus).where(criterion).order_by(col(TokenStatus.id).desc()).limit(1)
    )


async def _counts(
    session: AsyncSession, by: SQLCoreOperations[Any], criterion: ColumnElement[bool]
) -> dict[str, int]:
    rows = await session.execute(select(by, func.count()).where(criterion).group_by(by))
    return {str(name): count for name, count in rows}
