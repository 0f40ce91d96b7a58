"""Token refreshes: scheduling them, claiming them, and recording how they ended.

A claim is a `TokenStatus` as `claim_due` returned it. It is good until its lease expires and
someone else claims the refresh: the fencing token then no longer matches, and nothing can be done
with it any more. All times are the database's.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import BigInteger, ColumnElement, and_, cast, func, or_, select, text
from sqlalchemy import update as sql_update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.elements import SQLCoreOperations
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.common import (
    FRESH,
    Page,
    aware,
    check_limit,
    constraints,
    get_or_raise,
    many,
    one,
    paginate,
    storable,
    typed_errors,
)
from tiger_db.encryption import Secret
from tiger_db.errors import (
    EncryptionError,
    InvalidState,
    InvalidValue,
    LeaseLost,
    MissingReference,
    NotFound,
)
from tiger_db.models import (
    AccountStatus,
    AuditAction,
    AuditResult,
    RefreshTrigger,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.accounts import REFRESH_AHEAD
from tiger_db.models.token_status import OPEN

_IS_OPEN = text(
    "token_statuses.status IN ('pending', 'in_progress')"
)  # as the partial indexes have it
# Exponential backoff with full jitter, from this long to that:
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
BACKOFF = timedelta(seconds=30)
LONGEST_BACKOFF = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class RefreshStatistics:
    """How refreshes went; `success_rate` is of those that ended, None where none did."""

    total: int
    succeeded: int
    failed: int
    open: int
    success_rate: float | None
    p50_ms: float | None
    p95_ms: float | None
    by_trigger: dict[str, int]
    by_error: dict[str, int]


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
            await _log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, opened[0])
            return opened[0]
        open_one = await one(
            session,
            select(TokenStatus).where(
                col(TokenStatus.tiger_account_id) == tiger_account_id, _IS_OPEN
            ),
        )
        if open_one is not None:  # else it ended between the two statements
            return open_one


async def schedule_due(
    session: AsyncSession, *, within: timedelta = timedelta(hours=1), limit: int = 1000
) -> list[TokenStatus]:
    """Open a refresh for every active account whose token has expired or will within that time.

    Any number of schedulers open only one each. An account whose refresh was given up is left
    alone for half an hour. Returns what this call opened.
    """
    check_limit(limit)
    given_up = (
        select(col(TokenStatus.id))
        .where(
            col(TokenStatus.tiger_account_id) == col(TigerAccount.id),
            col(TokenStatus.status) == TokenRefreshStatus.FAILED,
            col(TokenStatus.completed_at) > func.now() - LONGEST_BACKOFF,
        )
        .exists()
    )
    already_open = (
        select(col(TokenStatus.id))
        .where(col(TokenStatus.tiger_account_id) == col(TigerAccount.id), _IS_OPEN)
        .exists()
    )
    due_accounts = (
        select(TigerAccount, col(TigerAccount.token_expires_at) <= func.now())
        .where(
            col(TigerAccount.status) == text("'active'"),  # as the partial index has it
            col(TigerAccount.access_token).is_not(None),
            col(TigerAccount.token_expires_at) <= func.now() + within,
            ~already_open,
            ~given_up,
        )
        .order_by(col(TigerAccount.token_expires_at))
        .limit(limit)
    )
    with typed_errors():
        rows = await session.execute(due_accounts, execution_options=FRESH)
    due = [
        _refresh_of(account, RefreshTrigger.EXPIRED if expired else RefreshTrigger.SCHEDULED)
        for account, expired in rows
    ]
    opened = await _open(session, due) if due else []
    for refresh in opened:
        await _log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, refresh)
    return opened


async def claim_due(
    session: AsyncSession,
    *,
    worker: str,
    limit: int = 10,
    lease: timedelta = timedelta(seconds=60),
) -> list[TokenStatus]:
    """Claim refreshes that are due, or whose lease has expired, for a worker: longest due first.

    Each is claimed by one worker only. Commit before asking Tiger. The claims returned belong to no
    session and stay as they are: pass them to `heartbeat`, `complete` and `fail`.

    Raises:
        InvalidValue: the lease is not positive, the limit is not from 1 to 1000, or the worker's
            name is refused.
    """
    check_limit(limit)
    _check_lease(lease)
    due = (
        select(col(TokenStatus.id))
        .join(TigerAccount, col(TigerAccount.id) == col(TokenStatus.tiger_account_id))
        .where(
            _IS_OPEN,
            col(TokenStatus.scheduled_at) <= func.clock_timestamp(),
            or_(
                col(TokenStatus.status) == TokenRefreshStatus.PENDING,
                col(TokenStatus.lease_expires_at) < func.clock_timestamp(),
            ),
            col(TigerAccount.status) == AccountStatus.ACTIVE,
        )
        .order_by(col(TokenStatus.scheduled_at))
        .limit(limit)
        .with_for_update(of=TokenStatus, skip_locked=True)
        .cte("due")
    )
    claims = await many(
        session,
        sql_update(TokenStatus)
        .where(col(TokenStatus.id) == due.c.id)
        .values(
            status=TokenRefreshStatus.IN_PROGRESS,
            worker=worker,
            started_at=func.clock_timestamp(),
            lease_expires_at=func.clock_timestamp() + lease,
            fencing_token=col(TokenStatus.fencing_token) + 1,
        )
        .returning(TokenStatus),
    )
    for claim in claims:
        session.expunge(claim)  # a claim must never pick up its successor's fencing token
    return sorted(claims, key=lambda claim: (claim.scheduled_at, claim.id))


async def heartbeat(
    session: AsyncSession, claim: TokenStatus, *, lease: timedelta = timedelta(seconds=60)
) -> TokenStatus:
    """Renew a claim's lease.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended.
    """
    _check_lease(lease)
    return await _change(session, claim, lease_expires_at=func.clock_timestamp() + lease)


async def complete(
    session: AsyncSession,
    claim: TokenStatus,
    *,
    access_token: str,
    refresh_token: str | None = None,
    expires_at: datetime | None = None,
    api_response_code: int | None = None,
    api_response_time_ms: int | None = None,
    server_version: str | None = None,
) -> TokenStatus:
    """End a refresh well: new token on the account, errors forgotten, history and event written.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
        ValidationError: a value is refused; nothing has changed.
    """
    # The account first, as everyone who locks both does.
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    changes: dict[str, object] = {
        "access_token": access_token,
        "token_expires_at": expires_at,
        "error_count": 0,
        "last_error": None,
        "last_error_at": None,
    }
    if refresh_token is not None:
        changes["refresh_token"] = refresh_token
    account._validated(changes)  # noqa: SLF001  # refused before anything has changed
    refresh = await _change(
        session,
        claim,
        status=TokenRefreshStatus.SUCCESS,
        completed_at=func.clock_timestamp(),
        duration_ms=_duration(),
        lease_expires_at=None,
        old_token_hash=_hash_of(account.access_token),
        new_token_expires_at=expires_at,
        new_token_hash=token_hash(access_token),
        next_refresh_at=expires_at - REFRESH_AHEAD if expires_at is not None else None,
        error_code=None,
        error_message=None,
        api_response_code=api_response_code,
        api_response_time_ms=api_response_time_ms,
        server_version=server_version,
    )
    account.sqlmodel_update(changes)
    await session.flush()
    await _log(session, AuditAction.TOKEN_REFRESH, refresh)
    return refresh


async def fail(
    session: AsyncSession,
    claim: TokenStatus,
    *,
    error: str,
    error_code: str | None = None,
    retry_after: timedelta | None = None,
    api_response_code: int | None = None,
    api_response_time_ms: int | None = None,
) -> TokenStatus:
    """End an attempt badly. It is tried again later, or given up after `max_retries` attempts.

    The wait is `retry_after`, else random up to 30 s, doubled with each attempt, 30 min at most.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
        ValidationError: a value is refused; nothing has changed.
    """
    attempts = claim.retry_count + 1
    if attempts >= claim.max_retries:
        ending: dict[str, object] = {
            "status": TokenRefreshStatus.FAILED,
            "completed_at": func.clock_timestamp(),
        }
    else:
        wait = retry_after if retry_after is not None else _backoff(attempts)
        ending = {
            "status": TokenRefreshStatus.PENDING,
            "scheduled_at": func.clock_timestamp() + wait,
        }
    refresh = await _change(
        session,
        claim,
        **ending,
        retry_count=attempts,
        duration_ms=_duration(),
        lease_expires_at=None,
        error_code=error_code,
        error_message=storable(error),
        api_response_code=api_response_code,
        api_response_time_ms=api_response_time_ms,
    )
    await _log(
        session,
        AuditAction.TOKEN_REFRESH,
        refresh,
        result=AuditResult.FAILURE,
        error_code=error_code,
        error_message=refresh.error_message,
    )
    return refresh


async def cancel(session: AsyncSession, refresh_id: UUID) -> TokenStatus:
    """Cancel an open refresh; whoever has claimed it loses the claim.

    Raises:
        NotFound: there is no such refresh.
        InvalidState: it has ended.
    """
    refresh = await get_or_raise(session, TokenStatus, refresh_id, lock=True)
    if not refresh.is_open:
        raise InvalidState(f"a {refresh.status.value} refresh cannot be cancelled")
    refresh = (
        await _set(
            session,
            col(TokenStatus.id) == refresh_id,
            status=TokenRefreshStatus.CANCELLED,
            completed_at=func.clock_timestamp(),
            lease_expires_at=None,
        )
        or refresh
    )
    await _log(session, AuditAction.TOKEN_REFRESH_CANCEL, refresh)
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
    async with constraints(session):
        refresh = (
            await _set(
                session,
                col(TokenStatus.id) == refresh_id,
                status=TokenRefreshStatus.PENDING,
                scheduled_at=func.clock_timestamp(),
                completed_at=None,
                retry_count=0,
            )
            or refresh
        )
    await _log(session, AuditAction.TOKEN_REFRESH_SCHEDULE, refresh)
    return refresh


async def get(session: AsyncSession, refresh_id: UUID) -> TokenStatus | None:
    """A refresh by its id."""
    return await _newest(session, col(TokenStatus.id) == refresh_id)


async def get_latest_status(session: AsyncSession, account_id: UUID) -> TokenStatus | None:
    """An account's newest refresh."""
    return await _newest(session, col(TokenStatus.tiger_account_id) == account_id)


async def get_pending_refreshes(
    session: AsyncSession, *, after: str | None = None, limit: int = 50
) -> Page[TokenStatus]:
    """The refreshes that wait to be claimed, newest first."""
    statement = select(TokenStatus).where(
        _IS_OPEN, col(TokenStatus.status) == TokenRefreshStatus.PENDING
    )
    return await paginate(session, statement, TokenStatus, after=after, limit=limit)


async def get_failed_refreshes(
    session: AsyncSession, *, after: str | None = None, limit: int = 50
) -> Page[TokenStatus]:
    """The refreshes that were given up, newest first."""
    statement = select(TokenStatus).where(
        text("token_statuses.status = 'failed'")
    )  # as the partial index has it
    return await paginate(session, statement, TokenStatus, after=after, limit=limit)


async def history(
    session: AsyncSession,
    *,
    account_id: UUID | None = None,
    after: str | None = None,
    limit: int = 50,
) -> Page[TokenStatus]:
    """All refreshes, or an account's, newest first."""
    statement = select(TokenStatus)
    if account_id is not None:
        statement = statement.where(col(TokenStatus.tiger_account_id) == account_id)
    return await paginate(session, statement, TokenStatus, after=after, limit=limit)


async def statistics(session: AsyncSession, *, since: datetime) -> RefreshStatistics:
    """How the refreshes opened since an aware datetime went.

    Raises:
        InvalidValue: `since` is naive.
    """
    recent = col(TokenStatus.id) >= func.uuid7_floor(aware("since", since))
    succeeded = col(TokenStatus.status) == TokenRefreshStatus.SUCCESS
    failed = col(TokenStatus.status) == TokenRefreshStatus.FAILED
    duration = col(TokenStatus.duration_ms)
    totals = (
        await session.execute(
            select(
                func.count(),
                func.count().filter(succeeded),
                func.count().filter(failed),
                func.count().filter(col(TokenStatus.status).in_(OPEN)),
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


async def _open_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """An account that is not closed, and is not before this transaction ends."""
    try:
        account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    except NotFound as error:
        raise MissingReference(str(error)) from None
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")
    return account


def token_hash(token: str) -> str:
    """What the history keeps of a token: enough to tell two apart, nothing to use."""
    return hashlib.sha256(token.encode("utf-8")).hexdigest()


def _hash_of(token: Secret | None) -> str | None:
    try:
        return None if token is None else token_hash(token.get_secret_value())
    except EncryptionError:  # a token that nobody can read any more may still be replaced
        return None


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
    return await many(
        session,
        insert(TokenStatus)
        .values(rows)
        .on_conflict_do_nothing(
            index_elements=["tiger_account_id"],
            index_where=text("status IN ('pending', 'in_progress')"),
        )
        .returning(TokenStatus),
    )


async def _change(session: AsyncSession, claim: TokenStatus, **values: object) -> TokenStatus:
    given = {name: v for name, v in values.items() if not isinstance(v, ColumnElement)}
    claim._validated(given)  # noqa: SLF001  # as if assigned
    refresh = await _set(
        session,
        and_(
            col(TokenStatus.id) == claim.id,
            col(TokenStatus.fencing_token) == claim.fencing_token,
            col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
        ),
        **values,
    )
    if refresh is None:
        raise LeaseLost
    return refresh


async def _set(
    session: AsyncSession, criterion: ColumnElement[bool], **values: object
) -> TokenStatus | None:
    return await one(
        session, sql_update(TokenStatus).where(criterion).values(**values).returning(TokenStatus)
    )


async def _newest(session: AsyncSession, criterion: ColumnElement[bool]) -> TokenStatus | None:
    return await one(
        session, select(TokenStatus).where(criterion).order_by(col(TokenStatus.id).desc()).limit(1)
    )


async def _counts(
    session: AsyncSession, by: SQLCoreOperations[Any], criterion: ColumnElement[bool]
) -> dict[str, int]:
    rows = await session.execute(select(by, func.count()).where(criterion).group_by(by))
    return {str(name): count for name, count in rows}


def _duration() -> ColumnElement[int]:
    elapsed = func.extract("epoch", func.clock_timestamp() - col(TokenStatus.started_at))
    return cast(func.greatest(elapsed * 1000, 0), BigInteger)


def _backoff(attempts: int) -> timedelta:
    longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** min(attempts - 1, 20))
    share = random.random()  # noqa: S311  # spreads load, protects nothing
    return timedelta(seconds=longest.total_seconds() * share)


def _check_lease(lease: timedelta) -> None:
    if lease <= timedelta(0):
        raise InvalidValue("lease must be positive")


async def _log(
    session: AsyncSession,
    action: AuditAction,
    refresh: TokenStatus,
    *,
    result: AuditResult = AuditResult.SUCCESS,
    error_code: str | None = None,
    error_message: str | None = None,
) -> None:
    await audit_logs.log_event(
        session,
        action=action,
        result=result,
        resource_type="token_status",
        resource_id=str(refresh.id),
        tiger_account_id=refresh.tiger_account_id,
        details={"status": refresh.status.value, "trigger": refresh.trigger.value},
        error_code=error_code,
        error_message=error_message,
        duration_ms=refresh.duration_ms,
    )
