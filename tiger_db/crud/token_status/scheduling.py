"""Opening refreshes, and closing or reopening them by hand."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import FRESH, fetch_all, fetch_one, get_or_raise, savepoint, typed_errors
from tiger_db.crud.pagination import check_limit
from tiger_db.crud.token_status.changes import IS_OPEN, log, set_values
from tiger_db.errors import (
    InvalidState,
    InvalidValue,
    MissingReference,
    NotFound,
)
from tiger_db.models import (
    AccountStatus,
    AuditAction,
    RefreshTrigger,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.accounts import ACTIVE_WITH_TOKEN, due_tokens
from tiger_db.models.token_status import OPEN_STATUSES


async def create_refresh_operation(
    session: AsyncSession,
    *,
    tiger_account_id: UUID,
    trigger: RefreshTrigger,
    scheduled_at: datetime | None = None,
    max_retries: int = 3,
    details: dict[str, JsonValue] | None = None,
) -> TokenStatus:
    """Open a refresh of an account's token, or return the one that is open already.

    `scheduled_at` is an aware datetime; None: now.

    Raises:
        MissingReference: there is no such account.
        InvalidState: it is closed.
        ValidationError: a value is refused.
    """
    account = await _open_account(session, tiger_account_id)
    while True:
        opened = await _open(
            session,
            [_refresh_of(account, trigger, scheduled_at, max_retries=max_retries, details=details)],
        )
        if opened:
            await log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, opened[0])
            return opened[0]
        open_one = await fetch_one(
            session,
            select(TokenStatus).where(
                col(TokenStatus.tiger_account_id) == tiger_account_id, IS_OPEN
            ),
        )
        if open_one is not None:  # else it ended between the two statements
            return open_one


async def schedule_due(
    session: AsyncSession, *, within: timedelta | None = None, limit: int = 1000
) -> list[TokenStatus]:
    """Open a refresh for every active account whose token has expired or will before long.

    That is at its `token_refresh_at`, which follows from the token's own life, or, if `within` is
    given, so long before it expires. Any number of schedulers open only one each. An account whose
    refresh was given up is left alone until that one's `next_refresh_at`. Returns what this call
    opened.
    """
    check_limit(limit)
    given_up = (
        select(col(TokenStatus.id))
        .where(
            col(TokenStatus.tiger_account_id) == col(TigerAccount.id),
            col(TokenStatus.status) == TokenRefreshStatus.FAILED,
            col(TokenStatus.next_refresh_at) > func.now(),
        )
        .offset(0)  # so that it is looked up account by account, not in all failures there were
        .exists()
    )
    already_open = (
        select(col(TokenStatus.id))
        .where(col(TokenStatus.tiger_account_id) == col(TigerAccount.id), IS_OPEN)
        .exists()
    )
    due, at = due_tokens(within)
    due_accounts = (
        select(TigerAccount, col(TigerAccount.token_expires_at) <= func.now())
        .where(due, ~already_open, ~given_up)
        .order_by(at)
        .limit(limit)
        # None of them closes before this transaction ends; one that is busy is left for later.
        .with_for_update(key_share=True, skip_locked=True)
    )
    with typed_errors():
        rows = await session.execute(due_accounts, execution_options=FRESH)
    refreshes = [
        _refresh_of(account, RefreshTrigger.EXPIRED if expired else RefreshTrigger.SCHEDULED)
        for account, expired in rows
    ]
    opened = await _open(session, refreshes) if refreshes else []
    await log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, *opened)
    return opened


async def next_due(session: AsyncSession) -> timedelta | None:
    """How long until another refresh becomes due, a lease runs out, or a token's time comes.

    None: none of them will.
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
    expiring = (
        select(col(TigerAccount.token_refresh_at))
        .where(ACTIVE_WITH_TOKEN, col(TigerAccount.token_refresh_at) > func.clock_timestamp())
        .order_by(col(TigerAccount.token_refresh_at))
        .limit(1)
    )
    leased = select(func.min(col(TokenStatus.lease_expires_at))).where(
        IS_OPEN,
        col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
        col(TokenStatus.scheduled_at) <= func.clock_timestamp(),  # as the index has it
        col(TokenStatus.lease_expires_at) > func.clock_timestamp(),
    )
    first = func.least(
        pending.scalar_subquery(), leased.scalar_subquery(), expiring.scalar_subquery()
    )
    wait: timedelta | None = await session.scalar(select(first - func.clock_timestamp()))
    return wait


async def prune(session: AsyncSession, *, older_than: timedelta, limit: int = 10_000) -> int:
    """Delete refreshes that ended and were opened so long ago; returns how many, `limit` at most.

    Raises:
        InvalidValue: `older_than` is not positive.
    """
    if older_than <= timedelta(0):
        raise InvalidValue("older_than must be positive")
    old = (
        select(col(TokenStatus.id))
        .where(
            col(TokenStatus.id) < func.uuid7_floor(func.now() - older_than),
            col(TokenStatus.status).not_in(OPEN_STATUSES),
        )
        .order_by(col(TokenStatus.id))
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("old")  # which is run once; a subquery may be run again, and find others
    )
    gone = await session.scalars(
        delete(TokenStatus).where(col(TokenStatus.id) == old.c.id).returning(col(TokenStatus.id)),
        execution_options={"synchronize_session": False},
    )
    return len(gone.all())


async def cancel(session: AsyncSession, refresh_id: UUID) -> TokenStatus:
    """Cancel an open refresh; whoever has claimed it loses the claim.

    Raises:
        NotFound: there is no such refresh.
        InvalidState: it has ended.
    """
    refresh = await get_or_raise(session, TokenStatus, refresh_id, lock=True)
    if not refresh.is_open:
        raise InvalidState(f"a {refresh.status.value} refresh cannot be cancelled")
    await set_values(
        session,
        col(TokenStatus.id) == refresh_id,
        status=TokenRefreshStatus.CANCELLED,
        completed_at=func.clock_timestamp(),
        lease_expires_at=None,
    )
    await log(session, AuditAction.TOKEN_REFRESH_CANCEL, refresh)
    return refresh


async def retry(session: AsyncSession, refresh_id: UUID) -> TokenStatus:
    """Open a failed refresh again, due now and with all its attempts before it.

    Raises:
        NotFound: there is no such refresh.
        InvalidState: it has not failed, or its account is closed.
        AlreadyExists: another refresh of the account is open.
    """
    refresh = await get_or_raise(session, TokenStatus, refresh_id)
    await _open_account(session, refresh.tiger_account_id)
    refresh = await get_or_raise(session, TokenStatus, refresh_id, lock=True)
    if refresh.status != TokenRefreshStatus.FAILED:
        raise InvalidState(f"a {refresh.status.value} refresh cannot be tried again")
    async with savepoint(session):
        await set_values(
            session,
            col(TokenStatus.id) == refresh_id,
            status=TokenRefreshStatus.PENDING,
            scheduled_at=func.clock_timestamp(),
            completed_at=None,
            retry_count=0,
        )
    await log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, refresh)
    return refresh


async def _open_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """An account that is not closed, and is not before this transaction ends."""
    try:
        account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    except NotFound as error:
        raise MissingReference(str(error)) from None
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")
    return account


def _refresh_of(
    account: TigerAccount,
    trigger: RefreshTrigger,
    scheduled_at: datetime | None = None,
    *,
    max_retries: int = 3,
    details: dict[str, JsonValue] | None = None,
) -> TokenStatus:
    return TokenStatus(
        tiger_account_id=account.id,
        trigger=trigger,
        scheduled_at=scheduled_at,
        max_retries=max_retries,
        details=details,
        old_token_expires_at=account.token_expires_at,
        environment=account.environment,
    )


async def _open(session: AsyncSession, refreshes: Sequence[TokenStatus]) -> list[TokenStatus]:
    """Insert the refreshes of those accounts that have none open."""
    rows = [
        {name: value for name, value in refresh.model_dump().items() if value is not None}
        for refresh in refreshes
    ]
    return await fetch_all(
        session,
        insert(TokenStatus)
        .values(rows)
        .on_conflict_do_nothing(
            index_elements=["tiger_account_id"],
            index_where=text("status IN ('pending', 'in_progress')"),
        )
        .returning(TokenStatus),
    )
