"""Functions that open, cancel, retry and prune token refreshes."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import and_, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import instance_state
from sqlmodel import col

from tiger_db.crud.audit_logs import recording
from tiger_db.crud.common import FRESH, fetch_all, fetch_one, get_or_raise, savepoint, typed_errors
from tiger_db.crud.pagination import check_limit
from tiger_db.crud.token_status.outcomes import update_refresh
from tiger_db.crud.token_status.queries import IS_OPEN
from tiger_db.errors import InvalidState, InvalidValue, MissingReference, NotFound
from tiger_db.models import (
    AccountStatus,
    AuditAction,
    RefreshTrigger,
    TigerAccount,
    TigerEnvironment,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.accounts import ACTIVE_WITH_TOKEN, due_tokens
from tiger_db.models.token_status import FOUND, OPEN_STATUSES
from tiger_db.public import public

_ENVIRONMENTS = frozenset(TigerEnvironment)


@public
async def create_refresh_operation(
    session: AsyncSession,
    *,
    tiger_account_id: UUID,
    trigger: RefreshTrigger,
    scheduled_at: datetime | None = None,
    max_retries: int = 3,
    details: dict[str, JsonValue] | None = None,
) -> TokenStatus:
    """Open a refresh of an account's token, or return the refresh that is open already.

    A new refresh is due at the aware datetime `scheduled_at`, or now if `scheduled_at` is None. A
    refresh that is open already is not changed. `found` of the returned TokenStatus is true if the
    refresh was open already. `refresh_now` also makes an open refresh due.

    Raises:
        MissingReference: no account has the id `tiger_account_id`.
        InvalidState: the account is closed.
        InvalidFields: `scheduled_at`, `max_retries` or `details` is invalid.
    """
    try:
        account = await _lock_account(session, tiger_account_id)
    except NotFound as error:
        raise MissingReference(str(error)) from None
    return await _open_or_find(
        session,
        account,
        trigger,
        scheduled_at=scheduled_at,
        max_retries=max_retries,
        details=details,
    )


@public
async def refresh_now(session: AsyncSession, account_id: UUID) -> TokenStatus:
    """Make the open refresh of an account due now, or open a refresh that is due now.

    A pending refresh is brought forward, even if it is planned for a later time or waits after a
    failed attempt. A refresh in progress is returned unchanged. A new refresh has the trigger
    `manual`. `found` of the returned TokenStatus is true if the refresh was open already. Workers
    are notified at the commit. Workers claim the refresh only while the account is active.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is closed.
    """
    account = await _lock_account(session, account_id)
    refresh = await _open_or_find(session, account, RefreshTrigger.MANUAL, lock=True)
    planned, now = refresh.scheduled_at, func.clock_timestamp()
    is_later = and_(
        col(TokenStatus.id) == refresh.id,
        col(TokenStatus.scheduled_at) > now,
        or_(
            col(TokenStatus.status) == TokenRefreshStatus.PENDING,
            col(TokenStatus.lease_expires_at) < now,
        ),
    )
    if refresh.found and await update_refresh(session, is_later, scheduled_at=now) is not None:
        event = recording.refresh_event(
            refresh,
            action=AuditAction.TOKEN_REFRESH_SCHEDULE,
            old_values={"scheduled_at": planned},
            new_values={"scheduled_at": refresh.scheduled_at},
        )
        await recording.insert_event(session, event)
    return refresh


@public
async def schedule_due(
    session: AsyncSession, *, within: timedelta = timedelta(0), limit: int = 1000
) -> list[TokenStatus]:
    """Open a refresh for every active account whose token is due, and return the new refreshes.

    A token is due from the account's `token_refresh_at` on. `within` looks ahead: a token that
    becomes due within this time is refreshed too. Parallel calls of `schedule_due` open at most one
    refresh per account. An account whose last refresh failed is skipped until the time
    `next_refresh_at` of the failed refresh.
    """
    check_limit(limit)
    of_account = select(col(TokenStatus.id)).where(
        col(TokenStatus.tiger_account_id) == col(TigerAccount.id)
    )
    given_up = (
        of_account.where(
            col(TokenStatus.status) == TokenRefreshStatus.FAILED,
            col(TokenStatus.next_refresh_at) > func.now(),
        )
        .offset(0)  # OFFSET 0 makes PostgreSQL look up each account in an index
        .exists()
    )
    statement = (
        select(TigerAccount, col(TigerAccount.token_expires_at) <= func.now())
        .where(due_tokens(within), ~of_account.where(IS_OPEN).exists(), ~given_up)
        .order_by(col(TigerAccount.token_refresh_at))
        .limit(limit)
        # While the transaction holds the row lock of an account, the account cannot be closed.
        # Accounts that are locked by other transactions are skipped.
        .with_for_update(key_share=True, skip_locked=True)
    )
    with typed_errors():
        rows = await session.execute(statement, execution_options=FRESH)
    due_accounts = [
        (account, RefreshTrigger.EXPIRED if expired else RefreshTrigger.SCHEDULED)
        for account, expired in rows
    ]
    return await _open(session, due_accounts)


@public
async def next_due(session: AsyncSession) -> timedelta | None:
    """Return the time until the next refresh or token becomes due, or the next lease expires.

    Return None if no refresh or token becomes due in the future, and no lease expires.
    """
    pending = (
        select(col(TokenStatus.scheduled_at))
        .where(
            IS_OPEN,
            col(TokenStatus.status) == TokenRefreshStatus.PENDING,
            col(TokenStatus.scheduled_at) > func.clock_timestamp(),
        )
        .order_by(col(TokenStatus.scheduled_at))
        .limit(1)
    )
    token = (
        select(col(TigerAccount.token_refresh_at))
        # The tokens that `due_tokens` does not select.
        .where(ACTIVE_WITH_TOKEN, col(TigerAccount.token_refresh_at) > func.now())
        .order_by(col(TigerAccount.token_refresh_at))
        .limit(1)
    )
    lease = select(func.min(col(TokenStatus.lease_expires_at))).where(
        IS_OPEN,
        col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
        # The condition on scheduled_at lets PostgreSQL use the index ix_token_statuses_due.
        col(TokenStatus.scheduled_at) <= func.clock_timestamp(),
        col(TokenStatus.lease_expires_at) > func.clock_timestamp(),
    )
    first = func.least(*(times.scalar_subquery() for times in (pending, lease, token)))
    wait: timedelta | None = await session.scalar(select(first - func.clock_timestamp()))
    return None if wait is None else max(wait, timedelta(0))


@public
async def prune(session: AsyncSession, *, older_than: timedelta, limit: int = 10_000) -> int:
    """Delete ended refreshes that are older than `older_than`. Return the number of deleted rows.

    Raises:
        InvalidValue: `older_than` or `limit` is not positive.
    """
    if older_than <= timedelta(0) or limit < 1:
        raise InvalidValue("older_than and limit must be positive")
    old = (
        select(col(TokenStatus.id))
        .where(
            col(TokenStatus.id) < func.uuid7_floor(func.now() - older_than),
            col(TokenStatus.status).not_in(OPEN_STATUSES),
        )
        .order_by(col(TokenStatus.id))
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("old")  # a CTE runs only once, but a subquery could run again and exceed `limit`
    )
    deleted = await session.scalars(
        delete(TokenStatus).where(col(TokenStatus.id) == old.c.id).returning(col(TokenStatus.id)),
        execution_options={"synchronize_session": False},
    )
    return len(deleted.all())


@public
async def cancel(session: AsyncSession, refresh_id: UUID) -> TokenStatus:
    """Cancel an open refresh. A worker that has claimed the refresh loses the claim.

    Raises:
        NotFound: no refresh has the id `refresh_id`.
        InvalidState: the refresh has ended.
    """
    refresh = await get_or_raise(session, TokenStatus, refresh_id, lock=True)
    if not refresh.is_open:
        raise InvalidState(f"a refresh with status {refresh.status} cannot be cancelled")
    await update_refresh(
        session,
        col(TokenStatus.id) == refresh_id,
        status=TokenRefreshStatus.CANCELLED,
        completed_at=func.clock_timestamp(),
        lease_expires_at=None,
    )
    await _log(session, AuditAction.TOKEN_REFRESH_CANCEL, refresh)
    return refresh


@public
async def retry(session: AsyncSession, refresh_id: UUID) -> TokenStatus:
    """Open a failed refresh again, and make it due now.

    The count of failed attempts of the refresh starts again at 0.

    Raises:
        NotFound: no refresh has the id `refresh_id`.
        InvalidState: the refresh has not failed, or the account is closed.
        AlreadyExists: the account has another open refresh.
    """
    refresh = await get_or_raise(session, TokenStatus, refresh_id)
    await _lock_account(session, refresh.tiger_account_id)
    refresh = await get_or_raise(session, TokenStatus, refresh_id, lock=True)
    if refresh.status != TokenRefreshStatus.FAILED:
        raise InvalidState(f"a refresh with status {refresh.status} cannot be tried again")
    async with savepoint(session):
        await update_refresh(
            session,
            col(TokenStatus.id) == refresh_id,
            status=TokenRefreshStatus.PENDING,
            scheduled_at=func.clock_timestamp(),
            completed_at=None,
            retry_count=0,
        )
    await _log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, refresh)
    return refresh


async def _lock_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Lock the row of an open account, so that the account stays open during the transaction.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is closed.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")
    return account


async def _open_or_find(
    session: AsyncSession,
    account: TigerAccount,
    trigger: RefreshTrigger,
    *,
    lock: bool = False,
    **values: Any,  # noqa: ANN401  # fields of TokenStatus
) -> TokenStatus:
    """Open a refresh of an account, or return the refresh that is open already.

    If `lock` is true, the row of a refresh that is open already is locked.
    """
    open_refresh = select(TokenStatus).where(
        col(TokenStatus.tiger_account_id) == account.id, IS_OPEN
    )
    if lock:
        open_refresh = open_refresh.with_for_update(key_share=True)
    while True:
        opened = await _open(session, [(account, trigger)], **values)
        refresh = opened[0] if opened else await fetch_one(session, open_refresh)
        # If no row is found, the open refresh has ended since the INSERT: insert again.
        if refresh is not None:
            instance_state(refresh).info[FOUND] = not opened
            return refresh


async def _open(
    session: AsyncSession,
    accounts: Iterable[tuple[TigerAccount, RefreshTrigger]],
    **values: Any,  # noqa: ANN401  # fields of TokenStatus
) -> list[TokenStatus]:
    """Open a refresh for each account without an open refresh, and record audit events."""
    refreshes = [
        TokenStatus(
            tiger_account_id=account.id,
            trigger=trigger,
            old_token_expires_at=account.token_expires_at,
            # A label that a newer release has added to the enum is read as a text.
            environment=account.environment if account.environment in _ENVIRONMENTS else None,
            **values,
        )
        for account, trigger in accounts
    ]
    if not refreshes:
        return []
    rows = [refresh.model_dump() for refresh in refreshes]
    # Omit the columns that are None in all rows, so that PostgreSQL sets the columns' defaults.
    names = {name for row in rows for name, value in row.items() if value is not None}
    rows = [{name: row[name] for name in names} for row in rows]
    inserted = await fetch_all(
        session,
        insert(TokenStatus)
        .values(rows)
        .on_conflict_do_nothing(index_elements=["tiger_account_id"], index_where=IS_OPEN)
        .returning(TokenStatus),
    )
    await _log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, *inserted)
    return inserted


async def _log(session: AsyncSession, action: AuditAction, *refreshes: TokenStatus) -> None:
    events = [
        recording.refresh_event(refresh, action=action, duration_ms=refresh.duration_ms)
        for refresh in refreshes
    ]
    await recording.log_events(session, events)
