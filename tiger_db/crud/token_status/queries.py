"""Functions that look up, list and count token refreshes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement, Float, and_, case, func, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import fetch_all, fetch_one, require_aware, typed_errors
from tiger_db.crud.filters import Filters, OneOrMore, has_text, one_of
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, EntityList, Page, check_limit, paginate
from tiger_db.errors import InvalidValue
from tiger_db.models import RefreshTrigger, TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.models.token_status import OPEN_STATUSES
from tiger_db.public import public

# IS_OPEN and _IS_FAILED equal the predicates of partial indexes, so PostgreSQL uses the indexes.
IS_OPEN = text("token_statuses.status IN ('pending', 'in_progress')")
_IS_FAILED = text("token_statuses.status = 'failed'")
# Values of GROUPING(trigger, error), which has one bit per column. The bit of a column is 0 if the
# row is grouped by the column.
_OF_ALL, _BY_TRIGGER, _BY_ERROR = 0b11, 0b01, 0b10


@dataclass(frozen=True, slots=True)
class RefreshStatistics:
    """Counts and durations of token refreshes. Durations are of the last attempt, in ms."""

    total: int  # number of refreshes of every status
    succeeded: int
    failed: int  # number of refreshes that were given up
    open: int  # number of refreshes that are pending or in progress
    success_rate: float | None  # succeeded / (succeeded + failed), or None if both numbers are 0
    mean_ms: float | None  # mean duration of the succeeded refreshes, or None if none succeeded
    median_ms: float | None  # median duration of the succeeded refreshes, or None if none succeeded
    p95_ms: float | None  # interpolated 95th percentile of the durations, or None if none succeeded
    by_trigger: dict[str, int]  # number of refreshes of each trigger
    by_error: dict[str, int]  # number of failed refreshes of each error code, or of "unknown"


@public
async def get(session: AsyncSession, refresh_id: UUID) -> TokenStatus | None:
    """Return the refresh with the given id, or None."""
    return await newest(session, col(TokenStatus.id) == refresh_id)


@public
async def get_latest_status(session: AsyncSession, account_id: UUID) -> TokenStatus | None:
    """Return the newest refresh of an account, or None."""
    return await newest(session, col(TokenStatus.tiger_account_id) == account_id)


class _Filters(TypedDict, total=False):
    account_id: OneOrMore[UUID] | None
    trigger: OneOrMore[RefreshTrigger] | None
    since: datetime | None
    until: datetime | None
    search: str | None


class RefreshFilters(_Filters, total=False):
    """The filters of a list of token refreshes.

    A filter with several values selects the refreshes that have one or more of the values. A filter
    with the value None selects all refreshes. A filter with an empty collection selects no refresh.

    `since` and `until` are aware datetimes, and select the refreshes that were opened from `since`
    (inclusive) to `until` (exclusive). `search` is a text in the name or the number of the account,
    regardless of case.
    """

    status: OneOrMore[TokenRefreshStatus] | None


class RefreshQuery(_Filters, total=False):
    """The parameters of `history` without `status`: the other filters, order, page and `load`."""

    order_by: Literal["newest", "schedule"]
    after: str | None
    before: str | None
    limit: int
    count: bool
    load: Sequence[str]


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
REFRESHES = EntityList("token_statuses", TokenStatus, _FILTERS, {"schedule": "scheduled_at"})


@public
async def get_pending_refreshes(
    session: AsyncSession, **query: Unpack[RefreshQuery]
) -> Page[TokenStatus]:
    """Return a page of the pending refreshes, as `history` does for the status `pending`."""
    return await _with_status(session, TokenRefreshStatus.PENDING, query)


@public
async def get_failed_refreshes(
    session: AsyncSession, **query: Unpack[RefreshQuery]
) -> Page[TokenStatus]:
    """Return a page of the given up refreshes, as `history` does for the status `failed`."""
    return await _with_status(session, TokenRefreshStatus.FAILED, query)


async def _with_status(
    session: AsyncSession, status: TokenRefreshStatus, query: RefreshQuery
) -> Page[TokenStatus]:
    if "status" in query:
        raise InvalidValue("unknown filters: status")
    return await history(session, status=status, **query)


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

    The list `running` contains refreshes in progress. The list `due` contains pending refreshes
    whose `scheduled_at` has passed. The list `waiting` contains pending refreshes whose
    `scheduled_at` is in the future. The lists `running`, `due` and `waiting` are ordered by
    `scheduled_at`. The list `failed` contains failed refreshes that were opened after the aware
    datetime `since`, newest refresh first. Each list has at most `limit` items.

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
async def statistics(
    session: AsyncSession, *, since: datetime, account_id: UUID | None = None
) -> RefreshStatistics:
    """Return statistics of the refreshes that were opened after the aware datetime `since`.

    The statistics are of all accounts, or of the account with the id `account_id`.

    Raises:
        InvalidValue: `since` is a naive datetime.
    """
    succeeded = col(TokenStatus.status) == TokenRefreshStatus.SUCCESS
    failed = col(TokenStatus.status) == TokenRefreshStatus.FAILED
    duration = col(TokenStatus.duration_ms)
    trigger = col(TokenStatus.trigger)
    error = case((failed, func.coalesce(col(TokenStatus.error_code), "unknown")))
    statement = (
        select(
            func.grouping(trigger, error).label("grouping"),
            trigger.label("trigger"),
            error.label("error"),
            func.count().label("total"),
            func.count().filter(succeeded).label("succeeded"),
            func.count().filter(failed).label("failed"),
            func.count().filter(col(TokenStatus.status).in_(OPEN_STATUSES)).label("open"),
            func.avg(duration).filter(succeeded).cast(Float).label("mean"),
            *(
                func.percentile_cont(share).within_group(duration).filter(succeeded).label(name)
                for name, share in (("median", 0.5), ("p95", 0.95))
            ),
        )
        .where(*_FILTERS.where({"since": since, "account_id": account_id}))
        .group_by(func.grouping_sets(tuple_(), tuple_(trigger), tuple_(error)))
    )
    with typed_errors():
        rows = (await session.execute(statement)).all()
    (total,) = (row for row in rows if row.grouping == _OF_ALL)
    ended = total.succeeded + total.failed
    return RefreshStatistics(
        total=total.total,
        succeeded=total.succeeded,
        failed=total.failed,
        open=total.open,
        success_rate=total.succeeded / ended if ended else None,
        mean_ms=total.mean,
        median_ms=total.median,
        p95_ms=total.p95,
        by_trigger={str(row.trigger): row.total for row in rows if row.grouping == _BY_TRIGGER},
        by_error={row.error: row.total for row in rows if row.grouping == _BY_ERROR and row.error},
    )


async def newest(session: AsyncSession, criterion: ColumnElement[bool]) -> TokenStatus | None:
    """Return the newest refresh that meets the criterion, or None."""
    return await fetch_one(
        session, select(TokenStatus).where(criterion).order_by(col(TokenStatus.id).desc()).limit(1)
    )
